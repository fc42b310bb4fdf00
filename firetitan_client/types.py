"""Result types: tinker's own where it is installed, their likeness where it is not.

Knows: which names tinker's types had between 0.23 and 0.38. Must not know: protobuf, gRPC.
Importing this module imports no tinker; asking for a type does.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy.typing as npt


class GradAccNormalization(StrEnum):
    """How `optim_step` scales the gradients accumulated since the last step."""

    NONE = "none"
    """The raw sum."""
    NUM_LOSS_TOKENS = "num_loss_tokens"
    """Divided by the tokens with a non-zero loss gradient."""
    NUM_SEQUENCES = "num_sequences"
    """Divided by the sequences with at least one such token."""


@dataclass(frozen=True)
class SaveSamplerResult:
    """A saved sampler snapshot; both names are the same immutable public identity."""

    path: str
    snapshot_name: str


@dataclass(frozen=True)
class WeightSyncResponse:
    """What `weight_sync` brought to the deployment."""

    version: str
    """The snapshot that is served."""
    optimizer_version: int
    """Optimizer steps in it."""
    metrics: dict[str, float] = field(default_factory=dict)
    """`save_s` and `hotload_s`."""


@dataclass(frozen=True)
class AdamParams:
    """AdamW settings of one step, for users without tinker."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(frozen=True)
class SamplingParams:
    """How to sample, for users without tinker."""

    max_tokens: int | None = None
    seed: int | None = None
    stop: Any = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


@dataclass(frozen=True)
class FiretitanSamplingParams(SamplingParams):
    """How to sample, with what FireTitan adds; what the daemon lacks is refused where it is used.

    Not a subclass of tinker's, so that it needs no tinker; every sampling call takes either.
    """

    include_routing_matrix: bool = False
    """Also return `routing_matrices`: which experts each token went to; None for dense models."""
    top_sampling_logprobs: int = 0
    """Also so many of the likeliest tokens of each new position, where nothing truncates."""
    sampling_mask: Any = None
    """Not supported."""
    r3_ttl_seconds: int | None = None
    """Ignored: routing matrices come with the answer, nothing is kept that could expire."""


@dataclass(frozen=True, eq=False)
class TensorData:
    """A dense array, for users without tinker."""

    array: npt.NDArray[Any]

    @property
    def data(self) -> list[Any]:
        """The elements in a flat list."""
        elements: list[Any] = self.array.ravel().tolist()
        return elements

    @property
    def dtype(self) -> str:
        """`int64` or `float32`."""
        return "int64" if self.array.dtype.kind == "i" else "float32"

    @property
    def shape(self) -> list[int]:
        """Extent of each dimension."""
        return list(self.array.shape)

    def to_numpy(self) -> npt.NDArray[Any]:
        """The array."""
        return self.array

    def to_torch(self) -> Any:
        """The array as a torch tensor."""
        import torch

        return torch.from_numpy(self.array.copy())  # a view of a message cannot be written to

    def tolist(self) -> list[Any]:
        """The array as nested lists."""
        elements: list[Any] = self.array.tolist()
        return elements


@dataclass(frozen=True)
class _ForwardBackwardOutput:
    loss_fn_output_type: str
    loss_fn_outputs: list[dict[str, Any]]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _OptimStepResponse:
    metrics: dict[str, float] | None = None


@dataclass(frozen=True)
class _PathResponse:
    path: str


@dataclass(frozen=True)
class _LoadWeightsResponse:
    path: str | None = None


@dataclass(frozen=True)
class _SampledSequence:
    stop_reason: str
    tokens: list[int]
    logprobs: list[float] | None = None


@dataclass(frozen=True)
class _SampleResponse:
    sequences: list[Any]
    prompt_logprobs: list[float | None] | None = None


@dataclass(frozen=True)
class _GetInfoResponse:
    model_data: Any
    model_id: str
    is_lora: bool | None = None
    lora_rank: int | None = None
    model_name: str | None = None


@dataclass(frozen=True)
class _ModelData:
    arch: str | None = None
    model_name: str | None = None
    tokenizer_id: str | None = None


@dataclass(frozen=True)
class _TopkLogprobs:
    token_ids: npt.NDArray[Any]
    logprobs: npt.NDArray[Any]


@dataclass(frozen=True)
class _PromptAltTokens:
    tokens: Any
    logprobs: Any


NOT_SCORED = -99999.0
"""Logprob that tinker's matrices of likeliest tokens hold where a position was not scored."""

_LIKENESSES: dict[str, type[Any]] = {
    "ForwardBackwardOutput": _ForwardBackwardOutput,
    "OptimStepResponse": _OptimStepResponse,
    "SaveWeightsResponse": _PathResponse,
    "SaveWeightsForSamplerResponse": _PathResponse,
    "LoadWeightsResponse": _LoadWeightsResponse,
    "SampledSequence": _SampledSequence,
    "SampleResponse": _SampleResponse,
    "TopkLogprobs": _TopkLogprobs,
    "PromptAltTokens": _PromptAltTokens,
    "GetInfoResponse": _GetInfoResponse,
    "ModelData": _ModelData,
}


@functools.cache
def has_tinker() -> bool:
    """Whether tinker is installed; imports nothing."""
    return importlib.util.find_spec("tinker") is not None


@functools.cache
def result_type(name: str) -> type[Any]:
    """Tinker's type of that name, or its likeness."""
    if has_tinker():
        import tinker.types

        found: type[Any] | None = getattr(tinker.types, name, None)
        if found is not None:
            return found
    return type(name, (_LIKENESSES[name],), {"__doc__": _LIKENESSES[name].__doc__})


def tinker_type(name: str) -> type[Any]:
    """Tinker's type of that name, for calls that only code written for tinker makes.

    Raises:
        ImportError: There is no tinker.
    """
    if not has_tinker():
        raise ImportError(f"this call gives tinker's {name}; install tinker")
    import tinker.types

    found: type[Any] = getattr(tinker.types, name)
    return found


def tensor_data(array: npt.NDArray[Any]) -> Any:
    """An array as tinker's TensorData."""
    if has_tinker():
        return _tinker_tensor(array)
    return TensorData(array)


def _tinker_tensor(array: npt.NDArray[Any]) -> Any:
    import tinker

    return tinker.TensorData(
        data=array if _keeps_arrays() else array.ravel().tolist(),
        dtype="int64" if array.dtype.kind == "i" else "float32",
        shape=list(array.shape),
    )


def sparse_like(sparse: Any, values: npt.NDArray[Any]) -> Any:
    """Float values in the cells of a CSR TensorData; only tinker has such."""
    return type(sparse)(
        data=values.astype("float32") if _keeps_arrays() else values.tolist(),
        dtype="float32",
        shape=list(sparse.shape),
        sparse_crow_indices=sparse.sparse_crow_indices,
        sparse_col_indices=sparse.sparse_col_indices,
    )


@functools.cache
def _keeps_arrays() -> bool:
    import tinker

    return dataclasses.is_dataclass(tinker.TensorData)


@functools.cache
def sampled_sequence_type() -> type[Any]:
    """Tinker's SampledSequence, with both kinds of logprobs."""
    base = result_type("SampledSequence")
    return _extended(
        base,
        "FiretitanSampledSequence",
        "A sampled sequence; `logprobs` are `sampling_logprobs`. `routing_matrices[i]` tells the "
        "experts of the position that token i was drawn at, base64.",
        {
            "sampling_logprobs": (list[float] | None, None),
            "inference_logprobs": (list[float] | None, None),
            "routing_matrices": (list[str] | None, None),
            "topk_logprobs": (list[Any] | None, None),
            "snapshots": (tuple[tuple[str, int], ...], ()),
        },
    )


@functools.cache
def sample_response_type() -> type[Any]:
    """Tinker's SampleResponse, with the snapshot that made it."""
    base = result_type("SampleResponse")
    return _extended(
        base,
        "FiretitanSampleResponse",
        "Sampled sequences; `snapshot` names what made them, empty for the base model.",
        {
            "snapshot": (str, ""),
            "seed": (int, 0),
            "topk_prompt_logprobs": (list[Any] | None, None),
            "target_prompt_logprobs": (Any, None),
            "prompt_alt_tokens": (Any, None),
            "prompt_cache_hit_tokens": (int, 0),
        },
    )


def __getattr__(name: str) -> Any:
    """The result types whose base is tinker's, made when they are asked for."""
    if name == "FiretitanSampleResponse":
        return sample_response_type()
    if name == "FiretitanSampledSequence":
        return sampled_sequence_type()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _extended(
    base: type[Any], name: str, doc: str, fields: dict[str, tuple[Any, Any]]
) -> type[Any]:
    """A subclass of a dataclass or of a pydantic model with the fields it lacks."""
    fields = {key: field for key, field in fields.items() if not _has(base, key)}
    body: dict[str, Any] = {
        "__annotations__": {key: kind for key, (kind, _) in fields.items()},
        "__doc__": doc,
        "__module__": __name__,
    }
    is_dataclass = dataclasses.is_dataclass(base)
    for key, (_, default) in fields.items():
        body[key] = field(default=default, repr=key == "snapshot") if is_dataclass else default
    metaclass: Any = type(base)
    made: type[Any] = metaclass(name, (base,), body)
    return dataclass(frozen=True)(made) if is_dataclass else made


def _has(kind: type[Any], name: str) -> bool:
    return name in accepted_fields(kind) or hasattr(kind, name)


def accepted_fields(kind: type[Any]) -> frozenset[str]:
    """Names of the fields a result type is built with."""
    if dataclasses.is_dataclass(kind):
        return frozenset(entry.name for entry in dataclasses.fields(kind) if entry.init)
    return frozenset(getattr(kind, "model_fields", {}))
