"""What a session is asked to be, and whether that goes with its trainer or with what it is.

Knows: records. Must not know: managers, workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.records import LoraSettings, Session, Trainer
from firetitan_daemon.core.texts import check_metadata


@dataclass(frozen=True)
class Wanted:
    """Settings as a client names them; None is not compared and takes the default."""

    base_model: str | None = None
    rank: int | None = None
    alpha: float | None = None
    train_attn: bool | None = None
    train_mlp: bool | None = None
    train_unembed: bool | None = None
    seed: int | None = None
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    forward_only: bool = False
    """Train nothing, on a trainer that has many sessions."""

    def lora(self, trainer: Trainer) -> LoraSettings:
        """The adapter of a session on a trainer that these settings were checked against."""
        rank = trainer.lora_rank
        if trainer.max_lora_rank and not self.forward_only:
            rank = self.rank or 0
        default = LoraSettings(rank)
        return LoraSettings(
            rank=rank,
            alpha=default.alpha if self.alpha is None else self.alpha,
            train_attn=self.train_attn is not False,
            train_mlp=self.train_mlp is not False,
            train_unembed=self.train_unembed is not False,
        )


def check_trainer(trainer: Trainer, wanted: Wanted) -> None:
    """Refuse a session that a trainer cannot have.

    Raises:
        FiretitanError: INVALID_ARGUMENT naming the setting.
    """
    if trainer.max_lora_rank:
        _check_rank(trainer, wanted)
    elif wanted.forward_only and not trainer.forward_only:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"forward_only: {trainer.name} trains and has one session; use a trainer of its own, "
            "or Forward with base_only",
            field="forward_only",
        )
    compared: list[tuple[str, object, object]] = [
        ("base_model", trainer.base_model, wanted.base_model)
    ]
    if not trainer.max_lora_rank:
        compared.append(("lora.rank", trainer.lora_rank, wanted.rank))
    for field_path, found, asked in compared:
        if asked is not None and asked != found:
            raise FiretitanError(
                Reason.INVALID_ARGUMENT,
                f"{field_path}: {asked!r}, but {trainer.name} was created with {found!r}; "
                "leave it out or use another trainer",
                field=field_path,
            )
    check_metadata(wanted.user_metadata)
    if wanted.alpha is not None and not 0 < wanted.alpha < float("inf"):
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"lora.alpha: {wanted.alpha} is not a positive number",
            field="lora.alpha",
        )


def _check_rank(trainer: Trainer, wanted: Wanted) -> None:
    rank = wanted.rank or 0
    if wanted.forward_only and not rank:
        return
    if wanted.forward_only or not 1 <= rank <= trainer.max_lora_rank:
        wish = "0 with forward_only" if wanted.forward_only else f"1 to {trainer.max_lora_rank}"
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"lora.rank: {rank}, but {trainer.name} has max_lora_rank={trainer.max_lora_rank}; "
            f"give {wish}",
            field="lora.rank",
        )


def check_same(session: Session, wanted: Wanted, reason: Reason) -> None:
    """Refuse to take a session for one with other settings.

    Raises:
        FiretitanError: `reason`, naming the setting that differs.
    """
    compared: list[tuple[str, object, object]] = [
        ("base_model", session.base_model, wanted.base_model),
        ("lora.rank", session.lora.rank, wanted.rank),
        ("seed", session.seed, wanted.seed),
    ]
    if session.lora.rank:
        compared += [
            ("lora.alpha", session.lora.alpha, wanted.alpha),
            ("lora.train_attn", session.lora.train_attn, wanted.train_attn),
            ("lora.train_mlp", session.lora.train_mlp, wanted.train_mlp),
            ("lora.train_unembed", session.lora.train_unembed, wanted.train_unembed),
        ]
    for field_path, found, asked in compared:
        if asked is not None and asked != found:
            raise FiretitanError(
                reason,
                f"{field_path}: {asked!r}, but {session.name} has {found!r}; leave it out to "
                "join the session, or use another trainer",
                field=field_path,
                session=session.name,
            )
