"""The public protocol by generated stubs alone: what any other language would do."""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
from firetitan.v1 import (
    checkpoint_service_pb2,
    checkpoint_service_pb2_grpc,
    deployment_pb2,
    deployment_service_pb2,
    deployment_service_pb2_grpc,
    model_service_pb2_grpc,
    operation_pb2,
    operation_service_pb2,
    operation_service_pb2_grpc,
    sampling_service_pb2,
    sampling_service_pb2_grpc,
    system_service_pb2_grpc,
    tensor_pb2,
    trainer_pb2,
    trainer_service_pb2,
    trainer_service_pb2_grpc,
    training_service_pb2,
    training_service_pb2_grpc,
)
from google.rpc import error_details_pb2, status_pb2

from support.commands import GOOD

TOY = "firetitan/toy"
START_S = 90.0
"""How long a worker may take until it has its model, on a machine that does much else."""


def reason(error: grpc.RpcError) -> str:
    """The ErrorInfo reason of a failed call."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            return status_reason(status_pb2.Status.FromString(value))
    return f"no reason: {error.code()} {error.details()}"


def status_reason(status: status_pb2.Status) -> str:
    """The ErrorInfo reason of a status."""
    info = error_details_pb2.ErrorInfo()
    for detail in status.details:
        if detail.Unpack(info):
            return info.reason
    return f"no reason: {status.message}"


def retry_delay_s(error: grpc.RpcError) -> float:
    """What the RetryInfo of a failed call asks to wait; 0 without one."""
    retry = error_details_pb2.RetryInfo()
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                if detail.Unpack(retry):
                    return float(retry.retry_delay.ToNanoseconds() / 1e9)
    return 0.0


class Stubs:
    """One channel, every service."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None = None) -> None:
        secure = functools.partial(grpc.secure_channel, credentials=credentials)
        self.channel = (secure if credentials else grpc.insecure_channel)(
            address,
            options=(
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.initial_reconnect_backoff_ms", 50),
                ("grpc.min_reconnect_backoff_ms", 10_000 if credentials else 2_000),
                ("grpc.max_reconnect_backoff_ms", 250),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", -1),
            ),
        )
        self.training = training_service_pb2_grpc.TrainingServiceStub(self.channel)
        self.checkpoints = checkpoint_service_pb2_grpc.CheckpointServiceStub(self.channel)
        self.operations = operation_service_pb2_grpc.OperationServiceStub(self.channel)
        self.trainers = trainer_service_pb2_grpc.TrainerServiceStub(self.channel)
        self.deployments = deployment_service_pb2_grpc.DeploymentServiceStub(self.channel)
        self.sampling = sampling_service_pb2_grpc.SamplingServiceStub(self.channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self.channel)
        self.system = system_service_pb2_grpc.SystemServiceStub(self.channel)

    def retry(self, call: Any, request: Any, timeout_s: float = 30.0) -> Any:
        """Send until something else comes back than from a daemon that is away or ends."""
        away = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return call(request, timeout=timeout_s)
            except grpc.RpcError as error:
                if error.code() not in away or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def wait(self, name: str, timeout_s: float = 30.0) -> operation_pb2.Operation:
        """An operation, done."""
        deadline = time.monotonic() + timeout_s
        while True:
            request = operation_service_pb2.WaitOperationRequest(name=name)
            request.timeout.FromSeconds(5)
            operation = self.retry(self.operations.WaitOperation, request).operation
            if operation.done:
                return operation
            assert time.monotonic() < deadline, f"{name} is not done: {operation}"

    def done(self, operation: operation_pb2.Operation) -> operation_pb2.Operation:
        """An operation, done, and without an error."""
        ended = self.wait(operation.name)
        assert not ended.HasField("error"), ended.error
        return ended

    def create_trainer(
        self, trainer_id: str = "t", *, rank: int = 0, base_model: str = TOY, **more: Any
    ) -> operation_pb2.Operation:
        """Create a trainer and wait for it."""
        making = self.begin_trainer(trainer_id, rank=rank, base_model=base_model, **more)
        return self.wait(making.name, timeout_s=START_S)

    def begin_trainer(
        self, trainer_id: str = "t", *, rank: int = 0, base_model: str = TOY, **more: Any
    ) -> operation_pb2.Operation:
        """Create a trainer; it is not there yet."""
        request = trainer_service_pb2.CreateTrainerRequest(
            trainer_id=trainer_id,
            base_model=base_model,
            lora_rank=rank,
            request_id=uuid.uuid4().hex,
            **more,
        )
        return self.retry(self.trainers.CreateTrainer, request).operation

    def create_deployment(
        self, deployment_id: str = "d", *, base_model: str = TOY, **more: Any
    ) -> operation_pb2.Operation:
        """Create a deployment and wait for it."""
        request = deployment_service_pb2.CreateDeploymentRequest(
            deployment_id=deployment_id,
            base_model=base_model,
            request_id=uuid.uuid4().hex,
            **more,
        )
        made = self.retry(self.deployments.CreateDeployment, request)
        return self.wait(made.operation.name, timeout_s=START_S)

    def hotload(self, deployment: str, snapshot: str, **more: Any) -> operation_pb2.Operation:
        """Begin a hotload and wait for it."""
        request = deployment_service_pb2.HotloadSnapshotRequest(
            deployment=deployment, snapshot=snapshot, request_id=uuid.uuid4().hex, **more
        )
        return self.wait(self.retry(self.deployments.HotloadSnapshot, request).operation.name)

    def all_trainers(self) -> dict[str, trainer_pb2.Trainer]:
        """Every trainer, by name."""
        listed = self.trainers.ListTrainers(trainer_service_pb2.ListTrainersRequest())
        return {one.name: one for one in listed.trainers}

    def all_deployments(self) -> dict[str, deployment_pb2.Deployment]:
        """Every deployment, by name."""
        request = deployment_service_pb2.ListDeploymentsRequest()
        listed = self.deployments.ListDeployments(request)
        return {one.name: one for one in listed.deployments}

    def session(self, trainer: str = "trainers/t", *, seed: int = 7) -> str:
        """Open the trainer's session; returns its name."""
        request = training_service_pb2.CreateSessionRequest(
            trainer=trainer, seed=seed, request_id=uuid.uuid4().hex
        )
        return str(self.retry(self.training.CreateSession, request).session.name)

    def sample(
        self, deployment: str = "deployments/d", *, seed: int = 3, snapshot: str = ""
    ) -> sampling_service_pb2.SampleResponse:
        """Eight tokens after a fixed prompt."""
        request = sampling_service_pb2.SampleRequest(deployment=deployment, snapshot=snapshot)
        chunk = request.prompt.chunks.add()
        chunk.encoded_text.token_ids = np.array([1, 2], dtype="<i4").tobytes()
        request.params.seed = seed
        request.params.max_tokens = 8
        request.params.ignore_eos = True
        return self.retry(self.sampling.Sample, request)


class LaneClient:
    """One lane: numbers its commands, sends them again after UNAVAILABLE."""

    def __init__(self, stubs: Stubs, session: str, client_id: str | None = None) -> None:
        self.stubs = stubs
        self.session = session
        self.client_id = client_id or uuid.uuid4().hex
        request = training_service_pb2.AttachSessionRequest(name=session, client_id=self.client_id)
        attached = stubs.retry(stubs.training.AttachSession, request)
        self.epoch = attached.session.epoch
        self.seq = attached.next_seq
        self.seen_failure = 0

    def header(self, message: Any, *, seq: int | None = None) -> Any:
        """Fill in a command's header under the next seq, or a given one."""
        message.header.session = self.session
        message.header.epoch = self.epoch
        message.header.client_id = self.client_id
        message.header.seq = seq or self.seq
        message.header.request_id = f"{self.client_id}-{message.header.seq}"
        message.header.seen_failure = self.seen_failure
        if seq is None:
            self.seq += 1
        return message

    def send(self, message: Any, *, seq: int | None = None) -> operation_pb2.Operation:
        """Send any command."""
        method = type(message).__name__.removesuffix("Request")
        service = (
            self.stubs.checkpoints
            if method in ("SaveState", "LoadState", "LoadAdapter", "SaveSnapshot")
            else self.stubs.training
        )
        call = getattr(service, method)
        return self.stubs.retry(call, self.header(message, seq=seq)).operation

    def forward_backward(
        self, datum: tensor_pb2.Datum = GOOD, *, seq: int | None = None
    ) -> operation_pb2.Operation:
        """ForwardBackward of one sequence."""
        message = training_service_pb2.ForwardBackwardRequest(data=[datum], loss_fn="cross_entropy")
        return self.send(message, seq=seq)

    def optim_step(self, *, seq: int | None = None) -> operation_pb2.Operation:
        """OptimStep with plain settings."""
        return self.send(optim_request(), seq=seq)

    def save_state(self, name: str, **more: Any) -> operation_pb2.Operation:
        """SaveState under a name."""
        return self.send(checkpoint_service_pb2.SaveStateRequest(checkpoint_id=name, **more))

    def load_state(self, name: str, *, with_optimizer: bool = True) -> operation_pb2.Operation:
        """LoadState of a reference."""
        return self.send(
            checkpoint_service_pb2.LoadStateRequest(checkpoint=name, with_optimizer=with_optimizer)
        )

    def load_adapter(self, adapter: str) -> operation_pb2.Operation:
        """LoadAdapter from a path or an address."""
        return self.send(checkpoint_service_pb2.LoadAdapterRequest(adapter=adapter))

    def save_snapshot(self, name: str, kind: int = 0) -> operation_pb2.Operation:
        """SaveSnapshot under a name."""
        return self.send(checkpoint_service_pb2.SaveSnapshotRequest(snapshot_id=name, kind=kind))

    def step(self) -> operation_pb2.Operation:
        """ForwardBackward and OptimStep, waited for; the latter's operation."""
        self.stubs.done(self.forward_backward())
        return self.stubs.done(self.optim_step())

    @contextmanager
    def watch(self, after_seq: int = 0) -> Iterator[Watch]:
        """A WatchOperations stream."""
        watch = Watch(self, after_seq)
        yield watch
        watch.call.cancel()


def optim_request() -> training_service_pb2.OptimStepRequest:
    """An OptimStep with plain settings, without a header."""
    message = training_service_pb2.OptimStepRequest()
    message.adam_params.learning_rate = 0.1
    message.adam_params.beta1 = 0.9
    message.adam_params.beta2 = 0.95
    message.adam_params.eps = 1e-8
    return message


class Watch:
    """One WatchOperations stream of a lane."""

    def __init__(self, lane: LaneClient, after_seq: int) -> None:
        import queue

        self._requests: queue.Queue[Any] = queue.Queue()
        self._requests.put(
            operation_service_pb2.WatchOperationsRequest(
                session=lane.session, client_id=lane.client_id, after_seq=after_seq
            )
        )
        self.call = lane.stubs.operations.WatchOperations(iter(self._requests.get, None))

    def next(self) -> operation_pb2.Operation:
        """The next operation that ended."""
        return next(self.call).operation

    def acknowledge(self, through: int) -> None:
        """Results up to a seq were taken."""
        self._requests.put(operation_service_pb2.WatchOperationsRequest(acked_through=through))
