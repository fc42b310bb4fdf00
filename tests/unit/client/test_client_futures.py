"""Futures: every way of waiting, none of which stops anything."""

from __future__ import annotations

import asyncio
import concurrent.futures
import queue
import threading

import pytest

from firetitan_client.futures import APIFuture, completed, in_event_loop

pytestmark = pytest.mark.timeout(20)


def finish_later(future: APIFuture[int], value: int, after_s: float = 0.05) -> None:
    threading.Timer(after_s, future.finish, (value,)).start()


def test_result_and_callbacks() -> None:
    future: APIFuture[int] = APIFuture("work")
    seen: queue.Queue[int] = queue.Queue()
    future.add_done_callback(lambda done: seen.put(done.result()))
    finish_later(future, 7)
    assert concurrent.futures.wait([future], timeout=5).done == {future}
    assert future.result() == 7
    assert future.future().result(timeout=1) == 7
    assert seen.get(timeout=5) == 7 and seen.empty()


def test_timeout_is_the_builtin_and_stops_nothing() -> None:
    future: APIFuture[int] = APIFuture("work")
    with pytest.raises(TimeoutError, match=r"work: not done within 0\.01 s; it goes on"):
        future.result(timeout=0.01)
    assert not future.cancelled()
    future.finish(1)
    assert future.result() == 1


def test_a_timeout_error_of_the_work_is_told_from_waiting() -> None:
    future: APIFuture[int] = APIFuture("work")
    future.finish(error=TimeoutError("the worker's own"))
    with pytest.raises(TimeoutError, match="the worker's own"):
        future.result(timeout=1)


async def test_await_and_double_await() -> None:
    future: APIFuture[int] = APIFuture("work")

    async def submit() -> APIFuture[int]:
        return future

    finish_later(future, 3)
    assert await (await submit()) == 3
    assert await future.result_async(timeout=1) == 3
    assert await asyncio.create_task(future.coroutine()) == 3


async def test_awaiting_twice_at_once() -> None:
    future: APIFuture[int] = APIFuture("work")
    finish_later(future, 4)
    assert await asyncio.gather(future.coroutine(), future.coroutine()) == [4, 4]


async def test_cancelling_the_waiter_stops_nothing() -> None:
    future: APIFuture[int] = APIFuture("work")
    waiter = asyncio.create_task(future.coroutine())
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert not future.done()
    future.finish(5)
    assert await future == 5


async def test_async_timeout() -> None:
    future: APIFuture[int] = APIFuture("work")
    with pytest.raises(TimeoutError, match="it goes on"):
        await future.result_async(timeout=0.01)
    future.finish(5)
    assert await future == 5


def test_two_loops_one_future() -> None:
    future: APIFuture[int] = APIFuture("work")
    finish_later(future, 6)
    assert asyncio.run(future.coroutine()) == 6
    assert asyncio.run(future.coroutine()) == 6


def test_looking_is_noted_waiting_is_not() -> None:
    future: APIFuture[int] = APIFuture("work")
    looks: list[bool] = []
    future._on_seen = lambda: looks.append(True)
    with pytest.raises(TimeoutError):
        future.result(timeout=0.01)
    future.finish(error=ValueError("bad"))
    assert looks == []
    assert "failed: ValueError" in repr(future)
    assert looks == []
    with pytest.raises(ValueError, match="bad"):
        future.result()
    assert looks == [True]


def test_cancel_asks_whoever_runs_it() -> None:
    future: APIFuture[int] = APIFuture("work")
    assert future.cancel() is False
    future._canceller = future.finish_cancelled
    assert future.cancel() is True
    assert future.cancelled()
    assert concurrent.futures.wait([future], timeout=1).done == {future}
    with pytest.raises(concurrent.futures.CancelledError):
        future.result()


def test_outcomes_are_set_once() -> None:
    future = completed(1)
    future.finish(2)
    future.finish(error=ValueError())
    assert future.result() == 1
    assert "done" in repr(future)


async def test_in_event_loop() -> None:
    assert in_event_loop()
    assert not await asyncio.to_thread(in_event_loop)
