"""Failures on the wire: `google.rpc.Status` with ErrorInfo, BadRequest, RetryInfo, SessionLoss.

Knows: reasons, gRPC codes, protobuf. Must not know: why something fails.
"""

from __future__ import annotations

from collections.abc import Mapping

import grpc
from firetitan.v1 import error_pb2
from google.protobuf import any_pb2, message
from google.rpc import error_details_pb2, status_pb2

from firetitan_daemon.core.errors import CODES, FiretitanError, Reason
from firetitan_daemon.core.records import ErrorRecord

DOMAIN = "firetitan.v1"
DETAILS_KEY = "grpc-status-details-bin"


def to_status(error: FiretitanError) -> status_pb2.Status:
    """A failure as a status with details."""
    return _status(str(error.reason), error.message, error.field, error.metadata)


def record_to_status(record: ErrorRecord) -> status_pb2.Status:
    """A stored failure as a status with details."""
    metadata = dict(record.metadata)
    return _status(record.reason, record.message, metadata.pop("field", None), metadata)


def code_of(status: status_pb2.Status) -> grpc.StatusCode:
    """The gRPC code of a status."""
    return next(code for code in grpc.StatusCode if code.value[0] == status.code)


def _status(
    reason: str, text: str, field: str | None, metadata: Mapping[str, str]
) -> status_pb2.Status:
    code = grpc.StatusCode[CODES.get(Reason(reason), "INTERNAL")]
    details: list[message.Message] = [
        error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=dict(metadata))
    ]
    if field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=text)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if "retry_after_s" in metadata:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(float(metadata["retry_after_s"]) * 1e9))
        details.append(retry)
    if reason == Reason.SESSION_LOSS and "cause" in metadata:
        details.append(
            error_pb2.SessionLoss(
                session=metadata.get("session", ""),
                cause=metadata["cause"],
                restored_step=int(metadata.get("restored_step", 0)),
                lost_operations=filter(None, metadata.get("lost_operations", "").split(",")),
                lost_steps=int(metadata.get("lost_steps", 0)),
                hint=metadata.get("hint", ""),
            )
        )
    return status_pb2.Status(
        code=code.value[0], message=text, details=[_pack(detail) for detail in details]
    )


def _pack(detail: message.Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
