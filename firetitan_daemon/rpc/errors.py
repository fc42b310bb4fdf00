"""Failures as clients get them: the common status, with RetryInfo and SessionLoss where they apply.

Knows: reasons and the metadata control leaves with them. Must not know: why something fails.
"""

from __future__ import annotations

from firetitan.v1 import error_pb2
from google.rpc import error_details_pb2, status_pb2

from firetitan_daemon import status
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.records import ErrorRecord


def to_status(error: FiretitanError) -> status_pb2.Status:
    """A failure as a status with details."""
    message = status.to_status(error)
    facts = error.metadata
    if "retry_after_s" in facts:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(float(facts["retry_after_s"]) * 1e9))
        message.details.add().Pack(retry)
    if error.reason is Reason.SESSION_LOSS and "cause" in facts:
        loss = error_pb2.SessionLoss(
            session=facts.get("session", ""),
            cause=facts["cause"],
            restored_step=int(facts.get("restored_step", 0)),
            lost_operations=filter(None, facts.get("lost_operations", "").split(",")),
            lost_steps=int(facts.get("lost_steps", 0)),
            hint=facts.get("hint", ""),
            restored_from=facts.get("restored_from", ""),
            lost_backwards=int(facts.get("lost_backwards", 0)),
        )
        message.details.add().Pack(loss)
    return message


def record_to_status(record: ErrorRecord) -> status_pb2.Status:
    """A stored failure as a status with details."""
    return to_status(status.from_record(record))
