"""All managers of a daemon, on workers in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from firetitan.v1 import training_service_pb2

from firetitan_daemon.control.checkpoints import CheckpointManager
from firetitan_daemon.control.cleanup import Cleaner
from firetitan_daemon.control.codec import Header, HotloadArguments
from firetitan_daemon.control.deployment_requests import DeploymentRequest
from firetitan_daemon.control.deployments import DeploymentManager
from firetitan_daemon.control.leases import LeaseManager
from firetitan_daemon.control.models import ModelRegistry
from firetitan_daemon.control.removal import SavedRemover
from firetitan_daemon.control.retention import Retention
from firetitan_daemon.control.sessions import SessionManager
from firetitan_daemon.control.supervisor import Supervisor
from firetitan_daemon.control.trainer_requests import TrainerRequest
from firetitan_daemon.control.trainers import TrainerManager
from firetitan_daemon.control.weight_sync import WeightSyncer
from firetitan_daemon.control.workers import WorkerPool
from firetitan_daemon.core.ports import Change, Limits
from firetitan_daemon.core.records import (
    Deployment,
    Operation,
    Session,
    Snapshot,
    Trainer,
)
from firetitan_daemon.core.worker_ports import Worker, WorkerLauncher
from firetitan_daemon.launch.in_process import InProcessLauncher
from firetitan_daemon.rpc.codec import read_header
from support.commands import GOOD, SESSION
from support.services import services_in

TOY = "firetitan/toy"


class Managers:
    """All managers of a daemon, on workers in this process unless another launcher is given."""

    def __init__(self, root: Path, run: Path, launcher: WorkerLauncher | None = None) -> None:
        self.services = services = services_in(
            root, limits=Limits(gap_timeout_s=0.2), launcher=launcher or InProcessLauncher(run)
        )
        self.store = services.store
        self.pool = WorkerPool(services)
        self.checkpoints = CheckpointManager(services)
        self.sessions = SessionManager(services, self.checkpoints)
        self.trainers = TrainerManager(services, self.pool, self.sessions)
        self.deployments = DeploymentManager(services, self.pool)
        self.syncer = WeightSyncer(services, self.deployments)
        self.remover = SavedRemover(services, self.checkpoints, self.sessions, self.deployments)
        cleaner = Cleaner(services, self.sessions, self.trainers, self.deployments)
        self.leases = LeaseManager(services, 60.0, cleaner.clean_up, self.syncer.release_pins)
        self.trainers.connect(self.leases.forget)
        self.deployments.connect(self.syncer.restore, self.leases.forget)
        self.supervisor = Supervisor(
            services,
            self.pool,
            self.sessions,
            self.trainers,
            self.deployments,
            self.syncer,
            self.checkpoints,
            self.remover,
            ModelRegistry(services, self.trainers, self.deployments),
            self.leases,
            cleaner,
            Retention(services, self.leases, 60.0, 60.0),
        )

    async def done(self, operation: Operation) -> Operation:
        found = await self.services.operations.wait(operation.id, 10)
        assert found.done, found
        return found

    async def trainer(self, request_id: str = "make-t") -> tuple[Trainer, Worker]:
        request = TrainerRequest("t", TOY, 0, 0, "auto", request_id, "digest")
        assert (await self.done(await self.trainers.create(request))).error is None
        return await self.trainers.ready("t")

    async def deployment(self) -> Deployment:
        request = DeploymentRequest("d", TOY, 0, "", "auto", None, "make-d", "digest")
        assert (await self.done(await self.deployments.create(request))).error is None
        return self.deployments.get("d")

    async def snapshots(self, *ids: str) -> None:
        """Rows of snapshots; `Applied` workers need no files."""
        rows = [
            Snapshot(
                id=one,
                session=SESSION.name,
                base_model=TOY,
                lora_rank=0,
                kind="base",
                format="hf_full",
                parent=None,
                step=0,
                commit_seq=1,
                folder="/nowhere",
                digest="d",
                result_digest="r",
                size_bytes=1,
                create_time=0.0,
            )
            for one in ids
        ]
        await self.store.write(Change(snapshots=rows))

    async def hotload(self, snapshot: str, *, etag: str = "", request_id: str = "") -> Operation:
        arguments = HotloadArguments("deployments/d", snapshot, etag)
        return await self.syncer.hotload(arguments, request_id or snapshot, snapshot.encode())


async def kill(managers: Managers, worker: Worker, patch: pytest.MonkeyPatch) -> None:
    """End a worker; returns while it is being forgotten, which takes a moment."""
    forget, forgetting = managers.pool.forget, asyncio.Event()

    async def slow_forget(worker_id: str | None) -> None:
        if not forgetting.is_set():
            forgetting.set()
            await asyncio.sleep(0.2)
        await forget(worker_id)

    patch.setattr(managers.pool, "forget", slow_forget)
    worker._process.kill()
    await forgetting.wait()


async def until(holds: Callable[[], bool]) -> None:
    """Wait for what happens by itself."""
    for _ in range(250):
        if holds():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it never came to that")


def forward_backward(session: Session, *, seq: int) -> tuple[Header, str, bytes]:
    message = training_service_pb2.ForwardBackwardRequest(data=[GOOD], loss_fn="cross_entropy")
    return command(session, message, seq=seq)


def command(session: Session, message: Any, *, seq: int) -> tuple[Header, str, bytes]:
    """What `SessionManager.submit` takes, of a command on lane "a"."""
    header = message.header
    header.session, header.epoch, header.client_id = session.name, session.epoch, "a"
    header.seq, header.request_id = seq, f"r{seq}"
    payload = message.SerializeToString()
    return read_header(payload), type(message).__name__.removesuffix("Request"), payload
