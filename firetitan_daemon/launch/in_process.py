"""Workers inside this process, behind real sockets: for tests, and where processes cannot be had.

Knows: the worker's servicers. Must not know: what they compute. Such a worker ends with its
process; everything else, its journal and its protocol, is as in a process of its own.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from pathlib import Path

from firetitan_daemon import handshake
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.records import WorkerSpec
from firetitan_daemon.launch import convert
from firetitan_daemon.launch.remote import RemoteWorker
from firetitan_daemon.worker.server import WorkerServer
from firetitan_daemon.worker.servicer import (
    SampleFactory,
    TrainFactory,
    make_sample_engine,
    make_train_engine,
)

STOP_GRACE_S = 2.0


class InProcess:
    """A worker's server, with the life of a process (see `launch.process.Process`).

    Args:
        server: Serving already.
        socket: Its socket, removed at the end.
    """

    def __init__(self, server: WorkerServer, socket: Path) -> None:
        self._server = server
        self._socket = socket
        self._grace_s = STOP_GRACE_S
        self._how = "exited with code 0"
        self._ended = asyncio.create_task(self._end())

    @property
    def pid(self) -> int:
        """Id of this process."""
        return os.getpid()

    @property
    def alive(self) -> bool:
        """Whether it serves."""
        return not self._ended.done()

    async def wait(self) -> str:
        """Wait until it is gone; says how it ended."""
        return await asyncio.shield(self._ended)

    def terminate(self) -> None:
        """Ask it to end."""
        self._server.ask_to_stop()

    def kill(self) -> None:
        """End it, running calls too."""
        self._grace_s = 0.0
        self._how = "killed by SIGKILL"
        self._server.ask_to_stop()

    async def _end(self) -> str:
        await self._server.wait_for_stop()
        await self._server.stop(self._grace_s)
        self._socket.unlink(missing_ok=True)
        return self._how


class InProcessLauncher:
    """Starts workers in this event loop (see `core.worker_ports.WorkerLauncher`).

    Args:
        run: Folder of the sockets.
        train: Loads a training engine.
        sample: Loads a sampling engine.
    """

    def __init__(
        self,
        run: Path,
        *,
        train: TrainFactory = make_train_engine,
        sample: SampleFactory = make_sample_engine,
    ) -> None:
        self._run = run
        self._train = train
        self._sample = sample
        self._live: dict[str, tuple[WorkerSpec, InProcess, str]] = {}

    async def launch(self, spec: WorkerSpec) -> RemoteWorker:
        """Start a worker and wait until it serves (not until its model is loaded).

        Raises:
            FiretitanError: ALREADY_EXISTS where it runs already.
        """
        if self._process(spec) is not None:
            raise FiretitanError(
                Reason.ALREADY_EXISTS,
                f"worker {spec.worker_id} runs already; adopt it or end it first",
            )
        incarnation = uuid.uuid4().hex
        self._run.mkdir(mode=0o700, parents=True, exist_ok=True)
        socket = handshake.socket_path(self._run, spec.worker_id, incarnation)
        address = f"unix:{socket}"
        message = convert.spec_to_proto(spec, address, incarnation)
        server = WorkerServer(message, train=self._train, sample=self._sample)
        await server.start()
        process = InProcess(server, socket)
        self._live[spec.worker_id] = (spec, process, address)
        return RemoteWorker(spec, process, address)

    async def adopt(self, spec: WorkerSpec) -> RemoteWorker | None:
        """The live worker of a specification, or None."""
        process = self._process(spec)
        if process is None:
            return None
        known, _, address = self._live[spec.worker_id]
        return RemoteWorker(spec, process, address) if known == spec else None

    async def discard(self, spec: WorkerSpec) -> None:
        """Forget a dead worker; a live one is left alone."""
        if self._process(spec) is None:
            self._live.pop(spec.worker_id, None)

    def _process(self, spec: WorkerSpec) -> InProcess | None:
        entry = self._live.get(spec.worker_id)
        return entry[1] if entry is not None and entry[1].alive else None
