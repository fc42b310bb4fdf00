"""Stopping and deleting what nobody needs, after what was accepted has ended.

Knows: trainers, deployments, what runs on them, when they were last used. Must not know: who asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable, Coroutine

from firetitan_daemon.control.deployments import DeploymentManager
from firetitan_daemon.control.leases import MayBegin
from firetitan_daemon.control.services import Services, internal_error
from firetitan_daemon.control.sessions import SessionManager
from firetitan_daemon.control.trainers import TrainerManager
from firetitan_daemon.core import names
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.records import Cleanup, Deployment, ResourceState, Trainer

logger = logging.getLogger("firetitan.cleanup")
_LOOK_S = 1.0
"""Between two looks whether what was accepted can end at all."""
_AGAIN_S = 0.2
"""Before a trainer whose worker is being made or replaced is stopped, if it can be by then."""
_COMES_BACK_S = 20.0
"""How long that is tried; a worker that hangs may be replaced never."""


class Cleaner:
    """Carries clean-ups out, and stops what is idle."""

    def __init__(
        self,
        services: Services,
        sessions: SessionManager,
        trainers: TrainerManager,
        deployments: DeploymentManager,
    ) -> None:
        self._services = services
        self._sessions = sessions
        self._trainers = trainers
        self._deployments = deployments
        self._stopping: dict[str, asyncio.Task[None]] = {}

    async def clean_up(self, name: str, cleanup: Cleanup, may_begin: MayBegin) -> None:
        """Stop or delete a trainer or a deployment; one that is gone is fine.

        Args:
            name: Which.
            cleanup: What to do.
            may_begin: Whether it still is to be done, once what was accepted has ended: that may
                take long, and somebody may have begun to use it.

        Raises:
            FiretitanError: STATE_DISK_FULL; RECOVERING where a worker is not there for long.
        """
        if name.startswith("deployments/"):
            await self._finish(name)
            await self._requests_end(name)
            await self._finish(name)  # a hotload may have been accepted meanwhile
            if not await may_begin():
                return
            if cleanup is Cleanup.DELETE:
                await self._deployments.delete(name)
            elif self._services.operations.open_of(name) or self._deployments.stuck(name):
                # Where a sampler hangs in it; it would be started again for it, too.
                raise FiretitanError(
                    Reason.RECOVERING,
                    f"{name}: a sampler hangs in what was accepted; it is stopped once that ends",
                    retry_after_s="5",
                )
            else:
                await self._stop_deployment(name)
            return
        trainer_id = names.parse_trainer(name)
        await self._finish(name, *(one.name for one in self._sessions.all(name)))
        if not await may_begin():
            return
        if cleanup is Cleanup.DELETE:
            await self._trainers.delete(name)
            return
        clock = self._services.clock
        until = clock.monotonic() + _COMES_BACK_S
        while not await self._trainers.stop(trainer_id):
            if not self._comes_back(trainer_id):
                logger.warning("goes on: it is used, or could not be brought back trainer=%s", name)
                return
            if clock.monotonic() >= until:
                raise FiretitanError(
                    Reason.RECOVERING,
                    f"{name}: its worker has not been there for {_COMES_BACK_S:g} s; it is stopped "
                    "once it is",
                    retry_after_s="5",
                )
            await asyncio.sleep(_AGAIN_S)
            if not await may_begin():
                return

    def _comes_back(self, trainer_id: str) -> bool:
        """Whether a trainer's worker is being made, reached or replaced."""
        found = [one for one in self._trainers.all() if one.id == trainer_id]
        return any(
            one.state in (ResourceState.CREATING, ResourceState.RECOVERING)
            or (one.state is ResourceState.ACTIVE and not self._trainers.pid(one))
            for one in found
        )

    async def expire(self) -> None:
        """Begin to stop the workers of what was not used for long enough.

        It is looked at again in its turn: it may have been used while others had theirs.
        """
        for trainer in self._trainers.all():
            if self._is_idle(trainer) and not self._trainers.busy(trainer.id):
                self._begin(trainer.name, self._stop_trainer(trainer.id))
        for deployment in self._deployments.all():
            if self._is_idle(deployment):
                still = functools.partial(self._deployment_is_idle, deployment.name)
                self._begin(deployment.name, self._stop_deployment(deployment.name, still))

    def _begin(self, name: str, work: Coroutine[None, None, None]) -> None:
        if name in self._stopping:
            work.close()
            return

        async def run() -> None:
            try:
                logger.info("idle, its worker is stopped target=%s", name)
                await work
            except Exception as error:  # a supervisor: the next look tries again
                internal_error(f"stopping {name}", error)

        task = self._stopping[name] = asyncio.create_task(run())
        task.add_done_callback(lambda _: self._stopping.pop(name, None))

    def _is_idle(self, record: Trainer | Deployment) -> bool:
        limit_s, services = record.inactivity_s, self._services
        return (
            limit_s > 0
            and record.state is ResourceState.ACTIVE
            and services.activity.idle_s(record.name) >= limit_s
            and not services.operations.open_of(record.name)
        )

    def _trainer_is_idle(self, trainer_id: str) -> bool:
        return self._is_idle(self._trainers.get(trainer_id))

    def _deployment_is_idle(self, name: str) -> bool:
        return self._is_idle(self._deployments.get(name))

    async def _stop_trainer(self, trainer_id: str) -> None:
        still = functools.partial(self._trainer_is_idle, trainer_id)
        if not await self._trainers.stop(trainer_id, still):
            # It has to go on: look again when it was idle for as long once more.
            self._services.activity.touch(names.trainer_name(trainer_id))

    async def _stop_deployment(self, name: str, still: Callable[[], bool] = lambda: True) -> None:
        try:
            await self._deployments.scale(name, 0, still)
        except FiretitanError as error:
            if error.reason is not Reason.DEPLOYMENT_NOT_FOUND:
                raise

    async def _finish(self, *targets: str) -> None:
        """Wait for the operations that were accepted for some targets, if they can end."""
        operations = self._services.operations
        for target in targets:
            while (open_ones := operations.open_of(target)) and not self._in_vain(target):
                await operations.wait(open_ones[0].id, _LOOK_S)

    async def _requests_end(self, name: str) -> None:
        """Wait for the requests that a deployment answers, if they can end."""
        while not self._in_vain(name):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._services.activity.ended(name)
                    return

    def _in_vain(self, target: str) -> bool:
        """Whether what was accepted may never end: a sampler hangs, or a session runs no more."""
        if target.startswith("deployments/"):
            return self._deployments.stuck(target)
        return self._sessions.broken(target)

    async def close(self, timeout_s: float) -> None:
        """Let what is being stopped end, up to a time: what then runs the next start sees to."""
        if self._stopping:
            await asyncio.wait(list(self._stopping.values()), timeout=timeout_s)
