"""What happens without anybody asking: taking over at start, expiring, letting go at the end.

Knows: the managers. Must not know: RPCs. The server answers from the start; what is not reached yet
answers RECOVERING.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable

from firetitan_daemon.control.checkpoints import CheckpointManager
from firetitan_daemon.control.cleanup import Cleaner
from firetitan_daemon.control.deployments import DeploymentManager
from firetitan_daemon.control.leases import LeaseManager
from firetitan_daemon.control.models import ModelRegistry
from firetitan_daemon.control.operations import draining
from firetitan_daemon.control.removal import SavedRemover
from firetitan_daemon.control.retention import Retention
from firetitan_daemon.control.services import Services, internal_error, logger
from firetitan_daemon.control.sessions import SessionManager
from firetitan_daemon.control.trainers import TrainerManager
from firetitan_daemon.control.weight_sync import WeightSyncer
from firetitan_daemon.control.workers import WorkerPool
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.ports import Ledger
from firetitan_daemon.core.records import Deployment, ResourceState, Trainer

_TICK_S = 0.25
_END_RETRY_S = 5.0
"""Between tries to end a worker that lives and does not answer."""


class Supervisor:
    """Takes over a former daemon's work, and hands it on."""

    def __init__(
        self,
        services: Services,
        pool: WorkerPool,
        sessions: SessionManager,
        trainers: TrainerManager,
        deployments: DeploymentManager,
        syncer: WeightSyncer,
        checkpoints: CheckpointManager,
        remover: SavedRemover,
        models: ModelRegistry,
        leases: LeaseManager,
        cleaner: Cleaner,
        retention: Retention,
    ) -> None:
        self._services = services
        self._pool = pool
        self._sessions = sessions
        self._trainers = trainers
        self._deployments = deployments
        self._syncer = syncer
        self._checkpoints = checkpoints
        self._remover = remover
        self._models = models
        self._leases = leases
        self._cleaner = cleaner
        self._retention = retention
        self._tasks: set[asyncio.Task[None]] = set()
        self.draining = False

    async def restore(self) -> Ledger:
        """Load the ledger and clean up after a former daemon; before anything is served."""
        services = self._services
        ledger = await services.store.load()
        swept = await services.spool.sweep(ledger.spool)
        folders = await services.folders.sweep(ledger.folders)
        services.operations.restore(ledger)
        self._models.restore(ledger)
        await self._checkpoints.restore(ledger)
        self._pool.restore(ledger)
        await self._sessions.restore(ledger)
        self._trainers.restore(ledger)
        self._deployments.restore(ledger)
        self._leases.restore(ledger)
        logger.info(
            "restored trainers=%d sessions=%d deployments=%d open_operations=%d workers=%d "
            "swept_files=%d swept_folders=%d",
            len(ledger.trainers),
            len(ledger.sessions),
            len(ledger.deployments),
            len(ledger.open_operations),
            len(ledger.workers),
            swept,
            folders,
        )
        return ledger

    def begin(self, ledger: Ledger) -> None:
        """Reach the workers, all at once; while the server already answers."""
        named = {trainer.worker_id for trainer in ledger.trainers}
        named.update(*(deployment.worker_ids for deployment in ledger.deployments))
        for trainer in ledger.trainers:
            self._spawn(trainer.name, self._recover(self._trainers, trainer))
        for deployment in ledger.deployments:
            self._spawn(deployment.name, self._recover(self._deployments, deployment))
        for spec in ledger.workers:
            if spec.worker_id not in named:
                end = functools.partial(self._pool.stop, spec.worker_id)
                self._spawn(spec.worker_id, self._until_it_answers(spec.worker_id, end))
        self._spawn("hotloads", self._syncer.resume())
        self._spawn("expiry", self._tick())

    async def _recover(
        self, manager: TrainerManager | DeploymentManager, record: Trainer | Deployment
    ) -> None:
        """Reach the workers of one; end them where a former daemon was deleting it."""
        if record.state is not ResourceState.DELETING:
            await manager.recover(record.id)
            return

        async def delete() -> None:
            # Somebody may have asked for it again since, and made another under that name.
            found = {one.id: one.state for one in manager.all()}
            if found.get(record.id) is ResourceState.DELETING:
                await manager.recover(record.id)

        await self._until_it_answers(record.name, delete)

    async def _until_it_answers(self, what: str, end: Callable[[], Awaitable[None]]) -> None:
        """End a worker that nobody needs: tried again while it hangs, as nobody else would."""
        while True:
            try:
                await end()
                return
            except FiretitanError as error:
                if error.reason is not Reason.WORKER_UNAVAILABLE:
                    raise
                logger.warning("to be ended once it answers target=%s: %s", what, error)
            await asyncio.sleep(_END_RETRY_S)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            for keeper in (
                self._cleaner,
                self._sessions,
                self._trainers,
                self._leases,
                self._remover,
                self._retention,
            ):
                try:
                    await keeper.expire()
                except FiretitanError as error:
                    logger.warning("what is over is looked after again later: %s", error)
                except Exception as error:  # a supervisor: the others are looked after all the same
                    internal_error("looking after what is over", error)

    def _spawn(self, what: str, work: Awaitable[None]) -> None:
        async def run() -> None:
            try:
                await work
            except Exception as error:  # a supervisor: one resource's trouble stays its own
                internal_error(what, error)

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def check_admitting(self) -> None:
        """Refuse new work while the daemon ends.

        Raises:
            FiretitanError: DAEMON_DRAINING.
        """
        if self.draining:
            raise draining()

    def refuse_new_work(self) -> int:
        """Take no more commands; returns how many are left in the spool."""
        self.draining = True
        self._sessions.refuse(draining())
        return self._services.operations.num_open

    async def stop(self, timeout_s: float) -> None:
        """Let the running commands end, leave the rest for the next start, keep the workers.

        Args:
            timeout_s: How long to wait in all for what is being stopped and for running commands;
                one that runs on is taken over by the next daemon from its worker.
        """
        self.refuse_new_work()
        for task in list(self._tasks):
            task.cancel()
        with contextlib.suppress(ValueError):
            await asyncio.wait(list(self._tasks))
        await self._leases.close()
        # At once: one that takes all the time leaves the other some.
        await asyncio.gather(self._cleaner.close(timeout_s), self._sessions.pause(timeout_s))
        await self._syncer.close()
        await self._trainers.close()
        await self._deployments.close()
        await self._pool.close()
        await self._services.operations.close()
