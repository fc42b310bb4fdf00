"""FiretitanError as google.rpc.Status and back: the form failures have on every wire.

Knows: the error table, google.rpc. Must not know: which service failed. Both the public and the
worker protocol send these; `ErrorInfo.reason` decides, the field travels as a BadRequest.
"""

from __future__ import annotations

import logging
import uuid
from typing import Any, NoReturn

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.records import ErrorRecord

DOMAIN = "firetitan.v1"
DETAILS_KEY = "grpc-status-details-bin"
"""Trailing metadata key under which gRPC libraries look for a serialized Status."""

log = logging.getLogger(__name__)


def to_status(error: FiretitanError) -> status_pb2.Status:
    """The Status of an error: code, message, ErrorInfo and, with a field, BadRequest."""
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code), message=error.message)
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(
            reason=error.reason.value, domain=DOMAIN, metadata=error.metadata
        )
    )
    if error.field is not None:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.message
        )
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    return status


def from_status(status: status_pb2.Status) -> FiretitanError:
    """The error of a Status; one without a reason of ours becomes INTERNAL."""
    reason, metadata, field = Reason.INTERNAL, {}, None
    for detail in status.details:
        info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            if info.domain == DOMAIN and info.reason in Reason.__members__:
                reason = Reason(info.reason)
            metadata = dict(info.metadata)
        elif detail.Unpack(request) and request.field_violations:
            field = request.field_violations[0].field
    error = FiretitanError(reason, status.message, field=field)
    error.metadata = metadata
    return error


def to_record(error: FiretitanError) -> ErrorRecord:
    """The error as it is kept; its field goes into the metadata as `field`."""
    metadata = dict(error.metadata)
    if error.field is not None:
        metadata["field"] = error.field
    return ErrorRecord(reason=error.reason.value, message=error.message, metadata=metadata)


def from_record(record: ErrorRecord) -> FiretitanError:
    """The kept error, with its field where the metadata names one."""
    metadata = dict(record.metadata)
    error = FiretitanError(Reason(record.reason), record.message, field=metadata.pop("field", None))
    error.metadata = metadata
    return error


WORKER_LOG = "the worker's log (workers/*/worker.log in the daemon's home)"
DAEMON_LOG = "the daemon's log"


def unforeseen(error: BaseException, doing: str, written_to: str = WORKER_LOG) -> FiretitanError:
    """INTERNAL with an id; the traceback goes to a log under that id, never to a client.

    Args:
        error: What was raised.
        doing: What was being done, for the log and the message, e.g. `ForwardBackward`.
        written_to: The log, as the message calls it.
    """
    error_id = uuid.uuid4().hex[:12]
    log.error("event=unforeseen id=%s doing=%s", error_id, doing, exc_info=error)
    return FiretitanError(
        Reason.INTERNAL,
        f"{doing} failed for an unforeseen reason; {written_to} has it under id {error_id}",
        error_id=error_id,
    )


def from_rpc(error: grpc.aio.AioRpcError) -> FiretitanError:
    """The error behind a failed call; without details of ours, INTERNAL with gRPC's text."""
    for key, value in error.trailing_metadata() or ():
        if key == DETAILS_KEY and isinstance(value, bytes):
            return from_status(status_pb2.Status.FromString(value))
    return FiretitanError(Reason.INTERNAL, f"{error.code().name}: {error.details()}")


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: FiretitanError) -> NoReturn:
    """End a call with an error, its Status in the trailing metadata."""
    await context.abort(
        grpc.StatusCode[error.code],
        error.message,
        trailing_metadata=((DETAILS_KEY, to_status(error).SerializeToString()),),
    )
    raise AssertionError("abort returned")
