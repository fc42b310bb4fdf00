"""Errors keep everything on their way over the wire and into the ledger."""

from __future__ import annotations

import pytest
from google.rpc import code_pb2, status_pb2

from firetitan_daemon import status
from firetitan_daemon.core.errors import FiretitanError, Reason


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_round_trips(reason: Reason) -> None:
    error = FiretitanError(reason, "what and why", field="data[3].x", seq="4")
    message = status.to_status(error)
    assert message.code == code_pb2.Code.Value(error.code)
    for got in (status.from_status(message), status.from_record(status.to_record(error))):
        assert (got.reason, got.message, got.field, got.metadata) == (
            reason,
            "what and why",
            "data[3].x",
            {"seq": "4"},
        )


def test_without_a_field_there_is_none() -> None:
    got = status.from_status(status.to_status(FiretitanError(Reason.CLOSED, "gone")))
    assert got.field is None and got.metadata == {}


def test_a_status_of_others_is_internal() -> None:
    got = status.from_status(status_pb2.Status(code=5, message="not ours"))
    assert got.reason is Reason.INTERNAL and got.message == "not ours"


def test_unforeseen_errors_show_an_id_and_no_internals(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise KeyError("secret detail")
    except KeyError as error:
        got = status.unforeseen(error, "OptimStep")
    assert got.reason is Reason.INTERNAL
    assert "secret" not in got.message
    assert got.metadata["error_id"] in got.message
    assert got.metadata["error_id"] in caplog.text and "secret detail" in caplog.text
