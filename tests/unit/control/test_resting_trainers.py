"""Trainers that are stopped because nobody uses them, and somebody does in that moment."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from support.managers import TOY, Managers, command, forward_backward, until
from support.stubs import optim_request

from firetitan_daemon.control.session_settings import Wanted
from firetitan_daemon.control.trainer_requests import TrainerRequest
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.records import Operation, OperationState, Session

pytestmark = pytest.mark.timeout(30)


async def two_sessions(managers: Managers) -> tuple[Session, Session]:
    """Of one trainer."""
    request = TrainerRequest("t", TOY, 0, 0, "auto", "make-t", "digest", max_lora_rank=8)
    assert (await managers.done(await managers.trainers.create(request))).error is None
    first, second = [await session(managers, one) for one in ("one", "two")]
    return first, second


async def session(managers: Managers, request_id: str) -> Session:
    trainer, worker = await managers.trainers.ready("t")
    wanted = Wanted(rank=4) if trainer.max_lora_rank else Wanted()
    return (await managers.sessions.create(trainer, worker, wanted, request_id))[0]


async def done(managers: Managers, sent: Operation) -> None:
    assert (await managers.done(sent)).state is OperationState.DONE


async def test_no_session_takes_a_command_while_another_is_suspended(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await two_sessions(managers)
    pipeline = managers.sessions._pipelines[first.name]
    suspend, begun, going = pipeline.suspend, asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        begun.set()
        await going.wait()
        await suspend()

    monkeypatch.setattr(pipeline, "suspend", slow)
    stopping = asyncio.create_task(managers.trainers.stop("t"))
    await begun.wait()
    with pytest.raises(FiretitanError) as caught:
        await managers.sessions.submit(*forward_backward(second, seq=1))
    assert caught.value.reason is Reason.RECOVERING
    going.set()
    assert await stopping


@pytest.mark.parametrize("used", ["a command", "a session"])
async def test_a_trainer_that_is_used_while_it_is_looked_at_goes_on(
    managers: Managers, monkeypatch: pytest.MonkeyPatch, used: str
) -> None:
    first, second = await two_sessions(managers)
    recovery = managers.sessions._pipelines[second.name].recovery
    can_rebuild, begun, going = recovery.can_rebuild, asyncio.Event(), asyncio.Event()

    async def slow(current: Session) -> bool:
        begun.set()
        await going.wait()
        return await can_rebuild(current)

    monkeypatch.setattr(recovery, "can_rebuild", slow)
    stopping = asyncio.create_task(managers.trainers.stop("t"))
    await begun.wait()
    seq = 1
    if used == "a command":
        await done(managers, await managers.sessions.submit(*forward_backward(first, seq=seq)))
        seq += 1
    else:
        first = await session(managers, "three")
    going.set()
    assert not await stopping
    await done(managers, await managers.sessions.submit(*forward_backward(first, seq=seq)))


async def test_what_a_point_holds_is_not_read_again_to_see_whether_a_trainer_may_rest(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await managers.trainer()
    one = await session(managers, "one")
    recovery = managers.sessions._pipelines[one.name].recovery
    recovery._policy.want()
    for sent in (forward_backward(one, seq=1), command(one, optim_request(), seq=2)):
        await done(managers, await managers.sessions.submit(*sent))
    await until(lambda: recovery.stats.points == 1)
    read, after = managers.store.done_operations, list[int]()

    async def counted(name: str, after_commit_seq: int) -> Sequence[Operation]:
        after.append(after_commit_seq)
        return await read(name, after_commit_seq)

    monkeypatch.setattr(managers.store, "done_operations", counted)
    assert await managers.trainers.stop("t")
    assert after == [2]
