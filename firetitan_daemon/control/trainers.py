"""Trainers: made, found, taken over and deleted.

Knows: trainer records, the sessions on a trainer. Must not know: RPCs, how a worker is kept alive
(`trainer_workers`). A caller that goes away changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from firetitan_daemon.control.provisioning import (
    choose_id,
    failure,
    inactivity_s,
    new_operation,
    settled,
)
from firetitan_daemon.control.trainer_requests import TrainerRequest, check_same, check_values
from firetitan_daemon.control.trainer_workers import METHOD, TrainerWorkers
from firetitan_daemon.core import names
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.failpoints import failpoint
from firetitan_daemon.core.ports import Change, Ledger
from firetitan_daemon.core.records import ErrorRecord, Operation, ResourceState, Trainer, WorkerKind
from firetitan_daemon.core.shapes import FORWARD_MODE, FULL_MODE, LORA_MODE, TRAINING, Wish
from firetitan_daemon.core.worker_ports import Worker


class TrainerManager(TrainerWorkers):
    """Every trainer by id."""

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

    def made_by(self, name: str, request_id: str) -> bool:
        """Whether a request made the trainer of a name; it may be gone again."""
        found = self._trainers.get(names.parse_trainer(name))
        return found is not None and bool(request_id) and found.made_by == request_id

    def busy(self, trainer_id: str) -> bool:
        """Whether it is being made, or its sessions have commands that are not done."""
        return trainer_id in self._tasks or self._sessions.busy(trainer_id)

    def pid(self, trainer: Trainer) -> int:
        """Process id of its worker; 0 without one."""
        return self._pool.pid(trainer.worker_id)

    def problem(self, trainer: Trainer) -> FiretitanError | None:
        """Why its worker, which lives, is left alone."""
        return self._pool.problem(trainer.worker_id)

    async def ready(self, name: str) -> tuple[Trainer, Worker]:
        """A trainer that can work; one that is being created is waited for, a stopped one started.

        Raises:
            FiretitanError: TRAINER_NOT_FOUND, RECOVERING, RESOURCE_FAILED where its worker is gone
                for good, or what its creation or its start failed for.
        """
        self.wake(self.get(name).id)
        task = self._tasks.get(self.get(name).id)
        if task is not None:
            await asyncio.wait([task])
        trainer = self.get(name)
        worker = self._pool.live(trainer.worker_id)
        if trainer.state is ResourceState.ACTIVE and worker is not None:
            return trainer, worker
        if trainer.state is ResourceState.FAILED and trainer.error is not None:
            raise failure(trainer.error)
        self._check_starts(trainer)
        # As far as its record tells, one whose worker has just ended is active.
        active = trainer.state is ResourceState.ACTIVE
        state = ResourceState.RECOVERING if active else trainer.state
        raise FiretitanError(
            Reason.RECOVERING,
            f"{trainer.name} is {state}; try again",
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
        async with self._lock(request.trainer_id):
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
                if existing.state is not ResourceState.FAILED:
                    return await self._join(existing, request.inactivity_s, operation)
                await self._pool.stop(existing.worker_id)
            elif self._forget_cleanup is not None:
                await self._forget_cleanup(name)
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
                made_by=existing.made_by if existing is not None else request.request_id,
                inactivity_s=inactivity_s(request.inactivity_s, existing, services),
            )
            async with self._rows[trainer.id]:
                await services.operations.write(
                    Change(trainers=[trainer], workers=[spec], operations=[operation], durable=True)
                )
                self._trainers[trainer.id] = trainer
                self._pool.remember([spec])
            self._begin(trainer.id, self._provision(trainer.id))
            return operation

    async def _join(
        self, existing: Trainer, inactivity: float | None, operation: Operation
    ) -> Operation:
        async with self._rows[existing.id]:
            joined = self._trainers[existing.id]
            if joined.state in (ResourceState.ACTIVE, ResourceState.RECOVERING):
                operation = settled(operation, self._services.clock.now())
            if joined.state is ResourceState.FAILED:
                operation = settled(operation, self._services.clock.now(), joined.error)
            if inactivity is not None:
                joined = replace(joined, inactivity_s=inactivity)
            await self._services.operations.write(Change(trainers=[joined], operations=[operation]))
            self._trainers[joined.id] = joined
        self._wake_after.pop(joined.id, None)
        self.wake(joined.id)
        return operation

    async def recover(self, trainer_id: str) -> None:
        """At start: reach a trainer's worker, or say what was lost."""
        trainer = self._trainers[trainer_id]
        if trainer.state is ResourceState.DELETING:
            await self._delete(trainer_id, purge=True)
        elif trainer.state is ResourceState.CREATING:
            self._begin(trainer_id, self._provision(trainer_id))
        elif trainer.state is ResourceState.STOPPED:
            creations = self._services.operations.open_of(trainer.name, METHOD)
            if creations or self._sessions.busy(trainer_id):
                # Somebody had asked for it when the last daemon ended.
                self.wake(trainer_id)
        elif trainer.state is ResourceState.RECOVERING:
            spec = self._pool.spec(trainer.worker_id)
            worker = await self._pool.adopt(spec) if spec is not None else None
            if worker is None:
                await self._ended(trainer_id, "it was gone when the daemon started")
                return
            failpoint("adopt.adopted")
            try:
                # One that was to take a dead one's place may not have got so far.
                model = await worker.load_model()
                await self._resume(trainer_id, worker, model)
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
        async with self._lock(trainer_id):
            trainer = self._trainers.get(trainer_id)
            if trainer is None:
                return
            async with self._rows[trainer_id]:
                trainer = replace(self._trainers[trainer_id], state=ResourceState.DELETING)
                await self._services.store.write(Change(trainers=[trainer], durable=True))
                self._trainers[trainer_id] = trainer
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
