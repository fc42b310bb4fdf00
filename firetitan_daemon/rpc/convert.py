"""Records <-> firetitan.v1 messages.

Knows: both sides' fields. Must not know: managers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TypeVar

from firetitan.v1 import (
    checkpoint_pb2,
    command_pb2,
    deployment_pb2,
    model_pb2,
    operation_pb2,
    session_pb2,
    shape_pb2,
    trainer_pb2,
)
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from firetitan_daemon.control.codec import Header
from firetitan_daemon.control.deployment_workers import ReplicaInfo
from firetitan_daemon.control.session_settings import Wanted
from firetitan_daemon.core import names
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.expiry import expire_time
from firetitan_daemon.core.model_records import Model, ModelInfo, Shape
from firetitan_daemon.core.records import (
    Checkpoint,
    Deployment,
    HotloadTransition,
    LoraSettings,
    Operation,
    ResourceState,
    Session,
    SessionState,
    Snapshot,
    Trainer,
)
from firetitan_daemon.core.shapes import as_loaded
from firetitan_daemon.rpc.errors import record_to_status

_Saved = TypeVar("_Saved", checkpoint_pb2.Checkpoint, checkpoint_pb2.Snapshot)
_TRAINER_STATES = {
    ResourceState.CREATING: trainer_pb2.Trainer.STATE_CREATING,
    ResourceState.ACTIVE: trainer_pb2.Trainer.STATE_ACTIVE,
    ResourceState.RECOVERING: trainer_pb2.Trainer.STATE_RECOVERING,
    ResourceState.STOPPED: trainer_pb2.Trainer.STATE_STOPPED,
    ResourceState.FAILED: trainer_pb2.Trainer.STATE_FAILED,
    ResourceState.DELETING: trainer_pb2.Trainer.STATE_DELETING,
}
_TRANSITIONS = {
    HotloadTransition.FINISH: deployment_pb2.HOTLOAD_TRANSITION_FINISH,
    HotloadTransition.SYNC: deployment_pb2.HOTLOAD_TRANSITION_SYNC,
    HotloadTransition.ASYNC: deployment_pb2.HOTLOAD_TRANSITION_ASYNC,
}
_DEPLOYMENT_STATES = {
    ResourceState.CREATING: deployment_pb2.Deployment.STATE_CREATING,
    ResourceState.ACTIVE: deployment_pb2.Deployment.STATE_ACTIVE,
    ResourceState.RECOVERING: deployment_pb2.Deployment.STATE_RECOVERING,
    ResourceState.STOPPED: deployment_pb2.Deployment.STATE_STOPPED,
    ResourceState.FAILED: deployment_pb2.Deployment.STATE_FAILED,
    ResourceState.DELETING: deployment_pb2.Deployment.STATE_DELETING,
}
_SESSION_STATES = {
    SessionState.ACTIVE: session_pb2.Session.STATE_ACTIVE,
    SessionState.RECOVERING: session_pb2.Session.STATE_RECOVERING,
    SessionState.LOST: session_pb2.Session.STATE_LOST,
    SessionState.CLOSED: session_pb2.Session.STATE_CLOSED,
}
_KINDS = {
    "base": checkpoint_pb2.Snapshot.KIND_BASE,
    "delta": checkpoint_pb2.Snapshot.KIND_DELTA,
    "merged_base": checkpoint_pb2.Snapshot.KIND_MERGED_BASE,
}
KIND_NAMES = {value: name for name, value in _KINDS.items()}
_MODEL_KINDS = {
    "hf_full": model_pb2.Model.KIND_FULL,
    "peft_adapter": model_pb2.Model.KIND_ADAPTER,
}
_FORMATS = {
    "peft_adapter": checkpoint_pb2.Snapshot.FORMAT_PEFT_ADAPTER,
    "hf_full": checkpoint_pb2.Snapshot.FORMAT_HF_FULL,
    "xor_zstd": checkpoint_pb2.Snapshot.FORMAT_XOR_ZSTD,
}


def timestamp(seconds: float) -> Timestamp:
    """Unix seconds as a Timestamp."""
    stamp = Timestamp()
    stamp.FromNanoseconds(int(seconds * 1e9))
    return stamp


def duration(seconds: float) -> Duration:
    """Seconds as a Duration."""
    message = Duration()
    message.FromNanoseconds(int(seconds * 1e9))
    return message


def seconds(message: Duration) -> float:
    """A Duration as seconds."""
    return message.ToNanoseconds() / 1e9


def header(message: command_pb2.CommandHeader) -> Header:
    """A command's header."""
    return Header(
        session=message.session,
        epoch=message.epoch,
        client_id=message.client_id,
        seq=message.seq,
        request_id=message.request_id,
        part=message.part,
        parts=message.parts,
        seen_failure=message.seen_failure,
    )


def wanted(
    base_model: str, lora: session_pb2.LoraConfig | None, seed: int | None, notes: dict[str, str]
) -> Wanted:
    """Settings as a client names them."""
    if lora is None:
        return Wanted(base_model=base_model or None, seed=seed, user_metadata=notes)

    def given(name: str) -> bool:
        return bool(lora.HasField(name))  # type: ignore[arg-type]

    return Wanted(
        base_model=base_model or None,
        rank=lora.rank,
        alpha=lora.alpha if given("alpha") else None,
        train_attn=lora.train_attn if given("train_attn") else None,
        train_mlp=lora.train_mlp if given("train_mlp") else None,
        train_unembed=lora.train_unembed if given("train_unembed") else None,
        seed=seed,
        user_metadata=notes,
    )


def model_info(base_model: str, model: ModelInfo) -> trainer_pb2.ModelInfo:
    """What was loaded."""
    return trainer_pb2.ModelInfo(
        base_model=base_model,
        path=model.path,
        source=model.source,
        fingerprint=model.fingerprint,
        architecture=model.architecture,
        dtype=model.dtype,
        device=model.device,
        vocab_size=model.vocab_size,
        max_context_length=model.max_context_length,
        num_parameters=model.num_parameters,
        packed=model.packed,
        num_threads=model.num_threads,
        notes=model.notes,
        versions=dict(model.versions),
        revision=model.revision,
        routing=(
            None if model.routing is None else trainer_pb2.RoutingShape(**asdict(model.routing))
        ),
    )


def trainer(record: Trainer, worker_pid: int, session: str) -> trainer_pb2.Trainer:
    """A trainer."""
    message = trainer_pb2.Trainer(
        name=record.name,
        base_model=record.base_model,
        lora_rank=record.lora_rank,
        max_context_length=record.max_context_length,
        state=_TRAINER_STATES[record.state],
        create_time=timestamp(record.create_time),
        worker_pid=worker_pid,
        session=session,
        forward_only=record.forward_only,
        max_lora_rank=record.max_lora_rank,
        inactivity_timeout=duration(record.inactivity_s),
    )
    if record.shape is not None:
        message.shape.CopyFrom(shape(as_loaded(record.shape, record.model)))
    if record.error is not None:
        message.error.CopyFrom(record_to_status(record.error))
    if record.model is not None:
        message.model.CopyFrom(model_info(record.base_model, record.model))
        message.max_context_length = record.max_context_length or record.model.max_context_length
    return message


def deployment(record: Deployment, replicas: Sequence[ReplicaInfo]) -> deployment_pb2.Deployment:
    """A deployment."""
    active = names.snapshot_name(record.active_snapshot) if record.active_snapshot else ""
    ready = sum(one.state is ResourceState.ACTIVE for one in replicas)
    state = record.state
    if state is ResourceState.ACTIVE and not ready:
        # Its last sampler has just ended; the row that says so is being written.
        state = ResourceState.RECOVERING
    message = deployment_pb2.Deployment(
        name=record.name,
        base_model=record.base_model,
        max_context_length=record.max_context_length,
        trainer=names.trainer_name(record.trainer_id) if record.trainer_id else "",
        state=_DEPLOYMENT_STATES[state],
        active_snapshot=active,
        etag=record.etag,
        create_time=timestamp(record.create_time),
        worker_pid=next((one.pid for one in replicas if one.pid), 0),
        transition=_TRANSITIONS[record.transition],
        requires_sync=record.requires_sync,
        inactivity_timeout=duration(record.inactivity_s),
        replicas=record.replicas,
        ready_replicas=ready,
        workers=[
            deployment_pb2.Replica(
                worker=one.worker_id,
                state=_DEPLOYMENT_STATES[one.state],
                pid=one.pid,
                running=one.running,
                unresponsive=one.unresponsive,
            )
            for one in replicas
        ],
    )
    if record.shape is not None:
        message.shape.CopyFrom(shape(as_loaded(record.shape, record.model)))
    if record.error is not None:
        message.error.CopyFrom(record_to_status(record.error))
    if record.model is not None:
        message.model.CopyFrom(model_info(record.base_model, record.model))
        message.max_context_length = record.max_context_length or record.model.max_context_length
    return message


def shape(record: Shape) -> shape_pb2.Shape:
    """A shape."""
    return shape_pb2.Shape(
        name=record.name,
        base_model=record.base_model,
        trainer_mode=record.trainer_mode,
        max_context_length=record.max_context_length,
        dtype=record.dtype,
        device=record.device,
        num_devices=record.num_devices,
        deployment_shape=record.deployment_shape,
        notes=record.notes,
    )


def lora(settings: LoraSettings) -> session_pb2.LoraConfig:
    """An adapter."""
    return session_pb2.LoraConfig(
        rank=settings.rank,
        alpha=settings.alpha,
        train_attn=settings.train_attn,
        train_mlp=settings.train_mlp,
        train_unembed=settings.train_unembed,
    )


def transition(value: int) -> HotloadTransition | None:
    """What becomes of running sequences; None where the request leaves it open.

    Raises:
        FiretitanError: INVALID_ARGUMENT for a number this version does not know.
    """
    if value == deployment_pb2.HOTLOAD_TRANSITION_UNSPECIFIED:
        return None
    for known, number in _TRANSITIONS.items():
        if number == value:
            return known
    raise FiretitanError(
        Reason.INVALID_ARGUMENT,
        f"transition: {value} is unknown; give one of "
        f"{', '.join(deployment_pb2.HotloadTransition.keys())}",
        field="transition",
    )


def session(record: Session) -> session_pb2.Session:
    """A session."""
    return session_pb2.Session(
        name=record.name,
        base_model=record.base_model,
        lora=lora(record.lora),
        seed=record.seed,
        state=_SESSION_STATES[record.state],
        epoch=record.epoch,
        step=record.step,
        commit_seq=record.commit_seq,
        suffix=record.suffix,
        user_metadata=dict(record.user_metadata),
        create_time=timestamp(record.create_time),
        forward_only=record.forward_only,
    )


def checkpoint(record: Checkpoint) -> checkpoint_pb2.Checkpoint:
    """A checkpoint."""
    message = checkpoint_pb2.Checkpoint(
        name=record.name,
        session=record.session,
        base_model=record.base_model,
        lora_rank=record.lora_rank,
        step=record.step,
        commit_seq=record.commit_seq,
        digest=record.digest,
        size_bytes=record.size_bytes,
        create_time=timestamp(record.create_time),
        user_metadata=dict(record.user_metadata),
        tokenizer=record.base.tokenizer,
        base_revision=record.base.revision,
        base_fingerprint=record.base.fingerprint,
        lora=None if record.lora is None else lora(record.lora),
    )
    return _with_expiry(message, record)


def snapshot(record: Snapshot) -> checkpoint_pb2.Snapshot:
    """A snapshot."""
    message = checkpoint_pb2.Snapshot(
        name=record.name,
        session=record.session,
        kind=_KINDS.get(record.kind, checkpoint_pb2.Snapshot.KIND_UNSPECIFIED),
        format=_FORMATS.get(record.format, checkpoint_pb2.Snapshot.FORMAT_UNSPECIFIED),
        parent=names.snapshot_name(record.parent) if record.parent else "",
        step=record.step,
        commit_seq=record.commit_seq,
        digest=record.digest,
        result_digest=record.result_digest,
        size_bytes=record.size_bytes,
        base_model=record.base_model,
        lora_rank=record.lora_rank,
        path=record.folder,
        create_time=timestamp(record.create_time),
        notes=record.notes,
        user_metadata=dict(record.user_metadata),
        tokenizer=record.base.tokenizer,
        base_revision=record.base.revision,
        base_fingerprint=record.base.fingerprint,
    )
    return _with_expiry(message, record)


def _with_expiry(message: _Saved, record: Checkpoint | Snapshot) -> _Saved:
    at = expire_time(record)
    if at is not None:
        message.expire_time.CopyFrom(timestamp(at))
    return message


def model(record: Model) -> model_pb2.Model:
    """A promoted model."""
    return model_pb2.Model(
        name=record.full_name,
        kind=_MODEL_KINDS.get(record.kind, model_pb2.Model.KIND_UNSPECIFIED),
        location=record.folder,
        snapshot=record.snapshot,
        base_model=record.base_model,
        lora_rank=record.lora_rank,
        tokenizer=record.base.tokenizer,
        base_revision=record.base.revision,
        base_fingerprint=record.base.fingerprint,
        digest=record.digest,
        size_bytes=record.size_bytes,
        create_time=timestamp(record.create_time),
    )


def operation(record: Operation) -> operation_pb2.Operation:
    """An operation without its result; an error is set."""
    message = operation_pb2.Operation(
        name=record.name,
        done=record.done,
        method=record.method,
        target=record.target,
        client_id=record.client_id,
        seq=record.seq,
        commit_seq=record.commit_seq,
        create_time=timestamp(record.create_time),
    )
    if record.done:
        message.finish_time.CopyFrom(timestamp(record.finish_time))
        if record.error is not None:
            message.error.CopyFrom(record_to_status(record.error))
    return message
