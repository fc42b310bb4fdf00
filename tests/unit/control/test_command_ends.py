"""The pipeline of one session where its worker, its lanes or itself come to an end."""

from __future__ import annotations

import asyncio

import pytest
from firetitan.v1 import training_service_pb2
from support.commands import BAD
from support.held_writes import HeldWrites
from support.managers import until
from support.pipeline import Bench

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.records import OperationState, SessionState
from firetitan_daemon.core.worker_ports import Command, Outcome

pytestmark = pytest.mark.timeout(30)


async def test_a_close_whose_worker_ends_leaves_what_was_accepted_to_the_next(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(bench.worker, "execute", gone)
        operations = [await bench.forward_backward() for _ in range(2)]
        closings = [asyncio.create_task(bench.pipeline.unload(1)) for _ in range(2)]
        await asyncio.sleep(0.02)
        with pytest.raises(FiretitanError) as caught:
            await bench.forward_backward(seq=3)
        assert caught.value.reason is Reason.CLOSED
        await bench.pipeline.suspend()
        for closing in closings:
            with pytest.raises(FiretitanError) as caught:
                await closing
            assert caught.value.reason is Reason.RECOVERING
    await bench.pipeline.resume(bench.worker, exact=True)
    await bench.pipeline.unload(1)
    assert [(await bench.ended(one)).state for one in operations] == [OperationState.DONE] * 2
    assert bench.pipeline.session.state is SessionState.CLOSED


async def gone(command: Command) -> Outcome:
    raise FiretitanError(Reason.WORKER_UNAVAILABLE, "it is gone")


async def test_a_session_that_stopped_of_itself_can_be_closed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = Stops(bench, monkeypatch)
    operation = await bench.forward_backward()
    await stops.begun.wait()
    closing = asyncio.create_task(bench.pipeline.close())
    await asyncio.sleep(0.02)
    stops.going.set()
    async with asyncio.timeout(5):
        await closing
    assert (await bench.ended(operation)).error.reason == Reason.CLOSED


async def test_a_session_that_stopped_as_a_command_came_can_be_closed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = Stops(bench, monkeypatch)
    await bench.forward_backward()
    await stops.begun.wait()
    with monkeypatch.context() as patch:
        row = HeldWrites(bench.store, patch, lambda change: bool(change.lanes))
        coming = asyncio.create_task(bench.forward_backward())
        await row.begun.wait()
        stops.going.set()
        await until(lambda: bench.pipeline._task.done())
        row.going.set()
        operation = await coming
    async with asyncio.timeout(5):
        await bench.pipeline.close()
    assert (await bench.ended(operation)).error.reason == Reason.CLOSED


class Stops:
    """A pipeline that stops as it settles a command, for a reason that nobody foresaw."""

    def __init__(self, bench: Bench, patch: pytest.MonkeyPatch) -> None:
        self.begun, self.going = asyncio.Event(), asyncio.Event()
        patch.setattr(bench.pipeline._rows, "settle", self._settle)

    async def _settle(self, *_: object, **__: object) -> None:
        self.begun.set()
        await self.going.wait()
        raise RuntimeError("unforeseen")


async def test_a_worker_that_ends_as_its_session_is_closed_leaves_it_closed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        row = HeldWrites(bench.store, patch, lambda change: bool(change.sessions))
        closing = asyncio.create_task(bench.pipeline.close())
        await row.begun.wait()
        losing = asyncio.create_task(bench.pipeline.lose("signal 9"))
        await asyncio.sleep(0.02)
        row.going.set()
        await asyncio.gather(closing, losing)
    (stored,) = (await bench.store.load()).sessions
    assert stored.state is bench.pipeline.session.state is SessionState.CLOSED


async def test_a_worker_that_ends_before_a_command_was_sent_did_not_end_in_it(
    bench: Bench,
) -> None:
    bench.worker._process.kill()
    await bench.worker.exited()
    operation = await bench.forward_backward()
    await until(lambda: bench.pipeline._rows._begun == operation.id)
    await bench.pipeline.suspend()
    found = bench.services.operations.current(operation.id)
    assert found is not None and found.deaths == 0


@pytest.mark.parametrize("refused", ["no worker", "ending"])
async def test_a_lane_is_not_closed_for_want_of_a_command_that_was_refused(
    bench: Bench, refused: str
) -> None:
    held = await bench.forward_backward(seq=2)
    if refused == "no worker":
        await bench.pipeline.suspend()
    else:
        bench.pipeline.refuse(FiretitanError(Reason.DAEMON_DRAINING, "about to end"))
    with pytest.raises(FiretitanError):
        await bench.forward_backward(seq=1)
    await asyncio.sleep(0.3)
    await bench.pipeline.expire()
    if refused == "no worker":
        await bench.pipeline.resume(bench.worker, exact=True)
    else:
        bench.pipeline._refusal = None  # as the next daemon has it
    await bench.pipeline.expire()
    missing = await bench.forward_backward(seq=1)
    for one in (missing, held):
        assert (await bench.ended(one)).state is OperationState.DONE
    # One that nothing keeps from coming is not waited for.
    late = await bench.forward_backward(seq=4)
    await asyncio.sleep(0.3)
    await bench.pipeline.expire()
    assert (await bench.ended(late)).error.reason == Reason.LANE_BROKEN


async def test_what_stands_behind_a_failure_says_so_though_its_lane_was_closed(
    bench: Bench,
) -> None:
    await bench.pipeline.pause(5)
    failing = await bench.submit(
        training_service_pb2.ForwardBackwardRequest(data=[BAD], loss_fn="cross_entropy")
    )
    behind = await bench.forward_backward(seq=2)
    await bench.forward_backward(seq=4)
    await asyncio.sleep(0.3)
    await bench.pipeline.expire()
    bench.pipeline.start(bench.worker)
    assert (await bench.ended(failing)).state is OperationState.FAILED
    assert (await bench.ended(behind)).error.reason == Reason.PRECEDING_FAILED
