"""The ledger in memory, for tests: the same rules as the one on disk, nothing survives.

Knows: records. Must not know: files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from firetitan_daemon.core.expiry import ended_before
from firetitan_daemon.core.model_records import Model
from firetitan_daemon.core.ports import Change, Ledger, Store
from firetitan_daemon.core.records import (
    Checkpoint,
    DeferredCleanup,
    Deployment,
    Lane,
    Lease,
    Moment,
    Operation,
    RecoveryPoint,
    Session,
    Snapshot,
    SpoolRef,
    Trainer,
    WorkerSpec,
)
from firetitan_daemon.store.rules import in_use, reused, stood_on, trainer_of, unknown_page

_Pin = tuple[str, str, str]


class MemoryStore(Store):
    """The ledger as dictionaries in order of insertion."""

    def __init__(self) -> None:
        self._trainers: dict[str, Trainer] = {}
        self._sessions: dict[str, Session] = {}
        self._lanes: dict[tuple[str, str], Lane] = {}
        self._operations: dict[str, Operation] = {}
        self._checkpoints: dict[str, Checkpoint] = {}
        self._snapshots: dict[str, Snapshot] = {}
        self._deleted: dict[str, str] = {}
        self._deployments: dict[str, Deployment] = {}
        self._workers: dict[str, WorkerSpec] = {}
        self._pins: dict[_Pin, None] = {}
        self._models: dict[str, Model] = {}
        self._points: dict[tuple[str, int], RecoveryPoint] = {}
        self._leases: dict[str, Lease] = {}
        self._cleanups: dict[str, DeferredCleanup] = {}

    async def load(self) -> Ledger:
        """What a daemon needs at start."""
        operations = list(self._operations.values())
        opened = sorted(
            (one for one in operations if not one.done),
            key=lambda one: (one.target, one.commit_seq, one.client_id, one.seq),
        )
        folders = [one.folder for one in self._checkpoints.values()]
        folders += [one.folder for one in self._snapshots.values()]
        folders += [one.folder for one in self._models.values()]
        folders += [one.folder for one in self._points.values()]
        kept = [one for one in operations if one.done and one.payload]
        return Ledger(
            trainers=[self._trainers[key] for key in sorted(self._trainers)],
            sessions=[self._sessions[key] for key in sorted(self._sessions)],
            lanes=[self._lanes[key] for key in sorted(self._lanes)],
            open_operations=opened,
            deployments=[self._deployments[key] for key in sorted(self._deployments)],
            workers=[self._workers[key] for key in sorted(self._workers)],
            pins=list(self._pins),
            models=[self._models[key] for key in sorted(self._models)],
            recovery_points=[self._points[key] for key in sorted(self._points)],
            kept_operations=sorted(kept, key=lambda one: (one.target, one.commit_seq)),
            leases=[self._leases[key] for key in sorted(self._leases)],
            cleanups=list(self._cleanups.values()),
            spool=[
                *(one.payload for one in operations if one.payload),
                *(one.result for one in operations if one.result),
            ],
            folders=[*folders, *in_use([*opened, *kept])],
        )

    async def write(self, change: Change) -> None:
        """Apply a change as one transaction."""
        operations = self._with(change)
        for snapshot_id in change.deleted_snapshots:
            self._check_unused(snapshot_id, change.deleted_snapshots)
        self._delete(change)
        self._operations = operations
        self._trainers.update((one.id, one) for one in change.trainers)
        self._sessions.update((one.name, one) for one in change.sessions)
        for lane in change.lanes:
            key = (lane.session, lane.client_id)
            acked = max(lane.acked_through, self._lanes.get(key, lane).acked_through)
            self._lanes[key] = replace(lane, acked_through=acked)
        self._checkpoints.update((one.name, one) for one in change.checkpoints)
        self._snapshots.update((one.id, one) for one in change.snapshots)
        self._deployments.update((one.id, one) for one in change.deployments)
        self._workers.update((one.worker_id, one) for one in change.workers)
        self._pins.update((pin, None) for pin in change.pins)
        self._models.update((one.id, one) for one in change.models)
        self._points.update(((one.session, one.commit_seq), one) for one in change.recovery_points)
        for session, through in change.released_payloads:
            for one in list(self._operations.values()):
                if one.target == session and one.done and 1 <= one.commit_seq <= through:
                    self._operations[one.id] = replace(one, payload=None)
        self._leases.update((one.client_id, one) for one in change.leases)
        self._cleanups.update((one.name, one) for one in change.cleanups)

    async def operation(self, operation_id: str) -> Operation | None:
        """One operation."""
        return self._operations.get(operation_id)

    async def operation_by_request(self, target: str, request_id: str) -> Operation | None:
        """The operation a request id made on a target."""
        return _first(
            one
            for one in self._operations.values()
            if request_id and (one.target, one.request_id) == (target, request_id)
        )

    async def operation_by_seq(self, target: str, client_id: str, seq: int) -> Operation | None:
        """The operation at a place in a lane."""
        return _first(
            one
            for one in self._operations.values()
            if client_id and (one.target, one.client_id, one.seq) == (target, client_id, seq)
        )

    async def lane_operations(
        self, session: str, client_id: str, after_seq: int, limit: int | None = None
    ) -> Sequence[Operation]:
        """Done operations of a lane with a higher seq, by seq; the first so many, or all."""
        lane = self._lane(session, client_id)
        return [one for one in lane if one.done and one.seq > after_seq][:limit]

    async def done_operations(self, session: str, after_commit_seq: int) -> Sequence[Operation]:
        """Done operations of a session with a higher commit_seq, by commit_seq."""
        found = [
            one
            for one in self._operations.values()
            if one.target == session and one.done and one.commit_seq > after_commit_seq
        ]
        return sorted(found, key=lambda one: one.commit_seq)

    async def operations(
        self, target: str, *, pending_only: bool, after_id: str, limit: int
    ) -> Sequence[Operation]:
        """Operations of a target by commit_seq, a page at a time; those without one last."""
        if after_id and after_id not in self._operations:
            raise unknown_page(after_id)
        # The sort is stable: rows without a commit_seq stay in order of acceptance.
        rows = sorted(
            self._operations.values(), key=lambda one: (not one.commit_seq, one.commit_seq)
        )
        start = [one.id for one in rows].index(after_id) + 1 if after_id else 0
        found = [
            one for one in rows[start:] if one.target == target and not (pending_only and one.done)
        ]
        return found[:limit]

    async def checkpoints(self, trainer_id: str | None) -> Sequence[Checkpoint]:
        """Checkpoints of a trainer, deleted ones too, or all; oldest first."""
        rows = self._checkpoints.values()
        return [one for one in rows if trainer_id in (None, trainer_of(one.session))]

    async def checkpoint(self, name: str) -> Checkpoint | None:
        """One checkpoint by full name."""
        return self._checkpoints.get(name)

    async def snapshots(self, trainer_id: str | None) -> Sequence[Snapshot]:
        """Snapshots of a trainer, or all, oldest first."""
        rows = self._snapshots.values()
        return [one for one in rows if trainer_id in (None, trainer_of(one.session))]

    async def snapshot_ids(self, trainer_id: str) -> Sequence[str]:
        """Every id that snapshots of a trainer ever had."""
        there = [one.id for one in await self.snapshots(trainer_id)]
        return [*there, *(one for one, trainer in self._deleted.items() if trainer == trainer_id)]

    async def snapshot(self, snapshot_id: str) -> Snapshot | None:
        """One snapshot by id."""
        return self._snapshots.get(snapshot_id)

    async def acknowledge(self, session: str, client_id: str, through_seq: int) -> list[SpoolRef]:
        """Forget results of a lane up to a seq; returns the spool files to remove."""
        refs = []
        for one in self._lane(session, client_id):
            if one.done and one.seq <= through_seq and one.result:
                refs.append(one.result)
                self._operations[one.id] = replace(one, result=None)
        lane = self._lanes.get((session, client_id))
        if lane is not None:
            acked = max(lane.acked_through, through_seq)
            self._lanes[session, client_id] = replace(lane, acked_through=acked)
        return refs

    async def untaken_results(self, before: Moment) -> Sequence[Operation]:
        """Operations that ended before a moment and whose result was not acknowledged."""
        rows = self._operations.values()
        return [one for one in rows if one.result and ended_before(one, before)]

    async def forget_results(self, operation_ids: Sequence[str]) -> list[SpoolRef]:
        """Forget the results of operations; returns the spool files to remove."""
        refs = []
        for one in [self._operations[key] for key in operation_ids if key in self._operations]:
            if one.result is not None:
                refs.append(one.result)
                self._operations[one.id] = replace(one, result=None, forgotten=True)
        return refs

    async def delete_operations(self, before: Moment) -> int:
        """Delete what ended before a moment and belongs to no session; returns how many."""
        rows = [one for one in self._operations.values() if not one.client_id]
        old = [one.id for one in rows if ended_before(one, before)]
        for key in old:
            del self._operations[key]
        return len(old)

    async def check(self) -> Sequence[str]:
        """Nothing is ever wrong with it."""
        return ()

    async def close(self) -> None:
        """Nothing to do."""

    def _with(self, change: Change) -> dict[str, Operation]:
        """The operations after a change; raises where a uniqueness rule breaks."""
        gone = {
            one.name for one in self._sessions.values() if one.trainer_id in change.deleted_trainers
        }
        kept = {key: one for key, one in self._operations.items() if one.target not in gone}
        for added in change.operations:
            for other in kept.values():
                if other.id != added.id and other.target == added.target:
                    _check_unique(added, other)
            kept[added.id] = added
        return kept

    def _delete(self, change: Change) -> None:
        for trainer in change.deleted_trainers:
            self._trainers.pop(trainer, None)
            for name in [n for n, one in self._sessions.items() if one.trainer_id == trainer]:
                del self._sessions[name]
                for point in [point for point in self._points if point[0] == name]:
                    del self._points[point]
                for key in [key for key in self._lanes if key[0] == name]:
                    del self._lanes[key]
        for name, folder in change.deleted_checkpoints:
            if name in self._checkpoints and self._checkpoints[name].folder == folder:
                del self._checkpoints[name]
        for snapshot_id in change.deleted_snapshots:
            snapshot = self._snapshots.pop(snapshot_id, None)
            if snapshot is not None:
                self._deleted[snapshot_id] = trainer_of(snapshot.session)
        for deployment in change.deleted_deployments:
            self._deployments.pop(deployment, None)
            for pin in [pin for pin in self._pins if pin[0] == deployment]:
                del self._pins[pin]
        for model in change.deleted_models:
            self._models.pop(model, None)
        for worker in change.deleted_workers:
            self._workers.pop(worker, None)
        for point in change.deleted_recovery_points:
            self._points.pop(point, None)
        for pin in change.deleted_pins:
            self._pins.pop(pin, None)
        for client_id in change.deleted_leases:
            self._leases.pop(client_id, None)
        for name in change.deleted_cleanups:
            self._cleanups.pop(name, None)

    def _check_unused(self, snapshot_id: str, deleted: Sequence[str]) -> None:
        for other in self._snapshots.values():
            if other.parent == snapshot_id and other.id not in deleted:
                raise stood_on(snapshot_id, other.id)

    def _lane(self, session: str, client_id: str) -> list[Operation]:
        rows = self._operations.values()
        lane = [
            one for one in rows if client_id and (one.target, one.client_id) == (session, client_id)
        ]
        return sorted(lane, key=lambda one: one.seq)


def _check_unique(added: Operation, other: Operation) -> None:
    same_lane = added.client_id and (added.client_id, added.seq) == (other.client_id, other.seq)
    if same_lane or (added.commit_seq and added.commit_seq == other.commit_seq):
        raise reused(added, by_request=False)
    if added.request_id and added.request_id == other.request_id:
        raise reused(added, by_request=True)


def _first(operations: Iterable[Operation]) -> Operation | None:
    return next(iter(operations), None)
