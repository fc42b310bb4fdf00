"""Deployments: made, found, scaled, taken over and deleted.

Knows: deployment records, pins. Must not know: how a sampler is kept alive (`deployment_workers`),
how weights are put together (`switching`), what a prompt is. A caller that goes away changes
nothing.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from firetitan_daemon.control.deployment_requests import (
    DeploymentRequest,
    check_replicas,
    check_same,
)
from firetitan_daemon.control.deployment_workers import METHOD, DeploymentWorkers
from firetitan_daemon.control.provisioning import (
    check_request,
    choose_id,
    failure,
    inactivity_s,
    new_etag,
    new_operation,
    settled,
)
from firetitan_daemon.control.services import when_there_is_space
from firetitan_daemon.core import names
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.ports import Change, Ledger
from firetitan_daemon.core.records import (
    Deployment,
    ErrorRecord,
    HotloadTransition,
    Operation,
    ResourceState,
)
from firetitan_daemon.core.shapes import DEPLOYMENT, Wish
from firetitan_daemon.core.texts import check_text
from firetitan_daemon.core.worker_ports import Worker

_STUCK_S = 30.0
"""How long a sampler may be silent before who leaves waits for it no more."""


class DeploymentManager(DeploymentWorkers):
    """Every deployment by id."""

    def restore(self, ledger: Ledger) -> None:
        """Take over the deployments of a former daemon; `recover` reaches their workers."""
        self._services.pins.restore(ledger)
        for deployment in ledger.deployments:
            if deployment.state is ResourceState.ACTIVE:
                deployment = replace(deployment, state=ResourceState.RECOVERING)
            self._deployments[deployment.id] = deployment

    def all(self) -> Sequence[Deployment]:
        """All deployments, by name."""
        return sorted(self._deployments.values(), key=lambda one: names.natural_key(one.id))

    def made_by(self, name: str, request_id: str) -> bool:
        """Whether a request made the deployment of a name; it may be gone again."""
        found = self._deployments.get(names.parse_deployment(name))
        return found is not None and bool(request_id) and found.made_by == request_id

    def problem(self, deployment: Deployment) -> FiretitanError | None:
        """Why one of its workers, which lives, is left alone."""
        return next(filter(None, map(self._pool.problem, deployment.worker_ids)), None)

    def stuck(self, name: str) -> bool:
        """Whether what was accepted may never end: a sampler hangs for long, or is left alone."""
        found = self._deployments.get(names.parse_deployment(name))
        return found is not None and (
            found.state is ResourceState.DELETING
            or self.problem(found) is not None
            or any((self._pool.silent_s(one) or 0.0) >= _STUCK_S for one in found.worker_ids)
        )

    async def ready(self, name: str) -> Deployment:
        """A deployment that can answer; one being created or restarted is waited for.

        A stopped one is started.

        Raises:
            FiretitanError: DEPLOYMENT_NOT_FOUND, RECOVERING, WORKER_UNAVAILABLE, or what its
                creation failed for.
        """
        deployment = self.get(name)
        if deployment.state is ResourceState.STOPPED:
            deployment = await self._apart(deployment.id, None)
        while not self.replica_set(deployment.id).workers:
            tasks = [self._tasks.get(one) for one in self.get(name).worker_ids]
            begun = [task for task in tasks if task is not None and not task.done()]
            if not begun:
                break
            await asyncio.wait(begun, return_when=asyncio.FIRST_COMPLETED)
        return self.serving(name)[0]

    def serving(self, name: str) -> tuple[Deployment, Sequence[Worker]]:
        """A deployment that can answer now, and its samplers that do.

        Raises:
            FiretitanError: As `ready`.
        """
        deployment = self.get(name)
        workers = self.replica_set(deployment.id).workers
        if deployment.state is ResourceState.ACTIVE and workers:
            return deployment, workers
        if deployment.state is ResourceState.FAILED and deployment.error is not None:
            raise failure(deployment.error)
        raise FiretitanError(
            Reason.RECOVERING,
            f"{deployment.name} is {deployment.state}; try again",
            retry_after_s="0.2",
        )

    @asynccontextmanager
    async def sampler(self, name: str, avoid: str = "") -> AsyncIterator[Worker]:
        """Around one request: the sampler of a deployment that takes it.

        Args:
            name: The deployment's.
            avoid: Id of a worker that is not to take it.

        Raises:
            FiretitanError: As `ready`.
        """
        deployment = await self.ready(name)
        with self._services.activity.using(deployment.name):
            async with self.replica_set(deployment.id).using(avoid) as worker:
                yield worker

    async def create(self, request: DeploymentRequest) -> Operation:
        """Start a deployment; one that exists with the same base model is answered as it is.

        A FAILED one gets new samplers. One that has fewer than are asked for gets more; who wants
        fewer scales it. Another trainer than before is noted.

        Raises:
            FiretitanError: NAME_INVALID, INVALID_ARGUMENT, ALREADY_EXISTS, REQUEST_ID_REUSED.
        """
        check_request(
            request.base_model, request.max_context_length, request.dtype, request.inactivity_s
        )
        check_text(request.request_id, "request_id")
        check_replicas(request.replicas, self._services.limits)
        if request.trainer:
            names.parse_trainer(request.trainer, "trainer")
        deployment_id = names.check_id(
            choose_id("d", request.deployment_id, request.request_id), "deployment_id"
        )
        wish = Wish(request.base_model, request.max_context_length, request.dtype)
        shape = self._services.shapes.choose(DEPLOYMENT, request.shape_name, wish)
        request = replace(
            request,
            deployment_id=deployment_id,
            shape=shape,
            max_context_length=shape.max_context_length,
            dtype=shape.dtype,
        )
        creation = asyncio.create_task(self._create(request))
        return await asyncio.shield(creation)

    async def _create(self, request: DeploymentRequest) -> Operation:
        services, name = self._services, names.deployment_name(request.deployment_id)
        trainer_id = names.parse_trainer(request.trainer) if request.trainer else ""
        async with self._lock(request.deployment_id):
            former = await services.operations.by_request(
                name, request.request_id, request.payload_digest
            )
            if former is not None:
                return former
            now = services.clock.now()
            operation = new_operation(METHOD, name, request.request_id, request.payload_digest, now)
            existing = self._deployments.get(request.deployment_id)
            if existing is not None:
                check_same(existing, request)
                if existing.state is not ResourceState.FAILED:
                    return await self._join(existing, trainer_id, request, operation)
                await self._end_all(existing)
            elif self._forget_cleanup is not None:
                await self._forget_cleanup(name)
            deployment = Deployment(
                id=request.deployment_id,
                base_model=request.base_model,
                max_context_length=request.max_context_length,
                dtype=request.dtype,
                state=ResourceState.CREATING,
                create_time=now,
                trainer_id=trainer_id,
                made_by=existing.made_by if existing is not None else request.request_id,
                inactivity_s=inactivity_s(request.inactivity_s, existing, services),
                active_snapshot=existing.active_snapshot if existing is not None else "",
                etag=new_etag(),
                replicas=max(request.replicas, existing.replicas if existing is not None else 1),
                shape=request.shape,
                transition=request.transition or HotloadTransition.FINISH,
                requires_sync=existing is not None
                and (existing.requires_sync or existing.trainer_id != trainer_id),
            )
            specs = self._new_specs(deployment, deployment.replicas)
            deployment = replace(deployment, worker_ids=tuple(one.worker_id for one in specs))
            await services.operations.write(
                Change(
                    deployments=[deployment], workers=specs, operations=[operation], durable=True
                )
            )
            self._deployments[deployment.id] = deployment
            self._pool.remember(specs)
            for worker_id in deployment.worker_ids:
                self._provide(deployment.id, worker_id)
            return operation

    async def _join(
        self,
        existing: Deployment,
        trainer_id: str,
        request: DeploymentRequest,
        operation: Operation,
    ) -> Operation:
        changes: dict[str, Any] = {}
        if trainer_id and trainer_id != existing.trainer_id:
            # It serves on what it served; what the new trainer made has to be brought to it.
            changes |= {"trainer_id": trainer_id, "requires_sync": True}
        if request.inactivity_s not in (None, existing.inactivity_s):
            changes["inactivity_s"] = request.inactivity_s
        if request.transition not in (None, existing.transition):
            changes["transition"] = request.transition
        operation = self._answered(operation, existing)
        replicas = max(existing.replicas, request.replicas)
        if existing.state is ResourceState.STOPPED:
            # As many start with the next use.
            changes |= {"replicas": replicas} if replicas != existing.replicas else {}
        elif replicas > len(existing.worker_ids):
            await self._grow(existing, replicas, operation=operation, **changes)
            return operation
        if not changes:
            return await self._answer(existing.id, operation)
        await self.update(existing.id, operation=operation, **changes)
        return operation

    async def recover(self, deployment_id: str) -> None:
        """At start: reach a deployment's samplers, or start others; try again what was given up."""
        deployment = self._deployments[deployment_id]
        if deployment.state is ResourceState.DELETING:
            await self._delete(deployment_id)
        elif deployment.state is ResourceState.CREATING:
            for worker_id in deployment.worker_ids:
                self._provide(deployment_id, worker_id)
        elif deployment.state is ResourceState.RECOVERING:
            reached = (self._reach(deployment_id, one) for one in deployment.worker_ids)
            make_up = functools.partial(self._make_up, deployment_id)
            await asyncio.gather(when_there_is_space(deployment.name, make_up), *reached)

    async def _make_up(self, deployment_id: str) -> None:
        """Add the samplers that are missing, if it was not scaled or deleted meanwhile."""
        async with self._lock(deployment_id):
            deployment = self._deployments.get(deployment_id)
            runs = (ResourceState.RECOVERING, ResourceState.ACTIVE)
            if deployment is None or deployment.state not in runs:
                return
            if len(deployment.worker_ids) < deployment.replicas:
                await self._grow(deployment, deployment.replicas)

    async def scale(
        self, name: str, replicas: int, still: Callable[[], bool] = lambda: True
    ) -> Deployment:
        """Have so many samplers; 0 stops all of them, whatever they do, the record stays.

        One that is taken away ends what it has begun; one that is added answers once it serves
        what the others serve.

        Args:
            name: Of which.
            replicas: How many.
            still: Asked in its turn, before all are stopped: where it says no, they go on.

        Raises:
            FiretitanError: DEPLOYMENT_NOT_FOUND, INVALID_ARGUMENT where that is too many.
        """
        deployment = self.get(name)
        check_replicas(replicas, self._services.limits)
        return await self._apart(deployment.id, replicas, still)

    async def _apart(
        self, deployment_id: str, replicas: int | None, still: Callable[[], bool] = lambda: True
    ) -> Deployment:
        scaling = asyncio.create_task(self._scale(deployment_id, replicas, still))
        return await asyncio.shield(scaling)

    async def _scale(
        self, deployment_id: str, replicas: int | None, still: Callable[[], bool]
    ) -> Deployment:
        """None: as many as it had, where it is stopped by then."""
        async with self._lock(deployment_id):
            deployment = self.get(deployment_id)
            stopped = deployment.state is ResourceState.STOPPED
            if replicas is None:
                if not stopped:
                    return deployment
                replicas = deployment.replicas
            if deployment.state is ResourceState.DELETING or (stopped and not replicas):
                return deployment
            if not replicas:
                async with self.weights_lock(deployment_id):
                    if not still():
                        return self.get(deployment_id)
                    # First: a record that cannot be written names no sampler that was ended.
                    rests = await self.update(
                        deployment_id, state=ResourceState.STOPPED, worker_ids=()
                    )
                    await self._end_all(deployment)
                    return rests
            if stopped or deployment.state is ResourceState.FAILED:
                await self._grow(deployment, replicas, state=ResourceState.RECOVERING)
            elif replicas < len(deployment.worker_ids):
                await self._shrink(deployment, replicas)
            elif not replicas == deployment.replicas == len(deployment.worker_ids):
                await self._grow(deployment, replicas)
            return self.get(deployment_id)

    async def delete(self, name: str) -> None:
        """End the samplers, forget the deployment. One that is gone already is fine."""
        deployment_id = names.parse_deployment(name)
        if deployment_id in self._deployments:
            await asyncio.shield(asyncio.create_task(self._delete(deployment_id)))

    async def _delete(self, deployment_id: str) -> None:
        async with self._lock(deployment_id):
            deployment = self._deployments.get(deployment_id)
            if deployment is None:
                return
            await self.update(deployment_id, state=ResourceState.DELETING)
            await self._end_all(deployment)
            gone = ErrorRecord(str(Reason.CLOSED), f"{deployment.name} was deleted")
            now = self._services.clock.now()
            await self._services.operations.write(
                Change(
                    deleted_deployments=[deployment_id],
                    deleted_pins=self._services.pins.of(deployment_id),
                    operations=[
                        settled(one, now, gone)
                        for one in self._services.operations.open_of(deployment.name)
                    ],
                    durable=True,
                )
            )
            self._services.pins.forget(deployment_id)
            del self._deployments[deployment_id]
            self._sets.pop(deployment_id, None)
