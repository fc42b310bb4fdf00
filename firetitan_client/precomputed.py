"""Results of `forward` as the first half of a custom loss, and which weights they are of.

Knows: what a result has to look like. Must not know: how losses run.

tinker's result has no place for the weights' version, so it is remembered beside the object. One
that came another way (a file, another process) is taken as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from firetitan.v1 import operation_pb2

from firetitan_client import convert

_versions: dict[int, tuple[weakref.ref[Any], int | None]] = {}
"""By the result's id; None: of the base model, without the adapter."""


def remember(output: Any, weights_version: int | None) -> None:
    """Note which weights a result is of, for as long as it lives; None: the base model's."""
    key = id(output)
    _versions[key] = (weakref.ref(output, lambda _: _versions.pop(key, None)), weights_version)


def version_of(output: Any) -> int | None:
    """The weights' version of a result; None where it is not known.

    Raises:
        ValueError: It is a reference's.
    """
    if id(output) not in _versions:
        return None
    version = _versions[id(output)][1]
    if version is None:
        raise convert.invalid(
            "precomputed_forward", "is of the base model; give what this client's forward returned"
        )
    return version


def as_forward_result(
    output: Any, shapes: Sequence[tuple[int, ...]]
) -> operation_pb2.ForwardResult:
    """A result of `forward` as the daemon gave it.

    Args:
        output: What `forward(...).result()` returned.
        shapes: Of each datum's targets.

    Raises:
        ValueError: It is something else, or not of this data.
    """
    rows = getattr(output, "loss_fn_outputs", None)
    if rows is None:
        raise convert.invalid(
            "precomputed_forward", f"is a {type(output).__name__}; give forward(...).result()"
        )
    if len(rows) != len(shapes):
        raise convert.invalid(
            "precomputed_forward", f"has {len(rows)} outputs for {len(shapes)} datums"
        )
    result = operation_pb2.ForwardResult()
    for index, (row, shape) in enumerate(zip(rows, shapes, strict=True)):
        field = f"precomputed_forward.loss_fn_outputs[{index}]"
        if "logprobs" not in row:
            raise convert.invalid(field, f"has no 'logprobs', only {sorted(row)}")
        array = convert.loss_input(row["logprobs"], "logprobs", field)
        if array.shape != shape:
            raise convert.invalid(
                field, f"logprobs have shape {list(array.shape)}, the targets {list(shape)}"
            )
        result.outputs.add().tensors["logprobs"].CopyFrom(convert.tensor_to_proto(array))
    return result
