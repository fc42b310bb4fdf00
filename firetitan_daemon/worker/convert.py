"""Protocol messages to and from the engine's plain values; the engine never sees protobuf.

Knows: firetitan.v1 messages, engine.api. Must not know: how requests arrive or what engines do with
them. Checks the encoding (types, shapes, lengths) and names the field at fault; whether a token or
a weight makes sense is the engine's to say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import cast

import numpy as np
import numpy.typing as npt
from firetitan.v1 import (
    operation_pb2,
    tensor_pb2,
    trainer_pb2,
    training_service_pb2,
)
from google.protobuf import struct_pb2

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import (
    AdamParams,
    Array,
    Datum,
    Float32Array,
    ForwardOutput,
    Int32Array,
    Int64Array,
    ModelInfo,
    Normalization,
    Pooling,
)
from firetitan_daemon.engine.grad_norms import GradNormMetrics

TOKEN_BYTES = 4
MAX_DIMENSIONS = 8
"""Of a tensor; no array library takes any number."""

_DTYPES: dict[int, np.dtype[np.float32] | np.dtype[np.int64] | np.dtype[np.int32]] = {
    tensor_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    tensor_pb2.DATA_TYPE_INT64: np.dtype("<i8"),
    tensor_pb2.DATA_TYPE_INT32: np.dtype("<i4"),
}
_NORMALIZATIONS = {
    training_service_pb2.GRAD_ACC_NORMALIZATION_UNSPECIFIED: Normalization.NONE,
    training_service_pb2.GRAD_ACC_NORMALIZATION_NONE: Normalization.NONE,
    training_service_pb2.GRAD_ACC_NORMALIZATION_NUM_LOSS_TOKENS: Normalization.NUM_LOSS_TOKENS,
    training_service_pb2.GRAD_ACC_NORMALIZATION_NUM_SEQUENCES: Normalization.NUM_SEQUENCES,
}
_GRAD_NORM_METRICS: dict[int, GradNormMetrics] = {
    training_service_pb2.GRAD_NORM_METRICS_UNSPECIFIED: GradNormMetrics.OFF,
    training_service_pb2.GRAD_NORM_METRICS_OFF: GradNormMetrics.OFF,
    training_service_pb2.GRAD_NORM_METRICS_BASIC: GradNormMetrics.BASIC,
    training_service_pb2.GRAD_NORM_METRICS_DETAILED: GradNormMetrics.DETAILED,
}
_POOLINGS: dict[int, Pooling | None] = {
    training_service_pb2.POOLING_UNSPECIFIED: None,
    training_service_pb2.POOLING_MEAN: Pooling.MEAN,
    training_service_pb2.POOLING_LAST: Pooling.LAST,
}


def data_from_proto(data: Iterable[tensor_pb2.Datum]) -> list[Datum]:
    """Training sequences; arrays are read-only views of the message's bytes.

    Raises:
        FiretitanError: INVALID_DATUM naming `data[i]....`.
    """
    return [_datum(datum, f"data[{index}]") for index, datum in enumerate(data)]


def _datum(datum: tensor_pb2.Datum, field: str) -> Datum:
    inputs: dict[str, Array] = {}
    for name, tensor in datum.loss_fn_inputs.items():
        where = f'{field}.loss_fn_inputs["{name}"]'
        array = tensor_from_proto(tensor, where)
        wanted = "int64" if name == "target_tokens" else "float32"
        if array.dtype.name != wanted:
            raise _invalid(where, f"is {array.dtype.name}; send it as {wanted}")
        if array.ndim not in (1, 2):
            raise _invalid(where, f"has shape {list(array.shape)}; give [N] or [N, K]")
        inputs[name] = array
    return Datum(
        tokens_from_proto(datum.model_input, f"{field}.model_input"),
        inputs,
        tuple(datum.model_input.routing_matrices),
    )


def tokens_from_proto(model_input: tensor_pb2.ModelInput, field: str) -> Int32Array:
    """The chunks of a model input, joined: int32 [N].

    Raises:
        FiretitanError: INVALID_DATUM for a chunk that holds no tokens or half of one.
    """
    pieces = []
    for index, chunk in enumerate(model_input.chunks):
        where = f"{field}.chunks[{index}]"
        if chunk.WhichOneof("chunk") != "encoded_text":
            raise _invalid(where, "holds nothing known here; give encoded_text")
        raw = chunk.encoded_text.token_ids
        if len(raw) % TOKEN_BYTES:
            raise _invalid(
                f"{where}.encoded_text.token_ids",
                f"has {len(raw)} bytes, not a multiple of 4; send int32 little-endian",
            )
        pieces.append(raw)
    return np.frombuffer(pieces[0] if len(pieces) == 1 else b"".join(pieces), dtype="<i4")


def tensor_from_proto(tensor: tensor_pb2.Tensor, field: str) -> Array:
    """A dense array, as a read-only view of the message's bytes.

    Raises:
        FiretitanError: INVALID_DATUM for an unknown type, a negative extent, or bytes that do not
            fill the shape.
    """
    dtype = _DTYPES.get(tensor.data_type)
    if dtype is None:
        known = ", ".join(item.name for item in _DTYPES.values())
        raise _invalid(field, f"has data_type {tensor.data_type}; give one of {known}")
    shape = list(tensor.shape)
    if len(shape) > MAX_DIMENSIONS:
        raise _invalid(field, f"has {len(shape)} dimensions; give [N] or [N, K]")
    if any(extent < 0 for extent in shape):
        raise _invalid(field, f"has shape {shape}; extents are 0 or more")
    raw = tensor.data
    wanted = math.prod(shape) * dtype.itemsize
    if len(raw) != wanted:
        raise _invalid(field, f"has {len(raw)} bytes, shape {shape} of {dtype.name} takes {wanted}")
    return cast(Array, np.frombuffer(raw, dtype=dtype).reshape(shape))


def float_tensor_to_proto(array: Float32Array) -> tensor_pb2.Tensor:
    """A float32 array of any shape as a Tensor."""
    return tensor_pb2.Tensor(
        data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=array.shape, data=to_bytes(array, "<f4")
    )


def int_tensor_to_proto(array: Int64Array) -> tensor_pb2.Tensor:
    """An int64 array of any shape as a Tensor."""
    return tensor_pb2.Tensor(
        data_type=tensor_pb2.DATA_TYPE_INT64, shape=array.shape, data=to_bytes(array, "<i8")
    )


def output_grads_from_proto(tensors: Sequence[tensor_pb2.Tensor]) -> list[Float32Array]:
    """dC/dlogprobs or dC/dembedding, one float32 array a datum.

    Raises:
        FiretitanError: INVALID_DATUM naming `output_grads[i]`.
    """
    grads: list[Float32Array] = []
    for index, tensor in enumerate(tensors):
        field = f"output_grads[{index}]"
        array = tensor_from_proto(tensor, field)
        if array.dtype.name != "float32":
            raise _invalid(field, f"is {array.dtype.name}; send it as float32")
        grads.append(array.astype(np.float32, copy=False))
    return grads


def loss_config_from_proto(config: struct_pb2.Struct) -> dict[str, float | str]:
    """Settings of a loss: numbers and texts by name.

    Raises:
        FiretitanError: INVALID_ARGUMENT naming `loss_fn_config["..."]` for any other kind of value.
    """
    settings: dict[str, float | str] = {}
    for name, value in config.fields.items():
        kind = value.WhichOneof("kind")
        if kind == "number_value":
            settings[name] = value.number_value
        elif kind == "string_value":
            settings[name] = value.string_value
        else:
            field = f'loss_fn_config["{name}"]'
            found = (kind or "nothing").removesuffix("_value")
            raise FiretitanError(
                Reason.INVALID_ARGUMENT,
                f"{field}: is a {found}; give a number or a text",
                field=field,
            )
    return settings


def pooling_from_proto(value: int) -> Pooling | None:
    """How sequences become vectors; None: they do not.

    Raises:
        FiretitanError: INVALID_ARGUMENT for a number this version does not know.
    """
    if value not in _POOLINGS:
        known = ", ".join(training_service_pb2.Pooling.keys())
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"pooling: {value} is unknown; give one of {known}",
            field="pooling",
        )
    return _POOLINGS[value]


def adam_params_from_proto(request: training_service_pb2.OptimStepRequest) -> AdamParams:
    """The optimizer's settings.

    Raises:
        FiretitanError: INVALID_ARGUMENT where there are none, or for unknown metrics.
    """
    if not request.HasField("adam_params"):
        raise FiretitanError(
            Reason.INVALID_ARGUMENT, "adam_params: missing; give all of them", field="adam_params"
        )
    params = request.adam_params
    metrics = _GRAD_NORM_METRICS.get(params.grad_norm_metrics)
    if metrics is None:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"adam_params.grad_norm_metrics: {params.grad_norm_metrics} is unknown",
            field="adam_params.grad_norm_metrics",
        )
    return AdamParams(
        learning_rate=params.learning_rate,
        beta1=params.beta1,
        beta2=params.beta2,
        eps=params.eps,
        weight_decay=params.weight_decay,
        grad_norm_metrics=metrics,
        grad_clip_norm=params.grad_clip_norm,
    )


def normalization_from_proto(value: int) -> Normalization:
    """How gradients are scaled.

    Raises:
        FiretitanError: INVALID_ARGUMENT for a number this version does not know.
    """
    try:
        return _NORMALIZATIONS[training_service_pb2.GradAccNormalization.ValueType(value)]
    except KeyError:
        known = ", ".join(training_service_pb2.GradAccNormalization.keys())
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"grad_acc_normalization: {value} is unknown; give one of {known}",
            field="grad_acc_normalization",
        ) from None


def forward_result_to_proto(output: ForwardOutput, step: int) -> operation_pb2.ForwardResult:
    """What a forward or backward gives back.

    Args:
        output: From the engine.
        step: Optimizer steps the weights had taken.
    """
    result = operation_pb2.ForwardResult(
        metrics=output.metrics, graph=output.graph or "", step=step
    )
    for arrays in output.outputs:
        tensors = result.outputs.add().tensors
        for name, array in arrays.items():
            to_proto = int_tensor_to_proto if array.dtype.kind == "i" else float_tensor_to_proto
            tensors[name].CopyFrom(to_proto(array))
    return result


def model_info_to_proto(info: ModelInfo, base_model: str) -> trainer_pb2.ModelInfo:
    """The loaded model.

    Args:
        info: From the engine.
        base_model: As it was asked for.
    """
    return trainer_pb2.ModelInfo(
        base_model=base_model,
        path=info.path,
        source=info.source,
        fingerprint=info.fingerprint,
        architecture=info.architecture,
        dtype=info.dtype,
        device=info.device,
        vocab_size=info.vocab_size,
        max_context_length=info.max_context_length,
        num_parameters=info.num_parameters,
        packed=info.packed,
        num_threads=info.num_threads,
        notes=info.notes,
        versions=_strings(info.versions),
        revision=info.revision,
        routing=None if info.routing is None else trainer_pb2.RoutingShape(**asdict(info.routing)),
    )


def to_bytes(array: npt.NDArray[np.generic], dtype: str) -> bytes:
    """An array's elements, row-major, in a dtype such as `<f4`."""
    return np.ascontiguousarray(array, dtype=dtype).tobytes()


def _strings(values: Mapping[str, str]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


def _invalid(field: str, problem: str) -> FiretitanError:
    return FiretitanError(Reason.INVALID_DATUM, f"{field}: {problem}", field=field)
