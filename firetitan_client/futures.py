"""What calls return: a future that is waited for in any style, and whose waiting changes nothing.

Knows: threads, event loops. Must not know: lanes, gRPC, what the operation does.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import logging
import os
import sys
import threading
from collections.abc import Callable, Generator
from typing import Any, Generic, NoReturn, Self, TypeVar

from firetitan_client.forking import on_fork
from firetitan_client.transport import in_own_thread

T = TypeVar("T")
logger = logging.getLogger("firetitan")


class APIFuture(concurrent.futures.Future[T], Generic[T]):
    """The outcome of an accepted call; also a `concurrent.futures.Future`.

    `f.result()`, `await f`, `await f.result_async()`, `f.add_done_callback(...)`,
    `concurrent.futures.wait([f])` all work. No wait, timeout, Ctrl-C or task cancellation ever
    stops the operation; only `cancel()` does, and only before it started.

    Args:
        label: The call, for people, e.g. `forward_backward`.
    """

    def __init__(self, label: str = "") -> None:
        super().__init__()
        self._pid = os.getpid()
        self._label = label
        self._canceller: Callable[[], bool] | None = None
        self._on_seen: Callable[[], None] | None = None
        self.operation: str | None = None
        """Name of the daemon's operation, `operations/...`, once it was accepted."""
        on_fork(self)

    def _after_fork(self) -> None:
        """In a child: what is not done ends in the parent; whoever waits here is told so."""
        self._condition = threading.Condition()  # another thread may have held it
        if self.done():
            return
        self._waiters: list[Any] = []
        self._done_callbacks: list[Any] = []
        self._canceller = None
        self.finish(
            error=RuntimeError(
                f"{self._label or 'operation'}: this future belongs to process {self._pid}, before "
                "the fork; wait for it there, or make new calls here"
            )
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self!r} cannot be pickled: a future belongs to the process that made the call; "
            "wait for it there and send its result"
        )

    def result(self, timeout: float | None = None) -> T:
        """Wait for the outcome.

        Args:
            timeout: Seconds; None waits as long as it takes.

        Raises:
            TimeoutError: Not done in time; the operation goes on.
            FiretitanError: The operation failed, by reason.
        """
        self._check_wait()
        try:
            return super().result(timeout)
        except TimeoutError:
            if self.done() and super().exception() is not None:
                self._seen()
                raise
            raise TimeoutError(
                f"{self._label or 'operation'}: not done within {timeout} s; it goes on, "
                "call result() again"
            ) from None
        except Exception:
            self._seen()
            raise

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """The failure, or None; waits like `result`."""
        self._check_wait()
        error = super().exception(timeout)
        if error is not None:
            self._seen()
        return error

    async def result_async(self, timeout: float | None = None) -> T:
        """As `result`, for coroutines of any event loop."""
        if not self.done():
            loop = asyncio.get_running_loop()
            done = loop.create_future()

            def finish() -> None:
                if not done.done():
                    done.set_result(None)

            def wake(_: object) -> None:
                with contextlib.suppress(RuntimeError):  # the waiter's loop is closed
                    loop.call_soon_threadsafe(finish)

            self.add_done_callback(wake)
            try:
                async with asyncio.timeout(timeout):
                    await done
            except TimeoutError:
                if not self.done():
                    raise TimeoutError(
                        f"{self._label or 'operation'}: not done within {timeout} s; it goes on"
                    ) from None
        return self.result(0)

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    async def coroutine(self) -> T:
        """This future as a coroutine, for `asyncio.create_task`."""
        return await self

    def future(self) -> concurrent.futures.Future[T]:
        """This future, for code that takes a `concurrent.futures.Future`."""
        return self

    def cancel(self) -> bool:
        """Cancel the operation if it has not started; True if that worked."""
        if self.done() or self._canceller is None:
            return self.cancelled()
        return self._canceller()

    def finish_cancelled(self) -> bool:
        """Mark as cancelled; for whoever runs the operation."""
        if self.done():
            return self.cancelled()
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            super().cancel()
            self.set_running_or_notify_cancel()
        return self.cancelled()

    def finish(self, outcome: T | None = None, error: BaseException | None = None) -> None:
        """Set the outcome once; later ones are ignored. For whoever runs the operation."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            if error is not None:
                self.set_exception(error)
            else:
                self.set_result(outcome)  # type: ignore[arg-type]

    def _seen(self) -> None:
        if self._on_seen is not None:
            self._on_seen()

    def _check_wait(self) -> None:
        if self.done():
            return
        if in_own_thread():
            raise RuntimeError(
                f"{self._label}: waiting inside a callback of another future would never end; "
                "hand the work to a thread of your own"
            )

    def __repr__(self) -> str:
        state = "pending"
        if self.cancelled():
            state = "cancelled"
        elif self.done():
            error = super().exception(0)
            state = "done" if error is None else f"failed: {type(error).__name__}"
        operation = f" {self.operation}" if self.operation else ""
        return f"<APIFuture {self._label or '?'}{operation} {state}>"


class SelfFuture(Generic[T]):
    """A client that is also the future of itself, while what it works on is being made.

    `client.result(timeout)`, `await client` and `client.future()` give the client once it is ready
    or raise why it never will be.
    """

    _ready: APIFuture[T]
    _give_up: Callable[[], None] = staticmethod(lambda: None)
    """Lets the call that makes it be repeated, while its work goes on."""

    def result(self, timeout: float | None = None) -> Self:
        """Wait until it is ready; returns the client.

        Raises:
            TimeoutError: Not ready in time; it goes on.
            FiretitanError: It could not be made, by reason.
        """
        self._ready.result(timeout)
        return self

    async def result_async(self, timeout: float | None = None) -> Self:
        """As `result`, for coroutines."""
        await self._ready.result_async(timeout)
        return self

    def __await__(self) -> Generator[Any, None, Self]:
        return self.result_async().__await__()

    async def coroutine(self) -> Self:
        """The client as a coroutine, for `asyncio.create_task`."""
        return await self

    def future(self) -> concurrent.futures.Future[Self]:
        """A `concurrent.futures.Future` of the client."""
        future: APIFuture[Self] = APIFuture(type(self).__name__)

        def finish(ready: concurrent.futures.Future[T]) -> None:
            error = ready.exception()
            future.finish(self if error is None else None, error)

        self._ready.add_done_callback(finish)
        return future

    @property
    def _opened(self) -> T:
        """What the client works on; waits for it, in an event loop too, which then stands still."""
        if not self._ready.done() and in_event_loop():
            logger.warning("%r is not ready and blocks the event loop; `await` it first", self)
        return self._ready.result()


def completed(outcome: T, label: str = "") -> APIFuture[T]:
    """A future that is done."""
    future: APIFuture[T] = APIFuture(label)
    future.finish(outcome)
    return future


Client = TypeVar("Client", bound=SelfFuture[Any])
_in_coroutine: contextvars.ContextVar[bool] = contextvars.ContextVar("in_coroutine", default=False)


async def made(make: Callable[..., Client], *args: Any, **kwargs: Any) -> Client:
    """What a call makes, awaited; in a notebook, too, where the call by itself would block."""
    before = _in_coroutine.set(True)
    try:
        client = make(*args, **kwargs)
    finally:
        _in_coroutine.reset(before)
    try:
        return await client
    except BaseException:  # cancelled too, or Ctrl-C
        client._give_up()
        raise


def in_event_loop() -> bool:
    """Whether blocking here would block a running event loop (a notebook cell's does not count)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return "ipykernel" not in sys.modules or _in_coroutine.get()
