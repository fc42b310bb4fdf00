"""Clients that only run the frozen model: for reference logprobs.

Knows: which calls a reference refuses. Must not know: where its session comes from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from firetitan.v1 import operation_pb2

from firetitan_client.attachment import call_name
from firetitan_client.errors import FailedPrecondition
from firetitan_client.futures import APIFuture
from firetitan_client.training import FiretitanTrainingClient


class ForwardOnlyClient(FiretitanTrainingClient):
    """A training client of a frozen model: `forward` works, what would change weights does not.

    Its commands have a lane of their own: a reference forward neither waits for the policy's calls
    nor fails with them.

    Args:
        service: Whose client this is.
        lane: Where the commands go.
        ready: Done once the session is open.
        label: What was asked for, for `repr`.
    """

    _base_only = True

    def __repr__(self) -> str:
        return super().__repr__().replace("full-parameter>", "forward only>")

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a client of the frozen model cannot be pickled; pickle its service, and call "
            "create_reference_client() or create_base_training_client() of that there"
        )

    def forward_backward_custom(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: raises RuntimeError."""
        raise _forward_only("forward_backward_custom")

    async def forward_backward_custom_async(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: raises RuntimeError."""
        raise _forward_only("forward_backward_custom")

    def forward_backward_contrastive(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: raises RuntimeError."""
        raise _forward_only("forward_backward_contrastive")

    def unload_model(self) -> NoReturn:
        """Refused: raises RuntimeError; `release_references` of the service lets go of it."""
        raise _forward_only("unload_model")

    def _submit(
        self,
        method: str,
        request: Any,
        response: type[Any],
        finish: Callable[[operation_pb2.Operation], Any],
    ) -> APIFuture[Any]:
        if method != "TrainingService/Forward":
            raise _forward_only(call_name(method))
        return super()._submit(method, request, response, finish)


def _forward_only(call: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{call}: this client runs the frozen model and only forward() works; train with the "
        "client of create_training_client()",
        reason="SESSION_FORWARD_ONLY",
    )
