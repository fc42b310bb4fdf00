"""Bringing samplers to a snapshot: one of them, or all of a deployment's or none.

Knows: the chain's rules, pins, what a sampler holds. Must not know: records of deployments beyond
what they serve, how weights are read or swapped.

Several are switched in two steps. Each builds and verifies the snapshot beside what it serves; if
one cannot, none serves it. Then they begin to serve it while no request begins, so that an answer
of the former one never follows an answer of the new one. What can still fail then is a sampler
itself: it is replaced, and its successor is brought to what the deployment is recorded to serve,
under the same lock. A daemon that ends in between leaves the record as it was and the hotload open:
the next one brings all of them back and hotloads again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Collection, Iterable
from dataclasses import dataclass
from typing import TypeVar

from firetitan_daemon.control.replica_set import ReplicaSet
from firetitan_daemon.control.services import Services, logger
from firetitan_daemon.core import chain, names
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.failpoints import failpoint
from firetitan_daemon.core.records import Deployment, HotloadTransition, Snapshot
from firetitan_daemon.core.worker_ports import PREPARE, SnapshotLayer, Worker, WorkerStatus

_T = TypeVar("_T")


@dataclass(frozen=True)
class Switch:
    """What to serve, and how to come to it."""

    snapshot_id: str
    transition: HotloadTransition = HotloadTransition.FINISH
    keep_prompt_cache: bool = False


class Switcher:
    """Has samplers serve snapshots; the caller holds the deployment's weights lock."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._pins = services.pins

    async def restore(self, deployment: Deployment, worker: Worker) -> None:
        """Make a fresh or adopted sampler serve what its deployment is recorded to serve.

        What clients have pinned is loaded first: every adapter, and the latest whole model where
        none is loaded, as two live at most. One that holds others let go of it as a third came.

        Raises:
            FiretitanError: WORKER_UNAVAILABLE where another has to take its place.
        """
        found = [await self._services.store.snapshot(one) for one in self._pinned(deployment)]
        pinned = sorted(filter(None, found), key=lambda one: one.create_time)
        status = await worker.describe()
        if status.active_snapshot and not deployment.active_snapshot:
            # The first hotload ended with its daemon, and no way leads back to the base model.
            raise FiretitanError(
                Reason.WORKER_UNAVAILABLE,
                f"worker {worker.spec.worker_id} serves {status.active_snapshot}, but "
                f"{deployment.name} serves the base model; another takes its place",
                worker=worker.spec.worker_id,
            )
        loaded = [
            await self._services.store.snapshot(names.last_segment(one))
            for one in status.loaded_snapshots
            if one  # the base model has no name
        ]
        # Not whether one is active: an adapter may be, of a try that went no further.
        room = all(one is not None and _is_adapter(one) for one in loaded)
        whole = [one for one in pinned if room and not _is_adapter(one)]
        for snapshot in [*filter(_is_adapter, pinned), *whole[-1:]]:
            if snapshot.name not in status.loaded_snapshots:
                await self._bring(deployment, worker, Switch(snapshot.id))
        if deployment.active_snapshot:
            await self._bring(deployment, worker, Switch(deployment.active_snapshot))

    def _pinned(self, deployment: Deployment) -> list[str]:
        pinned = self._pins.snapshots(deployment.id)
        return [one for one in pinned if one != deployment.active_snapshot]

    async def switch(self, deployment: Deployment, replicas: ReplicaSet, switch: Switch) -> None:
        """Make every sampler of a deployment serve a snapshot, or none.

        Raises:
            FiretitanError: What the first of them that cannot says; none serves it then.
        """
        workers = replicas.workers
        if len(workers) == 1:
            await self._bring(deployment, workers[0], switch)
            return
        ways = await _all(self._prepare(one, switch) for one in workers)
        failpoint("hotload.prepared")
        async with replicas.held():
            # A release that could not prepare had one sampler a deployment: there is one at most,
            # and while it can fail nobody else has switched.
            for worker, way in zip(workers, ways, strict=True):
                if way is None:
                    await self._bring(deployment, worker, switch)
            failed = await self._activate(deployment, zip(workers, ways, strict=True), switch)
            if len(failed) == len(workers):
                raise next(iter(failed.values()))
            for worker in failed:
                replicas.remove(worker.spec.worker_id)
        for worker, error in failed.items():
            logger.warning("could not switch worker=%s: %s", worker.spec.worker_id, error)
            await worker.shutdown()

    async def _prepare(self, worker: Worker, switch: Switch) -> list[SnapshotLayer] | None:
        """Build the snapshot in a sampler; None from one of a release that cannot do only that."""
        status = await worker.describe()
        if PREPARE not in status.capabilities:
            return None
        way = await self._way(status, switch.snapshot_id)
        if names.last_segment(status.active_snapshot) != switch.snapshot_id:
            await worker.prepare(way)
        return way

    async def _activate(
        self,
        deployment: Deployment,
        workers: Iterable[tuple[Worker, list[SnapshotLayer] | None]],
        switch: Switch,
    ) -> dict[Worker, Exception]:
        """Have those that have prepared serve it; returns who could not, and why."""
        failed: dict[Worker, Exception] = {}

        async def begin(worker: Worker, way: list[SnapshotLayer]) -> None:
            try:
                await self._apply(deployment, worker, way, switch)
            except Exception as error:  # whatever it is: this sampler must not answer any more
                failed[worker] = error
            else:
                failpoint("hotload.switched")

        await asyncio.gather(*(begin(worker, way) for worker, way in workers if way is not None))
        return failed

    async def _bring(self, deployment: Deployment, worker: Worker, switch: Switch) -> None:
        """Have one sampler load a snapshot, unless it has, and serve it."""
        status = await worker.describe()
        if names.last_segment(status.active_snapshot) == switch.snapshot_id:
            return
        await self._apply(deployment, worker, await self._way(status, switch.snapshot_id), switch)

    async def _apply(
        self, deployment: Deployment, worker: Worker, way: list[SnapshotLayer], switch: Switch
    ) -> None:
        await worker.apply(
            way,
            self._pins.names(deployment.id),
            switch.transition,
            keep_prompt_cache=switch.keep_prompt_cache,
        )

    async def _way(self, status: WorkerStatus, snapshot_id: str) -> list[SnapshotLayer]:
        """Layers from what a sampler holds to a snapshot."""
        loaded = {names.last_segment(name) for name in status.loaded_snapshots}
        # A loaded one that is not active is applied again from what it stands on.
        return await self._plan(snapshot_id, loaded - {snapshot_id})

    async def _plan(self, snapshot_id: str, loaded: Collection[str]) -> list[SnapshotLayer]:
        known: dict[str, Snapshot] = {}
        following: str | None = snapshot_id
        while following is not None and following not in known:
            snapshot = await self._services.store.snapshot(following)
            if snapshot is None:
                break
            known[following] = snapshot
            following = snapshot.parent if snapshot.kind == chain.DELTA else None
        return [
            SnapshotLayer(
                name=one.name,
                kind=one.kind,
                format=one.format,
                path=one.folder,
                digest=one.digest,
                result_digest=one.result_digest,
            )
            for one in chain.plan(snapshot_id, loaded, known.get)
        ]


def _is_adapter(snapshot: Snapshot) -> bool:
    return bool(snapshot.lora_rank) and snapshot.kind != chain.MERGED_BASE


async def _all(work: Iterable[Awaitable[_T]]) -> list[_T]:
    """Every result, once all have ended; of several failures one that is not a worker's end."""
    outcomes = await asyncio.gather(*work, return_exceptions=True)
    failures = [one for one in outcomes if isinstance(one, BaseException)]
    if failures:
        raise next(
            (one for one in failures if getattr(one, "reason", None) != Reason.WORKER_UNAVAILABLE),
            failures[0],
        )
    return [one for one in outcomes if not isinstance(one, BaseException)]
