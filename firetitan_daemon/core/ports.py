"""What the daemon's rules need from outside: a ledger, a spool, folders, workers, a clock.

Knows: records and dataclasses of core. Must not know: any implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from firetitan_daemon.core.model_records import Model
from firetitan_daemon.core.records import (
    Checkpoint,
    DeferredCleanup,
    Deployment,
    Lane,
    Lease,
    Moment,
    Operation,
    RecoveryPoint,
    Session,
    Snapshot,
    SpoolRef,
    Trainer,
    WorkerSpec,
)
from firetitan_daemon.core.worker_ports import LoadSource


class Clock(Protocol):
    """Time; injected so that tests can turn it."""

    def now(self) -> float:
        """Unix seconds, for display and expiry."""

    def monotonic(self) -> float:
        """Seconds that never jump, for timeouts; comparable between processes of one boot."""

    def boot_id(self) -> str:
        """This boot of the machine."""


@dataclass(frozen=True)
class Ledger:
    """Everything the store holds that a daemon needs at start."""

    trainers: Sequence[Trainer] = ()
    sessions: Sequence[Session] = ()
    lanes: Sequence[Lane] = ()
    open_operations: Sequence[Operation] = ()
    """Not done, by (target, commit_seq, client_id, seq)."""
    deployments: Sequence[Deployment] = ()
    workers: Sequence[WorkerSpec] = ()
    pins: Sequence[tuple[str, str, str]] = ()
    """(deployment id, snapshot id, holder)."""
    models: Sequence[Model] = ()
    recovery_points: Sequence[RecoveryPoint] = ()
    """By (session, commit_seq)."""
    kept_operations: Sequence[Operation] = ()
    """Done, their payload kept for a replay; by (target, commit_seq)."""
    leases: Sequence[Lease] = ()
    cleanups: Sequence[DeferredCleanup] = ()
    """In the order they were asked for."""
    spool: Sequence[SpoolRef] = ()
    """Every spool file that a row refers to: payloads of open operations and of those
    a replay needs, results not taken yet."""
    folders: Sequence[str] = ()
    """Every folder that a checkpoint, a snapshot, a recovery point or a model is in, that an open
    operation writes to, or that one reads which is open or may be replayed."""


@dataclass(frozen=True)
class Change:
    """Rows written in one transaction: each record replaces the one of its key."""

    trainers: Sequence[Trainer] = ()
    sessions: Sequence[Session] = ()
    lanes: Sequence[Lane] = ()
    operations: Sequence[Operation] = ()
    checkpoints: Sequence[Checkpoint] = ()
    snapshots: Sequence[Snapshot] = ()
    deployments: Sequence[Deployment] = ()
    workers: Sequence[WorkerSpec] = ()
    pins: Sequence[tuple[str, str, str]] = ()
    models: Sequence[Model] = ()
    recovery_points: Sequence[RecoveryPoint] = ()
    released_payloads: Sequence[tuple[str, int]] = ()
    """(session, commit_seq): payloads of its done operations up to there are needed no more."""
    deleted_recovery_points: Sequence[tuple[str, int]] = ()
    """(session, commit_seq) of each."""
    deleted_checkpoints: Sequence[tuple[str, str]] = ()
    """(name, folder) of each; one that was saved anew since has another folder and stays."""
    deleted_snapshots: Sequence[str] = ()
    """Ids; they are never used again."""
    deleted_models: Sequence[str] = ()
    """Ids."""
    leases: Sequence[Lease] = ()
    cleanups: Sequence[DeferredCleanup] = ()
    deleted_trainers: Sequence[str] = ()
    deleted_deployments: Sequence[str] = ()
    deleted_workers: Sequence[str] = ()
    deleted_pins: Sequence[tuple[str, str, str]] = ()
    deleted_leases: Sequence[str] = ()
    deleted_cleanups: Sequence[str] = ()
    """By name of the trainer or deployment."""
    durable: bool = False
    """Wait for the disk (survives power loss), as checkpoints, snapshots and deletions must."""


class Store(Protocol):
    """The ledger. One owner; calls may come concurrently and take effect in call order."""

    async def load(self) -> Ledger:
        """What a daemon needs at start."""

    async def write(self, change: Change) -> None:
        """Apply a change as one transaction.

        Raises:
            FiretitanError: STATE_DISK_FULL; SEQ_REUSED or REQUEST_ID_REUSED where a uniqueness
                rule (target, client_id, seq), (target, request_id) or (target, commit_seq) breaks;
                SNAPSHOT_IN_USE where a delta that stays stands on a deleted snapshot.
        """

    async def operation(self, operation_id: str) -> Operation | None:
        """One operation."""

    async def operation_by_request(self, target: str, request_id: str) -> Operation | None:
        """The operation a request id made on a target."""

    async def operation_by_seq(self, target: str, client_id: str, seq: int) -> Operation | None:
        """The operation at a place in a lane."""

    async def lane_operations(
        self, session: str, client_id: str, after_seq: int, limit: int | None = None
    ) -> Sequence[Operation]:
        """Done operations of a lane with a higher seq, by seq; the first so many, or all."""

    async def done_operations(self, session: str, after_commit_seq: int) -> Sequence[Operation]:
        """Done operations of a session with a higher commit_seq, by commit_seq."""

    async def operations(
        self, target: str, *, pending_only: bool, after_id: str, limit: int
    ) -> Sequence[Operation]:
        """Operations of a target by commit_seq, a page at a time; those without one last."""

    async def checkpoints(self, trainer_id: str | None) -> Sequence[Checkpoint]:
        """Checkpoints of a trainer's sessions, deleted trainers too; or all. Oldest first."""

    async def checkpoint(self, name: str) -> Checkpoint | None:
        """One checkpoint by full name."""

    async def snapshots(self, trainer_id: str | None) -> Sequence[Snapshot]:
        """Snapshots of a trainer, or all, oldest first."""

    async def snapshot_ids(self, trainer_id: str) -> Sequence[str]:
        """Every id that snapshots of a trainer ever had, those of deleted ones too."""

    async def snapshot(self, snapshot_id: str) -> Snapshot | None:
        """One snapshot by id."""

    async def acknowledge(self, session: str, client_id: str, through_seq: int) -> list[SpoolRef]:
        """Forget results of a lane up to a seq; returns the spool files to remove."""

    async def untaken_results(self, before: Moment) -> Sequence[Operation]:
        """Operations that ended before a moment and whose result was not acknowledged."""

    async def forget_results(self, operation_ids: Sequence[str]) -> list[SpoolRef]:
        """Forget the results of operations; returns the spool files to remove."""

    async def delete_operations(self, before: Moment) -> int:
        """Delete what ended before a moment and belongs to no session; returns how many."""

    async def check(self) -> Sequence[str]:
        """Look the ledger over; what is wrong with it, empty: nothing."""

    async def close(self) -> None:
        """Finish what is queued and close the file."""


class Spool(Protocol):
    """Request and result bytes, one file each; survives a process death."""

    async def write(self, data: bytes) -> SpoolRef:
        """Publish bytes.

        Raises:
            FiretitanError: STATE_DISK_FULL, STATE_NOT_WRITABLE; nothing is left behind.
        """

    async def read(self, ref: SpoolRef) -> bytes:
        """Bytes, verified.

        Raises:
            FiretitanError: CHECKSUM_MISMATCH; RECOVERING while the whole spool is away.
        """

    async def there(self) -> bool:
        """Whether the spool is in its place: what is in it can be read."""

    async def remove(self, refs: Sequence[SpoolRef]) -> None:
        """Remove files; those gone already are fine."""

    async def sweep(self, keep: Sequence[SpoolRef]) -> int:
        """At start: remove every file not in `keep`; returns how many."""


ADAPTERS = "adapters"
"""Kind of the folders with copies of users' adapters."""


class Folders(Protocol):
    """Published checkpoint and snapshot folders."""

    async def there(self, folder: Path) -> bool:
        """Whether the place of a published folder is there; a folder gone from it is damage."""

    def staging(self) -> Path:
        """A new empty folder, on the same file system as the published ones."""

    async def publish(self, staging: Path, kind: str, name: str) -> Path:
        """Give a sealed staging folder a final, never used name; returns it.

        The final name follows from the arguments alone, so that a publish that was cut off is
        finished by calling again: one that was finished before is fine.

        Args:
            staging: Made by `staging()`, sealed by a worker.
            kind: `checkpoints`, `snapshots`, `points` or `models`.
            name: Readable part of the final name.
        """

    async def copy(self, folder: Path, digest: str, kind: str, name: str) -> Path:
        """Publish a published folder's files once more; returns the new folder.

        Args:
            folder: Sealed; verified before a file of it is taken over.
            digest: What its manifest must hash to.
            kind: As in `publish`.
            name: As in `publish`.

        Raises:
            FiretitanError: CHECKSUM_MISMATCH, STATE_DISK_FULL; nothing was published.
        """

    async def import_adapter(self, location: str) -> LoadSource:
        """Copy a PEFT adapter from where a user keeps it and publish the copy.

        Args:
            location: An absolute path, or an address.

        Raises:
            FiretitanError: MODEL_NOT_FOUND, INVALID_ARGUMENT, UNSUPPORTED naming the driver that is
                missing, STATE_DISK_FULL; nothing was published.
        """

    async def discard(self, folder: Path) -> None:
        """Remove a staging or a published folder."""

    async def sweep(self, keep: Sequence[str]) -> int:
        """At start: remove staging and published folders that no row names.

        Args:
            keep: Paths of folders in use; for an open save its staging path, which also keeps the
                folder it was published to.
        """


@dataclass(frozen=True)
class ExportJob:
    """What to write where, as a plain folder."""

    name: str
    base_model: str
    layers: tuple[tuple[str, str], ...]
    """(folder, digest): a base or an adapter and the deltas on it, or one training state."""
    is_state: bool
    target: str


class Exporter(Protocol):
    """Writes what was saved as plain Hugging Face and PEFT folders."""

    async def export(self, job: ExportJob) -> None:
        """Write a folder; it is there as a whole, or not.

        Raises:
            FiretitanError: CHECKSUM_MISMATCH, MODEL_NOT_FOUND, INVALID_ARGUMENT, STATE_DISK_FULL.
        """


@dataclass(frozen=True)
class Limits:
    """The largest things the daemon accepts."""

    max_message_bytes: int = 64 * 1024 * 1024
    max_session_operations: int = 64
    max_operations: int = 1024
    max_queued_bytes: int = 256 * 1024 * 1024
    max_streams: int = 128
    max_replicas: int = 8
    """Samplers of one deployment."""
    gap_timeout_s: float = 60.0
    """How long a command may wait for an earlier seq of its lane."""
