"""Moving a deployment to a snapshot: take the hotload, have the samplers switched, write it down.

Knows: deployments, pins. Must not know: how samplers are switched (`switching`). A failure leaves
what was served and says why in the deployment's `error`.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

from firetitan_daemon.control.checkpoints import hold_snapshot
from firetitan_daemon.control.codec import HotloadArguments
from firetitan_daemon.control.deployment_workers import HOTLOAD
from firetitan_daemon.control.deployments import DeploymentManager
from firetitan_daemon.control.pins import Pin
from firetitan_daemon.control.provisioning import new_operation, settled
from firetitan_daemon.control.services import (
    Services,
    error_record,
    internal_error,
    logger,
    when_there_is_space,
)
from firetitan_daemon.control.switching import Switch, Switcher
from firetitan_daemon.core import names
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.failpoints import failpoint
from firetitan_daemon.core.ports import Change
from firetitan_daemon.core.records import (
    Deployment,
    ErrorRecord,
    LoadedFrom,
    Operation,
    ResourceState,
    Snapshot,
)
from firetitan_daemon.core.texts import check_text
from firetitan_daemon.core.worker_ports import Worker, hangs

METHOD = "HotloadSnapshot"
_MAX_DEATHS = 2
"""Of samplers that ended while they loaded a snapshot; then it is the snapshot."""
_RETAIN_S = 30.0
"""For dropping what nobody keeps: no more than tidying."""


class WeightSyncer:
    """Hotloads, one at a time a deployment."""

    def __init__(self, services: Services, deployments: DeploymentManager) -> None:
        self._services = services
        self._pins = services.pins
        self._deployments = deployments
        self._switcher = Switcher(services)
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.Lock()
        self._turns: dict[str, asyncio.Lock] = {}
        """One a deployment; hotloads wait on it in the order they were accepted."""

    async def hotload(
        self, arguments: HotloadArguments, request_id: str, payload: bytes
    ) -> Operation:
        """Begin to serve a snapshot.

        Raises:
            FiretitanError: DEPLOYMENT_NOT_FOUND, SNAPSHOT_NOT_FOUND, NAME_INVALID, ETAG_MISMATCH,
                REQUEST_ID_REUSED, QUEUE_FULL, INVALID_ARGUMENT where the snapshot is of another
                base model.
        """
        check_text(request_id, "request_id")
        acceptance = asyncio.create_task(self._admit(arguments, request_id, payload))
        return await asyncio.shield(acceptance)

    async def _admit(
        self, arguments: HotloadArguments, request_id: str, payload: bytes
    ) -> Operation:
        operations = self._services.operations
        name = self._deployments.get(arguments.deployment).name
        operations.reserve(name, len(payload))
        try:
            return await self._accept(arguments, request_id, payload)
        finally:
            operations.release(name, len(payload))

    async def _accept(
        self, arguments: HotloadArguments, request_id: str, payload: bytes
    ) -> Operation:
        deployment = self._deployments.get(arguments.deployment)
        services = self._services
        services.activity.touch(deployment.name)
        ref = await services.spool.write(payload)
        operation: Operation | None = None
        try:
            async with self._accepting:
                former = await services.operations.by_request(
                    deployment.name, request_id, ref.digest
                )
                if former is not None:
                    await services.spool.remove([ref])
                    return former
                operation = new_operation(
                    METHOD, deployment.name, request_id, ref.digest, services.clock.now(), ref
                )
                snapshot = await hold_snapshot(services, arguments.snapshot, operation.id)
                _check_base(deployment, snapshot)
                operation = replace(operation, loaded=LoadedFrom(snapshot.folder, snapshot.digest))
                # Under a new etag at once: of two hotloads that name the same one, one is refused.
                await self._deployments.update(
                    deployment.id, operation=operation, if_etag=arguments.etag
                )
                self._begin(operation, replace(arguments, snapshot=snapshot.id))
        except BaseException:
            if operation is not None:
                services.operations.holds.release(operation.id)
            await services.spool.remove([ref])
            raise
        return operation

    async def resume(self) -> None:
        """At start: go on with the hotloads that a former daemon accepted."""
        async with self._accepting:
            for deployment in self._deployments.all():
                for operation in self._services.operations.open_of(deployment.name, METHOD):
                    self._begin(operation)

    async def _read(self, operation: Operation) -> HotloadArguments:
        """The arguments of a hotload that a former daemon accepted.

        Raises:
            FiretitanError: CHECKSUM_MISMATCH where a loss of power took its payload: the row is
                written through to the disk, by default the payload is not; RECOVERING.
        """
        assert operation.payload is not None
        payload = await self._services.spool.read(operation.payload)
        arguments = self._services.codec.hotload(payload)
        return replace(arguments, snapshot=names.parse_snapshot(arguments.snapshot))

    def _begin(self, operation: Operation, arguments: HotloadArguments | None = None) -> None:
        """Start on a hotload.

        Args:
            operation: Accepted.
            arguments: They name the snapshot by id; None: as its payload says.
        """
        self._start(self._run(operation, arguments))

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, operation: Operation, arguments: HotloadArguments | None) -> None:
        async with self._turns.setdefault(operation.target, asyncio.Lock()):
            await self._run_in_turn(operation, arguments)

    async def _run_in_turn(self, operation: Operation, arguments: HotloadArguments | None) -> None:
        deaths = 0
        try:
            while True:
                if self._ended(operation):
                    return
                try:
                    arguments = arguments or await self._read(operation)
                    await self._move(operation, arguments)
                    return
                except FiretitanError as error:
                    # A sampler that ended meanwhile is replaced; then the way begins at a base.
                    # One that hangs may go on. A spool that is away is put back.
                    deaths += error.reason is Reason.WORKER_UNAVAILABLE and not hangs(error)
                    if not self._comes_back(operation.target, error) or deaths > _MAX_DEATHS:
                        raise
                    await asyncio.sleep(0.1)
        except FiretitanError as error:
            await self._fail(operation, error_record(error))
        except Exception as error:  # a supervisor: the hotload fails, the daemon goes on
            await self._fail(operation, error_record(internal_error(operation.name, error)))

    def _ended(self, operation: Operation) -> bool:
        """Whether a hotload's deployment was deleted; another may have its id since."""
        return self._services.operations.current(operation.id) is None

    def _comes_back(self, name: str, error: FiretitanError) -> bool:
        if error.reason is Reason.WORKER_UNAVAILABLE:
            return self._deployments.get(name).state is not ResourceState.FAILED
        return error.reason is Reason.RECOVERING

    async def _move(self, operation: Operation, arguments: HotloadArguments) -> None:
        snapshot_id = arguments.snapshot
        await self._deployments.ready(operation.target)
        async with self._deployments.weights_lock(names.last_segment(operation.target)):
            if self._ended(operation):
                return
            deployment, _ = self._deployments.serving(operation.target)
            await self._switcher.switch(
                deployment,
                self._deployments.replica_set(deployment.id),
                Switch(
                    snapshot_id,
                    arguments.transition or deployment.transition,
                    arguments.keep_prompt_cache,
                ),
            )
            failpoint("hotload.applied")

            def unless_ended(_: Deployment) -> Mapping[str, Any]:
                # Where the disk refuses, this is tried again: its deployment may be another's name.
                if self._ended(operation):
                    raise FiretitanError(Reason.CLOSED, f"{operation.target} was deleted")
                return {}

            served = functools.partial(
                self._deployments.update,
                deployment.id,
                revise=unless_ended,
                operation=settled(operation, self._services.clock.now()),
                active_snapshot=snapshot_id,
                requires_sync=False,
                error=None,
            )
            await when_there_is_space(operation.name, served)
        logger.info("hotloaded deployment=%s snapshot=%s", deployment.id, snapshot_id)

    async def restore(self, deployment: Deployment, worker: Worker) -> None:
        """Make a fresh or adopted sampler serve what its deployment is recorded to serve."""
        await self._switcher.restore(deployment, worker)

    async def _fail(self, operation: Operation, error: ErrorRecord) -> None:
        logger.warning("hotload failed op=%s reason=%s", operation.id, error.reason)
        # Where several were to switch, those that could hold what they do not serve.
        self._start(self._retain(names.last_segment(operation.target)))
        told = functools.partial(self._tell_failure, operation, error)
        await when_there_is_space(operation.name, told)

    async def _tell_failure(self, operation: Operation, error: ErrorRecord) -> None:
        current = self._services.operations.current(operation.id)
        if current is None:
            return  # its deployment was deleted
        failed = settled(current, self._services.clock.now(), error)
        try:
            deployment, _ = self._deployments.serving(operation.target)
        except FiretitanError:
            # Deleted or down: its record tells of that already.
            await self._services.operations.write(Change(operations=[failed]))
        else:
            error = replace(error, metadata={**error.metadata, HOTLOAD: operation.name})
            await self._deployments.update(deployment.id, operation=failed, error=error)

    async def pin(self, name: str, reference: str, holder: str, release: bool) -> None:
        """Keep a snapshot loaded for a client bound to it, or let it go.

        Raises:
            FiretitanError: DEPLOYMENT_NOT_FOUND, SNAPSHOT_NOT_ACTIVE where it is not loaded.
        """
        deployment = self._deployments.get(name)
        snapshot_id = names.parse_snapshot(reference)
        check_text(holder, "holder")
        pin = (deployment.id, snapshot_id, holder)
        if release:
            await self._unpin([pin])
            return
        if not holder:
            raise FiretitanError(
                Reason.INVALID_ARGUMENT, "holder: is empty; name who pins", field="holder"
            )
        await self._deployments.ready(name)
        async with self._deployments.weights_lock(deployment.id):
            deployment, workers = self._deployments.serving(name)
            loaded = [(await worker.describe()).loaded_snapshots for worker in workers]
            if not all(snapshot_id in map(names.last_segment, one) for one in loaded):
                raise FiretitanError(
                    Reason.SNAPSHOT_NOT_ACTIVE,
                    f"snapshots/{snapshot_id} is not loaded in {deployment.name}, which serves "
                    f"{deployment.active_snapshot or 'the base model'}; hotload it first",
                    snapshot=f"snapshots/{snapshot_id}",
                )
            await self._pins.add(pin)

    async def release_pins(self, alive: Callable[[str], bool]) -> None:
        """Let go of the pins of clients that are not there any more."""
        abandoned = self._pins.abandoned(alive)
        if abandoned:
            logger.info("pins of clients that are gone released=%d", len(abandoned))
            await self._unpin(abandoned)

    async def _unpin(self, pins: Sequence[Pin]) -> None:
        before = {pin[:2] for pin in pins}
        await self._pins.remove(pins)
        for deployment_id in {pin[0] for pin in pins}:
            kept = self._pins.snapshots(deployment_id)
            if any(one == deployment_id and snapshot not in kept for one, snapshot in before):
                self._start(self._retain(deployment_id))

    async def _retain(self, deployment_id: str) -> None:
        """Let the samplers drop what nobody keeps any more."""
        try:
            async with self._deployments.weights_lock(deployment_id):
                _, workers = self._deployments.serving(deployment_id)
                async with asyncio.timeout(_RETAIN_S):  # whoever wants these weights waits
                    for worker in workers:
                        await worker.retain(self._pins.names(deployment_id))
        except (FiretitanError, TimeoutError) as error:
            # Stopped or gone: what it loads next is loaded without them.
            logger.info("snapshots not dropped deployment=%s: %s", deployment_id, error)

    async def close(self) -> None:
        """Stop; what is half done is finished at the next start."""
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))


def _check_base(deployment: Deployment, snapshot: Snapshot) -> None:
    # One model may have several names.
    loaded = deployment.model.fingerprint if deployment.model is not None else ""
    same = loaded and loaded == snapshot.base.fingerprint
    if not same and snapshot.base_model != deployment.base_model:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"snapshot: {snapshot.name} is of base model {snapshot.base_model!r}, but "
            f"{deployment.name} serves {deployment.base_model!r}; hotload it into a deployment of "
            "its own base model",
            field="snapshot",
            snapshot=snapshot.name,
        )
