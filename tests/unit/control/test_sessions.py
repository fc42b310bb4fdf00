"""Sessions where callers go away, trainers are deleted and workers do not answer."""

from __future__ import annotations

import asyncio

import pytest
from support.managers import TOY, Managers, command, forward_backward, until
from support.stubs import optim_request

from firetitan_daemon.control.commands import CommandPipeline
from firetitan_daemon.control.session_settings import Wanted
from firetitan_daemon.control.trainer_requests import TrainerRequest
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.ports import Change
from firetitan_daemon.core.records import (
    OperationState,
    ResourceState,
    Session,
    SessionState,
    Trainer,
)
from firetitan_daemon.core.worker_ports import Worker

pytestmark = pytest.mark.timeout(30)


async def test_session_of_a_caller_that_went_away_is_there_for_the_next(
    managers: Managers,
) -> None:
    trainer, worker = await managers.trainer()
    opening = asyncio.Event()

    class Slow:
        def __getattr__(self, name: str) -> object:
            return getattr(worker, name)

        async def open_session(self, session: Session) -> object:
            answer = await worker.open_session(session)
            opening.set()
            await asyncio.sleep(0.1)
            return answer

    call = asyncio.create_task(managers.sessions.create(trainer, Slow(), Wanted(), "first"))
    await opening.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    session, _ = await managers.sessions.create(trainer, worker, Wanted(), "again")
    assert [one.name for one in managers.sessions.all("")] == [session.name]


async def test_a_session_that_opens_while_its_trainer_is_deleted_is_closed(
    managers: Managers,
) -> None:
    trainer, worker = await managers.trainer()
    opened, deleted = asyncio.Event(), asyncio.Event()

    class Slow:
        def __getattr__(self, name: str) -> object:
            return getattr(worker, name)

        async def open_session(self, session: Session) -> object:
            answer = await worker.open_session(session)
            opened.set()
            await deleted.wait()
            return answer

    call = asyncio.create_task(managers.sessions.create(trainer, Slow(), Wanted(), "request"))
    await opened.wait()
    await managers.trainers.delete("trainers/t")
    deleted.set()
    with pytest.raises(FiretitanError) as caught:
        await call
    assert caught.value.reason is Reason.CLOSED
    assert managers.sessions.all("") == []
    again, worker = await managers.trainer("make-t-again")
    session, created = await managers.sessions.create(again, worker, Wanted(), "another request")
    assert created and [one.name for one in managers.sessions.all("")] == [session.name]


async def test_opening_a_session_says_that_its_worker_does_not_answer(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, worker = await managers.trainer()
    answers = asyncio.Event()

    class Hung:
        def __getattr__(self, name: str) -> object:
            return getattr(worker, name)

        async def open_session(self, session: Session) -> object:
            await answers.wait()
            return await worker.open_session(session)

    with monkeypatch.context() as impatient:
        impatient.setattr("firetitan_daemon.control.sessions._ANSWER_S", 0.05)
        for _ in range(2):
            with pytest.raises(FiretitanError, match="has not answered") as caught:
                await managers.sessions.create(trainer, Hung(), Wanted(), "request")
            assert caught.value.reason is Reason.RECOVERING
            assert float(caught.value.metadata["retry_after_s"]) > 0
    answers.set()
    session, created = await managers.sessions.create(trainer, worker, Wanted(), "request")
    assert created and [one.name for one in managers.sessions.all("")] == [session.name]


async def test_a_full_disk_does_not_end_the_watch_over_lanes(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, again = 0, asyncio.Event()

    async def expire() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise FiretitanError(Reason.STATE_DISK_FULL, "the disk is full")
        again.set()

    monkeypatch.setattr(managers.sessions, "expire", expire)
    managers.supervisor.begin(await managers.store.load())
    await asyncio.wait_for(again.wait(), 5)


async def test_a_cancellation_happens_even_if_its_caller_goes_away(managers: Managers) -> None:
    trainer, worker = await managers.trainer()
    session, _ = await managers.sessions.create(trainer, worker, Wanted(), "s")
    pipeline = managers.sessions._pipelines[session.name]
    writes = managers.store.write

    async def slow(change: Change) -> None:
        await asyncio.sleep(0.05)
        await writes(change)

    payload = forward_backward(session, seq=2)
    held = await managers.sessions.submit(*payload)
    managers.store.write = slow  # type: ignore[method-assign]
    call = asyncio.create_task(managers.sessions.cancel(held))
    await asyncio.sleep(0.02)
    call.cancel()
    await asyncio.wait([call])
    first = await managers.sessions.submit(*forward_backward(session, seq=1))
    await managers.done(first)
    assert (await managers.done(held)).state is OperationState.CANCELLED
    assert pipeline.attach("a").next_seq == 3


async def adapter_session(managers: Managers) -> tuple[Session, Worker]:
    """One that can be closed while its trainer goes on."""
    request = TrainerRequest("t", TOY, 8, 0, "auto", "make-t", "digest")
    await managers.done(await managers.trainers.create(request))
    trainer, worker = await managers.trainers.ready("t")
    session, _ = await managers.sessions.create(trainer, worker, Wanted(), "s")
    return session, worker


async def test_a_session_of_a_trainer_that_was_stopped_can_be_closed(managers: Managers) -> None:
    session, _ = await adapter_session(managers)
    assert await managers.trainers.stop("t")
    async with asyncio.timeout(10):
        await managers.sessions.close(session.name)
    assert managers.sessions.get(session.name).state is SessionState.CLOSED
    _, worker = await managers.trainers.ready("t")
    assert not (await worker.describe()).sessions


async def test_closing_a_session_says_that_its_worker_is_being_replaced(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firetitan_daemon.control.sessions._ANSWER_S", 0.05)
    session, worker = await adapter_session(managers)
    await managers.sessions.suspend("t")
    with pytest.raises(FiretitanError) as caught:
        await managers.sessions.close(session.name)
    assert caught.value.reason is Reason.RECOVERING
    await managers.sessions.resume("t", worker, exact=True)
    await managers.sessions.close(session.name)


async def test_a_full_disk_at_a_loss_does_not_make_it_several(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where the loss cannot be written nor where what was kept cannot be dropped."""
    monkeypatch.setattr("firetitan_daemon.control.services.DISK_RETRY_S", 0.02)
    trainer, worker = await managers.trainer()
    session, _ = await managers.sessions.create(trainer, worker, Wanted(), "s")
    write, refused = managers.store.write, [0, 0]

    async def full(change: Change) -> None:
        for kind, matters in enumerate((change.sessions, change.released_payloads)):
            if matters and refused[kind] < 2:
                refused[kind] += 1
                raise FiretitanError(Reason.STATE_DISK_FULL, "the disk is full")
        await write(change)

    monkeypatch.setattr(managers.store, "write", full)
    await managers.sessions.lose("t", "signal 9")
    assert refused == [2, 2]
    assert managers.sessions.get(session.name).epoch == 2


async def dies() -> None:
    """What a daemon that is killed has done of a step: nothing."""


async def lost_with_point(
    managers: Managers, patch: pytest.MonkeyPatch
) -> tuple[Trainer, Worker, CommandPipeline]:
    """A session whose daemon died in its loss: what its weights were rebuilt from is there.

    Its trainer was made again.
    """
    trainer, worker = await managers.trainer()
    session, _ = await managers.sessions.create(trainer, worker, Wanted(), "s")
    pipeline = managers.sessions._pipelines[session.name]
    pipeline.recovery._policy.want()
    await managers.sessions.submit(*forward_backward(session, seq=1))
    await managers.sessions.submit(*command(session, optim_request(), seq=2))
    await until(lambda: pipeline.recovery.stats.points == 1)
    with patch.context() as dying:
        dying.setattr("firetitan_daemon.control.trainer_workers._MAX_RESTARTS", 0)
        dying.setattr(pipeline.recovery, "drop", dies)
        worker._process.kill()
        await until(lambda: managers.trainers.get("t").state is ResourceState.FAILED)
    assert pipeline.recovery._points and pipeline.recovery._kept
    return *await managers.trainer("again"), pipeline


async def test_what_a_daemon_that_died_in_a_loss_kept_goes_as_the_session_is_reopened(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, worker, _ = await lost_with_point(managers, monkeypatch)
    await managers.sessions.create(trainer, worker, Wanted(), "again")
    ledger = await managers.store.load()
    assert not ledger.recovery_points and not ledger.kept_operations


async def test_a_point_of_lost_weights_is_not_loaded(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that knew no better reopened the session beside it."""
    trainer, worker, pipeline = await lost_with_point(managers, monkeypatch)
    monkeypatch.setattr(pipeline.recovery, "drop", dies)
    session, _ = await managers.sessions.create(trainer, worker, Wanted(), "again")
    first = await managers.sessions.submit(*forward_backward(session, seq=3))
    assert (await managers.done(first)).state is OperationState.DONE
    assert pipeline.recovery._points
    assert await managers.trainers.stop("t")
    await managers.trainers.ready("t")
    second = await managers.sessions.submit(*forward_backward(session, seq=4))
    assert (await managers.done(second)).state is OperationState.DONE
    assert managers.sessions.get(session.name).epoch == 2


async def test_a_lost_session_is_closed_though_its_trainer_cannot_be_started(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, _ = await adapter_session(managers)
    assert await managers.trainers.stop("t")
    await managers.sessions.lose("t", "signal 9")

    def used(trainer_id: str) -> None:
        raise FiretitanError(Reason.MODEL_NOT_FOUND, f"the model of {trainer_id} is gone")

    monkeypatch.setattr(managers.sessions, "_used", used)
    await managers.sessions.close(session.name)
    assert managers.sessions.get(session.name).state is SessionState.CLOSED
