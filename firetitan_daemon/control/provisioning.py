"""What creating a trainer and creating a deployment have in common.

Knows: records. Must not know: managers.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Iterable
from dataclasses import replace

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.records import (
    ErrorRecord,
    ModelInfo,
    Operation,
    OperationState,
    Shape,
    SpoolRef,
)
from firetitan_daemon.core.sequencer import MAX_TEXT
from firetitan_daemon.core.shapes import DTYPES, as_loaded

logger = logging.getLogger("firetitan.shapes")


def check_request(base_model: str, max_context_length: int, dtype: str) -> None:
    """Refuse what no worker could load.

    Raises:
        FiretitanError: INVALID_ARGUMENT naming the field.
    """
    if not base_model or "\0" in base_model or len(base_model) > 4096:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"base_model: {base_model[:80]!r} names no model; give a Hugging Face id or a folder",
            field="base_model",
        )
    if max_context_length < 0:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"max_context_length: {max_context_length} is negative; 0 takes the model's own limit",
            field="max_context_length",
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


def check_text(text: str, field: str) -> None:
    """Refuse a request id or the like that is too long to be kept.

    Raises:
        FiretitanError: INVALID_ARGUMENT naming the field.
    """
    if len(text) > MAX_TEXT:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"{field}: has {len(text)} characters; use up to {MAX_TEXT}, e.g. a random UUID",
            field=field,
        )


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
