"""A real daemon with a toy and a tiny real model, and a good request for every RPC."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import grpc
import numpy as np
from firetitan.v1 import (
    checkpoint_service_pb2 as checkpoint,
)
from firetitan.v1 import (
    deployment_service_pb2 as deployment,
)
from firetitan.v1 import (
    lease_service_pb2 as lease,
)
from firetitan.v1 import (
    model_service_pb2 as model,
)
from firetitan.v1 import (
    operation_pb2,
    system_service_pb2,
    tensor_pb2,
)
from firetitan.v1 import (
    operation_service_pb2 as operation,
)
from firetitan.v1 import (
    sampling_service_pb2 as sampling,
)
from firetitan.v1 import (
    shape_service_pb2 as shape,
)
from firetitan.v1 import (
    trainer_service_pb2 as trainer,
)
from firetitan.v1 import (
    training_service_pb2 as training,
)
from google.protobuf import message
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message_factory import GetMessageClass
from google.rpc import status_pb2

from support.commands import GOOD as DATUM
from support.hostile import Refusal, path_of, refusal
from support.stubs import TOY, LaneClient, Stubs, optim_request

DEADLINE_S = 20.0


class Served(Protocol):
    """A daemon that runs: a process of its own, or this one."""

    home: Path
    process: Any

    @property
    def address(self) -> str:
        """Where it serves."""


class Site:
    """One model: a trainer with a session, a gradient pending, and a deployment that serves it."""

    def __init__(self, stubs: Stubs, name: str, base_model: str, rank: int) -> None:
        self.stubs, self.base_model = stubs, base_model
        self.trainer, self.deployment = f"trainers/{name}", f"deployments/{name}"
        assert not stubs.create_trainer(name, rank=rank, base_model=base_model).HasField("error")
        assert not stubs.create_deployment(name, base_model=base_model).HasField("error")
        self.session = stubs.session(self.trainer)
        self.lane, self._probe = LaneClient(stubs, self.session), LaneClient(stubs, self.session)
        self.lane.step()
        self.snapshot = stubs.done(self.lane.save_snapshot("served")).snapshot.name
        self.kept_digest = stubs.done(self.lane.save_state("kept")).checkpoint.digest
        assert not stubs.hotload(self.deployment, self.snapshot).HasField("error")
        stubs.done(self.lane.forward_backward())

    def digest(self) -> str:
        """Of weights, optimizer, gradients and counters."""
        return str(self.stubs.done(self._probe.save_state("probe")).checkpoint.digest)

    def new_lane(self) -> LaneClient:
        """Another lane of the session, from now on the one that is used."""
        self.lane = LaneClient(self.stubs, self.session)
        return self.lane

    def graph(self) -> str:
        """A forward that is kept for a Backward."""
        kept = training.ForwardRequest(data=[DATUM], loss_fn="cross_entropy", retain_graph=True)
        return str(self.stubs.done(self.lane.send(kept)).forward.graph)


class World:
    """The daemon, and what is on it."""

    def __init__(self, daemon: Served, tiny_llama: Path | None) -> None:
        self.daemon = daemon
        self.stubs = Stubs(daemon.address)
        self.stream_s = 0.1
        """How long a stream that stays open is listened to."""
        self.toy = Site(self.stubs, "toy", TOY, 0)
        self.sites = [self.toy]
        if tiny_llama is not None:
            self.llama = Site(self.stubs, "llama", str(tiny_llama), 4)
            self.sites.append(self.llama)

    def processes(self) -> list[int]:
        """The daemon, and the workers of the models."""
        shown = self.stubs.trainers.ListTrainers(trainer.ListTrainersRequest()).trainers
        served = self.stubs.deployments.ListDeployments(deployment.ListDeploymentsRequest())
        ours = {name for site in self.sites for name in (site.trainer, site.deployment)}
        found = {one.name: one.worker_pid for one in [*shown, *served.deployments]}
        process = self.daemon.process
        assert process is not None and process.poll() is None
        return [process.pid, *(found[name] for name in sorted(ours))]

    def clear(self) -> None:
        """Delete the trainers and deployments that hostile requests made after all."""
        ours = {name for site in self.sites for name in (site.trainer, site.deployment)}
        for one in self.stubs.trainers.ListTrainers(trainer.ListTrainersRequest()).trainers:
            if one.name not in ours:
                self.stubs.trainers.DeleteTrainer(trainer.DeleteTrainerRequest(name=one.name))
        listed = self.stubs.deployments.ListDeployments(deployment.ListDeploymentsRequest())
        for other in listed.deployments:
            if other.name not in ours:
                request = deployment.DeleteDeploymentRequest(name=other.name)
                self.stubs.deployments.DeleteDeployment(request)

    def outcome(self, method: MethodDescriptor, raw: bytes) -> Refusal | None:
        """Send bytes to an RPC; why it was refused, None where it was not.

        A command that was accepted is waited for: what it came to counts.
        """
        try:
            if method.client_streaming:
                call = self.stubs.channel.stream_stream(path_of(method))
                list(call(iter([raw]), timeout=self.stream_s))
            elif method.server_streaming:
                list(self.stubs.channel.unary_stream(path_of(method))(raw, timeout=DEADLINE_S))
            else:
                answer = self.stubs.channel.unary_unary(path_of(method))(raw, timeout=DEADLINE_S)
                return self._ended(method, answer, raw)
        except grpc.RpcError as error:
            if method.client_streaming and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return None
            return self._told(error, raw)
        return None

    def _told(self, error: grpc.RpcError, sent: bytes) -> Refusal:
        """Read a failed call."""
        for key, value in error.trailing_metadata() or ():
            if key == "grpc-status-details-bin":
                status = status_pb2.Status.FromString(value)
                assert status.message == error.details()
                return refusal(status, [str(self.daemon.home)], sent=sent)
        raise AssertionError(f"without details: {error}")

    def _ended(self, method: MethodDescriptor, answer: bytes, sent: bytes) -> Refusal | None:
        response = GetMessageClass(method.output_type).FromString(answer)
        accepted = getattr(response, "operation", None)
        if not isinstance(accepted, operation_pb2.Operation) or not accepted.name:
            return None
        ended = self.stubs.wait(accepted.name)
        if not ended.HasField("error"):
            return None
        return refusal(ended.error, [str(self.daemon.home)], sent=sent)


def _prompt(request: sampling.SampleRequest) -> sampling.SampleRequest:
    chunk = request.prompt.chunks.add()
    chunk.encoded_text.token_ids = np.array([1, 2], "<i4").tobytes()
    request.params.max_tokens = 2
    request.params.seed = 1
    request.params.stop.append("stop")
    request.params.stop_token_ids.append(5)
    return request


def _sample(site: Site) -> sampling.SampleRequest:
    return _prompt(sampling.SampleRequest(deployment=site.deployment, num_samples=1))


def _lora() -> Any:
    return {"rank": 0}


def _nowhere(kind: Any) -> Callable[[Site], message.Message]:
    """For RPCs that end or remove something: of a name that nothing has."""
    return lambda site: kind(name="nobody-has-this-name")


GOOD: dict[str, Callable[[Site], message.Message]] = {
    "CheckpointService/SaveState": lambda site: checkpoint.SaveStateRequest(
        checkpoint_id="hostile", user_metadata={"key": "value"}
    ),
    "CheckpointService/LoadState": lambda site: checkpoint.LoadStateRequest(
        checkpoint="kept", with_optimizer=True
    ),
    "CheckpointService/LoadAdapter": lambda site: checkpoint.LoadAdapterRequest(
        adapter="/nowhere/at/all"
    ),
    "CheckpointService/SaveSnapshot": lambda site: checkpoint.SaveSnapshotRequest(
        snapshot_id="hostile"
    ),
    "CheckpointService/GetCheckpoint": lambda site: checkpoint.GetCheckpointRequest(
        name=f"{site.session}/checkpoints/kept"
    ),
    "CheckpointService/ListCheckpoints": lambda site: checkpoint.ListCheckpointsRequest(
        parent=site.trainer
    ),
    "CheckpointService/GetSnapshot": lambda site: checkpoint.GetSnapshotRequest(name=site.snapshot),
    "CheckpointService/ListSnapshots": lambda site: checkpoint.ListSnapshotsRequest(
        parent=site.trainer
    ),
    "CheckpointService/DeleteCheckpoint": _nowhere(checkpoint.DeleteCheckpointRequest),
    "CheckpointService/DeleteSnapshot": _nowhere(checkpoint.DeleteSnapshotRequest),
    "DeploymentService/CreateDeployment": lambda site: deployment.CreateDeploymentRequest(
        deployment_id=site.deployment.rpartition("/")[2],
        base_model=site.base_model,
        request_id=uuid.uuid4().hex,
        inactivity_timeout=Duration(),
    ),
    "DeploymentService/GetDeployment": lambda site: deployment.GetDeploymentRequest(
        name=site.deployment
    ),
    "DeploymentService/ListDeployments": lambda site: deployment.ListDeploymentsRequest(),
    "DeploymentService/DeleteDeployment": _nowhere(deployment.DeleteDeploymentRequest),
    "DeploymentService/ScaleDeployment": _nowhere(deployment.ScaleDeploymentRequest),
    "DeploymentService/HotloadSnapshot": lambda site: deployment.HotloadSnapshotRequest(
        deployment=site.deployment, snapshot=site.snapshot, request_id=uuid.uuid4().hex
    ),
    "DeploymentService/PinSnapshot": lambda site: deployment.PinSnapshotRequest(
        deployment=site.deployment, snapshot=site.snapshot, holder="h", release=True
    ),
    "LeaseService/HoldLease": lambda site: lease.HoldLeaseRequest(
        client_id="c", label="l", uses=[lease.Use(name="trainers/nobody-has-this-name")]
    ),
    "LeaseService/ReleaseLease": lambda site: lease.ReleaseLeaseRequest(
        client_id="c", uses=[lease.Use(name="trainers/nobody-has-this-name")]
    ),
    "LeaseService/ListLeases": lambda site: lease.ListLeasesRequest(),
    "ModelService/PromoteCheckpoint": lambda site: model.PromoteCheckpointRequest(
        checkpoint=site.snapshot, model_id="hostile", base_model=site.base_model
    ),
    "ModelService/GetModel": _nowhere(model.GetModelRequest),
    "ModelService/ListModels": lambda site: model.ListModelsRequest(),
    "ModelService/DeleteModel": _nowhere(model.DeleteModelRequest),
    "ModelService/ExportCheckpoint": lambda site: model.ExportCheckpointRequest(
        checkpoint="snapshots/nobody-has-this-name", folder="/nowhere/at/all"
    ),
    "OperationService/GetOperation": _nowhere(operation.GetOperationRequest),
    "OperationService/ListOperations": lambda site: operation.ListOperationsRequest(
        parent=site.session
    ),
    "OperationService/WaitOperation": _nowhere(operation.WaitOperationRequest),
    "OperationService/CancelOperation": _nowhere(operation.CancelOperationRequest),
    "OperationService/WatchOperations": lambda site: operation.WatchOperationsRequest(
        session=site.session, client_id="nobody"
    ),
    "SamplingService/Sample": _sample,
    "SamplingService/SampleStream": lambda site: sampling.SampleStreamRequest(
        request=_sample(site)
    ),
    "ShapeService/GetShape": lambda site: shape.GetShapeRequest(name="local"),
    "ShapeService/ListShapes": lambda site: shape.ListShapesRequest(),
    "SystemService/GetSystemInfo": lambda site: system_service_pb2.GetSystemInfoRequest(),
    "SystemService/Drain": lambda site: system_service_pb2.DrainRequest(),
    "TrainerService/CreateTrainer": lambda site: trainer.CreateTrainerRequest(
        trainer_id=site.trainer.rpartition("/")[2],
        base_model=site.base_model,
        request_id=uuid.uuid4().hex,
        inactivity_timeout=Duration(),
    ),
    "TrainerService/GetTrainer": lambda site: trainer.GetTrainerRequest(name=site.trainer),
    "TrainerService/ListTrainers": lambda site: trainer.ListTrainersRequest(),
    "TrainerService/DeleteTrainer": _nowhere(trainer.DeleteTrainerRequest),
    "TrainingService/CreateSession": lambda site: training.CreateSessionRequest(
        trainer=site.trainer, seed=7, request_id=uuid.uuid4().hex, user_metadata={"key": "value"}
    ),
    "TrainingService/CloseSession": _nowhere(training.CloseSessionRequest),
    "TrainingService/AttachSession": lambda site: training.AttachSessionRequest(
        name=site.session, client_id="another"
    ),
    "TrainingService/GetSession": lambda site: training.GetSessionRequest(name=site.session),
    "TrainingService/ListSessions": lambda site: training.ListSessionsRequest(parent=site.trainer),
    "TrainingService/Forward": lambda site: training.ForwardRequest(
        data=[DATUM], loss_fn="cross_entropy"
    ),
    "TrainingService/Backward": lambda site: training.BackwardRequest(
        graph=site.graph(),
        output_grads=[
            tensor_pb2.Tensor(data_type=tensor_pb2.DATA_TYPE_FLOAT32, shape=[3], data=bytes(12))
        ],
    ),
    "TrainingService/ForwardBackward": lambda site: training.ForwardBackwardRequest(
        data=[DATUM], loss_fn="cross_entropy"
    ),
    "TrainingService/OptimStep": lambda site: optim_request(),
}
"""By `Service/Method`: a request that is right but for what a test does to it."""


MAKERS = ("CreateTrainer", "CreateDeployment")
NAMES = ("trainer_id", "deployment_id")
"""Of things that are made if the name is free: hostile requests keep to those there are."""


_IDLE_S = 3600


def tamed(method: MethodDescriptor, raw: bytes, good: message.Message | None = None) -> bytes:
    """A request that makes a thing has it stopped no moment later, as is right for one so idle.

    With a good one it makes none of another name either: starting workers takes seconds.
    """
    if method.name not in MAKERS:
        return raw
    try:
        request = GetMessageClass(method.input_type).FromString(raw)
    except message.DecodeError:
        return raw
    for name in NAMES:
        if good is not None and name in method.input_type.fields_by_name:
            setattr(request, name, getattr(good, name))
    if 0 <= request.inactivity_timeout.seconds < _IDLE_S and request.HasField("inactivity_timeout"):
        request.inactivity_timeout.seconds += _IDLE_S
    return request.SerializeToString()


def name_of(method: MethodDescriptor) -> str:
    """The key of an RPC in `GOOD`."""
    return f"{method.containing_service.name}/{method.name}"
