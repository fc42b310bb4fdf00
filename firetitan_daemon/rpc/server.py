"""The gRPC server: a Unix socket for its owner, TCP where asked for, health, reflection, limits.

Knows: grpc.aio, every service's descriptor. Must not know: what the services do.

Socket and port are two gRPC servers over the same servicers: what TCP asks of a call (`rpc.tcp`)
cannot be missed there, and costs nothing on the socket.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import grpc
import grpc.aio
from firetitan.v1 import (
    checkpoint_service_pb2,
    deployment_service_pb2,
    lease_service_pb2,
    model_service_pb2,
    operation_service_pb2,
    sampling_service_pb2,
    shape_service_pb2,
    system_service_pb2,
    trainer_service_pb2,
    training_service_pb2,
)
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from firetitan_daemon import places
from firetitan_daemon.core.ports import Limits
from firetitan_daemon.host import max_connections
from firetitan_daemon.rpc.binding import CommandCall, bind
from firetitan_daemon.rpc.checkpoints import CheckpointServicer
from firetitan_daemon.rpc.deployments import DeploymentServicer
from firetitan_daemon.rpc.leases import LeaseServicer
from firetitan_daemon.rpc.models import ModelServicer
from firetitan_daemon.rpc.operations import OperationServicer
from firetitan_daemon.rpc.sampling import SamplingServicer
from firetitan_daemon.rpc.shapes import ShapeServicer
from firetitan_daemon.rpc.streams import OpenStreams
from firetitan_daemon.rpc.system import SystemServicer
from firetitan_daemon.rpc.tcp import OPTIONS, TcpAccess, TokenCheck
from firetitan_daemon.rpc.trainers import TrainerServicer
from firetitan_daemon.rpc.training import TrainingServicer

_READ_FACTOR = 2
"""What gRPC itself lets in, in largest requests: below that the refusal can say what is wrong."""
_FILES = (
    (training_service_pb2, "TrainingService", TrainingServicer),
    (checkpoint_service_pb2, "CheckpointService", CheckpointServicer),
    (operation_service_pb2, "OperationService", OperationServicer),
    (sampling_service_pb2, "SamplingService", SamplingServicer),
    (deployment_service_pb2, "DeploymentService", DeploymentServicer),
    (trainer_service_pb2, "TrainerService", TrainerServicer),
    (model_service_pb2, "ModelService", ModelServicer),
    (lease_service_pb2, "LeaseService", LeaseServicer),
    (shape_service_pb2, "ShapeService", ShapeServicer),
    (system_service_pb2, "SystemService", SystemServicer),
)

Servicer = (
    TrainingServicer
    | CheckpointServicer
    | OperationServicer
    | SamplingServicer
    | DeploymentServicer
    | TrainerServicer
    | ModelServicer
    | LeaseServicer
    | ShapeServicer
    | SystemServicer
)


class RpcServer:
    """Serves the services on one Unix socket, and on a TCP port where there is to be one.

    Args:
        socket: Its path, in a folder only the owner can enter.
        servicers: One for each service.
        submit: Takes the session commands of all of them.
        limits: Of requests and streams.
        tcp: Who may call over TCP, and where; None: nobody.
    """

    def __init__(
        self,
        socket: Path,
        servicers: Sequence[Servicer],
        submit: CommandCall,
        limits: Limits,
        tcp: TcpAccess | None = None,
    ) -> None:
        self.tcp_address = ""
        """`host:port`, once it serves there."""
        self._socket = socket
        self._servicers = servicers
        self._submit = submit
        self._limits = limits
        self._streams = OpenStreams(limits.max_streams)
        self._max_connections = max_connections() // (2 if tcp else 1)
        self._tcp = tcp
        self._health = health.aio.HealthServicer()
        self._services = ["", reflection.SERVICE_NAME, health.SERVICE_NAME]
        self._services += [f"firetitan.v1.{name}" for _, name, _ in _FILES]
        self._servers = [self._make(None), *([self._make(tcp)] if tcp else [])]

    def _make(self, tcp: TcpAccess | None) -> grpc.aio.Server:
        check_of = tcp.check_of if tcp else None
        server = grpc.aio.server(
            interceptors=[TokenCheck(tcp.token)] if tcp else [],
            options=(
                ("grpc.max_receive_message_length", _READ_FACTOR * self._limits.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                # The state's lock says who may serve; a port that is taken must be an error.
                ("grpc.so_reuseport", 0),
                # Closed at once beyond that, and not where descriptors end: saves need some too.
                ("grpc.max_allowed_incoming_connections", self._max_connections),
                *(OPTIONS if tcp else ()),
            ),
        )
        for module, name, kind in _FILES:
            service: ServiceDescriptor = module.DESCRIPTOR.services_by_name[name]
            servicer = next(one for one in self._servicers if isinstance(one, kind))
            handler = bind(
                service,
                servicer,
                self._submit,
                self._limits.max_message_bytes,
                self._streams,
                check_of,
            )
            server.add_generic_rpc_handlers((handler,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(self._services[1:], server)
        return server

    async def start(self) -> str:
        """Bind and serve; returns the socket's address.

        Raises:
            PlaceError: The socket cannot be kept to its owner.
            OSError: Socket or port cannot be bound.
        """
        places.remove_stale_socket(self._socket)
        # gRPC creates the file with the mode the umask leaves; nothing else runs yet.
        before = os.umask(0o177)
        try:
            self._servers[0].add_insecure_port(f"unix:{self._socket}")
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self._socket}: {error}") from error
        finally:
            os.umask(before)
        places.check_socket(self._socket)
        if self._tcp is not None:
            self.tcp_address = self._tcp.listen(self._servers[1])
        for server in self._servers:
            await server.start()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        return f"unix:{self._socket}"

    async def drain(self) -> None:
        """Tell health checks that no new work is taken."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, let running ones end for a while, close socket and port."""
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))
        await asyncio.to_thread(places.remove_at_end, self._socket)

    async def _set_health(self, state: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in self._services:
            await self._health.set(name, state)
