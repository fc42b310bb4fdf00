"""What a training engine is: the seam between a worker and the numbers.

Knows: numpy arrays, plain dataclasses, paths. Must not know: torch, protobuf, gRPC, the daemon.
Two implementations pass the same contract suite: `hf` (transformers and torch, the real one) and
`toy` (numpy, milliseconds a step, for tests of everything around the engine).

One engine holds one model and at most one training session. Calls come from one thread.
A call that raises `FiretitanError` has changed nothing: weights, optimizer, gradients, counters and
kept graphs are bitwise as before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from firetitan_daemon.core.model_records import ModelInfo as ModelInfo
from firetitan_daemon.core.model_records import RoutingShape as RoutingShape
from firetitan_daemon.core.records import HotloadTransition as HotloadTransition
from firetitan_daemon.engine.grad_norms import GradNormMetrics

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
NamedArrays = dict[str, npt.NDArray[Any]]
"""Float32 or int64, by name."""
Array = npt.NDArray[np.float32] | npt.NDArray[np.int64] | npt.NDArray[np.int32]
LossConfig = Mapping[str, float | str]


@dataclass(frozen=True)
class ModelSpec:
    """Which weights to load, and how."""

    base_model: str
    """Hugging Face id or a local folder in safetensors format."""
    dtype: str = "auto"
    """`auto` (as stored), `float32` or `bfloat16`."""
    device: str = "auto"
    """`auto` (a GPU where there is one), `cpu` or `cuda`."""
    max_context_length: int | None = None
    """Tokens; None takes the model's own limit. Larger than that is refused."""


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA adapter: kaiming-uniform A, zero B, scale alpha / rank."""

    rank: int
    alpha: float = 32.0
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


@dataclass(frozen=True)
class SessionSpec:
    """One training session: `lora` None trains every parameter, or nothing."""

    seed: int
    lora: LoraSpec | None
    forward_only: bool = False
    """Nothing is trained or kept for training; only `forward` is called, without a graph."""

    @property
    def trains_all(self) -> bool:
        """Whether every parameter is trained: the weights are this session's alone."""
        return self.lora is None and not self.forward_only


@dataclass(frozen=True)
class Datum:
    """One sequence. Position i of `token_ids` [N] predicts target i of the loss inputs."""

    token_ids: Int32Array
    loss_inputs: Mapping[str, Array]
    """By name, shape [N] or [N, K]: `target_tokens` int64, the rest float32. `embedding_grads` is
    float32 [H]."""
    routing: Sequence[bytes] = ()
    """Experts to force, a routing matrix per token (`RoutingShape`); an empty one leaves the
    token's choice to the routers, an empty sequence that of all. Dense models ignore it."""


class Pooling(StrEnum):
    """How a sequence's last hidden states [N, H] become one vector [H]."""

    MEAN = "mean"
    LAST = "last"


@dataclass(frozen=True)
class ForwardOutput:
    """Per datum the arrays a loss returns, and metrics named `name:reduction`."""

    outputs: list[NamedArrays]
    """`outputs[i]["logprobs"]`: float32, shape of datum i's target_tokens, every position; where
    asked for `top_k_indices` int64 and `top_k_logprobs` [N, K] beside it; or
    `outputs[i]["embedding"]`: float32 [H]."""
    metrics: dict[str, float]
    """Holds `loss:sum` where there is a loss."""
    graph: str | None = None
    """Handle for `backward` where the graph was asked for and could be kept."""


class Normalization(StrEnum):
    """How `optim_step` scales the accumulated gradient before clipping."""

    NONE = "none"
    NUM_LOSS_TOKENS = "num_loss_tokens"
    NUM_SEQUENCES = "num_sequences"


@dataclass(frozen=True)
class AdamParams:
    """AdamW with decoupled weight decay; `grad_clip_norm` 0 turns clipping off."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0
    grad_norm_metrics: GradNormMetrics = GradNormMetrics.OFF


@dataclass(frozen=True)
class SavedFiles:
    """What a save left in its staging folder: complete, fsynced, `manifest.json` written last."""

    digest: str
    """BLAKE3 of manifest.json, hex; the manifest holds one BLAKE3 per file."""
    size_bytes: int


WriteState = Callable[[Path, Mapping[str, str | int]], SavedFiles]
"""(empty folder, facts for its manifest) -> what was written; from any thread."""


class SnapshotKind(StrEnum):
    """A base stands alone, a delta needs its parent; a merged base is an adapter's whole model."""

    BASE = "base"
    DELTA = "delta"
    MERGED_BASE = "merged_base"


class ExportPrecision(StrEnum):
    """In what a merged base is written: the base model's stored dtypes, or bfloat16."""

    SOURCE = "source"
    BF16 = "bf16"


class SnapshotFormat(StrEnum):
    """What the folder holds and which library loads it."""

    PEFT_ADAPTER = "peft_adapter"
    HF_FULL = "hf_full"
    XOR_ZSTD = "xor_zstd"


@dataclass(frozen=True)
class SavedSnapshot:
    """A snapshot in its staging folder."""

    files: SavedFiles
    kind: SnapshotKind
    format: SnapshotFormat
    result_digest: str
    """BLAKE3 over the tensors a reader ends up with; equal for a base and a chain to it."""


@dataclass(frozen=True)
class SnapshotLayer:
    """One published snapshot folder on the way to the weights to serve, base first."""

    name: str
    kind: SnapshotKind
    format: SnapshotFormat
    path: Path
    digest: str
    result_digest: str


@dataclass(frozen=True)
class SessionProgress:
    """Where a session stands."""

    step: int
    """Optimizer steps taken."""
    pending_backwards: int
    """Backward passes accumulated since the last step."""
    forward_passes: int
    """Model forwards run since the session was opened; shows that a custom loss costs one."""
    state_bytes: int
    """Of the weights and both moments, which a save of the session holds."""


class TrainEngine(Protocol):
    """One model, one training session. All calls from one thread, those of `beside` too."""

    @property
    def info(self) -> ModelInfo:
        """The loaded model."""

    @property
    def progress(self) -> SessionProgress:
        """Where the session stands."""

    def beside(self) -> TrainEngine:
        """An engine for one more session over the same weights, which are in memory once.

        Sessions with adapters, and such that train nothing, neither see nor disturb each other; one
        that trains every parameter has to be the only one.
        """

    def open_session(self, spec: SessionSpec) -> None:
        """Attach a fresh adapter (or make every parameter trainable) and a fresh optimizer."""

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: str,
        config: LossConfig,
        *,
        retain_graph: bool = False,
        base_only: bool = False,
        over_budget: bool = False,
    ) -> ForwardOutput:
        """Logprobs and the loss, gradients untouched; one that keeps a graph may drop older ones.

        Args:
            data: The batch.
            loss_fn: Name of a built-in loss.
            config: Its settings.
            retain_graph: Keep what `backward` needs.
            base_only: Leave the session's adapter out; nothing can be kept then.
            over_budget: Keep it whatever it takes, until it is used, released or the weights
                change: a backward is sure to come.

        Raises:
            FiretitanError: INVALID_DATUM, LOSS_INPUT_MISSING, UNKNOWN_LOSS, each naming the field;
                INVALID_ARGUMENT for `base_only` where every parameter is trained.
        """

    def forward_embeddings(
        self,
        data: Sequence[Datum],
        pooling: Pooling,
        loss_fn: str,
        config: LossConfig,
        *,
        retain_graph: bool = False,
        base_only: bool = False,
        over_budget: bool = False,
    ) -> ForwardOutput:
        """Pooled last hidden states; loss inputs are not read, gradients stay as they are.

        Args:
            data: The sequences.
            pooling: How.
            loss_fn: A loss over embeddings to report; empty: none.
            config: Its settings.
            retain_graph: Keep what `backward` needs.
            base_only: As of `forward`.
            over_budget: As of `forward`.

        Raises:
            FiretitanError: INVALID_DATUM, UNKNOWN_LOSS, INVALID_ARGUMENT, naming the field.
        """

    def backward(self, graph: str, output_grads: Sequence[Float32Array]) -> ForwardOutput:
        """Accumulate gradients from those of the kept outputs, one array a datum in its shape.

        Releases the graph. One that fails over its arrays keeps it; one that fails while computing
        has changed nothing, but its graph is gone: running back through it frees it part by part.

        Raises:
            FiretitanError: GRAPH_EXPIRED where the graph is gone; INVALID_ARGUMENT, NON_FINITE.
        """

    def release_graph(self, graph: str) -> None:
        """Drop a kept graph; unknown names are fine."""

    def expire_graphs(self) -> None:
        """Free kept graphs that are too old: while nobody calls, nothing else does."""

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: str, config: LossConfig
    ) -> ForwardOutput:
        """As forward, and accumulates gradients; unlike forward, rejects unknown loss inputs."""

    def forward_backward_embeddings(
        self, data: Sequence[Datum], pooling: Pooling, loss_fn: str, config: LossConfig
    ) -> ForwardOutput:
        """As `forward_embeddings`, and accumulates gradients.

        Without a `loss_fn` the loss is sum(embedding * embedding_grads), a loss input of each
        datum.

        Raises:
            FiretitanError: As `forward_embeddings`; LOSS_INPUT_MISSING, NON_FINITE.
        """

    def optim_step(
        self, params: AdamParams, normalization: Normalization, expected_step: int | None = None
    ) -> dict[str, float]:
        """Normalise, clip, AdamW, zero gradients. Returns metrics with `step` and `grad_norm`.

        Raises:
            FiretitanError: NO_GRADIENTS, NO_LOSS_TOKENS, STEP_MISMATCH, NON_FINITE,
                INVALID_ARGUMENT.
        """

    def save_state(self, staging: Path) -> SavedFiles:
        """Weights, optimizer, pending gradients and counters into an empty folder."""

    def capture_state(self, *, copy: bool) -> WriteState:
        """Writes, when called, what `save_state` would write now.

        Args:
            copy: Of a copy made now, while training goes on; else of the session's own memory:
                call it before anything changes.

        Raises:
            FiretitanError: DEVICE_OUT_OF_MEMORY where there is no room for a copy.
        """

    def load_state(self, folder: Path, *, with_optimizer: bool) -> None:
        """Verify every checksum, then replace the weights; clears gradients and graphs.

        Without the optimizer the moments and the step count start anew.
        """

    def load_adapter(self, folder: Path) -> None:
        """Verify every checksum, then take over a PEFT adapter's weights; moments and steps anew.

        Clears gradients and graphs.

        Raises:
            FiretitanError: INVALID_ARGUMENT, UNSUPPORTED or NON_FINITE naming what does not fit;
                CHECKSUM_MISMATCH.
        """

    def save_snapshot(
        self,
        staging: Path,
        name: str,
        kind: SnapshotKind,
        parent: str | None,
        precision: ExportPrecision = ExportPrecision.SOURCE,
    ) -> SavedSnapshot:
        """Weights to serve, into an empty folder; a delta against the snapshot `parent`.

        Args:
            staging: The folder.
            name: The snapshot's name.
            kind: An adapter is saved whole unless it is a merged base.
            parent: Of a delta.
            precision: Of a merged base.

        Raises:
            FiretitanError: CHAIN_BROKEN where `parent` is not the last snapshot saved here.
        """

    def close(self) -> None:
        """Free the memory."""
