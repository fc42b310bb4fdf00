"""What a custom loss is over: logprobs of targets, or embeddings of sequences.

Knows: what the worker is asked for, what of its answer the user's loss is given, and the linear
surrogate that has the same gradient. Must not know: lanes, when which command is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from firetitan.v1 import operation_pb2, tensor_pb2, training_service_pb2

from firetitan_client import convert

Grads = Sequence[npt.NDArray[np.float32]]
"""dC/doutput, one array a datum."""

_OUTPUTS = ("logprobs", "embedding", "cos_similarity_matrix")


class LossSpace(Protocol):
    """The outputs that a loss is over."""

    name: str
    """Of the tensor in a `LossFnOutput`."""

    def forward(self) -> training_service_pb2.ForwardRequest:
        """Asks for the outputs, their graph kept."""

    def shown(self, torch: Any, leaves: list[Any]) -> list[Any]:
        """What the user's loss is given.

        Args:
            torch: The module.
            leaves: The outputs, float32 tensors that require gradients.
        """

    def surrogate(self, grads: Grads) -> training_service_pb2.ForwardBackwardRequest:
        """A command whose loss is linear in the outputs and has these gradients."""


class Logprobs:
    """Logprobs of the targets.

    Args:
        data: The user's datums; only tokens and targets are sent.
    """

    name = "logprobs"

    def __init__(self, data: Any) -> None:
        self._messages = convert.custom_data_to_proto(data)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of each datum's targets."""
        return [tuple(one.loss_fn_inputs["target_tokens"].shape) for one in self._messages]

    def forward(self) -> training_service_pb2.ForwardRequest:
        """Asks for the outputs, their graph kept."""
        return training_service_pb2.ForwardRequest(
            data=self._messages, loss_fn="cross_entropy", retain_graph=True
        )

    def shown(self, torch: Any, leaves: list[Any]) -> list[Any]:
        """The logprobs themselves."""
        return leaves

    def surrogate(self, grads: Grads) -> training_service_pb2.ForwardBackwardRequest:
        """Cross entropy weighted by -dC/dlogprobs."""
        data = _with_input(self._messages, "weights", [-grad for grad in grads])
        return training_service_pb2.ForwardBackwardRequest(data=data, loss_fn="cross_entropy")


class Embeddings:
    """Pooled last hidden states, or their cosines to one another.

    Args:
        data: The user's datums; only tokens are sent.
        pooling: "mean" or "last".
        cosines: Show row i of the batch's cosine matrix for datum i.
    """

    name = "embedding"

    def __init__(self, data: Any, pooling: str, *, cosines: bool) -> None:
        self._messages = convert.sequences_to_proto(data)
        self._pooling = convert.pooling_to_proto(pooling)
        self._cosines = cosines

    def forward(self) -> training_service_pb2.ForwardRequest:
        """Asks for the outputs, their graph kept."""
        return training_service_pb2.ForwardRequest(
            data=self._messages, pooling=self._pooling, retain_graph=True
        )

    def shown(self, torch: Any, leaves: list[Any]) -> list[Any]:
        """The embeddings [H], or rows [B] of the cosine matrix [B, B]."""
        if not self._cosines:
            return leaves
        unit = torch.nn.functional.normalize(torch.stack(leaves), dim=1)
        return list((unit @ unit.T).unbind())

    def surrogate(self, grads: Grads) -> training_service_pb2.ForwardBackwardRequest:
        """The sum of embedding * dC/dembedding."""
        data = _with_input(self._messages, "embedding_grads", grads)
        return training_service_pb2.ForwardBackwardRequest(data=data, pooling=self._pooling)


def choose_space(
    data: Any, loss_type_input: str | None, output: str, pooling: str
) -> Logprobs | Embeddings:
    """The space that a call's options name.

    Raises:
        ValueError: An unknown option, or malformed data.
    """
    if loss_type_input not in (None, "logprobs"):
        raise convert.invalid("loss_type_input", f"is {loss_type_input!r}; give 'logprobs'")
    if output not in _OUTPUTS:
        raise convert.invalid(
            "output",
            f"Unsupported output={output!r}; expected 'logprobs', 'embedding', or "
            "'cos_similarity_matrix'",
        )
    convert.pooling_to_proto(pooling)
    if output == "logprobs":
        return Logprobs(data)
    return Embeddings(data, pooling, cosines=output == "cos_similarity_matrix")


def output_arrays(
    result: operation_pb2.ForwardResult, space: LossSpace
) -> list[npt.NDArray[np.float32]]:
    """The outputs of a forward, one array a datum.

    Raises:
        ValueError: They are not in it.
    """
    for one in result.outputs:
        if space.name not in one.tensors:
            raise ValueError(f"{space.name} response missing {space.name!r} tensor")
    return [convert.tensor_from_proto(one.tensors[space.name]) for one in result.outputs]


def _with_input(
    messages: Sequence[tensor_pb2.Datum], name: str, arrays: Grads
) -> list[tensor_pb2.Datum]:
    data = []
    for message, array in zip(messages, arrays, strict=True):
        datum = tensor_pb2.Datum()
        datum.CopyFrom(message)
        datum.loss_fn_inputs[name].CopyFrom(convert.tensor_to_proto(convert.float32(array)))
        data.append(datum)
    return data
