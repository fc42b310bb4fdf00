"""What goes wrong, as exceptions: one class for every reason the daemon can give.

Knows: reasons, `google.rpc.Status`. Must not know: tinker, tensors, how requests are sent.

Every class is also the built-in exception a Python user expects (`ValueError`, `RuntimeError`,
`ConnectionError` ...), so code that catches those needs no import from here.
"""

# ruff: noqa: N818 - the names say what is wrong; "Error" would add nothing
from __future__ import annotations

import concurrent.futures
from collections.abc import Mapping
from typing import Any

DOMAIN = "firetitan.v1"
"""The `domain` of `google.rpc.ErrorInfo` the daemon's reasons live in."""


_MAX_TEXT = 2000


class FiretitanError(Exception):
    """Something failed; `reason` says what kind of thing.

    Args:
        message: For people: what is wrong and what to do. One that is too long, because a value
            is, loses its middle.
        reason: Name of a `firetitan.v1.ErrorReason`, without its prefix; decide on this.
        field: Path of the offending argument, e.g. `data[3].loss_fn_inputs["weights"]`.
        metadata: Further facts as text.
        retry_after_s: Seconds after which another try makes sense, where the daemon knows.
    """

    reason: str = "INTERNAL"
    status_code: int = 500

    def __init__(
        self,
        message: str = "",
        *,
        reason: str | None = None,
        field: str | None = None,
        metadata: dict[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        if len(message) > _MAX_TEXT:
            message = f"{message[: _MAX_TEXT // 2]} ... {message[-_MAX_TEXT // 2 :]}"
        super().__init__(message)
        self.message = message
        if reason is not None:
            self.reason = reason
        self.field = field
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        """The message alone (some built-in bases would quote it)."""
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles by message, then by attributes: crosses process pools whole."""
        return (type(self), (self.message,), self.__dict__)


class TrainingAPIError(FiretitanError, RuntimeError):
    """A failure with an HTTP-like `status_code`, for code that decides on numbers.

    Args:
        message: As of every `FiretitanError`, and so the rest.
        status_code: HTTP's number for it; None: the class's own.
        reason: What kind of thing failed.
        field: Path of the offending argument.
        metadata: Further facts as text.
        retry_after_s: Seconds after which another try makes sense.
    """

    status_code = 500

    def __init__(
        self,
        message: str = "",
        *,
        status_code: int | None = None,
        reason: str | None = None,
        field: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(
            message,
            reason=reason,
            field=field,
            metadata=dict(metadata or {}),
            retry_after_s=retry_after_s,
        )
        if status_code is not None:
            self.status_code = status_code


class InvalidArgument(FiretitanError, ValueError):
    """An argument is malformed or out of range; `field` names it."""

    reason = "INVALID_ARGUMENT"
    status_code = 400


class NotFound(TrainingAPIError, KeyError):
    """A trainer, session, deployment, model, snapshot, checkpoint or operation does not exist."""

    status_code = 404


class AlreadyExists(FiretitanError, ValueError):
    """The resource exists with another specification."""

    reason = "ALREADY_EXISTS"
    status_code = 409


class Aborted(FiretitanError, RuntimeError):
    """Someone else was faster; look at the new state and try again."""

    status_code = 409


class LaneBroken(Aborted):
    """A command of this client never arrived; the client attaches again under a new id."""

    reason = "LANE_BROKEN"


class WeightsChanged(Aborted):
    """Another client moved the weights between forward and backward of a custom loss."""

    reason = "WEIGHTS_CHANGED"


class StepMismatch(Aborted):
    """The session stands at another step than expected."""

    reason = "STEP_MISMATCH"


class SessionRestarted(Aborted):
    """The session went on from an earlier point; the client attaches again."""

    reason = "SESSION_RESTARTED"


class FailedPrecondition(FiretitanError, RuntimeError):
    """The call does not fit the state of what it works on."""

    status_code = 400


class PrecedingFailed(FailedPrecondition):
    """An earlier call of this client failed before anyone saw it, so this one did not run."""

    reason = "PRECEDING_FAILED"


class GraphExpired(FailedPrecondition):
    """The kept forward graph is gone."""

    reason = "GRAPH_EXPIRED"


class NoGradients(FailedPrecondition):
    """`optim_step` without a backward since the last one."""

    reason = "NO_GRADIENTS"


class SnapshotNotActive(FailedPrecondition):
    """The deployment does not hold this snapshot any more."""

    reason = "SNAPSHOT_NOT_ACTIVE"


class ClientClosed(FailedPrecondition):
    """The client or the resource was closed."""

    reason = "CLOSED"


class OperationCancelled(FiretitanError, concurrent.futures.CancelledError):
    """The operation was cancelled before it started."""

    reason = "CANCELLED"
    status_code = 499


class SessionLost(FiretitanError, RuntimeError):
    """A worker died and took work with it.

    `restored_step` is the optimizer step the session goes on from (-1: it cannot go on) and
    `lost_operations` names what is gone.
    """

    reason = "SESSION_LOSS"

    def __init__(
        self,
        message: str = "",
        *,
        reason: str | None = None,
        field: str | None = None,
        metadata: dict[str, str] | None = None,
        retry_after_s: float | None = None,
        restored_step: int = -1,
        lost_operations: tuple[str, ...] = (),
    ) -> None:
        super().__init__(
            message, reason=reason, field=field, metadata=metadata, retry_after_s=retry_after_s
        )
        self.restored_step = restored_step
        self.lost_operations = lost_operations


class Corrupt(FiretitanError, RuntimeError):
    """A stored file is damaged; nothing was loaded from it."""

    reason = "CHECKSUM_MISMATCH"


class Busy(TrainingAPIError, RuntimeError):
    """No room: queue, device memory, devices or disk."""

    reason = "QUEUE_FULL"
    status_code = 429


class Unavailable(FiretitanError, ConnectionError):
    """The daemon or a worker does not answer."""

    reason = "WORKER_UNAVAILABLE"
    status_code = 503


class DaemonNotRunning(Unavailable):
    """Nothing listens at the address; the message says how to start a daemon."""

    reason = "DAEMON_NOT_RUNNING"


class Unauthenticated(FiretitanError, PermissionError):
    """No valid credentials."""

    reason = "UNAUTHENTICATED"
    status_code = 401


class Unsupported(FiretitanError, NotImplementedError):
    """Not supported; the message says what is."""

    reason = "UNSUPPORTED"
    status_code = 501


class InternalError(FiretitanError, RuntimeError):
    """Unforeseen; the message holds an id to look for in the daemon's log."""

    reason = "INTERNAL"


BY_REASON: dict[str, type[FiretitanError]] = {
    "INVALID_ARGUMENT": InvalidArgument,
    "INVALID_DATUM": InvalidArgument,
    "LOSS_INPUT_MISSING": InvalidArgument,
    "UNKNOWN_LOSS": InvalidArgument,
    "NAME_INVALID": InvalidArgument,
    "NON_FINITE": InvalidArgument,
    "REQUEST_TOO_LARGE": InvalidArgument,
    "TRAINER_NOT_FOUND": NotFound,
    "SESSION_NOT_FOUND": NotFound,
    "DEPLOYMENT_NOT_FOUND": NotFound,
    "MODEL_NOT_FOUND": NotFound,
    "OPERATION_NOT_FOUND": NotFound,
    "SNAPSHOT_NOT_FOUND": NotFound,
    "CHECKPOINT_NOT_FOUND": NotFound,
    "ALREADY_EXISTS": AlreadyExists,
    "REQUEST_ID_REUSED": AlreadyExists,
    "SEQ_REUSED": Aborted,
    "LANE_BROKEN": LaneBroken,
    "ETAG_MISMATCH": Aborted,
    "STEP_MISMATCH": StepMismatch,
    "WEIGHTS_CHANGED": WeightsChanged,
    "SESSION_RESTARTED": SessionRestarted,
    "SESSION_LOSS": SessionLost,
    "CHECKSUM_MISMATCH": Corrupt,
    "GRAPH_EXPIRED": GraphExpired,
    "PRECEDING_FAILED": PrecedingFailed,
    "NO_GRADIENTS": NoGradients,
    "NO_LOSS_TOKENS": FailedPrecondition,
    "CHAIN_BROKEN": FailedPrecondition,
    "SNAPSHOT_IN_USE": FailedPrecondition,
    "SNAPSHOT_NOT_ACTIVE": SnapshotNotActive,
    "SESSION_FORWARD_ONLY": FailedPrecondition,
    "CLOSED": ClientClosed,
    "CANCELLED": OperationCancelled,
    "STATE_DISK_FULL": Busy,
    "OUT_OF_DEVICES": Busy,
    "DEVICE_OUT_OF_MEMORY": Busy,
    "QUEUE_FULL": Busy,
    "DAEMON_DRAINING": Unavailable,
    "RECOVERING": Unavailable,
    "WORKER_UNAVAILABLE": Unavailable,
    "UNAUTHENTICATED": Unauthenticated,
    "UNSUPPORTED": Unsupported,
    "INTERNAL": InternalError,
    "POISON_COMMAND": InternalError,
    "CHECKPOINT_IN_USE": FailedPrecondition,
    "MODEL_IN_USE": FailedPrecondition,
    "RESOURCE_FAILED": FailedPrecondition,
    "STATE_NOT_WRITABLE": FailedPrecondition,
}
"""Class of each reason, by its name without the enum's prefix."""

_BY_CODE: dict[int, type[FiretitanError]] = {
    1: OperationCancelled,
    3: InvalidArgument,
    4: Unavailable,
    5: NotFound,
    6: AlreadyExists,
    8: Busy,
    9: FailedPrecondition,
    10: Aborted,
    11: InvalidArgument,
    12: Unsupported,
    14: Unavailable,
    15: Corrupt,
    16: Unauthenticated,
}


def from_status(status: Any) -> FiretitanError:
    """The exception a `google.rpc.Status` stands for.

    Args:
        status: A `google.rpc.status_pb2.Status`, from an operation or from a call's trailers.
    """
    from firetitan.v1 import error_pb2
    from google.rpc import error_details_pb2

    reason, field, retry_after_s = "", None, None
    metadata: dict[str, str] = {}
    loss = error_pb2.SessionLoss()
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        request = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.domain == DOMAIN:
            reason = info.reason.removeprefix("ERROR_REASON_")
            metadata = dict(info.metadata)
        elif detail.Is(request.DESCRIPTOR) and detail.Unpack(request):
            field = request.field_violations[0].field if request.field_violations else None
        elif detail.Is(retry.DESCRIPTOR) and detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToTimedelta().total_seconds()
        elif detail.Is(loss.DESCRIPTOR):
            detail.Unpack(loss)
    kind = BY_REASON.get(reason) or _BY_CODE.get(status.code, InternalError)
    facts: dict[str, Any] = {
        "reason": reason or None,
        "field": field,
        "metadata": metadata,
        "retry_after_s": retry_after_s,
    }
    if kind is SessionLost:
        return SessionLost(
            status.message,
            restored_step=loss.restored_step if loss.session else -1,
            lost_operations=tuple(loss.lost_operations),
            **facts,
        )
    return kind(status.message, **facts)


def from_rpc_error(error: Any) -> FiretitanError:
    """The exception a `grpc.RpcError` stands for; its details decide where it has some.

    Without details (nobody answered) the reason is the name of the gRPC code.
    """
    from google.rpc import status_pb2

    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            return from_status(status_pb2.Status.FromString(value))
    code: int = error.code().value[0]
    name: str = error.code().name
    return _BY_CODE.get(code, InternalError)(error.details() or name, reason=name)
