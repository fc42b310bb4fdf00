"""Windows that hold, grow, shrink, and work from several event loops."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from firetitan_client.concurrency import (
    AdaptiveConcurrencyController,
    FixedConcurrencyController,
    SamplingConcurrencyController,
)
from firetitan_client.server_metrics import ServerMetrics

pytestmark = pytest.mark.timeout(20)


def queued(seconds: float) -> ServerMetrics:
    return ServerMetrics(prefill_queue_duration=seconds)


async def fill(controller: SamplingConcurrencyController, places: int) -> None:
    for _ in range(places):
        await asyncio.wait_for(controller.acquire(), 1)


async def is_full(controller: SamplingConcurrencyController) -> bool:
    try:
        await asyncio.wait_for(controller.acquire(), 0.02)
    except TimeoutError:
        return True
    controller.release()
    return False


def adaptive(**settings: float) -> AdaptiveConcurrencyController:
    return AdaptiveConcurrencyController(**{"adjustment_interval": 1, **settings})  # type: ignore[arg-type]


def test_both_are_controllers() -> None:
    assert isinstance(FixedConcurrencyController(1), SamplingConcurrencyController)
    assert isinstance(AdaptiveConcurrencyController(), SamplingConcurrencyController)


async def test_fixed_window_holds() -> None:
    controller = FixedConcurrencyController(2)
    await fill(controller, 2)
    assert await is_full(controller)
    controller.release(queued(100))
    assert not await is_full(controller)
    assert controller.step_completed() == {"window": 2.0}
    with pytest.raises(ValueError, match="max_concurrency: is 0"):
        FixedConcurrencyController(0)


async def test_places_go_to_who_waited_longest() -> None:
    controller = FixedConcurrencyController(1)
    await controller.acquire()
    order: list[int] = []

    async def take(number: int) -> None:
        await controller.acquire()
        order.append(number)
        controller.release()

    waiting = [asyncio.create_task(take(number)) for number in range(5)]
    await asyncio.sleep(0)
    controller.release()
    await asyncio.gather(*waiting)
    assert order == [0, 1, 2, 3, 4]


async def test_a_cancelled_wait_takes_no_place() -> None:
    controller = FixedConcurrencyController(1)
    await controller.acquire()
    waiting = asyncio.create_task(controller.acquire())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    controller.release()
    assert not await is_full(controller)


async def test_a_wait_cancelled_as_its_place_comes_gives_it_back() -> None:
    controller = FixedConcurrencyController(1)
    await controller.acquire()
    waiting = asyncio.create_task(controller.acquire())
    await asyncio.sleep(0)
    controller.release()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert not await is_full(controller)


def test_a_waiter_of_a_closed_loop_is_passed_over() -> None:
    controller = FixedConcurrencyController(1)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(controller.acquire())
    gone = loop.create_task(controller.acquire())
    loop.run_until_complete(asyncio.sleep(0))
    gone._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    controller.release()
    asyncio.run(fill(controller, 1))


@pytest.mark.parametrize("kind", [FixedConcurrencyController, AdaptiveConcurrencyController])
def test_loops_in_several_threads_share_one_window(kind: type) -> None:
    controller = kind(3)
    running, most, done = 0, 0, 0
    lock = threading.Lock()

    async def request() -> None:
        nonlocal running, most, done
        await controller.acquire()
        with lock:
            running += 1
            most = max(most, running)
        await asyncio.sleep(0.001)
        with lock:
            running -= 1
            done += 1
        controller.release()

    async def requests() -> None:
        await asyncio.gather(*(request() for _ in range(30)))

    threads = [threading.Thread(target=asyncio.run, args=(requests(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert (done, most) == (120, 3)


def test_one_after_the_other_loop() -> None:
    controller = AdaptiveConcurrencyController(initial_window=2)
    for _ in range(2):
        asyncio.run(fill(controller, 1))
    assert controller.in_flight == 2


@pytest.mark.parametrize(
    ("queue_s", "window"),
    [(0.0, 12), (0.1, 12), (0.25, 10), (0.5, 9), (0.51, 4), (10.0, 4)],
)
def test_window_follows_the_queue(queue_s: float, window: int) -> None:
    controller = adaptive()
    controller.release(queued(queue_s))
    assert controller.window_size == window


def test_queue_is_a_moving_average() -> None:
    controller = adaptive(ema_alpha=0.3)
    controller.release(queued(0.4))
    assert controller.ema_prefill_queue == pytest.approx(0.4)
    controller.release(queued(0.8))
    assert controller.ema_prefill_queue == pytest.approx(0.3 * 0.8 + 0.7 * 0.4)
    assert controller.window_size == int((8 + 1.25) / 2)


def test_adjusts_once_every_interval() -> None:
    controller = adaptive(adjustment_interval=4)
    for number in range(1, 9):
        controller.release(queued(0.25))
        assert controller.window_size == 8 + 2 * (number // 4)


def test_interval_zero_adjusts_at_the_end_of_a_step() -> None:
    controller = adaptive(adjustment_interval=0)
    for _ in range(100):
        controller.release(queued(1.0))
    assert controller.window_size == 8
    summary = controller.step_completed()
    assert (summary["window"], summary["window_after"]) == (8, 4)


def test_window_stays_in_its_bounds() -> None:
    controller = adaptive(min_window=3, max_window=10)
    for _ in range(5):
        controller.release(queued(0.0))
    assert controller.window_size == 10
    for _ in range(5):
        controller.release(queued(9.0))
    assert controller.window_size == 3


def test_status_shrinks_at_once_and_once_in_a_cooldown(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    controller = adaptive(adjustment_interval=32, initial_window=64)
    for metrics in (
        ServerMetrics(http_status_code=429),
        ServerMetrics(http_status_code=503),
        ServerMetrics(transport_error=True),
    ):
        controller.release(metrics)
    assert controller.window_size == 32
    now += 1.0
    controller.release(ServerMetrics(http_status_code=503, retry_attempt=3))
    assert controller.window_size == 8
    controller.note_retry_exhausted(ServerMetrics(http_status_code=503))
    summary = controller.step_completed()
    assert summary["congestion_events"] == 2
    assert summary["congestion_responses"] == summary["status_responses"] == 4
    assert summary["retry_exhaustions"] == 1
    assert summary["window_after"] == 8


def test_status_grows_after_a_clean_interval_only() -> None:
    controller = adaptive(adjustment_interval=2)
    controller.release(ServerMetrics(http_status_code=200))
    controller.release(ServerMetrics(http_status_code=400))
    assert controller.window_size == 9
    controller.release(ServerMetrics(http_status_code=400))
    controller.release(ServerMetrics(http_status_code=400))
    assert controller.window_size == 9


def test_status_is_not_looked_at_where_there_are_queue_times() -> None:
    controller = adaptive(adjustment_interval=0)
    controller.release(ServerMetrics(prefill_queue_duration=0.1, http_status_code=429))
    assert controller.window_size == 8
    assert "status_responses" not in controller.step_completed()


async def test_a_shrink_is_paid_back_by_requests_that_end() -> None:
    controller = adaptive(adjustment_interval=0)
    await fill(controller, 8)
    controller.release(queued(5.0))
    assert controller.step_completed()["window_after"] == 4
    summary = controller.step_completed()
    assert summary["pending_decrease"] == 3
    for _ in range(3):
        assert await is_full(controller)
        controller.release()
    assert await is_full(controller)
    controller.release()
    assert not await is_full(controller)
    assert "pending_decrease" not in controller.step_completed()


async def test_a_grown_window_lets_waiters_in() -> None:
    controller = adaptive(initial_window=1, adjustment_interval=0)
    await controller.acquire()
    waiting = [asyncio.create_task(controller.acquire()) for _ in range(4)]
    await asyncio.sleep(0)
    controller.release(queued(0.0))
    assert controller.in_flight == 1
    controller.step_completed()
    await asyncio.wait_for(asyncio.gather(*waiting), 1)
    assert controller.in_flight == 4


async def test_a_step_is_summed_up() -> None:
    controller = adaptive(adjustment_interval=0)
    await fill(controller, 3)
    controller.release(
        ServerMetrics(prefill_queue_duration=0.2, prompt_tokens=10, cached_prompt_tokens=4)
    )
    controller.release(ServerMetrics(prefill_queue_duration=0.4, prompt_tokens=10))
    controller.release()
    summary = controller.step_completed()
    assert summary == pytest.approx(
        {
            "window": 8,
            "requests": 2,
            "max_in_flight": 3,
            "avg_pq": 0.3,
            "ema_pq": 0.3,
            "avg_window": 8,
            "cache_hit_rate": 0.2,
            "window_after": 9,
        }
    )
    assert set(controller.step_completed()) == {
        "window",
        "requests",
        "max_in_flight",
        "window_after",
        "ema_pq",
    }


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="adjustment_interval must be non-negative"):
        AdaptiveConcurrencyController(adjustment_interval=-1)
    with pytest.raises(ValueError, match="min_window: is 5"):
        AdaptiveConcurrencyController(min_window=5, max_window=4)
