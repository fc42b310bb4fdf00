"""The pipeline of one session with a toy worker, and a disk that refuses when it is told to."""

from __future__ import annotations

import asyncio
from pathlib import Path

from firetitan.v1 import checkpoint_service_pb2, operation_pb2, training_service_pb2

from firetitan_daemon.control.checkpoints import CheckpointManager
from firetitan_daemon.control.commands import CommandPipeline
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.ports import Change, Limits
from firetitan_daemon.core.records import Operation
from firetitan_daemon.core.sequencer import SessionSequencer
from firetitan_daemon.core.worker_ports import Worker
from firetitan_daemon.launch.in_process import InProcessLauncher
from firetitan_daemon.rpc.codec import read_header
from firetitan_daemon.store.folders import FileFolders
from firetitan_daemon.store.memory import MemoryStore
from support.commands import GOOD, SESSION
from support.services import services_in

FULL = FiretitanError(Reason.STATE_DISK_FULL, "the disk is full")


class FullStore(MemoryStore):
    """A store whose next changes of some kind fail as a full disk makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.failures = 0
        self.failed = asyncio.Event()

    async def write(self, change: Change) -> None:
        if self.failures and any(one.done for one in change.operations):
            self.failures -= 1
            self.failed.set()
            raise FULL
        await super().write(change)


class FullFolders(FileFolders):
    """Folders whose next publications fail as a full disk makes them."""

    failures = 0

    async def publish(self, staging: Path, kind: str, name: str) -> Path:
        if self.failures:
            self.failures -= 1
            raise FULL
        return await super().publish(staging, kind, name)


class Bench:
    """A pipeline and all it stands on."""

    def __init__(self, root: Path, worker: Worker, launcher: InProcessLauncher) -> None:
        self.store = FullStore()
        self.folders = FullFolders(root / "folders")
        self.spool_root = root / "spool"
        self.services = services_in(
            root,
            limits=Limits(gap_timeout_s=0.2),
            store=self.store,
            folders=self.folders,
            launcher=launcher,
        )
        self.spool = self.services.spool
        self.worker = worker
        self.pipeline = CommandPipeline(
            SESSION,
            SessionSequencer(SESSION.name),
            self.services,
            CheckpointManager(self.services),
        )
        self.seq = 0

    async def submit(self, message: object, *, seq: int = 0, seen_failure: int = 0) -> Operation:
        self.seq = seq or self.seq + 1
        header = message.header
        header.session, header.epoch = SESSION.name, 1
        header.client_id, header.seq = "a", self.seq
        header.request_id, header.seen_failure = f"r{self.seq}", seen_failure
        payload = message.SerializeToString()
        method = type(message).__name__.removesuffix("Request")
        return await self.pipeline.submit(read_header(payload), method, payload)

    async def forward_backward(self, **where: int) -> Operation:
        return await self.submit(
            training_service_pb2.ForwardBackwardRequest(data=[GOOD], loss_fn="cross_entropy"),
            **where,
        )

    async def save_snapshot(self, **where: int) -> Operation:
        return await self.submit(
            checkpoint_service_pb2.SaveSnapshotRequest(snapshot_id="s"), **where
        )

    async def ended(self, operation: Operation) -> Operation:
        found = await self.services.operations.wait(operation.id, 10)
        assert found.done, found
        return found

    async def result(self, operation: Operation) -> operation_pb2.Operation:
        found = await self.ended(operation)
        assert found.result is not None, found.error
        return operation_pb2.Operation.FromString(await self.spool.read(found.result))
