"""Trainers where workers die, the disk is full and others come between."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from support.held_writes import HeldWrites
from support.managers import TOY, Managers, command, forward_backward, kill, until
from support.stubs import optim_request

from firetitan_daemon.control.codec import Header
from firetitan_daemon.control.recovery import SessionRecovery
from firetitan_daemon.control.session_settings import Wanted
from firetitan_daemon.control.trainer_requests import TrainerRequest
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.ports import Change
from firetitan_daemon.core.records import (
    Operation,
    OperationState,
    RecoveryPoint,
    ResourceState,
    Session,
    SessionState,
    Trainer,
)
from firetitan_daemon.core.worker_ports import Worker, WrittenPoint

pytestmark = pytest.mark.timeout(30)


async def test_a_dead_worker_does_not_bring_a_deleted_trainer_back(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, worker = await managers.trainer()
    await kill(managers, worker, monkeypatch)
    await managers.trainers.delete("t")
    await asyncio.sleep(0.5)
    assert not managers.trainers.all()
    (row,) = (await managers.store.load()).trainers
    assert row.state is ResourceState.DELETING


async def test_who_asks_for_a_trainer_while_its_row_is_written_takes_nothing_back(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    active = HeldWrites(
        managers.store,
        monkeypatch,
        lambda change: any(one.state is ResourceState.ACTIVE for one in change.trainers),
    )
    first = await managers.trainers.create(TrainerRequest("t", TOY, 0, 0, "auto", "a", "digest"))
    await active.begun.wait()
    request = TrainerRequest("t", TOY, 0, 0, "auto", "b", "digest", inactivity_s=60.0)
    second = asyncio.create_task(managers.trainers.create(request))
    for _ in range(20):
        await asyncio.sleep(0)
    active.going.set()
    for operation in (first, await second):
        assert (await managers.done(operation)).error is None
    (row,) = (await managers.store.load()).trainers
    assert row == managers.trainers.get("t")
    assert (row.state, row.inactivity_s) == (ResourceState.ACTIVE, 60.0)


async def test_a_worker_that_is_slow_to_answer_while_it_loads_is_waited_for(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, worker = await managers.trainer()
    adopt, tries = managers.services.launcher.adopt, 0

    async def busy(spec: object) -> Worker | None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise FiretitanError(Reason.WORKER_UNAVAILABLE, "lives but did not answer")
        return await adopt(spec)

    managers.pool._live.clear()  # as a new daemon has it
    monkeypatch.setattr(managers.services.launcher, "adopt", busy)
    found, _ = await managers.pool.start(worker.spec)
    assert found.pid == worker.pid and tries == 2


async def test_a_full_disk_delays_what_has_happened_and_loses_none_of_it(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firetitan_daemon.control.services.DISK_RETRY_S", 0.02)
    write, refused = managers.store.write, 0

    async def full(change: Change) -> None:
        nonlocal refused
        ended = any(one.done for one in change.operations)
        lost = any(one.state is SessionState.LOST for one in change.sessions)
        if (ended or lost) and refused % 3 != 2:
            refused += 1
            raise FiretitanError(Reason.STATE_DISK_FULL, "the disk is full")
        refused += 1 if ended or lost else 0
        await write(change)

    monkeypatch.setattr(managers.store, "write", full)
    monkeypatch.setattr("firetitan_daemon.control.trainer_workers._MAX_RESTARTS", 0)
    trainer, worker = await managers.trainer()
    await managers.deployment()
    session, _ = await managers.sessions.create(trainer, worker, Wanted(), "s")
    worker._process.kill()
    await until(lambda: managers.trainers.get("t").state is ResourceState.FAILED)
    assert managers.sessions.get(session.name).state is SessionState.LOST
    assert refused >= 9


class HeldPoint:
    """A recovery point whose files are written and wait to be published, and its dead worker."""

    def __init__(self, managers: Managers, patch: pytest.MonkeyPatch) -> None:
        self.managers = managers
        self.going = asyncio.Event()
        self._publishing = asyncio.Event()
        publish = managers.services.folders.publish

        async def slow(staging: Path, kind: str, name: str) -> Path:
            self._publishing.set()
            await self.going.wait()
            return await publish(staging, kind, name)

        patch.setattr(managers.services.folders, "publish", slow)

    async def begin(self) -> Session:
        """Bring it about; returns once the worker is known to be dead."""
        managers = self.managers
        trainer, worker = await managers.trainer()
        session, _ = await managers.sessions.create(trainer, worker, Wanted(), "s")
        self.recovery(session)._policy.want()
        await managers.sessions.submit(*forward_backward(session, seq=1))
        await managers.sessions.submit(*command(session, optim_request(), seq=2))
        await self._publishing.wait()
        worker._process.kill()
        shown = managers.sessions.get
        await until(lambda: shown(session.name).state is SessionState.RECOVERING)
        return session

    def recovery(self, session: Session) -> SessionRecovery:
        return self.managers.sessions._pipelines[session.name].recovery

    async def points(self) -> list[RecoveryPoint]:
        """Those of the ledger; each has its folder, and there is no other."""
        rows = list((await self.managers.store.load()).recovery_points)
        there = {folder for folder in self.folder.iterdir()} if self.folder.exists() else set()
        assert there == {Path(row.folder) for row in rows}
        return rows

    @property
    def folder(self) -> Path:
        return self.managers.services.folders._root / "points"


async def test_a_point_that_was_written_outlives_its_worker(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldPoint(managers, monkeypatch)
    session = await held.begin()
    held.going.set()
    third = await submitted(managers, forward_backward(session, seq=3))
    assert (await managers.done(third)).state is OperationState.DONE
    assert len(await held.points()) == 1
    assert held.recovery(session).stats.replayed == 0


async def test_a_point_that_was_written_goes_with_its_trainer(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldPoint(managers, monkeypatch)
    await held.begin()
    deleting = asyncio.create_task(managers.trainers.delete("t"))
    await asyncio.sleep(0.1)
    held.going.set()
    await deleting
    await asyncio.sleep(0.1)
    assert await held.points() == []


async def test_a_point_whose_row_finds_no_space_leaves_no_files(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = managers.store.write

    async def full(change: Change) -> None:
        if change.recovery_points:
            raise FiretitanError(Reason.STATE_DISK_FULL, "the disk is full")
        await write(change)

    monkeypatch.setattr(managers.store, "write", full)
    held = HeldPoint(managers, monkeypatch)
    session = await held.begin()
    held.going.set()
    third = await submitted(managers, forward_backward(session, seq=3))
    assert (await managers.done(third)).state is OperationState.DONE
    assert await held.points() == [] and held.recovery(session).stats.replayed == 2


async def submitted(managers: Managers, sent: tuple[Header, str, bytes]) -> Operation:
    """A command, sent until the session takes commands again."""
    while True:
        try:
            return await managers.sessions.submit(*sent)
        except FiretitanError as error:
            if error.reason is not Reason.RECOVERING:
                raise
            await asyncio.sleep(0.02)


async def test_a_full_disk_delays_a_new_worker_and_the_session_goes_on(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firetitan_daemon.control.services.DISK_RETRY_S", 0.02)
    write, refused = managers.store.write, 0

    async def full(change: Change) -> None:
        nonlocal refused
        if any(one.state is ResourceState.RECOVERING for one in change.trainers) and refused < 3:
            refused += 1
            raise FiretitanError(Reason.STATE_DISK_FULL, "the disk is full")
        await write(change)

    monkeypatch.setattr(managers.store, "write", full)
    trainer, worker = await managers.trainer()
    session, _ = await managers.sessions.create(trainer, worker, Wanted(), "s")
    first = await managers.sessions.submit(*forward_backward(session, seq=1))
    assert (await managers.done(first)).state is OperationState.DONE
    worker._process.kill()
    await until(
        lambda: (
            managers.trainers.get("t").worker_id != worker.spec.worker_id
            and managers.sessions.get(session.name).state is SessionState.ACTIVE
        )
    )
    assert refused == 3
    second = await managers.sessions.submit(*forward_backward(session, seq=2))
    assert (await managers.done(second)).state is OperationState.DONE


@pytest.mark.parametrize("end", ["deleted", "stopped"])
async def test_a_point_that_is_being_written_leaves_no_files(
    managers: Managers, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    trainer, worker = await managers.trainer()
    session, _ = await managers.sessions.create(trainer, worker, Wanted(), "s")
    wait, begun = worker.wait_point, asyncio.Event()

    async def slow(session: str, staging: Path) -> WrittenPoint:
        written = await wait(session, staging)
        begun.set()
        await asyncio.Event().wait()
        return written

    monkeypatch.setattr(worker, "wait_point", slow)
    managers.sessions._pipelines[session.name].recovery._policy.want()
    await managers.sessions.submit(*forward_backward(session, seq=1))
    step = await managers.sessions.submit(*command(session, optim_request(), seq=2))
    assert (await managers.done(step)).state is OperationState.DONE
    await begun.wait()
    staging = managers.services.folders._root / "staging"
    assert [file for folder in staging.iterdir() for file in folder.iterdir()]
    if end == "deleted":
        await managers.trainers.delete("t")
    else:
        assert await managers.trainers.stop("t")
    assert not list(staging.iterdir())


async def lost_session(managers: Managers, patch: pytest.MonkeyPatch) -> tuple[Trainer, Worker]:
    """A session whose worker is gone for good; returns its trainer, which is made again."""
    with patch.context() as impatient:
        impatient.setattr("firetitan_daemon.control.trainer_workers._MAX_RESTARTS", 0)
        trainer, worker = await managers.trainer()
        await managers.sessions.create(trainer, worker, Wanted(), "s")
        worker._process.kill()
        await until(lambda: managers.trainers.get("t").state is ResourceState.FAILED)
    return await managers.trainer("again")


def reopened(managers: Managers, patch: pytest.MonkeyPatch) -> HeldWrites:
    """Holds back the row that says that a session is there again."""
    return HeldWrites(
        managers.store,
        patch,
        lambda change: any(one.state is SessionState.ACTIVE for one in change.sessions),
    )


async def goes_on(managers: Managers, session: Session) -> None:
    first = await submitted(managers, forward_backward(session, seq=1))
    assert (await managers.done(first)).state is OperationState.DONE


async def test_a_session_whose_worker_ends_as_it_is_reopened_goes_on_in_the_next(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, worker = await lost_session(managers, monkeypatch)
    row = reopened(managers, monkeypatch)
    reopening = asyncio.create_task(managers.sessions.create(trainer, worker, Wanted(), "again"))
    await row.begun.wait()
    worker._process.kill()

    def replaced() -> bool:
        live = managers.pool.live(managers.trainers.get("t").worker_id)
        return live is not None and live is not worker

    await until(replaced)
    row.going.set()
    session, _ = await reopening
    assert session.epoch == 2
    await goes_on(managers, session)


async def test_a_session_whose_trainer_is_lost_as_it_is_reopened_is_lost_again(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, worker = await lost_session(managers, monkeypatch)
    row = reopened(managers, monkeypatch)
    reopening = asyncio.create_task(managers.sessions.create(trainer, worker, Wanted(), "again"))
    await row.begun.wait()
    monkeypatch.setattr("firetitan_daemon.control.trainer_workers._MAX_RESTARTS", 0)
    worker._process.kill()
    await until(lambda: len(managers.pool.ends) == 2)
    row.going.set()
    session, _ = await reopening
    await until(lambda: managers.trainers.get("t").state is ResourceState.FAILED)
    assert managers.sessions.get(session.name).state is SessionState.LOST
    trainer, worker = await managers.trainer("once more")
    session, _ = await managers.sessions.create(trainer, worker, Wanted(), "once more")
    assert session.epoch == 3
    await goes_on(managers, session)


class HeldOpening:
    """A worker whose answer that it opened a session is held back."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.opened, self.going = asyncio.Event(), asyncio.Event()

    def __getattr__(self, name: str) -> object:
        return getattr(self._worker, name)

    async def open_session(self, session: Session) -> object:
        answer = await self._worker.open_session(session)
        self.opened.set()
        await self.going.wait()
        return answer


async def test_a_session_whose_trainer_is_deleted_as_it_is_reopened_stays_closed(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, worker = await lost_session(managers, monkeypatch)
    held = HeldOpening(worker)
    reopening = asyncio.create_task(managers.sessions.create(trainer, held, Wanted(), "again"))
    await held.opened.wait()
    await managers.trainers.delete("t")
    held.going.set()
    with pytest.raises(FiretitanError) as caught:
        await reopening
    assert caught.value.reason is Reason.CLOSED
    (row,) = (await managers.store.load()).sessions
    assert row.state is SessionState.CLOSED


async def test_a_session_whose_trainer_is_stopped_as_it_is_opened_goes_on_when_it_is_used(
    managers: Managers,
) -> None:
    trainer, worker = await managers.trainer()
    held = HeldOpening(worker)
    opening = asyncio.create_task(managers.sessions.create(trainer, held, Wanted(), "s"))
    await held.opened.wait()
    assert await managers.trainers.stop("t")
    held.going.set()
    session, _ = await opening
    await goes_on(managers, session)
