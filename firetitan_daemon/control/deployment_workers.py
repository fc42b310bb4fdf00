"""A deployment's samplers over their life: started, replaced, added, let go.

Knows: deployment records, the pool. Must not know: RPCs, what a deployment is asked to be, how
weights are put together. A sampler is brought to what is served before requests go to it.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from firetitan_daemon.control.provisioning import (
    ForgetCleanup,
    check_etag,
    log_shape,
    new_etag,
    settled,
)
from firetitan_daemon.control.replica_set import ReplicaSet
from firetitan_daemon.control.services import (
    DISK_RETRY_S,
    DISK_TROUBLE,
    Services,
    error_record,
    internal_error,
    logger,
    when_there_is_space,
)
from firetitan_daemon.control.workers import WorkerPool
from firetitan_daemon.core import names
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.failpoints import failpoint
from firetitan_daemon.core.model_records import ModelInfo
from firetitan_daemon.core.ports import Change
from firetitan_daemon.core.records import (
    Deployment,
    ErrorRecord,
    Operation,
    ResourceState,
    WorkerKind,
    WorkerSpec,
)
from firetitan_daemon.core.worker_ports import Worker, hangs

METHOD = "CreateDeployment"
HOTLOAD = "operation"
"""In the metadata of a deployment's error: the hotload that failed. The next one clears it."""
_RESTARTS = 3
_RESTART_WINDOW_S = 60.0
_START_PAUSES_S = (0.2, 1.0, 3.0, 0.0)
"""Behind the first sampler that could not be started, the second, ...; the last is given up."""
_SILENT_PAUSE_S = 0.1
"""Before a sampler that hangs is asked again."""

Restore = Callable[[Deployment, Worker], Awaitable[None]]
"""Makes a fresh worker serve what its deployment serves."""
Revision = Callable[[Deployment], Mapping[str, Any]]
"""Fields to change, from the record as it stands."""


@dataclass(frozen=True)
class ReplicaInfo:
    """A sampler for people."""

    worker_id: str
    state: ResourceState
    pid: int
    running: int
    unresponsive: bool


class DeploymentWorkers:
    """The samplers of every deployment.

    Owns the records, and two locks a deployment: for what changes its samplers, and for what
    changes their weights. The first is taken before the second.
    """

    def __init__(self, services: Services, pool: WorkerPool) -> None:
        self._services = services
        self._pool = pool
        self._deployments: dict[str, Deployment] = {}
        self._sets: dict[str, ReplicaSet] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._weights_locks: dict[str, asyncio.Lock] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        """What is done to a sampler, by the worker's id: it is provisioned or let go."""
        self._rows = asyncio.Lock()
        self._deaths: dict[str, list[float]] = {}
        """When a sampler and those it replaced ended of late, monotonic seconds, by worker id."""
        self._restore_weights: Restore | None = None
        self._forget_cleanup: ForgetCleanup | None = None

    def connect(self, restore_weights: Restore, forget_cleanup: ForgetCleanup) -> None:
        """Say what others do for it.

        Args:
            restore_weights: How a fresh worker is made to serve what is served.
            forget_cleanup: How clean-ups of a former deployment are dropped before another gets
                its name.
        """
        self._restore_weights = restore_weights
        self._forget_cleanup = forget_cleanup

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

    def _lock(self, deployment_id: str) -> asyncio.Lock:
        """Held while samplers are added or taken away: one that hangs holds up no other's."""
        return self._locks.setdefault(deployment_id, asyncio.Lock())

    def weights_lock(self, deployment_id: str) -> asyncio.Lock:
        """Held while a deployment's weights change."""
        return self._weights_locks.setdefault(deployment_id, asyncio.Lock())

    def replica_set(self, deployment_id: str) -> ReplicaSet:
        """The samplers of a deployment that answer requests."""
        if deployment_id not in self._sets:
            name = names.deployment_name(deployment_id)
            self._sets[deployment_id] = ReplicaSet(name, self._pool.answers)
        return self._sets[deployment_id]

    def replicas(self, deployment: Deployment) -> list[ReplicaInfo]:
        """Each of a deployment's samplers."""
        replicas = self.replica_set(deployment.id)
        creating = deployment.state is ResourceState.CREATING
        waiting = ResourceState.CREATING if creating else ResourceState.RECOVERING
        infos = []
        for worker_id in deployment.worker_ids:
            found = replicas.find(worker_id)
            infos.append(
                ReplicaInfo(
                    worker_id,
                    ResourceState.ACTIVE if found is not None else waiting,
                    self._pool.pid(worker_id),
                    found.running if found is not None else 0,
                    not self._pool.answers(worker_id),
                )
            )
        return infos

    async def update(
        self,
        deployment_id: str,
        *,
        operation: Operation | None = None,
        workers: Sequence[WorkerSpec] = (),
        if_etag: str = "",
        revise: Revision | None = None,
        **changes: Any,
    ) -> Deployment:
        """Change a deployment's fields under a new etag.

        Operations that wait for its creation end with it where it then stands ACTIVE or FAILED,
        `operation` too where it is one.

        Args:
            deployment_id: Which.
            operation: Written with it, e.g. ended or accepted by it.
            workers: Specifications to write with it.
            if_etag: The etag it must still have; empty: any.
            revise: What else to change, given the record that nobody changes meanwhile.
            changes: Fields of the record.

        Raises:
            FiretitanError: DEPLOYMENT_NOT_FOUND where it was deleted meanwhile, ETAG_MISMATCH.
        """
        async with self._rows:
            former = self.get(deployment_id)
            check_etag(former.name, former.etag, if_etag)
            revised = revise(former) if revise is not None else {}
            deployment = replace(former, **{**changes, **revised, "etag": new_etag()})
            operations = [operation] if operation is not None else []
            if deployment.state in (ResourceState.ACTIVE, ResourceState.FAILED):
                operations += [
                    one
                    for one in self._services.operations.open_of(deployment.name, METHOD)
                    if operation is None or one.id != operation.id
                ]
                operations = [self._answered(one, deployment) for one in operations]
            await self._services.operations.write(
                Change(
                    deployments=[deployment], workers=workers, operations=operations, durable=True
                )
            )
            self._deployments[deployment.id] = deployment
            return deployment

    def _answered(self, operation: Operation, deployment: Deployment) -> Operation:
        """An operation that waits for a creation, ended unless that goes on; others as they are."""
        if operation.done or operation.method != METHOD:
            return operation
        if deployment.state is ResourceState.CREATING:
            return operation
        failed = deployment.state is ResourceState.FAILED
        now = self._services.clock.now()
        return settled(operation, now, deployment.error if failed else None)

    async def _answer(self, deployment_id: str, operation: Operation) -> Operation:
        """Write an operation that asks for a deployment as it is."""
        async with self._rows:
            operation = self._answered(operation, self.get(deployment_id))
            await self._services.operations.write(Change(operations=[operation]))
            return operation

    def _new_specs(self, deployment: Deployment, count: int) -> list[WorkerSpec]:
        return [
            self._pool.new_spec(
                WorkerKind.SAMPLER,
                deployment.name,
                deployment.base_model,
                deployment.dtype,
                deployment.max_context_length,
                deployment.shape,
            )
            for _ in range(count)
        ]

    async def _grow(self, deployment: Deployment, replicas: int, **changes: Any) -> None:
        """Add samplers until a deployment has so many; under `_lock`."""
        specs = self._new_specs(deployment, replicas - len(deployment.worker_ids))
        added = tuple(spec.worker_id for spec in specs)

        def grown(former: Deployment) -> Mapping[str, Any]:
            return {"replicas": replicas, "worker_ids": (*former.worker_ids, *added)}

        await self.update(deployment.id, workers=specs, revise=grown, **changes)
        self._pool.remember(specs)
        for worker_id in added:
            self._provide(deployment.id, worker_id)

    async def _shrink(self, deployment: Deployment, replicas: int) -> None:
        """Take samplers away, those first that do not serve yet; under `_lock`."""
        serving = self.replica_set(deployment.id)
        latest = sorted(
            reversed(deployment.worker_ids), key=lambda one: serving.find(one) is not None
        )
        removed = latest[: len(deployment.worker_ids) - replicas]

        def shrunk(former: Deployment) -> Mapping[str, Any]:
            left = tuple(one for one in former.worker_ids if one not in removed)
            return {"replicas": replicas, "worker_ids": left}

        # Those that no record names any more are ended by the next daemon, if not by this one.
        await self.update(deployment.id, revise=shrunk)
        failpoint("scale.removed")
        for worker_id in removed:
            await self._cancel(worker_id)
            self._begin(worker_id, self._let_go(deployment.id, worker_id))

    async def _let_go(self, deployment_id: str, worker_id: str) -> None:
        """End a sampler that was taken away, once it has answered what it has begun."""
        replica = self.replica_set(deployment_id).remove(worker_id)
        try:
            if replica is not None:
                await replica.idle()
            async with self.weights_lock(deployment_id):
                await self._pool.stop(worker_id)
        except Exception as error:  # a supervisor: the next daemon ends it
            internal_error(f"letting go of {worker_id}", error)

    def _provide(self, deployment_id: str, worker_id: str) -> None:
        self._begin(worker_id, self._provision(deployment_id, worker_id))

    def _begin(self, worker_id: str, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks[worker_id] = task

        def ended(_: asyncio.Task[None]) -> None:
            if self._tasks.get(worker_id) is task:
                del self._tasks[worker_id]

        task.add_done_callback(ended)
        return task

    async def _provision(self, deployment_id: str, worker_id: str) -> None:
        deployment = self._deployments[deployment_id]
        try:
            spec = self._pool.spec(worker_id)
            assert spec is not None, "a deployment's row and its workers' are written together"
            worker, model = await self._pool.start(spec)
            await self._let_in(deployment_id, worker, model)
        except FiretitanError as error:
            await self._pool.stop(worker_id)
            if error.reason is Reason.CLOSED:
                return  # taken away, stopped or being deleted
            may_do = hangs(error) or deployment.state is not ResourceState.CREATING
            if may_do and error.reason in (Reason.WORKER_UNAVAILABLE, *DISK_TROUBLE):
                await self._not_started(deployment_id, worker_id, error)
            else:
                await self._do_without(deployment_id, worker_id, error_record(error))
        except Exception as error:  # a supervisor: the deployment fails, the daemon goes on
            await self._pool.stop(worker_id)
            record = error_record(internal_error(deployment.name, error))
            await self._do_without(deployment_id, worker_id, record)
        else:
            log_shape(deployment.name, deployment.shape, model)

    async def _let_in(self, deployment_id: str, worker: Worker, model: ModelInfo) -> None:
        """Bring a sampler to what is served, then let requests go to it.

        Raises:
            FiretitanError: CLOSED where it is not wanted any more, WORKER_UNAVAILABLE. One that
                hangs is waited for where it is adopted: it holds something, a fresh one nothing.
        """
        worker_id = worker.spec.worker_id
        joined = functools.partial(
            self.update, deployment_id, revise=functools.partial(_joined, model, worker_id)
        )
        while True:
            try:
                # Free in between: while it hangs, its deployment may be scaled.
                async with self.weights_lock(deployment_id):
                    if self._restore_weights is not None:
                        await self._restore_weights(self._deployments[deployment_id], worker)
                    await when_there_is_space(f"deployments/{deployment_id}", joined)
                    self.replica_set(deployment_id).add(worker)
                    self._watch(deployment_id, worker)
                    return
            except FiretitanError as error:
                if not hangs(error) or not self._pool.adopted(worker_id):
                    raise
                self._pool.hangs(worker_id)
            await asyncio.sleep(_SILENT_PAUSE_S)

    async def _not_started(self, deployment_id: str, worker_id: str, error: FiretitanError) -> None:
        """After a while start another instead; a disk that refuses is waited for."""
        logger.error("sampler not started deployment=%s: %s", deployment_id, error)
        counts = error.reason not in DISK_TROUBLE
        former = min(len(self._deaths.get(worker_id, ())), len(_START_PAUSES_S) - 1)
        await asyncio.sleep(_START_PAUSES_S[former] if counts else DISK_RETRY_S)
        await self._ended(deployment_id, worker_id, error.message, counts=counts)

    async def _do_without(self, deployment_id: str, worker_id: str, error: ErrorRecord) -> None:
        """As `_give_up`, for what has happened and must be told."""
        self._deaths.pop(worker_id, None)
        give_up = functools.partial(self._give_up, deployment_id, worker_id, error)
        await when_there_is_space(f"deployments/{deployment_id}", give_up)

    async def _give_up(self, deployment_id: str, worker_id: str, error: ErrorRecord) -> None:
        """Leave a sampler out; the deployment fails where it was the last."""

        def without(former: Deployment) -> Mapping[str, Any]:
            left = tuple(one for one in former.worker_ids if one != worker_id)
            if not _wants(former, worker_id):
                return {}  # taken away or stopped meanwhile
            if left:
                return {"worker_ids": left, "error": error}
            return {"worker_ids": left, "error": error, "state": ResourceState.FAILED}

        await self.update(deployment_id, revise=without)

    def _watch(self, deployment_id: str, worker: Worker) -> None:
        worker_id = worker.spec.worker_id

        async def exited(cause: str) -> None:
            self.replica_set(deployment_id).remove(worker_id)
            deployment = self._deployments.get(deployment_id)
            if deployment is None or worker_id not in deployment.worker_ids:
                return  # whoever takes it away sees to what is left of it
            await self._begin(worker_id, self._ended(deployment_id, worker_id, cause))

        self._pool.watch(worker, exited)

    async def _ended(
        self, deployment_id: str, worker_id: str, cause: str, *, counts: bool = True
    ) -> None:
        """A sampler is gone: put another in its place, or give it up where that was too often.

        Args:
            deployment_id: Whose.
            worker_id: Which.
            cause: How it ended.
            counts: Whether it is one time more.
        """
        now = self._services.clock.monotonic()
        deaths = [t for t in self._deaths.pop(worker_id, []) if now - t < _RESTART_WINDOW_S]
        deaths += [now] if counts else []

        async def restart() -> None:
            # Free in between: while the disk refuses, it may be scaled or deleted.
            async with self._lock(deployment_id):
                await self._restart(deployment_id, worker_id, cause, deaths)

        await when_there_is_space(f"a new sampler of deployments/{deployment_id}", restart)

    async def _restart(
        self, deployment_id: str, worker_id: str, cause: str, deaths: list[float]
    ) -> None:
        """Under `_lock`; where the disk refuses, it is done again as a whole."""
        deployment = self._deployments.get(deployment_id)
        if deployment is None or worker_id not in deployment.worker_ids:
            return  # deleted, stopped or taken away meanwhile
        if deployment.state is ResourceState.DELETING:
            return  # its samplers are ended, in this try or the next
        await self._pool.forget(worker_id)
        if len(deaths) > _RESTARTS:
            error = ErrorRecord(
                str(Reason.WORKER_UNAVAILABLE),
                f"{deployment.name}: its worker ended {len(deaths)} times within "
                f"{_RESTART_WINDOW_S:.0f} s, at last: {cause}; see its log, then create the "
                "deployment again",
                {"cause": cause},
            )
            await self._give_up(deployment_id, worker_id, error)
            return
        logger.warning("sampler restarts deployment=%s cause=%s", deployment_id, cause)
        (spec,) = self._new_specs(deployment, 1)

        def renewed(former: Deployment) -> Mapping[str, Any]:
            ids = tuple(spec.worker_id if one == worker_id else one for one in former.worker_ids)
            serves = bool(self.replica_set(former.id).workers)
            return {
                "worker_ids": ids,
                "state": former.state if serves else ResourceState.RECOVERING,
            }

        await self.update(deployment.id, workers=[spec], revise=renewed)
        self._pool.remember([spec])
        self._deaths[spec.worker_id] = deaths
        self._provide(deployment.id, spec.worker_id)

    async def _reach(self, deployment_id: str, worker_id: str) -> None:
        """At start: go on with a sampler of a former daemon, or start another."""
        spec = self._pool.spec(worker_id)
        worker = await self._pool.adopt(spec) if spec is not None else None
        deployment = self._deployments.get(deployment_id)
        if deployment is None or not _wants(deployment, worker_id):
            # It did not answer when it was to end.
            await self._pool.stop(worker_id)
            return
        if worker is not None:
            self._provide(deployment_id, worker_id)
            return
        cause = "it was gone when the daemon started"
        await self._ended(deployment_id, worker_id, cause, counts=False)

    async def _end_all(self, deployment: Deployment) -> None:
        """End every sampler of a deployment, those that are let go too; under `_lock`.

        One that cannot be ended is told of once the others have ended.
        """
        failed: FiretitanError | None = None
        for spec in self._pool.specs():
            if spec.target == deployment.name:
                self.replica_set(deployment.id).remove(spec.worker_id)
                await self._cancel(spec.worker_id)
                try:
                    await self._pool.stop(spec.worker_id)
                except FiretitanError as error:
                    failed = error
        if failed is not None:
            raise failed

    async def _cancel(self, worker_id: str) -> None:
        self._deaths.pop(worker_id, None)
        task = self._tasks.get(worker_id)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def close(self) -> None:
        """Stop provisioning; what is half done is finished at the next start."""
        for worker_id in list(self._tasks):
            await self._cancel(worker_id)


def _wants(deployment: Deployment, worker_id: str) -> bool:
    """Whether a sampler still is one of a deployment's, and not to end with it."""
    ends = deployment.state in (ResourceState.STOPPED, ResourceState.DELETING)
    return worker_id in deployment.worker_ids and not ends


def _joined(model: ModelInfo, worker_id: str, former: Deployment) -> Mapping[str, Any]:
    """A sampler serves: so does the deployment; what failed is put right, but for a hotload."""
    if not _wants(former, worker_id):
        raise FiretitanError(Reason.CLOSED, f"{former.name} has no use for {worker_id} any more")
    changes: dict[str, Any] = {"state": ResourceState.ACTIVE, "model": model}
    of_hotload = former.error is not None and HOTLOAD in former.error.metadata
    if len(former.worker_ids) >= former.replicas and not of_hotload:
        changes["error"] = None
    return changes
