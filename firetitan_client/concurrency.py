"""How many sampling requests run at a time: a fixed window, or one that follows the server's load.

Knows: windows, waiting for a place, what metrics say about load. Must not know: requests, how they
are sent.

Controllers may be shared by several event loops, in one thread or in many: a place is counted
under a lock, and who waits for one is woken in the loop it waits in.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from firetitan_client.forking import on_fork
from firetitan_client.server_metrics import ServerMetrics

logger = logging.getLogger("firetitan")

_CONGESTED = frozenset({429, 503})
_MAX_GROWTH = 4.0
_SHORTEST_QUEUE_S = 0.001
_DEEP_RETRY = 3


@runtime_checkable
class SamplingConcurrencyController(Protocol):
    """What a sampler asks before and tells after each request."""

    @property
    def window_size(self) -> int:
        """Requests that may run at a time."""
        ...

    async def acquire(self) -> None:
        """Wait for a place."""
        ...

    def release(self, metrics: ServerMetrics | None = None) -> None:
        """Give the place back.

        Args:
            metrics: What the request cost; None where it never got an answer.
        """
        ...

    def step_completed(self) -> dict[str, float]:
        """A step of the training loop is over; what happened in it, for its log."""
        ...


@dataclass(eq=False)
class _Waiter:
    future: asyncio.Future[None]
    admitted: bool = False


class _Gate:
    """Places in a window, first come first served; its lock guards its owner too."""

    def __init__(self) -> None:
        self.window = 1
        self._begin()
        on_fork(self)

    def _begin(self) -> None:
        self.lock = threading.Lock()
        self._waiters: deque[_Waiter] = deque()
        self.in_flight = 0
        self.max_in_flight = 0

    def _after_fork(self) -> None:
        """In a child: the places that are taken are taken in the parent."""
        self._begin()

    @property
    def debt(self) -> int:
        """Places taken beyond a window that shrank; paid back as requests end."""
        return max(0, self.in_flight - self.window)

    async def enter(self) -> None:
        """Wait for a place and take it."""
        with self.lock:
            if not self._waiters and self.in_flight < self.window:
                self._take()
                return
            waiter = _Waiter(asyncio.get_running_loop().create_future())
            self._waiters.append(waiter)
        try:
            await waiter.future
        except asyncio.CancelledError:
            with self.lock:
                if waiter.admitted:
                    self.leave()
                else:
                    self._waiters.remove(waiter)
            raise

    def leave(self) -> None:
        """Give a place back, under the lock."""
        self.in_flight = max(0, self.in_flight - 1)
        self.admit()

    def admit(self) -> None:
        """Give free places to those who wait, under the lock."""
        while self._waiters and self.in_flight < self.window:
            waiter = self._waiters.popleft()
            try:
                waiter.future.get_loop().call_soon_threadsafe(_wake, waiter.future)
            except RuntimeError:
                continue  # Its loop was closed: nobody waits there any more.
            waiter.admitted = True
            self._take()

    def _take(self) -> None:
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class FixedConcurrencyController:
    """A window of constant size.

    Args:
        max_concurrency: Requests that may run at a time.

    Raises:
        ValueError: Fewer than 1.
    """

    def __init__(self, max_concurrency: int) -> None:
        if max_concurrency < 1:
            raise ValueError(f"max_concurrency: is {max_concurrency!r}; give 1 or more")
        self._gate = _Gate()
        self._gate.window = max_concurrency

    @property
    def window_size(self) -> int:
        """Requests that may run at a time."""
        return self._gate.window

    async def acquire(self) -> None:
        """Wait for a place."""
        await self._gate.enter()

    def release(self, metrics: ServerMetrics | None = None) -> None:
        """Give the place back; the metrics change nothing."""
        with self._gate.lock:
            self._gate.leave()

    def step_completed(self) -> dict[str, float]:
        """The window."""
        return {"window": float(self.window_size)}


class AdaptiveConcurrencyController:
    """A window that grows step by step and halves when the server falls behind (AIMD).

    Where answers carry `prefill_queue_duration`, the window follows its moving average alone, once
    every `adjustment_interval` requests and in `step_completed`. Only where they do not, rejected
    requests (429, 503) and broken connections shrink it, at once. What a shrink cannot take because
    requests are running is taken from those that end next.

    Args:
        initial_window: Requests that may run at first.
        min_window: The window never gets smaller.
        max_window: The window never gets larger.
        prefill_queue_target: Seconds a prompt may wait for its turn.
        additive_increase: Growth of the window, up to four times that far below the target.
        multiplicative_decrease: What is left of the window above the target.
        ema_alpha: Weight of the newest average.
        adjustment_interval: Requests between adjustments; 0: only in `step_completed`.
        shrink_cooldown_s: Rejections this soon after one count as the same.

    Raises:
        ValueError: `adjustment_interval` below 0, or a window below 1 or upside down.
    """

    def __init__(
        self,
        initial_window: int = 8,
        min_window: int = 1,
        max_window: int = 256,
        prefill_queue_target: float = 0.5,
        additive_increase: float = 1.0,
        multiplicative_decrease: float = 0.5,
        ema_alpha: float = 0.3,
        adjustment_interval: int = 32,
        shrink_cooldown_s: float = 1.0,
    ) -> None:
        if adjustment_interval < 0:
            raise ValueError("adjustment_interval must be non-negative")
        if not 1 <= min_window <= max_window:
            raise ValueError(
                f"min_window: is {min_window!r}; give 1 or more, and at most "
                f"max_window={max_window!r}"
            )
        self._min, self._max = float(min_window), float(max_window)
        self._target = prefill_queue_target
        self._increase = additive_increase
        self._decrease = multiplicative_decrease
        self._alpha = ema_alpha
        self._interval = adjustment_interval
        self._cooldown_s = shrink_cooldown_s
        self._gate = _Gate()
        self._window = 0.0
        self._resize(float(initial_window))
        self._ema: float | None = None
        self._queued_s: list[float] = []
        """Prefill queue times since the last adjustment."""
        self._answered = 0
        """Answers without a queue time since the last adjustment."""
        self._congested = 0
        """How many of them said that the server is full."""
        self._since_adjustment = 0
        self._shrunk_at = float("-inf")
        self._warned = False
        self._step = _Step()

    @property
    def window_size(self) -> int:
        """Requests that may run at a time."""
        return self._gate.window

    @property
    def in_flight(self) -> int:
        """Requests that run."""
        return self._gate.in_flight

    @property
    def ema_prefill_queue(self) -> float | None:
        """Moving average of the prefill queue in seconds; None before the first adjustment."""
        return self._ema

    async def acquire(self) -> None:
        """Wait for a place."""
        await self._gate.enter()

    def release(self, metrics: ServerMetrics | None = None) -> None:
        """Give the place back, learn from the metrics, perhaps adjust the window."""
        with self._gate.lock:
            step = self._step
            step.released += 1
            step.window_sum += self.window_size
            if metrics is not None:
                step.requests += 1
                step.cached_tokens += metrics.cached_prompt_tokens or 0
                step.prompt_tokens += metrics.prompt_tokens or 0
                if metrics.prefill_queue_duration is not None:
                    self._queued_s.append(metrics.prefill_queue_duration)
                else:
                    self._learn_from_status(metrics)
            self._since_adjustment += 1
            if self._interval and self._since_adjustment >= self._interval:
                self._adjust()
            self._gate.leave()

    def note_retry_exhausted(self, metrics: ServerMetrics | None) -> None:
        """A request was given up after its last try; counts where the server was full."""
        with self._gate.lock:
            if (
                metrics is not None
                and metrics.prefill_queue_duration is None
                and _says_full(metrics)
            ):
                self._step.retry_exhaustions += 1

    def step_completed(self) -> dict[str, float]:
        """Adjust the window by what is left of the step, and start the next.

        Returns:
            window, requests, max_in_flight and window_after; where known avg_pq, ema_pq,
            avg_window, cache_hit_rate and pending_decrease; without queue times
            congestion_responses, status_responses, congestion_events and retry_exhaustions.
        """
        with self._gate.lock:
            step, self._step = self._step, _Step()
            summary = {
                "window": float(self.window_size),
                "requests": float(step.requests),
                "max_in_flight": float(self._gate.max_in_flight),
            }
            if self._queued_s:
                summary["avg_pq"] = sum(self._queued_s) / len(self._queued_s)
            elif self._answered:
                summary["status_responses"] = float(self._answered)
                summary["congestion_responses"] = float(self._congested)
            if step.congestion_events:
                summary["congestion_events"] = float(step.congestion_events)
            if step.retry_exhaustions:
                summary["retry_exhaustions"] = float(step.retry_exhaustions)
            if step.released:
                summary["avg_window"] = step.window_sum / step.released
            if step.prompt_tokens:
                summary["cache_hit_rate"] = step.cached_tokens / step.prompt_tokens
            if self._gate.debt:
                summary["pending_decrease"] = float(self._gate.debt)
            self._adjust()
            if self._ema is not None:
                summary["ema_pq"] = self._ema
            summary["window_after"] = float(self.window_size)
            self._gate.max_in_flight = self._gate.in_flight
            self._gate.admit()
        logger.info(
            "concurrency step: %s", " ".join(f"{key}={value:g}" for key, value in summary.items())
        )
        return summary

    def _learn_from_status(self, metrics: ServerMetrics) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "answers carry no prefill_queue_duration; concurrency follows rejected requests "
                "and broken connections instead"
            )
        code = metrics.http_status_code
        if not _says_full(metrics):
            # Other failures are no sign of load, nor of room for more.
            self._answered += code is not None and 200 <= code < 300
            return
        self._answered += 1
        self._congested += 1
        now = time.monotonic()
        if now - self._shrunk_at < self._cooldown_s:
            return
        self._shrunk_at = now
        self._step.congestion_events += 1
        deep = (metrics.retry_attempt or 1) >= _DEEP_RETRY
        self._resize(self._window * self._decrease * (self._decrease if deep else 1.0))

    def _adjust(self) -> None:
        if self._queued_s:
            average = sum(self._queued_s) / len(self._queued_s)
            previous = average if self._ema is None else self._ema
            self._ema = self._alpha * average + (1 - self._alpha) * previous
            if self._ema > self._target:
                self._resize(self._window * self._decrease)
            else:
                room = self._target / max(self._ema, _SHORTEST_QUEUE_S)
                self._resize(self._window + self._increase * min(room, _MAX_GROWTH))
        elif self._answered and not self._congested:
            self._resize(self._window + self._increase)
        self._queued_s.clear()
        self._answered = self._congested = self._since_adjustment = 0

    def _resize(self, window: float) -> None:
        self._window = max(self._min, min(self._max, window))
        before, self._gate.window = self._gate.window, int(self._window)
        if before != self._gate.window:
            logger.debug("concurrency window %d -> %d", before, self._gate.window)


@dataclass
class _Step:
    """What happened since the last `step_completed`."""

    requests: int = 0
    cached_tokens: int = 0
    prompt_tokens: int = 0
    congestion_events: int = 0
    retry_exhaustions: int = 0
    released: int = 0
    window_sum: int = 0
    """Of the window at the end of each request."""


def _says_full(metrics: ServerMetrics) -> bool:
    return metrics.transport_error or metrics.http_status_code in _CONGESTED
