"""What the daemon knows of each resource: frozen records, replaced as a whole.

Knows: names, states, plain values. Must not know: how they are stored or sent. Times are Unix
seconds (float), for display and expiry only; order comes from commit_seq.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from firetitan_daemon.core.model_records import BaseFacts, ModelInfo, Shape


@dataclass(frozen=True)
class Expiry:
    """When something saved may go: `ttl_s` after it was saved, by a clock that never jumps."""

    ttl_s: float
    boot_id: str
    """The boot of the machine that `monotonic_s` belongs to."""
    monotonic_s: float
    """`Clock.monotonic` when it was saved."""


@dataclass(frozen=True)
class Moment:
    """A moment by both clocks: within its boot the one that never jumps counts."""

    wall_s: float
    """Unix seconds."""
    boot_id: str
    """The boot of the machine that `monotonic_s` belongs to."""
    monotonic_s: float


class ResourceState(StrEnum):
    """Life of a trainer or a deployment."""

    CREATING = "creating"
    ACTIVE = "active"
    RECOVERING = "recovering"
    STOPPED = "stopped"
    FAILED = "failed"
    DELETING = "deleting"


class SessionState(StrEnum):
    """Life of a session."""

    ACTIVE = "active"
    RECOVERING = "recovering"
    LOST = "lost"
    CLOSED = "closed"


class OperationState(StrEnum):
    """Life of an operation; DONE, FAILED, CANCELLED and LOST are final."""

    ACCEPTED = "accepted"
    DISPATCHED = "dispatched"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"


@dataclass(frozen=True)
class ErrorRecord:
    """A failure as it is kept: reason by name, text for people, facts."""

    reason: str
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Trainer:
    """A base model in a worker, ready to be trained."""

    id: str
    base_model: str
    lora_rank: int
    max_context_length: int
    dtype: str
    state: ResourceState
    create_time: float
    model: ModelInfo | None = None
    error: ErrorRecord | None = None
    worker_id: str | None = None
    forward_only: bool = False
    """Its session trains nothing."""
    max_lora_rank: int = 0
    """Above 0: many sessions, each with an adapter of its own of at most this rank."""
    shape: Shape | None = None
    """What it was made as; None: before there were shapes."""
    made_by: str = ""
    """Request id of the creation."""
    inactivity_s: float = 0.0
    """How long it may be unused before its worker is stopped; 0: for ever."""

    @property
    def name(self) -> str:
        """`trainers/{trainer}`."""
        return f"trainers/{self.id}"


@dataclass(frozen=True)
class LoraSettings:
    """A session's adapter; rank 0 trains every parameter."""

    rank: int
    alpha: float = 32.0
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


@dataclass(frozen=True)
class Session:
    """Weights being trained."""

    name: str
    trainer_id: str
    base_model: str
    lora: LoraSettings
    seed: int
    suffix: str
    """Eight hexadecimal digits, unique in the daemon, appended to snapshot names."""
    state: SessionState
    create_time: float
    epoch: int = 1
    step: int = 0
    commit_seq: int = 0
    """Highest commit_seq given out."""
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    forward_only: bool = False
    """Trains nothing: only Forward runs."""
    request_id: str = ""
    """Of the request that opened it."""
    chain_head: str | None = None
    """Last snapshot a delta may build on; None makes the next full-parameter save a base."""
    chain_note: str = ""
    """Why a delta that is asked for is saved as base: the chain was cut through no one's wish."""
    origin_commit_seq: int = 0
    """Highest commit_seq given out before the weights last began anew; 0: they never did."""
    base: BaseFacts = field(default_factory=BaseFacts)


@dataclass(frozen=True)
class Lane:
    """One client's own order within a session."""

    session: str
    client_id: str
    next_seq: int = 1
    """The seq that has not been admitted yet."""
    acked_through: int = 0
    broken: bool = False
    failed_seq: int = 0
    """Last command of the lane that failed by itself; those behind it that were sent with a lower
    `seen_failure` fail too, and do not move it."""


@dataclass(frozen=True)
class SpoolRef:
    """A file of the spool."""

    path: str
    size_bytes: int
    digest: str


@dataclass(frozen=True)
class ReplayCheck:
    """A command's result in brief: what it must come to when it is run again."""

    digest: str
    """BLAKE3 over the result, hex."""
    measure: float
    """Its loss, or a step's gradient norm."""


@dataclass(frozen=True)
class LoadedFrom:
    """The published folder that a load read."""

    folder: str
    digest: str


@dataclass(frozen=True)
class Operation:
    """Something accepted. Session commands have a lane; creations and hotloads have none."""

    id: str
    method: str
    target: str
    """The session, trainer or deployment it works on."""
    request_id: str
    payload_digest: str
    state: OperationState
    create_time: float
    client_id: str = ""
    seq: int = 0
    commit_seq: int = 0
    epoch: int = 0
    seen_failure: int = 0
    payload: SpoolRef | None = None
    """The request's bytes, until they are no longer needed: until it ends or, where its effect
    would have to be replayed, until a recovery point holds it."""
    result: SpoolRef | None = None
    """A serialized Operation with only its result set; None once it was acknowledged."""
    forgotten: bool = False
    """Nobody took its result in time: that is gone."""
    error: ErrorRecord | None = None
    finish_time: float = 0.0
    finished: Moment | None = None
    """What its age is measured from; None while it is open, and in rows of older versions."""
    staging: str = ""
    """Where an open save writes; kept until it is settled."""
    graph: str = ""
    """Handle of the forward pass a Forward kept or a Backward used."""
    check: ReplayCheck | None = None
    loaded: LoadedFrom | None = None
    deaths: int = 0
    """How often the worker ended while it ran this."""

    @property
    def name(self) -> str:
        """`operations/{operation}`."""
        return f"operations/{self.id}"

    @property
    def done(self) -> bool:
        """Whether it ended."""
        return self.state not in (OperationState.ACCEPTED, OperationState.DISPATCHED)


@dataclass(frozen=True)
class Checkpoint:
    """Weights and optimizer to resume from."""

    name: str
    """`trainers/{trainer}/sessions/{session}/checkpoints/{checkpoint}`."""
    session: str
    base_model: str
    lora_rank: int
    step: int
    commit_seq: int
    folder: str
    digest: str
    size_bytes: int
    create_time: float
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    base: BaseFacts = field(default_factory=BaseFacts)
    expiry: Expiry | None = None
    """None: it stays until it is deleted."""
    lora: LoraSettings | None = None
    """None in rows of older versions."""


@dataclass(frozen=True)
class RecoveryPoint:
    """A session's state as it was after a command; the daemon's own, no checkpoint of a user."""

    session: str
    commit_seq: int
    """The last command whose effect is in it."""
    step: int
    folder: str
    digest: str
    size_bytes: int
    create_time: float


@dataclass(frozen=True)
class Snapshot:
    """Weights to serve."""

    id: str
    session: str
    base_model: str
    lora_rank: int
    kind: str
    """`base`, `delta` or `merged_base`."""
    format: str
    """`peft_adapter`, `hf_full` or `xor_zstd`."""
    parent: str | None
    step: int
    commit_seq: int
    folder: str
    digest: str
    result_digest: str
    size_bytes: int
    create_time: float
    notes: tuple[str, ...] = ()
    base: BaseFacts = field(default_factory=BaseFacts)
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    expiry: Expiry | None = None
    """None: it stays until it is deleted."""

    @property
    def name(self) -> str:
        """`snapshots/{snapshot}`."""
        return f"snapshots/{self.id}"


class HotloadTransition(StrEnum):
    """What becomes of running sequences when other weights are served."""

    FINISH = "finish"
    """They end on the weights they began with, beside new ones on the new weights."""
    SYNC = "sync"
    """Nothing begins until they have ended; then the weights change."""
    ASYNC = "async"
    """They go over to the new weights between two tokens."""


@dataclass(frozen=True)
class Deployment:
    """A base model served for sampling."""

    id: str
    base_model: str
    max_context_length: int
    dtype: str
    state: ResourceState
    create_time: float
    trainer_id: str = ""
    active_snapshot: str = ""
    """Id of the snapshot served now; empty for the base model."""
    etag: str = ""
    model: ModelInfo | None = None
    error: ErrorRecord | None = None
    replicas: int = 1
    """Samplers it is to have; of a stopped one: once it is used again."""
    worker_ids: tuple[str, ...] = ()
    """Those it has; one that was given up is not replaced and missing here."""
    shape: Shape | None = None
    """What it was made as; None: before there were shapes."""
    transition: HotloadTransition = HotloadTransition.FINISH
    """Of hotloads that name none."""
    made_by: str = ""
    """Request id of the creation."""
    inactivity_s: float = 0.0
    """How long it may be unused before its workers are stopped; 0: for ever."""
    requires_sync: bool = False
    """Attached to another trainer, it still serves what the former one made."""

    @property
    def name(self) -> str:
        """`deployments/{deployment}`."""
        return f"deployments/{self.id}"


class Cleanup(StrEnum):
    """What happens to a trainer or a deployment that nobody uses any more."""

    KEEP = ""
    STOP = "stop"
    DELETE = "delete"


@dataclass(frozen=True)
class Lease:
    """A client that is there, and what it uses."""

    client_id: str
    label: str
    """The client for people."""
    ttl_s: float
    """How long it holds without being renewed."""
    uses: Mapping[str, Cleanup] = field(default_factory=dict)
    """Names of trainers, sessions and deployments, each with what to do when the client leaves."""


@dataclass(frozen=True)
class DeferredCleanup:
    """A clean-up that waits until nobody uses its trainer or deployment."""

    name: str
    cleanup: Cleanup
    asked_by: str
    """The client that asked, for people."""
    create_time: float


class WorkerKind(StrEnum):
    """What a worker computes."""

    TRAINER = "trainer"
    SAMPLER = "sampler"


@dataclass(frozen=True)
class WorkerSpec:
    """What to start a worker for."""

    worker_id: str
    kind: WorkerKind
    target: str
    """`trainers/{trainer}` or `deployments/{deployment}`."""
    base_model: str
    dtype: str
    max_context_length: int
    num_threads: int = 0
    """0: as many as there are cores."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
