"""What a done operation comes to in the future of its call."""

from __future__ import annotations

from typing import Any

import pytest
from firetitan.v1 import operation_pb2, training_service_pb2

from firetitan_client import convert
from firetitan_client.errors import FiretitanError, NotFound
from firetitan_client.lane import Lane


async def never(client_id: str) -> Any:
    raise AssertionError("it is not attached")


def finished(operation: operation_pb2.Operation) -> Any:
    """The result of a forward pass whose operation ended so."""
    lane = Lane(None, never)  # type: ignore[arg-type]  # nothing is sent
    command = lane.make(
        "TrainingService/Forward",
        b"",
        training_service_pb2.ForwardResponse,
        lambda ended: convert.forward_output(ended.forward),
    )
    lane._finish(command, operation, None)  # type: ignore[arg-type]
    return command.future.result(0)


def test_a_result_that_the_daemon_has_no_more_is_no_empty_one() -> None:
    operation = operation_pb2.Operation(name="operations/o", done=True, method="Forward")
    with pytest.raises(NotFound, match=r"operations/o.*does not have its result") as caught:
        finished(operation)
    assert isinstance(caught.value, FiretitanError)
    assert caught.value.reason == "OPERATION_NOT_FOUND"
    operation.forward.metrics["loss:sum"] = 2.0
    assert finished(operation).metrics == {"loss:sum": 2.0}


def test_an_empty_result_is_one() -> None:
    operation = operation_pb2.Operation(name="operations/o", done=True, method="Forward")
    operation.forward.SetInParent()
    assert finished(operation).loss_fn_outputs == []
