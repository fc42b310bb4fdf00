"""One session against the death of its worker: recovery points, kept payloads, replay.

Knows: the store, the spool, folders, one trainer worker. Must not know: lanes, admission, how a
worker is started, what is in a payload or in a point.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from firetitan_daemon.control.holds import discard
from firetitan_daemon.control.services import DISK_RETRY_S, Services, when_there_is_space
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.failpoints import failpoint
from firetitan_daemon.core.ports import Change
from firetitan_daemon.core.records import Operation, RecoveryPoint, Session, SpoolRef
from firetitan_daemon.core.recovery import (
    BOUNDARIES,
    LOADS,
    REPLAYED,
    Plan,
    PointPolicy,
    plan_replay,
    same_result,
)
from firetitan_daemon.core.worker_ports import Command, LoadSource, Outcome, Worker

logger = logging.getLogger("firetitan.recovery")

MAX_DEATHS = 2
"""A command in which this many workers ended is not given to another."""
_KEPT_POINTS = 2
_EVERYTHING = 2**62


@dataclass
class RecoveryStats:
    """What `firetitand status` shows of a session; counts since the daemon started."""

    recoveries: int = 0
    replayed: int = 0
    to_replay: int = 0
    points: int = 0
    point_step: int = 0
    point_time: float = 0.0
    point_bytes: int = 0
    point_cost: float = 0.0
    kept_bytes: int = 0
    recovery_s: float = 0.0
    """Of the last recovery, from the worker's end until the session went on."""
    load_s: float = 0.0
    """Of that, starting a worker and loading the model and the recovery point."""
    replay_s: float = 0.0
    """Of that, running commands again."""


@dataclass
class _Kept:
    """A payload that a replay needs; of a load, the folder it read is held as long."""

    operation_id: str
    commit_seq: int
    ref: SpoolRef


@dataclass
class SessionRecovery:
    """Keeps what a session's replay needs, and replays.

    Args:
        session: Its name.
        services: The ports.
    """

    session: str
    services: Services
    stats: RecoveryStats = field(default_factory=RecoveryStats)
    _kept: list[_Kept] = field(default_factory=list)
    _points: list[RecoveryPoint] = field(default_factory=list)
    _deaths: Counter[int] = field(default_factory=Counter)
    _writing: asyncio.Task[None] | None = None
    _written: bool = False
    """The worker has written its files: what is left to do is done, whatever becomes of it."""

    def __post_init__(self) -> None:
        self._policy = PointPolicy(self.services.recovery)

    def restore(self, points: Iterable[RecoveryPoint], kept: Iterable[Operation]) -> None:
        """Take over what a former daemon kept."""
        self._points = list(points)
        held = self._points[-1].commit_seq if self._points else 0
        for operation in kept:
            assert operation.payload is not None
            self._kept.append(_Kept(operation.id, operation.commit_seq, operation.payload))
            if operation.commit_seq > held:
                self._policy.ran(0.0, operation.payload.size_bytes)
        self._show()

    # -- while the worker lives ----------------------------------------------------------------

    def keep(self, operation: Operation, ended: Operation, outcome: Outcome) -> Operation:
        """The ended operation with what a replay needs of it.

        Args:
            operation: As it was run.
            ended: As it is about to be written.
            outcome: What the worker made of it.
        """
        needed = operation.method in REPLAYED or (operation.method == "Forward" and outcome.graph)
        if not needed or not self.services.recovery.enabled:
            return ended
        return replace(
            ended,
            payload=operation.payload,
            check=outcome.check,
            graph=outcome.graph,
            loaded=operation.loaded,
        )

    async def ran(self, operation: Operation, seconds: float, state_bytes: int) -> None:
        """Count an operation that was settled.

        Args:
            operation: As written.
            seconds: What the worker took.
            state_bytes: What a recovery point would hold.
        """
        if operation.payload is None:
            return
        self._kept.append(_Kept(operation.id, operation.commit_seq, operation.payload))
        self._policy.ran(seconds, operation.payload.size_bytes)
        self._policy.expect(state_bytes)
        if operation.method in LOADS:
            # What was loaded may be replaced by another save under its name.
            self._policy.want()
        self._show()
        if self.stats.kept_bytes > self.services.recovery.max_spool_bytes:
            logger.warning(
                "payloads for a replay take too much, given up until the next recovery point "
                "session=%s bytes=%d",
                self.session,
                self.stats.kept_bytes,
            )
            self._policy.want()
            await self._release(operation.commit_seq)

    async def make_point(self, worker: Worker, operation: Operation) -> None:
        """Make a recovery point behind an operation that was settled, if one is due.

        Returns once the worker has copied its state. One that fails is tried again later.
        """
        writing = self._writing is not None and not self._writing.done()
        if operation.method not in BOUNDARIES or writing or not self._policy.due():
            return
        failpoint("point.begun")
        self._policy.begun()
        try:
            staging = self.services.folders.staging()
        except FiretitanError as error:
            logger.warning("no recovery point session=%s: %s", self.session, error)
            return
        try:
            step, blocked_s = await worker.save_point(self.session, operation.commit_seq, staging)
        except FiretitanError as error:
            logger.warning("no recovery point session=%s: %s", self.session, error)
            await discard(self.services.folders, staging)
            return
        point = RecoveryPoint(self.session, operation.commit_seq, step, "", "", 0, 0.0)
        self._written = False
        self._writing = asyncio.create_task(self._finish(worker, point, staging, blocked_s))

    async def _finish(
        self, worker: Worker, point: RecoveryPoint, staging: Path, blocked_s: float
    ) -> None:
        services, began = self.services, self.services.clock.monotonic()
        folder: Path | None = None
        try:
            written = await worker.wait_point(self.session, staging)
            self._written = True
            folder = await services.folders.publish(staging, "points", str(point.commit_seq))
            failpoint("point.published")
            point = replace(
                point,
                folder=str(folder),
                digest=written.saved.digest,
                size_bytes=written.saved.size_bytes,
                create_time=services.clock.now(),
            )
            await self._replace_points([*self._points, point])
        except asyncio.CancelledError:
            # A worker that still writes there fails unseen.
            await discard(services.folders, staging)
            raise
        except FiretitanError as error:
            logger.warning("no recovery point session=%s: %s", self.session, error)
            if folder is None:
                await discard(self.services.folders, staging)
            elif error.reason is Reason.STATE_DISK_FULL:
                # Its row was not written; after another error it may have been.
                await discard(self.services.folders, folder)
            return
        failpoint("point.made")
        self._policy.made(blocked_s + written.compute_s)
        self.stats.points += 1
        self._show()
        logger.info(
            "recovery point session=%s commit_seq=%d step=%d bytes=%d blocked_s=%.4f "
            "compute_s=%.4f wall_s=%.3f",
            self.session,
            point.commit_seq,
            point.step,
            point.size_bytes,
            blocked_s,
            written.compute_s,
            services.clock.monotonic() - began,
        )

    async def _replace_points(self, points: list[RecoveryPoint]) -> None:
        """Write the points there are now; the newest stay, with the payloads behind the oldest."""
        kept, gone = points[-_KEPT_POINTS:], points[:-_KEPT_POINTS]
        new = [point for point in kept if point not in self._points]
        # Payloads reach back to the older point, in case the newer turns out to be damaged.
        released = kept[0].commit_seq if len(kept) == _KEPT_POINTS else 0
        change = Change(
            recovery_points=new,
            deleted_recovery_points=[(one.session, one.commit_seq) for one in gone],
            released_payloads=[(self.session, released)] if released else [],
            durable=True,
        )
        await self.services.store.write(change)
        self._points = kept
        await self._forget(released)
        for point in gone:
            await discard(self.services.folders, Path(point.folder))

    async def _release(self, through: int) -> None:
        change = Change(released_payloads=[(self.session, through)])
        try:
            await self.services.store.write(change)
        except FiretitanError as error:
            logger.warning("payloads stay session=%s: %s", self.session, error)
            return
        await self._forget(through)

    async def _forget(self, through: int) -> None:
        forgotten = [one for one in self._kept if one.commit_seq <= through]
        self._kept = [one for one in self._kept if one.commit_seq > through]
        for one in forgotten:
            self.services.operations.holds.release(one.operation_id)
        await self.services.spool.remove([one.ref for one in forgotten])
        self._show()

    async def interrupt(self) -> None:
        """Stop waiting for a point that is being written; one that was written is kept."""
        # Not forgotten here: whoever waits may be cancelled, and the next one must wait too.
        task = self._writing
        if task is not None:
            if not self._written and not task.cancelling():
                task.cancel()
            await asyncio.wait([task])

    async def drop(self) -> None:
        """Keep nothing any more: the session was closed, or begins anew."""
        await self.interrupt()
        gone = self._points
        await self.services.store.write(
            Change(
                deleted_recovery_points=[(one.session, one.commit_seq) for one in gone],
                released_payloads=[(self.session, _EVERYTHING)],
                durable=bool(gone),
            )
        )
        self._points = []
        self._policy = PointPolicy(self.services.recovery)
        await self._forget(_EVERYTHING)
        for point in gone:
            await discard(self.services.folders, Path(point.folder))

    def _show(self) -> None:
        self.stats.kept_bytes = sum(one.ref.size_bytes for one in self._kept)
        if self._points:
            newest = self._points[-1]
            self.stats.point_step, self.stats.point_bytes = newest.step, newest.size_bytes
            self.stats.point_time = newest.create_time
        else:
            self.stats.point_step = self.stats.point_bytes = 0
            self.stats.point_time = 0.0
        self.stats.point_cost = self._policy.share

    # -- after its death -----------------------------------------------------------------------

    async def rebuild(self, worker: Worker, session: Session, *, exact: bool) -> bool:
        """Bring a worker to where the session's settled commands had brought the last one.

        A worker that is there already, or half way, goes on from where it is.

        Args:
            worker: With the model loaded.
            session: The session's record.
            exact: Whether results must come out bit for bit.

        Returns:
            Whether the worker holds the session's last snapshot still.

        Raises:
            FiretitanError: SESSION_LOSS where this cannot be, and why; WORKER_UNAVAILABLE where
                the worker ended meanwhile.
        """
        clock = self.services.clock
        began = clock.monotonic()
        held = await worker.open_session(session)
        if held.applied_commit_seq:
            plan = await self._plan_patiently(session, held.applied_commit_seq)
            if plan.missing:
                raise _impossible(session, _gone(plan))
        else:
            plan = await self._load_start(worker, session)
        self.stats.to_replay = len(plan.replay)
        if plan.replay:
            logger.info("replaying session=%s commands=%d", session.name, len(plan.replay))
        loaded = clock.monotonic()
        for operation in plan.replay:
            keep_graph = operation.method == "Forward" and operation.graph in plan.graphs
            await self._replay(worker, session, operation, exact=exact, keep_graph=keep_graph)
            failpoint("recovery.replayed")
            self.stats.replayed += 1
            self.stats.to_replay -= 1
        self.stats.load_s, self.stats.replay_s = loaded - began, clock.monotonic() - loaded
        return bool(held.last_snapshot)

    async def can_rebuild(self, session: Session) -> bool:
        """Whether a new worker could be brought to where the session is."""
        points = [point.commit_seq for point in self._points_of(session)]
        # From the origin last: that reads all the session ever did, and seldom leads anywhere.
        for start in (*reversed(points), session.origin_commit_seq):
            if not (await self._plan(session, start)).missing:
                return True
        return False

    def _points_of(self, session: Session) -> list[RecoveryPoint]:
        # A daemon that died in a loss leaves points of the weights that were lost.
        return [one for one in self._points if one.commit_seq > session.origin_commit_seq]

    async def _plan(self, session: Session, after: int) -> Plan:
        return plan_replay(await self.services.store.done_operations(session.name, after), after)

    async def _plan_patiently(self, session: Session, after: int) -> Plan:
        # A ledger that cannot be read for a while is no loss.
        return await when_there_is_space(
            f"the replay of {session.name}", lambda: self._plan(session, after)
        )

    async def _await_place(self, folder: Path) -> None:
        # Files of a store that is gone are not damaged, only away; the worker waits for the spool.
        while not await self.services.folders.there(folder):
            logger.error("%s is gone, waiting for it session=%s", folder.parent, self.session)
            await asyncio.sleep(DISK_RETRY_S)

    async def _load_start(self, worker: Worker, session: Session) -> Plan:
        """Load the newest point that leads to where the session was, or begin at its origin."""
        why = ""
        for point in reversed(self._points_of(session)):
            plan = await self._plan_patiently(session, point.commit_seq)
            if plan.missing:
                why = why or _gone(plan)
                continue
            await self._await_place(Path(point.folder))
            try:
                await worker.load_point(point)
            except FiretitanError as error:
                if error.reason is not Reason.CHECKSUM_MISMATCH:
                    raise
                logger.error("recovery point is damaged session=%s: %s", session.name, error)
                why = why or error.message
                continue
            return plan
        plan = await self._plan_patiently(session, session.origin_commit_seq)
        if plan.missing:
            raise _impossible(session, why or _gone(plan))
        return plan

    async def _replay(
        self,
        worker: Worker,
        session: Session,
        operation: Operation,
        *,
        exact: bool,
        keep_graph: bool,
    ) -> None:
        assert operation.payload is not None
        source = operation.loaded
        command = Command(
            session=session.name,
            commit_seq=operation.commit_seq,
            request_id=operation.request_id,
            method=operation.method,
            payload=operation.payload,
            load=LoadSource(Path(source.folder), source.digest) if source is not None else None,
            settled_through=operation.commit_seq - 1,
            client_id=operation.client_id,
            seq=operation.seq,
            # A worker learns what a graph takes as it goes: this one may think that none has room.
            keep_graph=keep_graph,
        )
        what = f"{operation.method} {operation.name} (commit_seq {operation.commit_seq})"
        if source is not None:
            await self._await_place(Path(source.folder))
        try:
            outcome = await worker.execute(command)
        except FiretitanError as error:
            if error.reason is Reason.WORKER_UNAVAILABLE:
                self._deaths[operation.commit_seq] += 1
                if self._deaths[operation.commit_seq] >= MAX_DEATHS:
                    raise _impossible(session, f"{what} ended the worker twice") from error
            raise
        if outcome.error is not None:
            raise _impossible(session, f"{what} failed in the replay: {outcome.error.message}")
        if not same_result(operation.check, outcome.check, exact=exact):
            raise _impossible(
                session,
                f"{what} came to {outcome.check} in the replay, to {operation.check} before",
            )

    def recovered(self, seconds: float, start_s: float) -> None:
        """A worker was replaced and the session goes on.

        Args:
            seconds: After its end.
            start_s: Of that, starting the new one and loading its model.
        """
        self._deaths.clear()
        self.stats.recoveries += 1
        self.stats.recovery_s = seconds
        self.stats.load_s += start_s
        logger.info(
            "recovered session=%s seconds=%.3f load_s=%.3f replay_s=%.3f",
            self.session,
            seconds,
            self.stats.load_s,
            self.stats.replay_s,
        )


def _gone(plan: Plan) -> str:
    first = plan.missing[0]
    return (
        f"payloads of {len(plan.missing)} of {len(plan.replay)} commands to replay are gone, the "
        f"first of {first.method} {first.name}: over recovery.max_spool_bytes, or "
        "recovery.enabled was off"
    )


def _impossible(session: Session, why: str) -> FiretitanError:
    return FiretitanError(Reason.SESSION_LOSS, f"no replay: {why}", session=session.name)
