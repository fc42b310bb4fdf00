"""Records and port values to and from the worker protocol, on the daemon's side.

Knows: core.records, core.worker_ports, firetitan.worker.v1. Must not know: processes, sockets.
Requests and results pass as bytes: the daemon never decodes a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

from firetitan.v1 import trainer_pb2
from firetitan.worker.v1 import worker_pb2

from firetitan_daemon import handshake, status
from firetitan_daemon.core.model_records import ModelInfo, RoutingShape
from firetitan_daemon.core.records import (
    HotloadTransition,
    RecoveryPoint,
    ReplayCheck,
    Session,
    WorkerSpec,
)
from firetitan_daemon.core.worker_ports import (
    Command,
    Outcome,
    SavedFiles,
    SnapshotLayer,
    WorkerSession,
    WorkerStatus,
    WrittenPoint,
)


def spec_to_proto(spec: WorkerSpec, address: str, incarnation: str) -> worker_pb2.WorkerSpec:
    """The specification a worker reads at its start."""
    return worker_pb2.WorkerSpec(
        protocol_version=handshake.PROTOCOL_VERSION,
        worker_id=spec.worker_id,
        kind=spec.kind.value,
        target=spec.target,
        address=address,
        incarnation=incarnation,
        num_threads=spec.num_threads,
        model=load_request(spec),
    )


def load_request(spec: WorkerSpec) -> worker_pb2.LoadModelRequest:
    """What a worker is to load."""
    return worker_pb2.LoadModelRequest(
        base_model=spec.base_model,
        dtype=spec.dtype,
        max_context_length=spec.max_context_length,
        device=spec.device,
    )


def open_request(session: Session) -> worker_pb2.OpenSessionRequest:
    """The session a worker is to open."""
    return worker_pb2.OpenSessionRequest(
        session=session.name,
        seed=session.seed,
        lora_rank=session.lora.rank,
        lora_alpha=session.lora.alpha,
        train_attn=session.lora.train_attn,
        train_mlp=session.lora.train_mlp,
        train_unembed=session.lora.train_unembed,
        forward_only=session.forward_only,
    )


def execute_request(command: Command) -> worker_pb2.ExecuteRequest:
    """A command; its payload goes as the path of its spool file."""
    request = worker_pb2.ExecuteRequest(
        session=command.session,
        commit_seq=command.commit_seq,
        request_id=command.request_id,
        method=command.method,
        spooled=worker_pb2.SpoolFile(
            path=command.payload.path,
            size_bytes=command.payload.size_bytes,
            digest=command.payload.digest,
        ),
        settled_through=command.settled_through,
        client_id=command.client_id,
        seq=command.seq,
        keep_graph=command.keep_graph,
    )
    if command.save is not None:
        request.save.staging = str(command.save.staging)
        request.save.name = command.save.name
        request.save.kind = command.save.kind
        request.save.parent = command.save.parent
    if command.load is not None:
        request.load.folder = str(command.load.folder)
        request.load.digest = command.load.digest
    return request


def apply_request(
    layers: Sequence[SnapshotLayer],
    keep: Sequence[str],
    transition: HotloadTransition,
    keep_prompt_cache: bool,
) -> worker_pb2.ApplyRequest:
    """The snapshots to serve."""
    return worker_pb2.ApplyRequest(
        layers=[_layer_to_proto(layer) for layer in layers],
        keep=keep,
        transition=transition.value,
        keep_prompt_cache=keep_prompt_cache,
    )


def prepare_request(layers: Sequence[SnapshotLayer]) -> worker_pb2.PrepareRequest:
    """The snapshots to build."""
    return worker_pb2.PrepareRequest(layers=[_layer_to_proto(layer) for layer in layers])


def _layer_to_proto(layer: SnapshotLayer) -> worker_pb2.SnapshotLayer:
    return worker_pb2.SnapshotLayer(
        name=layer.name,
        kind=layer.kind,
        format=layer.format,
        path=layer.path,
        digest=layer.digest,
        result_digest=layer.result_digest,
    )


def outcome_from_proto(response: worker_pb2.ExecuteResponse) -> Outcome:
    """What became of a command."""
    session = session_from_proto(response.session)
    kind = response.WhichOneof("outcome")
    if kind == "error":
        record = status.to_record(status.from_status(response.error))
        return Outcome(commit_seq=response.commit_seq, session=session, error=record)
    check = None
    if response.HasField("check"):
        check = ReplayCheck(response.check.digest, response.check.measure)
    if kind == "saved":
        saved = SavedFiles(
            digest=response.saved.digest,
            size_bytes=response.saved.size_bytes,
            result_digest=response.saved.result_digest,
            kind=response.saved.kind,
            format=response.saved.format,
        )
        return Outcome(commit_seq=response.commit_seq, session=session, saved=saved)
    return Outcome(
        commit_seq=response.commit_seq,
        session=session,
        result=response.result,
        check=check,
        graph=response.graph,
    )


def load_point_request(point: RecoveryPoint) -> worker_pb2.LoadRecoveryPointRequest:
    """The recovery point a session is to go on from."""
    return worker_pb2.LoadRecoveryPointRequest(
        session=point.session,
        source=worker_pb2.LoadSource(folder=point.folder, digest=point.digest),
        commit_seq=point.commit_seq,
    )


def point_from_proto(response: worker_pb2.WaitRecoveryPointResponse) -> WrittenPoint:
    """A recovery point in its staging folder."""
    saved = SavedFiles(digest=response.saved.digest, size_bytes=response.saved.size_bytes)
    return WrittenPoint(saved, response.compute_s)


def session_from_proto(state: worker_pb2.SessionState) -> WorkerSession:
    """A session as its worker holds it."""
    return WorkerSession(
        session=state.session,
        applied_commit_seq=state.applied_commit_seq,
        step=state.step,
        pending_backwards=state.pending_backwards,
        forward_passes=state.forward_passes,
        last_snapshot=state.last_snapshot,
        state_bytes=state.state_bytes,
    )


def status_from_proto(response: worker_pb2.DescribeResponse) -> WorkerStatus:
    """Who a worker is and where it stands."""
    return WorkerStatus(
        worker_id=response.worker_id,
        incarnation=response.incarnation,
        pid=response.pid,
        model=model_from_proto(response.model) if response.HasField("model") else None,
        sessions=tuple(session_from_proto(state) for state in response.sessions),
        loaded_snapshots=tuple(response.loaded_snapshots),
        active_snapshot=response.active_snapshot,
        capabilities=tuple(response.capabilities),
    )


def model_from_proto(model: trainer_pb2.ModelInfo) -> ModelInfo:
    """The loaded model."""
    return ModelInfo(
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
        notes=tuple(model.notes),
        versions=dict(model.versions),
        revision=model.revision,
        routing=_routing_from_proto(model.routing) if model.HasField("routing") else None,
    )


def _routing_from_proto(routing: trainer_pb2.RoutingShape) -> RoutingShape:
    return RoutingShape(
        layers=routing.layers,
        experts_per_token=routing.experts_per_token,
        num_experts=routing.num_experts,
    )
