"""What creating a trainer and creating a deployment have in common.

Knows: records. Must not know: managers.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from firetitan_daemon.control.services import Services
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.expiry import MAX_TTL_S
from firetitan_daemon.core.model_names import check_location
from firetitan_daemon.core.model_records import ModelInfo, Shape
from firetitan_daemon.core.records import (
    Deployment,
    ErrorRecord,
    Operation,
    OperationState,
    ResourceState,
    SpoolRef,
    Trainer,
)
from firetitan_daemon.core.shapes import DTYPES, as_loaded

logger = logging.getLogger("firetitan.shapes")

ForgetCleanup = Callable[[str], Awaitable[None]]
"""Drops the clean-up that waits for a name, before a new trainer or deployment gets that name."""


def check_request(
    base_model: str, max_context_length: int, dtype: str, inactivity: float | None
) -> None:
    """Refuse what no worker could load.

    Raises:
        FiretitanError: INVALID_ARGUMENT naming the field.
    """
    check_location(base_model, "base_model")
    if max_context_length < 0:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"max_context_length: {max_context_length} is negative; 0 takes the model's own limit",
            field="max_context_length",
        )
    if inactivity is not None and not 0 <= inactivity <= MAX_TTL_S:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"inactivity_timeout: {inactivity:g} s; give up to {MAX_TTL_S:.0f} s, or 0 to never "
            "stop it",
            field="inactivity_timeout",
        )
    if dtype not in DTYPES:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}",
            field="dtype",
        )


def check_equal(name: str, compared: Iterable[tuple[str, object, object]], id_field: str) -> None:
    """Refuse to create what exists as something else.

    Args:
        name: Of what exists.
        compared: (field, as it is, as asked for) of each setting.
        id_field: The field that another id goes in.

    Raises:
        FiretitanError: ALREADY_EXISTS naming the field that differs.
    """
    for field_path, found, asked in compared:
        if found != asked:
            raise FiretitanError(
                Reason.ALREADY_EXISTS,
                f"{field_path}: {asked!r}, but {name} exists with {found!r}; use that, another "
                f"{id_field}, or delete it first",
                field=field_path,
            )


def check_etag(name: str, found: str, wanted: str) -> None:
    """Refuse to change what somebody else has changed.

    Args:
        name: Of what is to change.
        found: Its etag.
        wanted: The etag it must have; empty: any.

    Raises:
        FiretitanError: ETAG_MISMATCH.
    """
    if wanted and wanted != found:
        raise FiretitanError(
            Reason.ETAG_MISMATCH,
            f"etag: {wanted!r}, but {name} has {found!r} now: someone changed it since; read it "
            "again and decide anew",
            field="etag",
            etag=found,
        )


def new_etag() -> str:
    """An etag nobody has seen."""
    return uuid.uuid4().hex[:16]


def choose_id(prefix: str, wanted: str, request_id: str) -> str:
    """The wanted id, else one made from the request's, so that a repeat finds what it made."""
    if wanted:
        return wanted
    if not request_id:
        return f"{prefix}-{uuid.uuid4().hex[:8]}"
    return f"{prefix}-{hashlib.blake2b(request_id.encode(), digest_size=4).hexdigest()}"


def log_shape(name: str, shape: Shape | None, model: ModelInfo) -> None:
    """Say what was chosen for a trainer or a deployment."""
    if shape is not None:
        chosen = as_loaded(shape, model)
        logger.info(
            "shape of %s shape=%s model=%s source=%s max_context_length=%d dtype=%s device=%s",
            name,
            chosen.name,
            chosen.base_model,
            model.source,
            chosen.max_context_length,
            chosen.dtype,
            chosen.device,
        )


def context_length(record: Trainer | Deployment) -> int:
    """The longest sequence, in tokens; 0 where the model that limits it is not loaded yet."""
    if record.max_context_length or record.model is None:
        return record.max_context_length
    return record.model.max_context_length


def check_same(
    existing: Trainer | Deployment,
    base_model: str,
    dtype: str,
    max_context_length: int,
    id_field: str,
    *others: tuple[str, object, object],
) -> None:
    """Refuse to join a trainer or a deployment that is not what was asked for.

    Args:
        existing: What is there.
        base_model: As asked for.
        dtype: As asked for; "auto" is whatever it has.
        max_context_length: As asked for; 0 is whatever it has.
        id_field: The field that another id goes in.
        others: Further settings: field, what it has, what was asked for.

    Raises:
        FiretitanError: ALREADY_EXISTS naming the field that differs; CLOSED while it is deleted.
    """
    if existing.state is ResourceState.DELETING:
        raise FiretitanError(
            Reason.CLOSED, f"{existing.name} is being deleted; try again when it is gone"
        )
    compared: list[tuple[str, object, object]] = [
        ("base_model", existing.base_model, base_model),
        *others,
    ]
    if max_context_length and context_length(existing):
        compared.append(("max_context_length", context_length(existing), max_context_length))
    if dtype != "auto":
        compared.append(("dtype", existing.dtype, dtype))
    check_equal(existing.name, compared, id_field)


def failure(record: ErrorRecord) -> FiretitanError:
    """What a failed trainer or deployment answers: for good, whatever ended its worker."""
    error = FiretitanError(Reason(record.reason), record.message, **record.metadata)
    if error.reason is Reason.WORKER_UNAVAILABLE:
        error.reason = Reason.RESOURCE_FAILED
    return error


def inactivity_s(
    asked: float | None, existing: Trainer | Deployment | None, services: Services
) -> float:
    """How long a new record may be unused: as asked, as one of its id had, else the setting."""
    if asked is not None:
        return asked
    return services.inactivity_s if existing is None else existing.inactivity_s


def new_operation(
    method: str,
    target: str,
    request_id: str,
    payload_digest: str,
    now: float,
    payload: SpoolRef | None = None,
) -> Operation:
    """An accepted operation on a trainer or a deployment."""
    return Operation(
        id=uuid.uuid4().hex,
        method=method,
        target=target,
        request_id=request_id or uuid.uuid4().hex,
        payload_digest=payload_digest,
        state=OperationState.ACCEPTED,
        create_time=now,
        payload=payload,
    )


def settled(operation: Operation, now: float, error: ErrorRecord | None = None) -> Operation:
    """The operation, ended."""
    return replace(
        operation,
        state=OperationState.FAILED if error is not None else OperationState.DONE,
        error=error,
        finish_time=now,
        payload=None,
    )
