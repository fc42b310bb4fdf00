"""What a trainer is asked to be: a request's values, and whether they are those of one that exists.

Knows: records. Must not know: workers, the manager.
"""

from __future__ import annotations

from dataclasses import dataclass

from firetitan_daemon.control import provisioning
from firetitan_daemon.control.provisioning import check_request
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.model_records import Shape
from firetitan_daemon.core.records import Trainer
from firetitan_daemon.core.texts import check_text


@dataclass(frozen=True)
class TrainerRequest:
    """What a trainer is to be."""

    trainer_id: str
    """Empty: chosen here."""
    base_model: str
    lora_rank: int
    max_context_length: int
    dtype: str
    request_id: str
    payload_digest: str
    forward_only: bool = False
    max_lora_rank: int = 0
    shape_name: str = ""
    """Of its training shape; empty: derived."""
    shape: Shape | None = None
    """Set by the manager."""
    inactivity_s: float | None = None
    """None: the setting for a new one, what it was for one that exists; 0: never stopped."""


def check_values(request: TrainerRequest) -> None:
    """Refuse values that no trainer can have.

    Raises:
        FiretitanError: INVALID_ARGUMENT naming the field.
    """
    check_request(
        request.base_model, request.max_context_length, request.dtype, request.inactivity_s
    )
    check_text(request.request_id, "request_id")
    if not 0 <= request.lora_rank <= 4096:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"lora_rank: {request.lora_rank} is not between 0 (full-parameter) and 4096",
            field="lora_rank",
        )
    if not 0 <= request.max_lora_rank <= 4096:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"max_lora_rank: {request.max_lora_rank} is not between 0 (one session) and 4096",
            field="max_lora_rank",
        )
    if request.max_lora_rank and (request.lora_rank or request.forward_only):
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            "max_lora_rank: given together with lora_rank or forward_only; with max_lora_rank "
            "each session says what it trains",
            field="max_lora_rank",
        )
    if request.forward_only and request.lora_rank:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"lora_rank: {request.lora_rank}, but a forward-only trainer has no adapter; "
            "leave it out",
            field="lora_rank",
        )


def check_same(existing: Trainer, request: TrainerRequest) -> None:
    """Refuse to join a trainer that is not what was asked for.

    Raises:
        FiretitanError: ALREADY_EXISTS naming the field that differs; CLOSED while it is deleted.
    """
    provisioning.check_same(
        existing,
        request.base_model,
        request.dtype,
        request.max_context_length,
        "trainer_id",
        ("lora_rank", existing.lora_rank, request.lora_rank),
        ("forward_only", existing.forward_only, request.forward_only),
        ("max_lora_rank", existing.max_lora_rank, request.max_lora_rank),
    )
