"""A worker on its socket: servicers put together, started and stopped.

Knows: grpc.aio, the servicers. Must not know: processes, files (`__main__.py`).
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
from firetitan.worker.v1 import worker_pb2, worker_pb2_grpc

from firetitan_daemon.engine.api import TrainEngine
from firetitan_daemon.engine.sample_api import SampleEngine
from firetitan_daemon.worker.sampler import SamplerServicer
from firetitan_daemon.worker.servicer import (
    EngineHost,
    ErrorInterceptor,
    SampleFactory,
    TrainFactory,
    WorkerServicer,
    make_sample_engine,
    make_train_engine,
)
from firetitan_daemon.worker.trainer import TrainerServicer

TRAINER = "trainer"
SAMPLER = "sampler"

# The daemon's own limit on public messages bounds these.
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
)


class WorkerServer:
    """One worker: its engine and the services of its kind.

    Args:
        spec: What it is for.
        train: Loads a training engine.
        sample: Loads a sampling engine.
    """

    def __init__(
        self,
        spec: worker_pb2.WorkerSpec,
        *,
        train: TrainFactory = make_train_engine,
        sample: SampleFactory = make_sample_engine,
    ) -> None:
        self._spec = spec
        self._stopping = asyncio.Event()
        self._server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=_OPTIONS)
        self._host: EngineHost[TrainEngine] | EngineHost[SampleEngine]
        if spec.kind == TRAINER:
            trainer_host = EngineHost(train)
            trainer = TrainerServicer(trainer_host)
            worker_pb2_grpc.add_TrainerWorkerServiceServicer_to_server(trainer, self._server)
            self._host, describe = trainer_host, trainer.describe
        elif spec.kind == SAMPLER:
            sampler_host = EngineHost(sample, computes_here=False)
            sampler = SamplerServicer(sampler_host)
            worker_pb2_grpc.add_SamplerWorkerServiceServicer_to_server(sampler, self._server)
            self._host, describe = sampler_host, sampler.describe
        else:
            raise ValueError(f"kind {spec.kind!r}: give {TRAINER} or {SAMPLER}")
        servicer = WorkerServicer(spec, self._host, describe, self.ask_to_stop)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, self._server)

    async def start(self) -> None:
        """Serve on the socket of the specification.

        Raises:
            RuntimeError: The socket cannot be bound.
        """
        self._bind()
        await self._server.start()

    def _bind(self) -> None:
        self._server.add_insecure_port(self._spec.address)
        Path(self._spec.address.removeprefix("unix:")).chmod(0o600)

    def ask_to_stop(self) -> None:
        """Let `wait_for_stop` return."""
        self._stopping.set()

    async def wait_for_stop(self) -> None:
        """Wait until someone asked the worker to end."""
        await self._stopping.wait()

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, let running ones end within the grace, free the engine.

        Args:
            grace_s: Seconds; after them running calls are cancelled.
        """
        await self._server.stop(grace_s)
        self._host.close()
