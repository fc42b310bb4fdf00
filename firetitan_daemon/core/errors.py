"""Every reason a request can fail for: one table, the same on both sides of the wire.

Knows: reasons, their gRPC code by name, whether a client may try again by itself. Must not know:
gRPC, protobuf. `firetitan.v1.ErrorReason` lists the same names; a test compares them.
"""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Why; clients decide on this, never on the text."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    INVALID_DATUM = "INVALID_DATUM"
    LOSS_INPUT_MISSING = "LOSS_INPUT_MISSING"
    UNKNOWN_LOSS = "UNKNOWN_LOSS"
    NAME_INVALID = "NAME_INVALID"
    NON_FINITE = "NON_FINITE"
    REQUEST_TOO_LARGE = "REQUEST_TOO_LARGE"
    TRAINER_NOT_FOUND = "TRAINER_NOT_FOUND"
    SESSION_NOT_FOUND = "SESSION_NOT_FOUND"
    DEPLOYMENT_NOT_FOUND = "DEPLOYMENT_NOT_FOUND"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    OPERATION_NOT_FOUND = "OPERATION_NOT_FOUND"
    SNAPSHOT_NOT_FOUND = "SNAPSHOT_NOT_FOUND"
    CHECKPOINT_NOT_FOUND = "CHECKPOINT_NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    REQUEST_ID_REUSED = "REQUEST_ID_REUSED"
    SEQ_REUSED = "SEQ_REUSED"
    LANE_BROKEN = "LANE_BROKEN"
    ETAG_MISMATCH = "ETAG_MISMATCH"
    STEP_MISMATCH = "STEP_MISMATCH"
    WEIGHTS_CHANGED = "WEIGHTS_CHANGED"
    SESSION_RESTARTED = "SESSION_RESTARTED"
    SESSION_LOSS = "SESSION_LOSS"
    CHECKSUM_MISMATCH = "CHECKSUM_MISMATCH"
    GRAPH_EXPIRED = "GRAPH_EXPIRED"
    PRECEDING_FAILED = "PRECEDING_FAILED"
    NO_GRADIENTS = "NO_GRADIENTS"
    NO_LOSS_TOKENS = "NO_LOSS_TOKENS"
    CHAIN_BROKEN = "CHAIN_BROKEN"
    SNAPSHOT_IN_USE = "SNAPSHOT_IN_USE"
    SNAPSHOT_NOT_ACTIVE = "SNAPSHOT_NOT_ACTIVE"
    SESSION_FORWARD_ONLY = "SESSION_FORWARD_ONLY"
    CLOSED = "CLOSED"
    CANCELLED = "CANCELLED"
    STATE_DISK_FULL = "STATE_DISK_FULL"
    OUT_OF_DEVICES = "OUT_OF_DEVICES"
    DEVICE_OUT_OF_MEMORY = "DEVICE_OUT_OF_MEMORY"
    QUEUE_FULL = "QUEUE_FULL"
    DAEMON_DRAINING = "DAEMON_DRAINING"
    RECOVERING = "RECOVERING"
    WORKER_UNAVAILABLE = "WORKER_UNAVAILABLE"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    UNSUPPORTED = "UNSUPPORTED"
    INTERNAL = "INTERNAL"
    POISON_COMMAND = "POISON_COMMAND"
    CHECKPOINT_IN_USE = "CHECKPOINT_IN_USE"
    MODEL_IN_USE = "MODEL_IN_USE"
    RESOURCE_FAILED = "RESOURCE_FAILED"
    STATE_NOT_WRITABLE = "STATE_NOT_WRITABLE"


CODES: dict[Reason, str] = {
    Reason.INVALID_ARGUMENT: "INVALID_ARGUMENT",
    Reason.INVALID_DATUM: "INVALID_ARGUMENT",
    Reason.LOSS_INPUT_MISSING: "INVALID_ARGUMENT",
    Reason.UNKNOWN_LOSS: "INVALID_ARGUMENT",
    Reason.NAME_INVALID: "INVALID_ARGUMENT",
    Reason.NON_FINITE: "INVALID_ARGUMENT",
    Reason.REQUEST_TOO_LARGE: "INVALID_ARGUMENT",
    Reason.TRAINER_NOT_FOUND: "NOT_FOUND",
    Reason.SESSION_NOT_FOUND: "NOT_FOUND",
    Reason.DEPLOYMENT_NOT_FOUND: "NOT_FOUND",
    Reason.MODEL_NOT_FOUND: "NOT_FOUND",
    Reason.OPERATION_NOT_FOUND: "NOT_FOUND",
    Reason.SNAPSHOT_NOT_FOUND: "NOT_FOUND",
    Reason.CHECKPOINT_NOT_FOUND: "NOT_FOUND",
    Reason.ALREADY_EXISTS: "ALREADY_EXISTS",
    Reason.REQUEST_ID_REUSED: "ALREADY_EXISTS",
    Reason.SEQ_REUSED: "ABORTED",
    Reason.LANE_BROKEN: "ABORTED",
    Reason.ETAG_MISMATCH: "ABORTED",
    Reason.STEP_MISMATCH: "ABORTED",
    Reason.WEIGHTS_CHANGED: "ABORTED",
    Reason.SESSION_RESTARTED: "ABORTED",
    Reason.SESSION_LOSS: "DATA_LOSS",
    Reason.CHECKSUM_MISMATCH: "DATA_LOSS",
    Reason.GRAPH_EXPIRED: "FAILED_PRECONDITION",
    Reason.PRECEDING_FAILED: "FAILED_PRECONDITION",
    Reason.NO_GRADIENTS: "FAILED_PRECONDITION",
    Reason.NO_LOSS_TOKENS: "FAILED_PRECONDITION",
    Reason.CHAIN_BROKEN: "FAILED_PRECONDITION",
    Reason.SNAPSHOT_IN_USE: "FAILED_PRECONDITION",
    Reason.SNAPSHOT_NOT_ACTIVE: "FAILED_PRECONDITION",
    Reason.SESSION_FORWARD_ONLY: "FAILED_PRECONDITION",
    Reason.CLOSED: "FAILED_PRECONDITION",
    Reason.CANCELLED: "CANCELLED",
    Reason.STATE_DISK_FULL: "RESOURCE_EXHAUSTED",
    Reason.OUT_OF_DEVICES: "RESOURCE_EXHAUSTED",
    Reason.DEVICE_OUT_OF_MEMORY: "RESOURCE_EXHAUSTED",
    Reason.QUEUE_FULL: "RESOURCE_EXHAUSTED",
    Reason.DAEMON_DRAINING: "UNAVAILABLE",
    Reason.RECOVERING: "UNAVAILABLE",
    Reason.WORKER_UNAVAILABLE: "UNAVAILABLE",
    Reason.UNAUTHENTICATED: "UNAUTHENTICATED",
    Reason.UNSUPPORTED: "UNIMPLEMENTED",
    Reason.INTERNAL: "INTERNAL",
    Reason.POISON_COMMAND: "INTERNAL",
    Reason.CHECKPOINT_IN_USE: "FAILED_PRECONDITION",
    Reason.MODEL_IN_USE: "FAILED_PRECONDITION",
    Reason.RESOURCE_FAILED: "FAILED_PRECONDITION",
    Reason.STATE_NOT_WRITABLE: "FAILED_PRECONDITION",
}
"""The gRPC status code of each reason, by name."""


MAX_TEXT_BYTES = 1200
"""Longest message: it travels in the trailers of a call, and those are bounded."""
_MAX_FIELD_BYTES = 400


class FiretitanError(Exception):
    """A failure with a reason both sides know.

    Args:
        reason: What clients decide on.
        message: For people: what is wrong, with field and value, and what to do. One that is
            too long, because a value is, loses its middle.
        field: Path of the offending request field, e.g. `data[3].loss_fn_inputs["weights"]`.
        metadata: Further facts, as strings; become `ErrorInfo.metadata`.
    """

    def __init__(
        self, reason: Reason, message: str, *, field: str | None = None, **metadata: str
    ) -> None:
        message = _shorten(message, MAX_TEXT_BYTES)
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = None if field is None else _shorten(field, _MAX_FIELD_BYTES)
        self.metadata = metadata

    @property
    def code(self) -> str:
        """Name of the gRPC status code."""
        return CODES[self.reason]


def _shorten(text: str, limit: int) -> str:
    raw = text.encode("utf-8", "replace")
    if len(raw) > limit:
        half = limit // 2 - 10
        raw = raw[:half] + b" ... " + raw[-half:]
    return raw.decode("utf-8", "ignore")
