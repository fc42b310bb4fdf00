"""A trainer's worker over its life: started, replaced when it dies, stopped and started again.

Knows: trainer records, the pool, the sessions on a trainer. Must not know: RPCs, what a trainer is
asked to be. Each of these is a task of the trainer's, of which there is one at a time.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from firetitan_daemon.control.provisioning import ForgetCleanup, failure, log_shape, settled
from firetitan_daemon.control.services import (
    Services,
    error_record,
    internal_error,
    when_there_is_space,
)
from firetitan_daemon.control.sessions import SessionManager
from firetitan_daemon.control.workers import WorkerPool
from firetitan_daemon.core import names
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.failpoints import failpoint
from firetitan_daemon.core.model_records import ModelInfo
from firetitan_daemon.core.ports import Change
from firetitan_daemon.core.records import (
    ErrorRecord,
    ResourceState,
    Trainer,
    WorkerKind,
    WorkerSpec,
)
from firetitan_daemon.core.worker_ports import Worker

METHOD = "CreateTrainer"
_REPLACE_PAUSES_S = (0.0, 0.2, 1.0, 3.0)
"""Before each try to put a worker in the place of a dead one."""
_MAX_RESTARTS, _RESTARTS_WITHIN_S = 5, 60.0
_WAKE_PAUSE_S = 5.0
"""Between tries to start a stopped trainer that could not be started."""
_BUSY_PAUSE_S = 25.0
"""As much longer where only commands that were accepted wait for it."""
_LASTING = (Reason.MODEL_NOT_FOUND, Reason.UNSUPPORTED, Reason.DEVICE_OUT_OF_MEMORY)
"""What another try to start a trainer is not likely to change: somebody has to see to it."""

logger = logging.getLogger("firetitan.trainers")


class TrainerWorkers:
    """The workers of every trainer.

    Owns the records; each changes in memory when its row is written, and only in `_update` or under
    its lock of `_rows`: no row is written from a record that another write has just changed.
    """

    def __init__(self, services: Services, pool: WorkerPool, sessions: SessionManager) -> None:
        self._services = services
        self._pool = pool
        self._sessions = sessions
        self._trainers: dict[str, Trainer] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._rows: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._replaced: dict[str, list[float]] = {}
        """When workers of a trainer were replaced, monotonic seconds, of late."""
        self._wake_after: dict[str, float] = {}
        """When a stopped trainer that could not be started may be tried again."""
        self._forget_cleanup: ForgetCleanup | None = None
        sessions.connect(self._use)

    def connect(self, forget_cleanup: ForgetCleanup) -> None:
        """Say how clean-ups of a former trainer are dropped before another gets its name."""
        self._forget_cleanup = forget_cleanup

    def _lock(self, trainer_id: str) -> asyncio.Lock:
        """Held while a trainer is made, stopped or deleted: one that hangs holds up no other."""
        return self._locks.setdefault(trainer_id, asyncio.Lock())

    def _begin(self, trainer_id: str, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks[trainer_id] = task

        def ended(_: asyncio.Task[None]) -> None:
            if self._tasks.get(trainer_id) is task:
                del self._tasks[trainer_id]

        task.add_done_callback(ended)
        return task

    async def _provision(self, trainer_id: str) -> None:
        trainer = self._trainers[trainer_id]
        spec = self._pool.spec(trainer.worker_id)
        if spec is None:
            # It was forgotten, and the daemon died before it wrote down what it failed for.
            await self._failed(trainer_id, _never_told(trainer))
            return
        try:
            worker, model = await self._pool.start(spec)
        except FiretitanError as error:
            await self._failed(trainer_id, error_record(error))
            return
        except Exception as error:  # a supervisor: the trainer fails, the daemon goes on
            await self._failed(trainer_id, error_record(internal_error(trainer.name, error)))
            return
        failpoint("create.loaded")
        await self._serves(trainer_id, worker, model)
        log_shape(trainer.name, trainer.shape, model)

    async def _serves(self, trainer_id: str, worker: Worker, model: ModelInfo) -> None:
        self._services.activity.touch(names.trainer_name(trainer_id))  # loading was no idle time
        active = {"state": ResourceState.ACTIVE, "worker_id": worker.spec.worker_id}
        if await self._write(trainer_id, **active, model=model, error=None):
            self._watch(trainer_id, worker)

    async def _failed(self, trainer_id: str, error: ErrorRecord) -> None:
        await self._write(trainer_id, state=ResourceState.FAILED, error=error, worker_id=None)

    async def _write(self, trainer_id: str, **changes: Any) -> bool:
        """As `_update`, for what has happened and must be told."""
        update = functools.partial(self._update, trainer_id, **changes)
        return await when_there_is_space(f"trainers/{trainer_id}", update)

    async def _update(
        self, trainer_id: str, *, workers: Sequence[WorkerSpec] = (), **changes: Any
    ) -> bool:
        """Change fields of a trainer's record; one that is being deleted stays as it is.

        Operations that wait for its creation end with it, unless its worker is being replaced.

        Args:
            trainer_id: Which.
            workers: Specifications to write with it.
            changes: Fields of the record.

        Returns:
            False where it is deleted.
        """
        async with self._rows[trainer_id]:
            former = self._trainers.get(trainer_id)
            if former is None or former.state is ResourceState.DELETING:
                return False
            trainer = replace(former, **changes)
            operations = []
            if trainer.state is not ResourceState.RECOVERING:
                now = self._services.clock.now()
                operations = [
                    settled(one, now, trainer.error)
                    for one in self._services.operations.open_of(trainer.name, METHOD)
                ]
            await self._services.operations.write(
                Change(trainers=[trainer], workers=workers, operations=operations, durable=True)
            )
            self._trainers[trainer_id] = trainer
            return True

    def _watch(self, trainer_id: str, worker: Worker) -> None:
        async def exited(cause: str) -> None:
            await self._ended(trainer_id, cause)

        self._pool.watch(worker, exited)

    async def _ended(self, trainer_id: str, cause: str) -> None:
        """A worker is gone: put another in its place, or say what was lost."""
        trainer = self._trainers.get(trainer_id)
        if trainer is None or trainer.state is ResourceState.DELETING:
            await self._lost(trainer_id, cause)
            return
        now = self._services.clock.monotonic()
        late = [one for one in self._replaced.get(trainer_id, []) if now - one < _RESTARTS_WITHIN_S]
        self._replaced[trainer_id] = [*late, now]
        if len(late) >= _MAX_RESTARTS:
            await self._lost(
                trainer_id, f"{cause}; its worker ended {len(late) + 1} times in a minute"
            )
            return
        await self._begin(trainer_id, self._replace(trainer_id, cause))

    async def _replace(self, trainer_id: str, cause: str) -> None:
        """Bring the trainer's sessions to where they were, in a new worker."""
        problem, began = "", self._services.clock.monotonic()
        try:
            for pause_s in _REPLACE_PAUSES_S:
                # Each time: of several sessions some may be in a worker that ended since.
                await self._sessions.suspend(trainer_id)
                await asyncio.sleep(pause_s)
                started = self._services.clock.monotonic()
                try:
                    worker, model = await when_there_is_space(
                        f"a new worker of trainers/{trainer_id}",
                        lambda: self._start_again(trainer_id),
                    )
                    start_s = self._services.clock.monotonic() - started
                    await self._resume(trainer_id, worker, model)
                except FiretitanError as error:
                    problem = error.message
                    await self._pool.stop(self._trainers[trainer_id].worker_id)
                    if error.reason is not Reason.WORKER_UNAVAILABLE:
                        break
                    logger.error("worker not replaced trainer=%s: %s", trainer_id, error)
                else:
                    now = self._services.clock.monotonic()
                    self._sessions.recovered(trainer_id, now - began, start_s)
                    return
        except Exception as error:  # a supervisor: the trainer fails, the daemon goes on
            problem = internal_error(
                f"replacing the worker of trainers/{trainer_id}", error
            ).message
            await self._pool.stop(self._trainers[trainer_id].worker_id)
        await self._lost(trainer_id, f"{cause}; {problem}")

    async def _start_again(self, trainer_id: str) -> tuple[Worker, ModelInfo]:
        """A new worker for a trainer, its model loaded.

        Raises:
            FiretitanError: As `WorkerPool.start`; SESSION_LOSS where the model is another now.
        """
        trainer = self._trainers[trainer_id]
        await self._pool.forget(trainer.worker_id)
        spec = self._pool.new_spec(
            WorkerKind.TRAINER,
            trainer.name,
            trainer.base_model,
            trainer.dtype,
            trainer.max_context_length,
            trainer.shape,
        )
        if not await self._update(
            trainer_id,
            workers=[spec],
            state=ResourceState.RECOVERING,
            worker_id=spec.worker_id,
        ):
            raise FiretitanError(Reason.CLOSED, f"{trainer.name} is being deleted")
        worker, model = await self._pool.start(spec)
        failpoint("recovery.launched")
        if trainer.model is not None and trainer.model.fingerprint != model.fingerprint:
            raise FiretitanError(
                Reason.SESSION_LOSS,
                f"the files of {trainer.base_model!r} are others now than when the trainer began: "
                f"fingerprint {model.fingerprint[:12]}, was {trainer.model.fingerprint[:12]}",
            )
        return worker, model

    async def _resume(self, trainer_id: str, worker: Worker, model: ModelInfo) -> None:
        """Let a trainer's sessions go on in a worker.

        Raises:
            FiretitanError: As `SessionManager.resume`.
        """
        # On other devices than the CPU, sums may come in another order.
        await self._sessions.resume(trainer_id, worker, exact=model.device == "cpu")
        await self._serves(trainer_id, worker, model)

    async def stop(self, trainer_id: str, still: Callable[[], bool] = lambda: True) -> bool:
        """Stop the worker of a trainer that nobody uses; the next use starts it where it was.

        Args:
            trainer_id: Which.
            still: Asked in its turn: where it says no, the trainer goes on.

        Returns:
            False where it goes on: it is in use after all, or what it holds could not be rebuilt.
        """
        return await asyncio.shield(asyncio.create_task(self._stop(trainer_id, still)))

    async def _stop(self, trainer_id: str, still: Callable[[], bool]) -> bool:
        async with self._lock(trainer_id):
            trainer = self._trainers.get(trainer_id)
            if trainer is None or trainer.state is not ResourceState.ACTIVE:
                return trainer is None or trainer.state is ResourceState.STOPPED
            worker = self._pool.live(trainer.worker_id)
            if worker is None:
                return False

            def serves() -> bool:
                # Not where it died meanwhile: another is being put in its place, or was.
                return self._pool.live(trainer.worker_id) is worker

            def may_rest() -> bool:
                return serves() and still()

            if not await self._sessions.rest(trainer_id, may_rest) or not serves():
                return False
            # Until the row is written, it is a trainer whose worker ended: that is made good.
            await self._pool.stop(trainer.worker_id)
            await self._write(trainer_id, state=ResourceState.STOPPED, worker_id=None)
            logger.info("trainer stopped trainer=%s", trainer_id)
            if self._sessions.busy(trainer_id):
                self.wake(trainer_id)
            return True

    def wake(self, trainer_id: str) -> None:
        """Somebody uses a trainer: start it again where it is stopped."""
        self._services.activity.touch(names.trainer_name(trainer_id))
        trainer = self._trainers.get(trainer_id)
        stopped = trainer is not None and trainer.state is ResourceState.STOPPED
        now = self._services.clock.monotonic()
        if stopped and trainer_id not in self._tasks and self._wake_after.get(trainer_id, 0) <= now:
            self._begin(trainer_id, self._wake(trainer_id))

    def _use(self, trainer_id: str) -> None:
        """As `wake`, for who needs it now.

        Raises:
            FiretitanError: As `_check_starts`.
        """
        self.wake(trainer_id)
        trainer = self._trainers.get(trainer_id)
        if trainer is not None:
            self._check_starts(trainer)

    def _check_starts(self, trainer: Trainer) -> None:
        """Tell why a stopped trainer could not be started, where that was just tried.

        Raises:
            FiretitanError: MODEL_NOT_FOUND, UNSUPPORTED, DEVICE_OUT_OF_MEMORY; RECOVERING for
                another reason, with its text.
        """
        tried = self._services.clock.monotonic() < self._wake_after.get(trainer.id, 0)
        if trainer.state is not ResourceState.STOPPED or trainer.error is None or not tried:
            return
        error = failure(trainer.error)
        if error.reason in _LASTING:
            raise error
        raise FiretitanError(
            Reason.RECOVERING,
            f"{trainer.name} is stopped and could not be started, which is tried again: "
            f"{error.message}",
            retry_after_s="0.2",
        )

    async def _wake(self, trainer_id: str) -> None:
        trainer = self._trainers[trainer_id]
        try:
            await self._resume(trainer_id, *await self._start_again(trainer_id))
            self._wake_after.pop(trainer_id, None)
            return
        except FiretitanError as error:
            problem = error
        except Exception as error:  # a supervisor: the trainer stays stopped, the daemon goes on
            problem = internal_error(f"starting {trainer.name} again", error)
        await self._pool.stop(self._trainers[trainer_id].worker_id)
        if problem.reason is Reason.SESSION_LOSS:
            await self._lost(trainer_id, problem.message)
            return
        logger.error("trainer not started again trainer=%s: %s", trainer_id, problem)
        self._wake_after[trainer_id] = self._services.clock.monotonic() + _WAKE_PAUSE_S
        await self._sessions.suspend(trainer_id)
        await self._write(
            trainer_id, state=ResourceState.STOPPED, error=error_record(problem), worker_id=None
        )

    async def expire(self) -> None:
        """Start again what accepted commands wait for: whoever sent them asks for nothing more."""
        now = self._services.clock.monotonic()
        for trainer in list(self._trainers.values()):
            rests = trainer.state is ResourceState.STOPPED
            again = self._wake_after.get(trainer.id, -_BUSY_PAUSE_S) + _BUSY_PAUSE_S
            if rests and again <= now and self._sessions.busy(trainer.id):
                self.wake(trainer.id)

    async def _lost(self, trainer_id: str, cause: str) -> None:
        # The sessions first: a daemon that dies between them finds the rest to do; and without
        # the lock, which a deletion holds while it waits for them.
        await self._sessions.lose(trainer_id, cause)
        async with self._lock(trainer_id):
            await self._end_lost(trainer_id, cause)

    async def _end_lost(self, trainer_id: str, cause: str) -> None:
        trainer = self._trainers.get(trainer_id)
        if trainer is None or trainer.state is ResourceState.DELETING:
            return
        error = ErrorRecord(
            str(Reason.WORKER_UNAVAILABLE),
            f"{trainer.name}: its worker ended: {cause}; create the trainer again with the same "
            "id, then load the last checkpoint",
            {"cause": cause},
        )
        forget = functools.partial(self._pool.forget, trainer.worker_id)
        await when_there_is_space(f"the end of the worker of {trainer.name}", forget)
        await self._failed(trainer_id, error)

    async def close(self) -> None:
        """Stop provisioning; what is half done is finished at the next start."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _never_told(trainer: Trainer) -> ErrorRecord:
    return ErrorRecord(
        str(Reason.WORKER_UNAVAILABLE),
        f"{trainer.name}: its worker could not be started, and the daemon ended before it could "
        "tell why; see the daemon's log, then create the trainer again with the same id",
    )
