"""Sessions where callers go away, trainers are deleted and workers do not answer."""

from __future__ import annotations

import asyncio

import pytest
from support.managers import Managers, forward_backward

from firetitan_daemon.control.session_settings import Wanted
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.ports import Change
from firetitan_daemon.core.records import (
    OperationState,
    Session,
)

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
