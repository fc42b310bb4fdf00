"""What the daemon's rules need of a worker, and of whoever starts one.

Knows: records and dataclasses of core. Must not know: any implementation.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from firetitan_daemon.core.errors import FiretitanError
from firetitan_daemon.core.model_records import ModelInfo
from firetitan_daemon.core.records import (
    ErrorRecord,
    HotloadTransition,
    RecoveryPoint,
    ReplayCheck,
    Session,
    SpoolRef,
    WorkerSpec,
)


@dataclass(frozen=True)
class LoadSource:
    """What a load reads."""

    folder: Path
    digest: str


@dataclass(frozen=True)
class WorkerSession:
    """A session as its worker holds it."""

    session: str
    applied_commit_seq: int
    step: int
    pending_backwards: int
    forward_passes: int
    last_snapshot: str
    state_bytes: int
    """Of the weights and moments, which a recovery point holds; 0: not said."""


PREPARE = "prepare"
"""Capability of a sampler: it builds a snapshot without serving it."""


SILENT = "silent_s"
"""In the metadata of a failure: for how long a worker that lives was waited for."""


def hangs(error: FiretitanError) -> bool:
    """Whether a call failed only as a worker did not answer in time; it lives, and may go on."""
    return SILENT in error.metadata


@dataclass(frozen=True)
class WorkerStatus:
    """A worker's answer to `Describe`."""

    worker_id: str
    incarnation: str
    pid: int
    model: ModelInfo | None
    sessions: Sequence[WorkerSession] = ()
    loaded_snapshots: Sequence[str] = ()
    active_snapshot: str = ""
    capabilities: Sequence[str] = ()


@dataclass(frozen=True)
class SaveTarget:
    """Where a save goes."""

    staging: Path
    name: str
    kind: str = ""
    parent: str = ""


@dataclass(frozen=True)
class Command:
    """One command for a trainer worker."""

    session: str
    commit_seq: int
    request_id: str
    method: str
    payload: SpoolRef
    save: SaveTarget | None = None
    load: LoadSource | None = None
    settled_through: int = 0
    client_id: str = ""
    """The command's lane, as in its header: known even where the payload cannot be read."""
    seq: int = 0
    """Place in the lane."""
    keep_graph: bool = False
    """Of a Forward: keep its graph whatever it takes; a Backward after it is run again too."""


@dataclass(frozen=True)
class SavedFiles:
    """What a save left in its staging folder."""

    digest: str
    size_bytes: int
    result_digest: str = ""
    kind: str = ""
    format: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a command: exactly one of result, error and saved is set."""

    commit_seq: int
    session: WorkerSession
    result: bytes | None = None
    """A serialized firetitan.v1.Operation with only its result set."""
    error: ErrorRecord | None = None
    saved: SavedFiles | None = None
    check: ReplayCheck | None = None
    """What it must come to when it is run again."""
    graph: str = ""
    """Handle of the forward pass a Forward kept or a Backward used."""


@dataclass(frozen=True)
class WrittenPoint:
    """A recovery point in its staging folder."""

    saved: SavedFiles
    compute_s: float
    """Seconds of computing that writing it took, beside the session."""


@dataclass(frozen=True)
class SnapshotLayer:
    """One published snapshot on the way to the weights to serve."""

    name: str
    kind: str
    format: str
    path: str
    digest: str
    result_digest: str


class Worker(Protocol):
    """A worker process, seen from the daemon.

    Every call raises FiretitanError WORKER_UNAVAILABLE once the process is gone, never sooner:
    a slow worker is waited for. Only `describe` has a limit; what it raises then `hangs` tells.
    """

    @property
    def spec(self) -> WorkerSpec:
        """What it was started for."""

    @property
    def pid(self) -> int:
        """Its process id."""

    @property
    def alive(self) -> bool:
        """Whether its process is there."""

    async def describe(self) -> WorkerStatus:
        """Who it is and where it stands; within 5 s or WORKER_UNAVAILABLE."""

    async def load_model(self) -> ModelInfo:
        """Load the base model of its specification; again is fine.

        Raises:
            FiretitanError: MODEL_NOT_FOUND, UNSUPPORTED, DEVICE_OUT_OF_MEMORY.
        """

    async def open_session(self, session: Session) -> WorkerSession:
        """Open a training session; the same one again is fine."""

    async def close_session(self, session: str) -> None:
        """Free what a session takes, after its commands ended; one that is not open is fine."""

    async def execute(self, command: Command) -> Outcome:
        """Run a command once; a repeat waits for or returns the first outcome."""

    async def fetch_result(self, session: str, commit_seq: int) -> Outcome | None:
        """The stored outcome of a command."""

    async def save_point(self, session: str, commit_seq: int, staging: Path) -> tuple[int, float]:
        """Copy a session as it stands behind a command and begin to write the copy.

        Returns:
            Its step, and the seconds the session stood still for the copy.

        Raises:
            FiretitanError: STEP_MISMATCH where another command ran last or gradients are pending.
        """

    async def wait_point(self, session: str, staging: Path) -> WrittenPoint:
        """Wait until a copy that was begun is written.

        Raises:
            FiretitanError: STATE_DISK_FULL.
        """

    async def load_point(self, point: RecoveryPoint) -> WorkerSession:
        """Put a session that has run nothing yet where a recovery point was made.

        Raises:
            FiretitanError: CHECKSUM_MISMATCH; nothing was changed.
        """

    async def apply(
        self,
        layers: Sequence[SnapshotLayer],
        keep: Sequence[str],
        transition: HotloadTransition = HotloadTransition.FINISH,
        *,
        keep_prompt_cache: bool = False,
    ) -> Sequence[str]:
        """Serve the last layer's weights; returns what is loaded."""

    async def prepare(self, layers: Sequence[SnapshotLayer]) -> None:
        """Build and verify what `apply` of the same layers then serves at once.

        Only where its capabilities name `prepare`.
        """

    async def retain(self, keep: Sequence[str]) -> Sequence[str]:
        """Drop the snapshots that are neither active nor named; returns what is loaded."""

    async def generate(self, request: bytes) -> bytes:
        """A serialized SampleRequest in, a SampleResponse out; cancelling frees its place."""

    def generate_stream(self, request: bytes) -> AsyncGenerator[bytes, None]:
        """A serialized SampleStreamRequest in, SampleStreamResponses out, as they come.

        Closing it frees the request's place.
        """

    async def exited(self) -> str:
        """Waits until the process is gone; says how it ended."""

    async def shutdown(self) -> None:
        """Ask it to end, then make it; returns once the process is gone."""


class WorkerLauncher(Protocol):
    """Starts workers and finds those a former daemon left."""

    async def launch(self, spec: WorkerSpec) -> Worker:
        """Start a worker and wait until it serves (not until its model is loaded)."""

    async def adopt(self, spec: WorkerSpec) -> Worker | None:
        """The live worker of a specification, or None; its identity is checked."""

    async def discard(self, spec: WorkerSpec) -> None:
        """Remove what is left of a dead worker but its log."""
