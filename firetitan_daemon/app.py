"""Puts the daemon together: the only module that knows every class.

Knows: constructors, the order of starting and stopping. Must not know: any rule.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import importlib.metadata
import json
import logging
import os
import signal
import time
import uuid

from firetitan_daemon import credentials, durable, handshake, service_manager
from firetitan_daemon.config import DaemonConfig
from firetitan_daemon.control.checkpoints import CheckpointManager
from firetitan_daemon.control.cleanup import Cleaner
from firetitan_daemon.control.deployments import DeploymentManager
from firetitan_daemon.control.exports import ExportManager
from firetitan_daemon.control.leases import LeaseManager
from firetitan_daemon.control.models import ModelRegistry
from firetitan_daemon.control.operations import OperationRegistry
from firetitan_daemon.control.removal import SavedRemover
from firetitan_daemon.control.retention import Retention
from firetitan_daemon.control.sampling import SamplingRouter
from firetitan_daemon.control.services import Services
from firetitan_daemon.control.sessions import SessionManager
from firetitan_daemon.control.supervisor import Supervisor
from firetitan_daemon.control.trainers import TrainerManager
from firetitan_daemon.control.weight_sync import WeightSyncer
from firetitan_daemon.control.workers import WorkerPool
from firetitan_daemon.core.model_names import ModelNames
from firetitan_daemon.core.ports import Clock
from firetitan_daemon.core.shapes import Shapes
from firetitan_daemon.core.worker_ports import WorkerLauncher
from firetitan_daemon.host import count_gpus
from firetitan_daemon.launch.export import ProcessExporter
from firetitan_daemon.launch.local import LocalLauncher
from firetitan_daemon.places import Places, remove_at_end
from firetitan_daemon.rpc.checkpoints import CheckpointServicer
from firetitan_daemon.rpc.codec import ProtobufCodec
from firetitan_daemon.rpc.deployments import DeploymentServicer
from firetitan_daemon.rpc.leases import LeaseServicer
from firetitan_daemon.rpc.models import ModelServicer
from firetitan_daemon.rpc.operations import OperationMessages, OperationServicer
from firetitan_daemon.rpc.sampling import SamplingServicer
from firetitan_daemon.rpc.server import RpcServer
from firetitan_daemon.rpc.shapes import ShapeServicer
from firetitan_daemon.rpc.system import Identity, SystemServicer
from firetitan_daemon.rpc.tcp import TcpAccess
from firetitan_daemon.rpc.trainers import TrainerServicer
from firetitan_daemon.rpc.training import Commands, TrainingServicer
from firetitan_daemon.store.folders import FileFolders
from firetitan_daemon.store.lock import StateLock
from firetitan_daemon.store.spool import FileSpool
from firetitan_daemon.store.sqlite import SqliteStore

logger = logging.getLogger("firetitan.app")
_RPC_GRACE_S = 1.0


class SystemClock(Clock):
    """The machine's clocks."""

    def now(self) -> float:
        """Unix seconds."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds that never jump."""
        return time.monotonic()

    def boot_id(self) -> str:
        """This boot of the machine."""
        return _boot_id()


@functools.cache
def _boot_id() -> str:
    return handshake.boot_id()


class Daemon:
    """One daemon on one home.

    Args:
        config: Its settings.
        launcher: Starts workers; None: real processes.
    """

    def __init__(self, config: DaemonConfig, launcher: WorkerLauncher | None = None) -> None:
        self.config = config
        self.places = Places(config.home)
        self.address = ""
        self._launcher = launcher
        self._stopping = asyncio.Event()
        self._draining: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        """Take the state over and serve; returns the address.

        Raises:
            PlaceError: The home cannot be used.
            StateOwned: Another daemon owns the state.
            FiretitanError: The ledger cannot be opened.
        """
        started = time.monotonic()
        config, places = self.config, self.places
        places.make()
        self._lock = StateLock(places.lock)
        places.announcement.unlink(missing_ok=True)
        durable.sweep_temporaries(places.home)
        self._store = SqliteStore(
            places.database,
            folders=places.store,
            fsync_operations=config.server.fsync_operations,
        )
        self._spool = FileSpool(places.spool, fsync=config.server.fsync_operations)
        self._folders = FileFolders(places.store, config.server.adapter_folders)
        clock = SystemClock()
        services = Services(
            store=self._store,
            spool=self._spool,
            folders=self._folders,
            launcher=self._launcher or LocalLauncher(places.workers, places.run),
            clock=clock,
            codec=ProtobufCodec(),
            limits=config.limits,
            operations=OperationRegistry(self._store, self._spool, config.limits, clock),
            recovery=config.recovery,
            inactivity_s=config.idle.timeout_s,
            models=ModelNames(config.models),
            shapes=Shapes(config.training_shapes, config.deployment_shapes, count_gpus()),
            num_threads=config.workers.num_threads,
            adopt_timeout_s=config.workers.adopt_timeout_s,
        )
        self._server = self._compose(services)
        ledger = await self._supervisor.restore()
        self.address = await self._server.start()
        self._supervisor.begin(ledger)
        self._announce()
        logger.info(
            "serving address=%s tcp=%s pid=%d start_s=%.3f",
            self.address,
            self._server.tcp_address or "no",
            os.getpid(),
            time.monotonic() - started,
        )
        service_manager.tell(service_manager.READY)
        return self.address

    def _compose(self, services: Services) -> RpcServer:
        pool = WorkerPool(services)
        checkpoints = CheckpointManager(services)
        sessions = SessionManager(services, checkpoints)
        trainers = TrainerManager(services, pool, sessions)
        deployments = DeploymentManager(services, pool)
        syncer = WeightSyncer(services, deployments)
        remover = SavedRemover(services, checkpoints, sessions, deployments)
        models = ModelRegistry(services, trainers, deployments)
        exports = ExportManager(
            services, checkpoints, ProcessExporter(services.num_threads), self.places.home
        )
        cleaner = Cleaner(services, sessions, trainers, deployments)
        leases = LeaseManager(
            services, self.config.leases.ttl_s, cleaner.clean_up, syncer.release_pins
        )
        trainers.connect(leases.forget)
        deployments.connect(syncer.restore, leases.forget)
        self._supervisor = supervisor = Supervisor(
            services,
            pool,
            sessions,
            trainers,
            deployments,
            syncer,
            checkpoints,
            remover,
            models,
            leases,
            cleaner,
            Retention(services, leases, **dataclasses.asdict(self.config.retention)),
        )
        messages = OperationMessages(services, trainers, deployments, sessions)
        self._identity = Identity(
            version=importlib.metadata.version("firetitan"),
            instance_id=uuid.uuid4().hex,
            pid=os.getpid(),
            places=self.places,
            start_time=services.clock.now(),
        )
        servicers = (
            TrainingServicer(sessions, trainers, supervisor),
            CheckpointServicer(checkpoints, remover),
            ModelServicer(models, exports, supervisor),
            ShapeServicer(services.shapes),
            OperationServicer(services.operations, sessions, messages),
            SamplingServicer(SamplingRouter(deployments), supervisor),
            DeploymentServicer(deployments, syncer, messages, supervisor),
            TrainerServicer(trainers, sessions, messages, supervisor),
            LeaseServicer(leases, services),
            SystemServicer(
                self._identity,
                services,
                supervisor,
                pool,
                sessions,
                self._stopping.set,
                self.config.server.drain_timeout_s,
            ),
        )
        return RpcServer(
            self.places.socket,
            servicers,
            Commands(sessions, messages).submit,
            services.limits,
            self._tcp_access(),
        )

    def _tcp_access(self) -> TcpAccess | None:
        tcp = self.config.tcp
        if not tcp.address:
            return None
        own = credentials.server_credentials(self.places, tcp.host_names)
        return TcpAccess(
            tcp.address,
            own.token,
            own.certificate,
            own.key,
            None if credentials.is_loopback(tcp.host) else own.ca,
            tcp.folders,
        )

    def _announce(self) -> None:
        announcement = {
            "address": self.address,
            "tcp_address": self._server.tcp_address,
            "pid": self._identity.pid,
            "instance_id": self._identity.instance_id,
            "version": self._identity.version,
        }
        try:
            durable.publish_file(
                self.places.announcement, json.dumps(announcement).encode(), fsync=False
            )
        except OSError as error:  # on a full disk it has to serve: things are deleted through it
            logger.error("not announced file=%s: %s", self.places.announcement, error)

    def request_stop(self) -> None:
        """Begin to stop; `run` returns when that is done."""
        self._stopping.set()

    async def stop(self) -> None:
        """Refuse new work, let running commands end, keep the workers, close the state."""
        logger.info("stopping")
        service_manager.tell(service_manager.STOPPING)
        remove_at_end(self.places.announcement)
        self._supervisor.refuse_new_work()
        await self._server.drain()
        await self._supervisor.stop(self.config.server.drain_timeout_s)
        await self._server.stop(_RPC_GRACE_S)
        await self._store.close()
        await self._spool.close()
        await self._folders.close()
        self.places.leave()
        self._lock.release()
        logger.info("stopped")

    async def run(self) -> None:
        """Serve until SIGTERM, SIGINT or Drain."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.request_stop)
        await self.start()
        await self._stopping.wait()
        await self.stop()
