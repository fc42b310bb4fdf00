"""The raw services of the protocol, for what the clients do not wrap.

Knows: the generated stubs. Must not know: anything built on them.
"""

from __future__ import annotations

from functools import cached_property

from firetitan.v1 import (
    checkpoint_service_pb2_grpc,
    deployment_service_pb2_grpc,
    model_service_pb2_grpc,
    operation_service_pb2_grpc,
    sampling_service_pb2_grpc,
    shape_service_pb2_grpc,
    system_service_pb2_grpc,
    trainer_service_pb2_grpc,
    training_service_pb2_grpc,
)

from firetitan_client.forking import on_fork
from firetitan_client.transport import Transport


class Stubs:
    """Blocking gRPC stubs on the client's own channel; errors are `grpc.RpcError`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        on_fork(self)

    def _after_fork(self) -> None:
        """In a child: stubs on a channel of its own, made anew."""
        self.__dict__ = {"_transport": self._transport}

    @cached_property
    def training(self) -> training_service_pb2_grpc.TrainingServiceStub:
        """Sessions and the commands that compute."""
        return training_service_pb2_grpc.TrainingServiceStub(self._transport.channel)

    @cached_property
    def checkpoints(self) -> checkpoint_service_pb2_grpc.CheckpointServiceStub:
        """Saving and loading."""
        return checkpoint_service_pb2_grpc.CheckpointServiceStub(self._transport.channel)

    @cached_property
    def sampling(self) -> sampling_service_pb2_grpc.SamplingServiceStub:
        """Sampling."""
        return sampling_service_pb2_grpc.SamplingServiceStub(self._transport.channel)

    @cached_property
    def deployments(self) -> deployment_service_pb2_grpc.DeploymentServiceStub:
        """Managing deployments."""
        return deployment_service_pb2_grpc.DeploymentServiceStub(self._transport.channel)

    @cached_property
    def trainers(self) -> trainer_service_pb2_grpc.TrainerServiceStub:
        """Managing trainers."""
        return trainer_service_pb2_grpc.TrainerServiceStub(self._transport.channel)

    @cached_property
    def models(self) -> model_service_pb2_grpc.ModelServiceStub:
        """The registry of models."""
        return model_service_pb2_grpc.ModelServiceStub(self._transport.channel)

    @cached_property
    def shapes(self) -> shape_service_pb2_grpc.ShapeServiceStub:
        """Shapes by name."""
        return shape_service_pb2_grpc.ShapeServiceStub(self._transport.channel)

    @cached_property
    def operations(self) -> operation_service_pb2_grpc.OperationServiceStub:
        """Following operations."""
        return operation_service_pb2_grpc.OperationServiceStub(self._transport.channel)

    @cached_property
    def system(self) -> system_service_pb2_grpc.SystemServiceStub:
        """The daemon itself."""
        return system_service_pb2_grpc.SystemServiceStub(self._transport.channel)
