"""Reasons to exceptions."""

from __future__ import annotations

import pickle

import pytest
from firetitan.v1 import error_pb2
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from firetitan_client import errors


def status(code: int, message: str, *details: Message) -> status_pb2.Status:
    made = status_pb2.Status(code=code, message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        made.details.append(packed)
    return made


def info(reason: str, **metadata: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain=errors.DOMAIN, metadata=metadata)


def test_every_reason_has_a_class() -> None:
    reasons = {name.removeprefix("ERROR_REASON_") for name in error_pb2.ErrorReason.keys()} - {
        "UNSPECIFIED"
    }
    assert set(errors.BY_REASON) == reasons


@pytest.mark.parametrize(
    ("reason", "builtin"),
    [
        ("INVALID_DATUM", ValueError),
        ("SNAPSHOT_NOT_FOUND", KeyError),
        ("ALREADY_EXISTS", ValueError),
        ("NO_GRADIENTS", RuntimeError),
        ("UNSUPPORTED", NotImplementedError),
        ("DAEMON_DRAINING", ConnectionError),
        ("UNAUTHENTICATED", PermissionError),
    ],
)
def test_builtin_exceptions_catch_them(reason: str, builtin: type[Exception]) -> None:
    error = errors.from_status(status(code_pb2.UNKNOWN, "what happened", info(reason)))
    assert isinstance(error, builtin)
    assert isinstance(error, errors.FiretitanError)
    assert error.reason == reason
    assert str(error) == "what happened"


def test_details_are_read() -> None:
    field = error_details_pb2.BadRequest(
        field_violations=[error_details_pb2.BadRequest.FieldViolation(field="data[1]")]
    )
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(250)
    error = errors.from_status(
        status(code_pb2.RESOURCE_EXHAUSTED, "full", info("QUEUE_FULL", limit="x"), field, retry)
    )
    assert isinstance(error, errors.Busy)
    assert error.status_code == 429
    assert (error.field, error.retry_after_s, error.metadata) == ("data[1]", 0.25, {"limit": "x"})


def test_session_loss_says_what_is_gone() -> None:
    loss = error_pb2.SessionLoss(
        session="trainers/t/sessions/s", restored_step=4, lost_operations=["operations/1"]
    )
    error = errors.from_status(status(code_pb2.DATA_LOSS, "gone", info("SESSION_LOSS"), loss))
    assert isinstance(error, errors.SessionLost)
    assert error.restored_step == 4
    assert error.lost_operations == ("operations/1",)


def test_unknown_reasons_and_foreign_domains_go_by_code() -> None:
    newer = errors.from_status(status(code_pb2.NOT_FOUND, "x", info("SOMETHING_NEW")))
    assert isinstance(newer, errors.NotFound)
    assert newer.reason == "SOMETHING_NEW"
    foreign = error_details_pb2.ErrorInfo(reason="NO_GRADIENTS", domain="example.com")
    assert type(errors.from_status(status(code_pb2.INTERNAL, "x", foreign))) is (
        errors.InternalError
    )


def test_errors_cross_process_pools() -> None:
    error = errors.SessionLost("gone", restored_step=2, lost_operations=("a",))
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is errors.SessionLost
    assert (str(copy), copy.restored_step, copy.reason) == ("gone", 2, "SESSION_LOSS")
