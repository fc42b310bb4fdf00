"""Trainers: a base model in a worker of its own.

Knows: trainer records, the pool, the sessions on a trainer. Must not know: RPCs. Provisioning runs
in a task of the manager; a caller that goes away changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import replace

from firetitan_daemon.control.provisioning import (
    choose_id,
    log_shape,
    new_operation,
    settled,
)
from firetitan_daemon.control.services import (
    Services,
    error_record,
    internal_error,
    when_there_is_space,
)
from firetitan_daemon.control.sessions import SessionManager
from firetitan_daemon.control.trainer_requests import TrainerRequest, check_same, check_values
from firetitan_daemon.control.workers import WorkerPool
from firetitan_daemon.core import names
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.failpoints import failpoint
from firetitan_daemon.core.ports import Change, Ledger, Worker
from firetitan_daemon.core.records import (
    ErrorRecord,
    Operation,
    ResourceState,
    Trainer,
    WorkerKind,
)
from firetitan_daemon.core.shapes import FORWARD_MODE, FULL_MODE, LORA_MODE, TRAINING, Wish

METHOD = "CreateTrainer"
_REPLACE_PAUSES_S = (0.0, 0.2, 1.0, 3.0)
"""Before each try to put a worker in the place of a dead one."""
_MAX_RESTARTS, _RESTARTS_WITHIN_S = 5, 60.0

logger = logging.getLogger("firetitan.trainers")


class TrainerManager:
    """Every trainer by id.

    Owns the records; each changes in memory when its row is written.
    """

    def __init__(self, services: Services, pool: WorkerPool, sessions: SessionManager) -> None:
        self._services = services
        self._pool = pool
        self._sessions = sessions
        self._trainers: dict[str, Trainer] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._lock = asyncio.Lock()
        self._replaced: dict[str, list[float]] = {}
        """When workers of a trainer were replaced, monotonic seconds, of late."""

    def restore(self, ledger: Ledger) -> None:
        """Take over the trainers of a former daemon; `recover` reaches their workers."""
        for trainer in ledger.trainers:
            if trainer.state is ResourceState.ACTIVE:
                trainer = replace(trainer, state=ResourceState.RECOVERING)
            self._trainers[trainer.id] = trainer

    def get(self, name: str) -> Trainer:
        """One trainer, by name or id.

        Raises:
            FiretitanError: NAME_INVALID, TRAINER_NOT_FOUND.
        """
        trainer_id = names.parse_trainer(name)
        trainer = self._trainers.get(trainer_id)
        if trainer is None:
            raise FiretitanError(
                Reason.TRAINER_NOT_FOUND,
                f"trainers/{trainer_id} does not exist; create it first",
                trainer=f"trainers/{trainer_id}",
            )
        return trainer

    def all(self) -> Sequence[Trainer]:
        """All trainers, by name."""
        return sorted(self._trainers.values(), key=lambda one: names.natural_key(one.id))

    def pid(self, trainer: Trainer) -> int:
        """Process id of its worker; 0 without one."""
        return self._pool.pid(trainer.worker_id)

    async def ready(self, name: str) -> tuple[Trainer, Worker]:
        """A trainer that can work; one that is being created is waited for.

        Raises:
            FiretitanError: TRAINER_NOT_FOUND, RECOVERING, or what its creation failed for.
        """
        task = self._tasks.get(self.get(name).id)
        if task is not None:
            await asyncio.wait([task])
        trainer = self.get(name)
        worker = self._pool.live(trainer.worker_id)
        if trainer.state is ResourceState.ACTIVE and worker is not None:
            return trainer, worker
        if trainer.state is ResourceState.FAILED and trainer.error is not None:
            raise FiretitanError(
                Reason(trainer.error.reason), trainer.error.message, **trainer.error.metadata
            )
        raise FiretitanError(
            Reason.RECOVERING,
            f"{trainer.name} is {trainer.state}; try again",
            retry_after_s="0.2",
        )

    async def create(self, request: TrainerRequest) -> Operation:
        """Start a trainer; one that exists with an equal specification is answered as it is.

        A FAILED trainer gets a new worker.

        Raises:
            FiretitanError: NAME_INVALID, INVALID_ARGUMENT, ALREADY_EXISTS naming the field that
                differs, REQUEST_ID_REUSED, CLOSED while it is being deleted.
        """
        check_values(request)
        trainer_id = names.check_id(
            choose_id("t", request.trainer_id, request.request_id), "trainer_id"
        )
        request = self._shaped(replace(request, trainer_id=trainer_id))
        creation = asyncio.create_task(self._create(request))
        return await asyncio.shield(creation)

    def _shaped(self, request: TrainerRequest) -> TrainerRequest:
        mode = LORA_MODE if request.lora_rank or request.max_lora_rank else FULL_MODE
        mode = FORWARD_MODE if request.forward_only else mode
        wish = Wish(request.base_model, request.max_context_length, request.dtype, mode)
        shape = self._services.shapes.choose(TRAINING, request.shape_name, wish)
        return replace(
            request, shape=shape, max_context_length=shape.max_context_length, dtype=shape.dtype
        )

    async def _create(self, request: TrainerRequest) -> Operation:
        services, name = self._services, names.trainer_name(request.trainer_id)
        async with self._lock:
            former = await services.operations.by_request(
                name, request.request_id, request.payload_digest
            )
            if former is not None:
                return former
            operation = new_operation(
                METHOD, name, request.request_id, request.payload_digest, services.clock.now()
            )
            existing = self._trainers.get(request.trainer_id)
            if existing is not None:
                check_same(existing, request)
                if not request.shape_name:
                    request = replace(request, shape=existing.shape or request.shape)
                if existing.state in (ResourceState.ACTIVE, ResourceState.RECOVERING):
                    operation = settled(operation, services.clock.now())
                if existing.state is not ResourceState.FAILED:
                    await services.operations.write(Change(operations=[operation]))
                    return operation
                await self._pool.stop(existing.worker_id)
            spec = self._pool.new_spec(
                WorkerKind.TRAINER,
                name,
                request.base_model,
                request.dtype,
                request.max_context_length,
                request.shape,
            )
            trainer = Trainer(
                id=request.trainer_id,
                base_model=request.base_model,
                lora_rank=request.lora_rank,
                max_context_length=request.max_context_length,
                dtype=request.dtype,
                state=ResourceState.CREATING,
                create_time=services.clock.now(),
                worker_id=spec.worker_id,
                forward_only=request.forward_only,
                max_lora_rank=request.max_lora_rank,
                shape=request.shape,
            )
            await services.operations.write(
                Change(trainers=[trainer], workers=[spec], operations=[operation], durable=True)
            )
            self._trainers[trainer.id] = trainer
            self._begin(trainer.id, self._provision(trainer.id))
            return operation

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
        assert spec is not None, "a trainer's row and its worker's are written together"
        try:
            worker, model = await self._pool.start(spec)
        except FiretitanError as error:
            await self._failed(trainer, error_record(error))
            return
        except Exception as error:  # a supervisor: the trainer fails, the daemon goes on
            await self._failed(trainer, error_record(internal_error(trainer.name, error)))
            return
        failpoint("create.loaded")
        active = replace(trainer, state=ResourceState.ACTIVE, model=model, error=None)
        await self._write(active)
        log_shape(active.name, active.shape, model)
        self._watch(trainer_id, worker)

    async def _failed(self, trainer: Trainer, error: ErrorRecord) -> None:
        await self._write(
            replace(trainer, state=ResourceState.FAILED, error=error, worker_id=None), error
        )

    async def _write(self, trainer: Trainer, error: ErrorRecord | None = None) -> None:
        now = self._services.clock.now()
        operations = [
            settled(one, now, error)
            for one in self._services.operations.open_of(trainer.name, METHOD)
        ]
        change = Change(trainers=[trainer], operations=operations, durable=True)
        await when_there_is_space(trainer.name, lambda: self._services.operations.write(change))
        self._trainers[trainer.id] = trainer

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
                    worker = await when_there_is_space(
                        f"a new worker of trainers/{trainer_id}",
                        lambda: self._start_again(trainer_id),
                    )
                    start_s = self._services.clock.monotonic() - started
                    await self._resume(trainer_id, worker)
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

    async def _start_again(self, trainer_id: str) -> Worker:
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
        trainer = replace(trainer, state=ResourceState.RECOVERING, worker_id=spec.worker_id)
        await self._services.operations.write(
            Change(trainers=[trainer], workers=[spec], durable=True)
        )
        self._trainers[trainer_id] = trainer
        worker, model = await self._pool.start(spec)
        failpoint("recovery.launched")
        if trainer.model is not None and trainer.model.fingerprint != model.fingerprint:
            raise FiretitanError(
                Reason.SESSION_LOSS,
                f"the files of {trainer.base_model!r} are others now than when the trainer began: "
                f"fingerprint {model.fingerprint[:12]}, was {trainer.model.fingerprint[:12]}",
            )
        self._trainers[trainer_id] = replace(trainer, model=model)
        return worker

    async def _resume(self, trainer_id: str, worker: Worker) -> None:
        """Let a trainer's sessions go on in a worker.

        Raises:
            FiretitanError: As `SessionManager.resume`.
        """
        model = self._trainers[trainer_id].model
        # On other devices than the CPU, sums may come in another order.
        exact = model is None or model.device == "cpu"
        await self._sessions.resume(trainer_id, worker, exact=exact)
        active = replace(self._trainers[trainer_id], state=ResourceState.ACTIVE, error=None)
        await self._write(active)
        self._watch(trainer_id, worker)

    async def _lost(self, trainer_id: str, cause: str) -> None:
        # The sessions first: a daemon that dies between them finds the rest to do; and without
        # the lock, which a deletion holds while it waits for them.
        await self._sessions.lose(trainer_id, cause)
        async with self._lock:
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
        await self._pool.forget(trainer.worker_id)
        await self._failed(trainer, error)

    async def recover(self, trainer_id: str) -> None:
        """At start: reach a trainer's worker, or say what was lost."""
        trainer = self._trainers[trainer_id]
        if trainer.state is ResourceState.DELETING:
            await self._delete(trainer_id, purge=True)
        elif trainer.state is ResourceState.CREATING:
            self._begin(trainer_id, self._provision(trainer_id))
        elif trainer.state is ResourceState.RECOVERING:
            spec = self._pool.spec(trainer.worker_id)
            worker = await self._pool.adopt(spec) if spec is not None else None
            if worker is None:
                await self._ended(trainer_id, "it was gone when the daemon started")
                return
            failpoint("adopt.adopted")
            try:
                # One that was to take a dead one's place may not have got so far.
                await worker.load_model()
                await self._resume(trainer_id, worker)
            except FiretitanError as error:
                await self._pool.stop(trainer.worker_id)
                cause = f"it could not be taken over: {error.message}"
                if error.reason is Reason.WORKER_UNAVAILABLE:
                    await self._ended(trainer_id, cause)
                else:
                    await self._lost(trainer_id, cause)

    async def delete(self, name: str) -> None:
        """Finish what its session accepted, end the worker, forget the trainer.

        Checkpoints and snapshots stay. One that is gone already is fine.
        """
        trainer_id = names.parse_trainer(name)
        if trainer_id in self._trainers:
            await asyncio.shield(asyncio.create_task(self._delete(trainer_id)))

    async def _delete(self, trainer_id: str, *, purge: bool = False) -> None:
        async with self._lock:
            trainer = self._trainers.get(trainer_id)
            if trainer is None:
                return
            deleting = replace(trainer, state=ResourceState.DELETING)
            await self._services.store.write(Change(trainers=[deleting], durable=True))
            self._trainers[trainer_id] = deleting
            task = self._tasks.get(trainer_id)
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
            gone = ErrorRecord(str(Reason.CLOSED), f"{trainer.name} was deleted")
            now = self._services.clock.now()
            operations = [
                settled(one, now, gone)
                for one in self._services.operations.open_of(trainer.name, METHOD)
            ]
            await self._sessions.close_trainer(trainer_id)
            await self._pool.stop(trainer.worker_id)
            await self._services.operations.write(Change(operations=operations))
            del self._trainers[trainer_id]
            if purge:
                # Not before the next start: results that were not taken yet stay until then.
                await self._services.store.write(
                    Change(deleted_trainers=[trainer_id], durable=True)
                )
                self._sessions.forget(trainer_id)

    async def close(self) -> None:
        """Stop provisioning; what is half done is finished at the next start."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
