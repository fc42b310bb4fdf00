"""Deployments: a base model in a sampler worker, and what it serves.

Knows: deployment records, the pool, pins. Must not know: how weights are put together
(`weight_sync`), what a prompt is. Provisioning runs in a task of the manager.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from firetitan_daemon.control.deployment_requests import DeploymentRequest, check_same
from firetitan_daemon.control.provisioning import (
    check_etag,
    check_request,
    choose_id,
    failure,
    inactivity_s,
    log_shape,
    new_etag,
    new_operation,
    settled,
)
from firetitan_daemon.control.services import (
    Services,
    error_record,
    internal_error,
    logger,
    when_there_is_space,
)
from firetitan_daemon.control.workers import WorkerPool
from firetitan_daemon.core import names
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.ports import Change, Ledger, Worker
from firetitan_daemon.core.records import (
    Deployment,
    ErrorRecord,
    HotloadTransition,
    Operation,
    ResourceState,
    WorkerKind,
    WorkerSpec,
)
from firetitan_daemon.core.shapes import DEPLOYMENT, Wish
from firetitan_daemon.core.texts import check_text

METHOD = "CreateDeployment"
_RESTARTS = 3
_RESTART_WINDOW_S = 60.0

Restore = Callable[[Deployment, Worker], Awaitable[None]]
"""Makes a fresh worker serve what the deployment served before."""


class DeploymentManager:
    """Every deployment by id.

    Owns the records, and one lock a deployment for whatever changes its weights.
    """

    def __init__(self, services: Services, pool: WorkerPool) -> None:
        self._services = services
        self._pool = pool
        self._deployments: dict[str, Deployment] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._lock = asyncio.Lock()
        self._rows = asyncio.Lock()
        self._deaths: dict[str, list[float]] = {}
        self._restore_weights: Restore | None = None

    def connect(self, restore_weights: Restore) -> None:
        """Say how a fresh worker is made to serve what was served before."""
        self._restore_weights = restore_weights

    def restore(self, ledger: Ledger) -> None:
        """Take over the deployments of a former daemon; `recover` reaches their workers."""
        self._services.pins.restore(ledger)
        for deployment in ledger.deployments:
            if deployment.state is ResourceState.ACTIVE:
                deployment = replace(deployment, state=ResourceState.RECOVERING)
            self._deployments[deployment.id] = deployment

    def get(self, name: str) -> Deployment:
        """One deployment, by name or id.

        Raises:
            FiretitanError: NAME_INVALID, DEPLOYMENT_NOT_FOUND.
        """
        deployment_id = names.parse_deployment(name)
        deployment = self._deployments.get(deployment_id)
        if deployment is None:
            raise FiretitanError(
                Reason.DEPLOYMENT_NOT_FOUND,
                f"deployments/{deployment_id} does not exist; create it first",
                deployment=f"deployments/{deployment_id}",
            )
        return deployment

    def all(self) -> Sequence[Deployment]:
        """All deployments, by name."""
        return sorted(self._deployments.values(), key=lambda one: names.natural_key(one.id))

    def made_by(self, name: str, request_id: str) -> bool:
        """Whether a request made the deployment of a name; it may be gone again."""
        found = self._deployments.get(names.parse_deployment(name))
        return found is not None and bool(request_id) and found.made_by == request_id

    def pid(self, deployment: Deployment) -> int:
        """Process id of its worker; 0 without one."""
        return self._pool.pid(deployment.worker_id)

    def problem(self, deployment: Deployment) -> FiretitanError | None:
        """Why its worker, which lives, is left alone."""
        return self._pool.problem(deployment.worker_id)

    def weights_lock(self, deployment_id: str) -> asyncio.Lock:
        """Held while a deployment's weights change."""
        return self._locks.setdefault(deployment_id, asyncio.Lock())

    async def ready(self, name: str) -> tuple[Deployment, Worker]:
        """A deployment that can answer; one being created or restarted is waited for.

        A stopped one is started.

        Raises:
            FiretitanError: DEPLOYMENT_NOT_FOUND, RECOVERING, WORKER_UNAVAILABLE, or what its
                creation failed for.
        """
        deployment = self.get(name)
        if deployment.state is ResourceState.STOPPED:
            deployment = await self.scale(deployment.name, 1)
        task = self._tasks.get(deployment.id)
        if task is not None:
            await asyncio.wait([task])
        return self.serving(name)

    def serving(self, name: str) -> tuple[Deployment, Worker]:
        """A deployment that can answer now.

        Raises:
            FiretitanError: As `ready`.
        """
        deployment = self.get(name)
        worker = self._pool.live(deployment.worker_id)
        if deployment.state is ResourceState.ACTIVE and worker is not None:
            return deployment, worker
        if deployment.state is ResourceState.FAILED and deployment.error is not None:
            raise failure(deployment.error)
        raise FiretitanError(
            Reason.RECOVERING,
            f"{deployment.name} is {deployment.state}; try again",
            retry_after_s="0.2",
        )

    async def create(self, request: DeploymentRequest) -> Operation:
        """Start a deployment; one that exists with the same base model is answered as it is.

        A FAILED one gets a new worker. Another trainer than before is noted.

        Raises:
            FiretitanError: NAME_INVALID, INVALID_ARGUMENT, ALREADY_EXISTS, REQUEST_ID_REUSED.
        """
        check_request(
            request.base_model, request.max_context_length, request.dtype, request.inactivity_s
        )
        check_text(request.request_id, "request_id")
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
        async with self._lock:
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
                await self._pool.stop(existing.worker_id)
            spec = self._pool.new_spec(
                WorkerKind.SAMPLER,
                name,
                request.base_model,
                request.dtype,
                request.max_context_length,
                request.shape,
            )
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
                worker_id=spec.worker_id,
                shape=request.shape,
                transition=request.transition or HotloadTransition.FINISH,
                requires_sync=existing is not None
                and (existing.requires_sync or existing.trainer_id != trainer_id),
            )
            await services.operations.write(
                Change(
                    deployments=[deployment], workers=[spec], operations=[operation], durable=True
                )
            )
            self._deployments[deployment.id] = deployment
            self._begin(deployment.id)
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
        if existing.state is not ResourceState.CREATING:
            operation = settled(operation, self._services.clock.now())
        if changes:
            await self.update(existing.id, operation=operation, **changes)
        else:
            await self._services.operations.write(Change(operations=[operation]))
        return operation

    def _begin(self, deployment_id: str) -> None:
        task = asyncio.create_task(self._provision(deployment_id))
        self._tasks[deployment_id] = task

        def ended(_: asyncio.Task[None]) -> None:
            if self._tasks.get(deployment_id) is task:
                del self._tasks[deployment_id]

        task.add_done_callback(ended)

    async def _provision(self, deployment_id: str) -> None:
        deployment = self._deployments[deployment_id]
        try:
            spec = self._pool.spec(deployment.worker_id)
            assert spec is not None, "a deployment's row and its worker's are written together"
            worker, model = await self._pool.start(spec)
            async with self.weights_lock(deployment_id):
                if self._restore_weights is not None:
                    await self._restore_weights(self._deployments[deployment_id], worker)
        except FiretitanError as error:
            await self._pool.stop(deployment.worker_id)
            recovering = deployment.state is ResourceState.RECOVERING
            if recovering and error.reason is Reason.WORKER_UNAVAILABLE:
                async with self._lock:
                    await self._restart(deployment_id, deployment.worker_id, error.message)
            else:
                await self._fail(deployment_id, error_record(error))
        except Exception as error:  # a supervisor: the deployment fails, the daemon goes on
            await self._pool.stop(deployment.worker_id)
            record = error_record(internal_error(deployment.name, error))
            await self._fail(deployment_id, record)
        else:
            active = functools.partial(
                self.update, deployment_id, state=ResourceState.ACTIVE, model=model, error=None
            )
            await when_there_is_space(deployment.name, active)
            log_shape(deployment.name, deployment.shape, model)
            self._watch(deployment_id, worker)

    async def _fail(self, deployment_id: str, error: ErrorRecord) -> None:
        failed = functools.partial(
            self.update,
            deployment_id,
            creation_error=error,
            state=ResourceState.FAILED,
            error=error,
            worker_id=None,
        )
        await when_there_is_space(f"deployments/{deployment_id}", failed)

    async def update(
        self,
        deployment_id: str,
        *,
        operation: Operation | None = None,
        creation_error: ErrorRecord | None = None,
        workers: Sequence[WorkerSpec] = (),
        if_etag: str = "",
        **changes: Any,
    ) -> Deployment:
        """Change a deployment's fields under a new etag.

        Args:
            deployment_id: Which.
            operation: Written with it, e.g. ended or accepted by it.
            creation_error: What operations that wait for its creation end with, where it now
                stands ACTIVE or FAILED; None: they end well.
            workers: Specifications to write with it.
            if_etag: The etag it must still have; empty: any.
            changes: Fields of the record.

        Raises:
            FiretitanError: DEPLOYMENT_NOT_FOUND where it was deleted meanwhile, ETAG_MISMATCH.
        """
        async with self._rows:
            former = self.get(deployment_id)
            check_etag(former.name, former.etag, if_etag)
            deployment = replace(former, **changes, etag=new_etag())
            operations = [operation] if operation is not None else []
            if deployment.state in (ResourceState.ACTIVE, ResourceState.FAILED):
                now = self._services.clock.now()
                operations += [
                    settled(one, now, creation_error)
                    for one in self._services.operations.open_of(deployment.name, METHOD)
                    if operation is None or one.id != operation.id
                ]
            await self._services.operations.write(
                Change(
                    deployments=[deployment], workers=workers, operations=operations, durable=True
                )
            )
            self._deployments[deployment.id] = deployment
            return deployment

    def _watch(self, deployment_id: str, worker: Worker) -> None:
        async def exited(cause: str) -> None:
            async with self._lock:
                await self._restart(deployment_id, worker.spec.worker_id, cause)

        self._pool.watch(worker, exited)

    async def _restart(self, deployment_id: str, worker_id: str | None, cause: str) -> None:
        deployment = self._deployments.get(deployment_id)
        if deployment is None or deployment.worker_id != worker_id:
            return  # deleted, stopped or created anew meanwhile
        now = self._services.clock.monotonic()
        deaths = [t for t in self._deaths.get(deployment_id, []) if now - t < _RESTART_WINDOW_S]
        self._deaths[deployment_id] = [*deaths, now]
        await self._pool.forget(worker_id)
        if len(deaths) >= _RESTARTS:
            error = ErrorRecord(
                str(Reason.WORKER_UNAVAILABLE),
                f"{deployment.name}: its worker ended {len(deaths) + 1} times within "
                f"{_RESTART_WINDOW_S:.0f} s, at last: {cause}; see its log, then create the "
                "deployment again",
                {"cause": cause},
            )
            await self._fail(deployment_id, error)
            return
        logger.warning("sampler restarts deployment=%s cause=%s", deployment_id, cause)
        await self._renew(deployment)

    async def _renew(self, deployment: Deployment) -> None:
        spec = self._pool.new_spec(
            WorkerKind.SAMPLER,
            deployment.name,
            deployment.base_model,
            deployment.dtype,
            deployment.max_context_length,
            deployment.shape,
        )
        await self.update(
            deployment.id,
            workers=[spec],
            state=ResourceState.RECOVERING,
            worker_id=spec.worker_id,
        )
        self._begin(deployment.id)

    async def recover(self, deployment_id: str) -> None:
        """At start: reach a deployment's worker, or start another."""
        deployment = self._deployments[deployment_id]
        if deployment.state is ResourceState.DELETING:
            await self._delete(deployment_id)
        elif deployment.state is ResourceState.CREATING:
            self._begin(deployment_id)
        elif deployment.state is ResourceState.RECOVERING:
            spec = self._pool.spec(deployment.worker_id)
            worker = await self._pool.adopt(spec) if spec is not None else None
            if worker is None:
                await self._pool.forget(deployment.worker_id)
                await self._renew(deployment)
            else:
                self._begin(deployment_id)

    async def scale(self, name: str, replicas: int) -> Deployment:
        """Stop the worker (0) or start it again (1); the record stays.

        Raises:
            FiretitanError: DEPLOYMENT_NOT_FOUND, UNSUPPORTED for more than one.
        """
        deployment = self.get(name)
        if replicas not in (0, 1):
            raise FiretitanError(
                Reason.UNSUPPORTED,
                f"replicas: {replicas}; a deployment has one worker or none",
                field="replicas",
            )
        return await asyncio.shield(asyncio.create_task(self._scale(deployment.id, replicas)))

    async def _scale(self, deployment_id: str, replicas: int) -> Deployment:
        async with self._lock:
            deployment = self.get(deployment_id)
            if replicas and deployment.state in (ResourceState.STOPPED, ResourceState.FAILED):
                await self._renew(deployment)
            elif not replicas and deployment.state is not ResourceState.STOPPED:
                async with self.weights_lock(deployment_id):
                    await self._cancel_task(deployment_id)
                    await self._pool.stop(deployment.worker_id)
                    await self.update(deployment_id, state=ResourceState.STOPPED, worker_id=None)
            return self.get(deployment_id)

    async def delete(self, name: str) -> None:
        """End the worker, forget the deployment. One that is gone already is fine."""
        deployment_id = names.parse_deployment(name)
        if deployment_id in self._deployments:
            await asyncio.shield(asyncio.create_task(self._delete(deployment_id)))

    async def _delete(self, deployment_id: str) -> None:
        async with self._lock:
            deployment = self._deployments.get(deployment_id)
            if deployment is None:
                return
            await self.update(deployment_id, state=ResourceState.DELETING)
            await self._cancel_task(deployment_id)
            await self._pool.stop(deployment.worker_id)
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

    async def _cancel_task(self, deployment_id: str) -> None:
        task = self._tasks.get(deployment_id)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def close(self) -> None:
        """Stop provisioning; what is half done is finished at the next start."""
        for deployment_id in list(self._tasks):
            await self._cancel_task(deployment_id)
