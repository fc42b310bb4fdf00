"""tinker's types to firetitan.v1 and back: the only module that knows both.

Knows: the attributes of tinker's types (anything that has them will do), messages, numpy.
Must not know: lanes, transports. Wrong data raises here, in the user's call, naming the field.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from firetitan.v1 import operation_pb2, tensor_pb2, training_service_pb2
from google.protobuf import struct_pb2

from firetitan_client import routing, types
from firetitan_client.errors import InvalidArgument, Unsupported

_INTEGER_KEYS = frozenset({"target_tokens"})
_DTYPES: dict[int, str] = {
    tensor_pb2.DATA_TYPE_FLOAT32: "<f4",
    tensor_pb2.DATA_TYPE_INT64: "<i8",
    tensor_pb2.DATA_TYPE_INT32: "<i4",
}
_NORMALIZATIONS: dict[str, training_service_pb2.GradAccNormalization.ValueType] = {
    "none": training_service_pb2.GRAD_ACC_NORMALIZATION_NONE,
    "num_loss_tokens": training_service_pb2.GRAD_ACC_NORMALIZATION_NUM_LOSS_TOKENS,
    "num_sequences": training_service_pb2.GRAD_ACC_NORMALIZATION_NUM_SEQUENCES,
}
_GRAD_NORM_METRICS: dict[str, training_service_pb2.GradNormMetrics.ValueType] = {
    "off": training_service_pb2.GRAD_NORM_METRICS_OFF,
    "basic": training_service_pb2.GRAD_NORM_METRICS_BASIC,
    "detailed": training_service_pb2.GRAD_NORM_METRICS_DETAILED,
}
_POOLINGS: dict[str, training_service_pb2.Pooling.ValueType] = {
    "mean": training_service_pb2.POOLING_MEAN,
    "last": training_service_pb2.POOLING_LAST,
}


def invalid(field: str, problem: str) -> InvalidArgument:
    """The error for one wrong field."""
    return InvalidArgument(f"{field}: {problem}", field=field)


def whole_number(value: Any, field: str, low: int, high: int) -> int:
    """An integer within bounds, those included.

    Raises:
        InvalidArgument: Anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise invalid(field, f"is {value!r}; give a whole number")
    if not low <= value <= high:
        raise invalid(field, f"is {value}; give at least {low} and at most {high}")
    return int(value)


def real_number(value: Any, field: str) -> float:
    """A number, finite or not.

    Raises:
        InvalidArgument: Anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise invalid(field, f"is {value!r}; give a number")
    return float(value)


def data_to_proto(data: Any) -> list[tensor_pb2.Datum]:
    """Training sequences, all their loss inputs with them.

    Args:
        data: `tinker.Datum`s, or anything with `model_input` and `loss_fn_inputs`.

    Raises:
        InvalidArgument: No data, or a value that is no rectangular array of numbers.
    """
    return [
        tensor_pb2.Datum(
            model_input=model_input_to_proto(datum.model_input, f"data[{index}].model_input"),
            loss_fn_inputs={
                name: tensor_to_proto(
                    loss_input(value, name, f'data[{index}].loss_fn_inputs["{name}"]')
                )
                for name, value in datum.loss_fn_inputs.items()
            },
        )
        for index, datum in enumerate(checked_data(data))
    ]


def checked_data(data: Any) -> Sequence[Any]:
    """The data as a sequence of datums.

    Raises:
        InvalidArgument: None, or something that is no datum.
    """
    if hasattr(data, "model_input"):
        raise invalid("data", "is one datum; give a list of them")
    if data is not None and not isinstance(data, Iterable):
        raise invalid("data", f"is a {type(data).__name__}; give a list of tinker.Datum")
    datums = data if isinstance(data, Sequence) else list(data or ())
    if not datums:
        raise InvalidArgument("No data provided", field="data")
    for index, datum in enumerate(datums):
        if not hasattr(datum, "model_input") or not hasattr(datum, "loss_fn_inputs"):
            raise invalid(
                f"data[{index}]",
                f"is a {type(datum).__name__}; give tinker.Datum(model_input, loss_fn_inputs)",
            )
    return datums


def custom_data_to_proto(data: Any) -> list[tensor_pb2.Datum]:
    """What a custom loss needs of each datum: tokens and targets; the rest stays here.

    A datum without `target_tokens` gets the next token of its model input at each position, and
    so one position less.
    """
    messages = []
    for index, datum in enumerate(checked_data(data)):
        where = f"data[{index}]"
        message = tensor_pb2.Datum(
            model_input=model_input_to_proto(datum.model_input, f"{where}.model_input")
        )
        given = datum.loss_fn_inputs.get("target_tokens")
        if given is not None:
            field = f'{where}.loss_fn_inputs["target_tokens"]'
            targets = loss_input(given, "target_tokens", field)
        else:
            tokens = tokens_of(datum.model_input, f"{where}.model_input")
            if tokens.size < 2:
                raise invalid(
                    f"{where}.model_input", "has fewer than 2 tokens and no target_tokens"
                )
            targets = tokens[1:].astype(np.int64)
            message.model_input.CopyFrom(
                _encoded(tokens[:-1], message.model_input.routing_matrices[:-1])
            )
        message.loss_fn_inputs["target_tokens"].CopyFrom(tensor_to_proto(targets))
        messages.append(message)
    return messages


def sequences_to_proto(data: Any) -> list[tensor_pb2.Datum]:
    """The tokens of each datum; its loss inputs, if any, stay here."""
    return [
        tensor_pb2.Datum(
            model_input=model_input_to_proto(datum.model_input, f"data[{index}].model_input")
        )
        for index, datum in enumerate(checked_data(data))
    ]


def pooling_to_proto(pooling: Any) -> training_service_pb2.Pooling.ValueType:
    """How sequences become vectors.

    Raises:
        InvalidArgument: Neither "mean" nor "last".
    """
    found = _POOLINGS.get(pooling) if isinstance(pooling, str) else None
    if found is None:
        raise InvalidArgument(
            f"Unsupported pooling={pooling!r}; expected 'mean' or 'last'", field="pooling"
        )
    return found


def model_input_to_proto(model_input: Any, field: str) -> tensor_pb2.ModelInput:
    """A `tinker.ModelInput`, or a plain list of token ids."""
    tokens = tokens_of(model_input, field)
    return _encoded(tokens, routing.matrices_of(model_input, len(tokens), field))


def _encoded(
    tokens: npt.NDArray[np.int32], routing_matrices: Sequence[bytes]
) -> tensor_pb2.ModelInput:
    text = tensor_pb2.EncodedText(token_ids=tokens.astype("<i4", copy=False).tobytes())
    return tensor_pb2.ModelInput(
        chunks=[tensor_pb2.InputChunk(encoded_text=text)], routing_matrices=routing_matrices
    )


def tokens_of(model_input: Any, field: str) -> npt.NDArray[np.int32]:
    """The token ids of a model input, int32 [N].

    Raises:
        InvalidArgument: Not whole numbers, or too large to be tokens.
        Unsupported: It holds something other than text.
    """
    chunks = getattr(model_input, "chunks", None)
    if chunks is None:
        return _tokens(model_input, field)
    pieces = []
    for index, chunk in enumerate(chunks):
        tokens = getattr(chunk, "tokens", None)
        if tokens is None:
            raise Unsupported(
                f"{field}.chunks[{index}]: is a {type(chunk).__name__}; only text is supported",
                field=f"{field}.chunks[{index}]",
            )
        pieces.append(_tokens(tokens, f"{field}.chunks[{index}].tokens"))
    return np.concatenate(pieces) if pieces else np.empty(0, np.int32)


def token_list(tokens: Any, field: str) -> list[int]:
    """Token ids of a model input, a list or an array, as plain numbers.

    Raises:
        InvalidArgument: As `tokens_of`.
    """
    plain: list[int] = tokens_of(tokens, field).tolist()
    return plain


def _tokens(values: Any, field: str) -> npt.NDArray[np.int32]:
    array = _array(values, field)
    if array.size == 0:
        return np.empty(0, np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise invalid(field, f"has shape {list(array.shape)} of {array.dtype}; give token ids [N]")
    if array.min() < -(2**31) or array.max() >= 2**31:
        worst = array.min() if array.min() < 0 else array.max()
        raise invalid(field, f"holds {worst}, which is no token id")
    return array.astype(np.int32)


def loss_input(value: Any, name: str, field: str) -> npt.NDArray[Any]:
    """A loss input as a dense array of the type its name calls for; sparse CSR is filled up.

    Raises:
        InvalidArgument: Not a rectangular array of numbers.
    """
    array = _dense(value, field)
    if name in _INTEGER_KEYS:
        if array.dtype.kind == "f" and not np.array_equal(array, np.round(array)):
            raise invalid(field, "holds fractions; give token ids")
        return np.ascontiguousarray(array, dtype="<i8")
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype="<f4")


def _dense(value: Any, field: str) -> npt.NDArray[Any]:
    rows = getattr(value, "sparse_crow_indices", None)
    if rows is not None:
        return _from_csr(value, rows, field)
    if hasattr(value, "detach"):  # torch, where the user's own code made it
        return _array(
            value.detach().cpu().float() if value.is_floating_point() else (value.detach().cpu()),
            field,
        )
    if isinstance(getattr(value, "dtype", None), str) and hasattr(value, "data"):
        to_numpy = getattr(value, "to_numpy", None)
        array = _array(to_numpy() if to_numpy is not None else value.data, field)
        shape = value.shape
        if shape is not None and list(array.shape) != list(shape):
            if math.prod(shape) != array.size:
                raise invalid(
                    field,
                    f"has {array.size} values, its shape {list(shape)} says {math.prod(shape)}",
                )
            array = array.reshape(shape)
        return array
    return _array(value, field)


def _from_csr(value: Any, rows: Sequence[int], field: str) -> npt.NDArray[Any]:
    columns, shape = value.sparse_col_indices, value.shape
    data = _array(value.data, field).ravel()
    if columns is None or shape is None or len(shape) != 2:
        raise invalid(field, "is sparse without column indices or a shape [N, K]")
    starts = np.asarray(rows, dtype=np.int64)
    index = np.asarray(columns, dtype=np.int64)
    fits = (
        len(starts) == shape[0] + 1
        and starts[0] == 0
        and starts[-1] == len(index) == len(data)
        and bool(np.all(np.diff(starts) >= 0))
        and (len(index) == 0 or (index.min() >= 0 and index.max() < shape[1]))
    )
    if not fits:
        raise invalid(field, f"is not a CSR array of shape {list(shape)}")
    dense = np.zeros(tuple(shape), dtype=data.dtype)
    dense[np.repeat(np.arange(shape[0]), np.diff(starts)), index] = data
    return dense


def _array(values: Any, field: str) -> npt.NDArray[Any]:
    try:
        array = np.asarray(values)
    except ValueError:
        raise invalid(field, "is ragged; give a rectangular array of numbers") from None
    if array.size == 0:
        return array.astype(np.float32) if array.dtype.kind not in "iu" else array
    if array.dtype.kind == "b" or array.dtype.kind not in "iuf":
        what = "text; encode it with get_tokenizer()" if array.dtype.kind == "U" else array.dtype
        raise invalid(field, f"holds {what}; give numbers")
    return array


def tensor_to_proto(array: npt.NDArray[Any]) -> tensor_pb2.Tensor:
    """A dense float32 or int64 array."""
    kind = tensor_pb2.DATA_TYPE_INT64 if array.dtype.kind == "i" else tensor_pb2.DATA_TYPE_FLOAT32
    return tensor_pb2.Tensor(data_type=kind, shape=array.shape, data=array.tobytes())


def float32(array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """A contiguous float32 array; a copy where the given one is not."""
    return np.ascontiguousarray(array, dtype="<f4")


def tensor_from_proto(tensor: tensor_pb2.Tensor) -> npt.NDArray[Any]:
    """A dense array; a read-only view of the message."""
    array = np.frombuffer(tensor.data, dtype=_DTYPES[tensor.data_type])
    return array.reshape(tuple(tensor.shape))


def loss_config(config: Any) -> dict[str, Any]:
    """Settings of a loss, as a dict of the caller's own; None: there are none.

    Raises:
        InvalidArgument: Not a mapping.
    """
    if config is not None and not isinstance(config, Mapping):
        raise invalid("loss_fn_config", f"is a {type(config).__name__}; give a dict of settings")
    return dict(config or {})


def loss_config_to_proto(config: Mapping[str, Any] | None) -> struct_pb2.Struct:
    """Settings of a loss; None values are left out.

    Raises:
        InvalidArgument: Not a mapping, or a value that is neither a number nor a text.
    """
    settings = struct_pb2.Struct()
    for name, value in loss_config(config).items():
        if value is None:
            continue
        if isinstance(value, str):
            settings.fields[name].string_value = value
        elif isinstance(value, int | float | np.number) and not isinstance(value, bool):
            settings.fields[name].number_value = float(value)
        else:
            raise invalid(
                f'loss_fn_config["{name}"]', f"is a {type(value).__name__}; give a number or text"
            )
    return settings


def adam_params_to_proto(params: Any) -> training_service_pb2.AdamParams:
    """`tinker.AdamParams`, or anything with those of its attributes that matter.

    Raises:
        InvalidArgument: No `learning_rate`, or a value that is no number.
        Unsupported: Settings of another optimizer than AdamW.
    """
    kind = getattr(params, "type", "adamw")
    if "dimuon" in str(kind).lower() or "muon" in type(params).__name__.lower():
        raise Unsupported(f"optimizer {type(params).__name__}: only AdamW is supported")
    if not hasattr(params, "learning_rate"):
        raise invalid("adam_params", f"is a {type(params).__name__}; give tinker.AdamParams(...)")
    defaults = types.AdamParams()
    values: dict[str, Any] = {}
    for name in ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm"):
        value = getattr(params, name, getattr(defaults, name))
        values[name] = real_number(value, f"adam_params.{name}")
    return training_service_pb2.AdamParams(**values)


def grad_norm_metrics_to_proto(value: Any) -> training_service_pb2.GradNormMetrics.ValueType:
    """A `GradNormMetricsMode`, its text in any case, True for basic, or None or False for off.

    Raises:
        InvalidArgument: Something else.
    """
    if value is None or isinstance(value, bool):
        value = "basic" if value else "off"
    found = _GRAD_NORM_METRICS.get(str(getattr(value, "value", value)).lower())
    if found is None:
        raise InvalidArgument(
            f"Unknown emit_grad_norm_metrics {value!r}; expected a bool or one of "
            f"{', '.join(_GRAD_NORM_METRICS)}",
            field="emit_grad_norm_metrics",
        )
    return found


def normalization_to_proto(
    value: Any,
) -> training_service_pb2.GradAccNormalization.ValueType:
    """A `GradAccNormalization`, its text in any case, or None for the raw sum.

    Raises:
        InvalidArgument: Something else.
    """
    if value is None:
        return training_service_pb2.GRAD_ACC_NORMALIZATION_NONE
    found = _NORMALIZATIONS.get(str(getattr(value, "value", value)).lower())
    if found is None:
        raise InvalidArgument(
            f"Unknown grad_accumulation_normalization {value!r}; expected one of "
            f"{', '.join(_NORMALIZATIONS)}",
            field="grad_accumulation_normalization",
        )
    return found


def forward_output(result: operation_pb2.ForwardResult) -> Any:
    """A `tinker.ForwardBackwardOutput`."""
    return types.result_type("ForwardBackwardOutput")(
        loss_fn_output_type="ArrayRecord",
        loss_fn_outputs=[
            {
                name: types.tensor_data(tensor_from_proto(value))
                for name, value in output.tensors.items()
            }
            for output in result.outputs
        ],
        metrics=dict(result.metrics),
    )


def optim_step_response(result: operation_pb2.OptimStepResult) -> Any:
    """A `tinker.OptimStepResponse`; its metrics always hold `step` and `grad_norm`."""
    return types.result_type("OptimStepResponse")(metrics=dict(result.metrics))


def response_tokens(data: Sequence[tensor_pb2.Datum]) -> float:
    """Target tokens that a cross-entropy counts: those of non-zero weight."""
    total = 0
    for datum in data:
        name = "weights" if "weights" in datum.loss_fn_inputs else "target_tokens"
        array = tensor_from_proto(datum.loss_fn_inputs[name])
        total += int(np.count_nonzero(array)) if name == "weights" else array.size
    return float(total)
