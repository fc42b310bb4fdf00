"""Opening the session a training client works on, and attaching lanes to it.

Knows: CreateSession, AttachSession, which settings are compared. Must not know: how trainers are
made, what commands do.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from firetitan.v1 import (
    checkpoint_pb2,
    checkpoint_service_pb2,
    session_pb2,
    trainer_pb2,
    trainer_service_pb2,
    training_service_pb2,
)

from firetitan_client.attachment import Place
from firetitan_client.errors import NotFound
from firetitan_client.transport import Transport

logger = logging.getLogger("firetitan")

_GONE = frozenset({"WORKER_UNAVAILABLE"})


@dataclass(frozen=True)
class Opened:
    """The session a client works on, and its trainer."""

    session: str
    trainer: trainer_pb2.Trainer
    base_model: str
    lora_rank: int
    suffix: str
    user_metadata: Mapping[str, str]


@dataclass(frozen=True)
class Wanted:
    """What the user asked of a session; None is not compared with one that exists."""

    rank: int | None = None
    seed: int | None = None
    alpha: float | None = None
    alpha_is_twice_rank: bool = False
    """Instead of `alpha`: whatever the rank turns out to be."""
    train_attn: bool | None = None
    train_mlp: bool | None = None
    train_unembed: bool | None = None
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    forward_only: bool = False
    """Train nothing, beside the adapters of a trainer that has many."""

    def lora(self, rank: int) -> session_pb2.LoraConfig:
        """The adapter, of a rank; sessions without one have no settings."""
        if rank == 0:
            return session_pb2.LoraConfig()
        return session_pb2.LoraConfig(
            rank=rank,
            alpha=2.0 * rank if self.alpha_is_twice_rank else self.alpha,
            train_attn=self.train_attn,
            train_mlp=self.train_mlp,
            train_unembed=self.train_unembed,
        )


async def open_session(
    transport: Transport,
    trainer: trainer_pb2.Trainer,
    session: str | None,
    wanted: Wanted,
    request_id: str,
) -> Opened:
    """Create the trainer's session, or join the one that is there.

    On a trainer that has many each request creates another.

    Args:
        transport: The daemon.
        trainer: Ready.
        session: Join this one; None: the trainer's.
        wanted: Settings; those that are given must be those of a session that exists.
        request_id: Of this opening, however often it is tried.

    Raises:
        FiretitanError: INVALID_ARGUMENT naming the setting that differs; SESSION_NOT_FOUND;
            WORKER_UNAVAILABLE where the trainer's worker is gone: create the trainer again.
    """
    if session is None and not trainer.session:
        found = await _create(transport, trainer, wanted, request_id)
    else:
        found = await _join(transport, trainer, session or trainer.session, wanted)
        if found.state == session_pb2.Session.STATE_LOST and session is None:
            logger.warning(
                "%s lost its weights with its worker and starts over; load a checkpoint to go on",
                found.name,
            )
            found = await _create(transport, trainer, wanted, request_id)
    return Opened(
        found.name,
        trainer,
        found.base_model,
        found.lora.rank,
        found.suffix,
        dict(found.user_metadata),
    )


async def _create(
    transport: Transport, trainer: trainer_pb2.Trainer, wanted: Wanted, request_id: str
) -> session_pb2.Session:
    rank = wanted.rank or 0 if trainer.max_lora_rank else trainer.lora_rank
    answer = await transport.call(
        "TrainingService/CreateSession",
        training_service_pb2.CreateSessionRequest(
            trainer=trainer.name,
            base_model=trainer.base_model,
            lora=wanted.lora(rank),
            seed=wanted.seed,
            user_metadata=dict(wanted.user_metadata),
            request_id=request_id,
            forward_only=wanted.forward_only,
        ),
        training_service_pb2.CreateSessionResponse,
        final=_GONE,
    )
    made: session_pb2.Session = answer.session
    return made


async def _join(
    transport: Transport, trainer: trainer_pb2.Trainer, name: str, wanted: Wanted
) -> session_pb2.Session:
    rank = trainer.lora_rank
    if trainer.max_lora_rank:
        rank = (await _get(transport, name)).lora.rank if wanted.rank is None else wanted.rank
    lora = wanted.lora(rank) if rank else None
    answer = await transport.call(
        "TrainingService/AttachSession",
        training_service_pb2.AttachSessionRequest(
            name=name, client_id=uuid.uuid4().hex, lora=lora, seed=wanted.seed
        ),
        training_service_pb2.AttachSessionResponse,
        final=_GONE,
    )
    joined: session_pb2.Session = answer.session
    return joined


async def _get(transport: Transport, name: str) -> session_pb2.Session:
    answer = await transport.call(
        "TrainingService/GetSession",
        training_service_pb2.GetSessionRequest(name=name),
        training_service_pb2.GetSessionResponse,
    )
    found: session_pb2.Session = answer.session
    return found


async def close_session(transport: Transport, name: str) -> None:
    """Finish what a session accepted and close it for good.

    Raises:
        FiretitanError: UNSUPPORTED where it trains every parameter.
    """
    await transport.call(
        "TrainingService/CloseSession",
        training_service_pb2.CloseSessionRequest(name=name),
        training_service_pb2.CloseSessionResponse,
        timeout_s=None,
    )


async def attach(transport: Transport, session: str, client_id: str) -> Place:
    """Open a lane."""
    answer = await transport.call(
        "TrainingService/AttachSession",
        training_service_pb2.AttachSessionRequest(name=session, client_id=client_id),
        training_service_pb2.AttachSessionResponse,
    )
    return Place(answer.session.name, answer.session.epoch, answer.next_seq)


async def get_trainer(transport: Transport, name: str) -> trainer_pb2.Trainer:
    """A trainer by its full name."""
    answer = await transport.call(
        "TrainerService/GetTrainer",
        trainer_service_pb2.GetTrainerRequest(name=name),
        trainer_service_pb2.GetTrainerResponse,
    )
    found: trainer_pb2.Trainer = answer.trainer
    return found


async def find_checkpoint(transport: Transport, reference: str) -> checkpoint_pb2.Checkpoint | None:
    """The daemon's record of a checkpoint; None for a bare name, which needs a trainer.

    Args:
        transport: The daemon.
        reference: A full name, or `cross_job://trainer/name`.

    Raises:
        FiretitanError: CHECKPOINT_NOT_FOUND, NAME_INVALID.
    """
    job, _, name = reference.removeprefix("cross_job://").rpartition("/")
    if reference.startswith("cross_job://"):
        rows = await checkpoints(transport, f"trainers/{job}")
        found = [row for row in rows if row.name.rpartition("/")[2] == name]
        if not found:
            raise NotFound(
                f"{reference}: trainer {job!r} has no checkpoint of this name; list_checkpoints() "
                "of a client there shows what it has",
                reason="CHECKPOINT_NOT_FOUND",
            )
        return max(found, key=lambda row: row.create_time.ToNanoseconds())
    if "/" not in reference:
        return None
    answer = await transport.call(
        "CheckpointService/GetCheckpoint",
        checkpoint_service_pb2.GetCheckpointRequest(name=reference),
        checkpoint_service_pb2.GetCheckpointResponse,
    )
    row: checkpoint_pb2.Checkpoint = answer.checkpoint
    return row


async def find_snapshot(transport: Transport, reference: str) -> str:
    """The full name of a snapshot.

    Raises:
        FiretitanError: SNAPSHOT_NOT_FOUND, NAME_INVALID.
    """
    answer = await transport.call(
        "CheckpointService/GetSnapshot",
        checkpoint_service_pb2.GetSnapshotRequest(name=reference),
        checkpoint_service_pb2.GetSnapshotResponse,
    )
    return str(answer.snapshot.name)


async def checkpoints(transport: Transport, parent: str) -> list[checkpoint_pb2.Checkpoint]:
    """The checkpoints of a trainer or session, in natural order of their names."""
    rows: list[checkpoint_pb2.Checkpoint] = []
    token: Any = ""
    while True:
        answer = await transport.call(
            "CheckpointService/ListCheckpoints",
            checkpoint_service_pb2.ListCheckpointsRequest(parent=parent, page_token=token),
            checkpoint_service_pb2.ListCheckpointsResponse,
        )
        rows += answer.checkpoints
        token = answer.next_page_token
        if not token:
            return rows


async def checkpoint_names(transport: Transport, parent: str) -> list[str]:
    """Last segments of the checkpoints of a trainer or session, in natural order."""
    rows = await checkpoints(transport, parent)
    return list(dict.fromkeys(row.name.rpartition("/")[2] for row in rows))
