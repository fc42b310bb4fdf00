"""Talking to one daemon: a channel, a background event loop, retries.

Knows: gRPC, channels, threads. Must not know: what the requests mean, how long to go on trying.

One thread runs one asyncio loop per process; each address has one channel. Calls go through
gRPC's own threads and come back to the loop: unlike `grpc.aio`, that survives a fork, after which
the child gets a loop and a channel of its own (`forking`).
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import functools
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc

from firetitan_client import address as addresses
from firetitan_client import forking, peer
from firetitan_client.credentials import Access
from firetitan_client.errors import FiretitanError, from_rpc_error
from firetitan_client.patience import Patience, Untrusted

T = TypeVar("T")
logger = logging.getLogger("firetitan")

SLICE_S = 30.0
"""Deadline of one try of an ordinary RPC; long waits are made of such slices."""
_ASK_S = 10.0
"""Deadline of the question whether the daemon is there, in the midst of a call without one."""
_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 250),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
]

_CONNECT = "grpc.min_reconnect_backoff_ms"
"""Its name notwithstanding: how long an attempt to connect may take."""
# A machine that is busy answers late.
_SOCKET_OPTIONS = [*_OPTIONS, (_CONNECT, 2_000)]
_TCP_OPTIONS = [
    *_OPTIONS,
    # Several ways to the other machine and back, and the other machine may be busy.
    (_CONNECT, 10_000),
    # A connection that died without a word is noticed.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]

# Re-entrant: a garbage collection in here may run a finalizer that sends something.
_lock = threading.RLock()
_loop: asyncio.AbstractEventLoop | None = None
_delivery: ThreadPoolExecutor | None = None
_own_threads: set[int] = set()
_transports: dict[tuple[str, Access], Transport] = {}
_exit_first: list[Callable[[], object]] = []
_exit_last: list[Callable[[], object]] = []


class _Threads:
    """This module's own state, for `forking`."""

    @staticmethod
    def _after_fork() -> None:
        """In a child: neither loop nor thread of the parent's is there."""
        global _loop, _lock, _delivery
        _lock, _loop, _delivery = threading.RLock(), None, None
        _own_threads.clear()


_threads = _Threads()
forking.on_fork(_threads)


def loop() -> asyncio.AbstractEventLoop:
    """This process's background loop; started on first use."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_run_loop, args=(_loop,), name="firetitan", daemon=True).start()
        return _loop


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    _own_threads.add(threading.get_ident())
    asyncio.set_event_loop(loop)
    loop.run_forever()


def deliver(function: Callable[..., object], *arguments: object) -> None:
    """Run where results are converted and users' callbacks are called: one thread, in order."""
    global _delivery
    with _lock:
        if _delivery is None:
            _delivery = ThreadPoolExecutor(
                1, "firetitan-results", lambda: _own_threads.add(threading.get_ident())
            )
        executor = _delivery
    with contextlib.suppress(RuntimeError):  # the interpreter is ending: nobody waits any more
        executor.submit(function, *arguments)


def at_exit(function: Callable[[], object], *, last: bool = False) -> None:
    """Have a function called when the interpreter ends; the `last` ones behind all others."""
    (_exit_last if last else _exit_first).append(function)


def _run_exit_functions() -> None:
    for function in (*_exit_first, *_exit_last):
        function()


atexit.register(_run_exit_functions)


def in_own_thread() -> bool:
    """Whether this is a thread that results depend on; blocking in it would block for ever."""
    return threading.get_ident() in _own_threads


def run(work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
    """Start a coroutine on the background loop."""
    return asyncio.run_coroutine_threadsafe(work, loop())


class Transport:
    """One daemon. Get it by `connect`; it opens on first use and re-opens after a fork.

    Args:
        address: `unix:/path` or `tcp:host:port`.
        autostart: Start a daemon where none listens; None asks FIRETITAN_AUTOSTART.
        access: What is shown over TCP.
    """

    def __init__(
        self, address: str, autostart: bool | None = None, access: Access | None = None
    ) -> None:
        self.address = address
        self.autostart = autostart
        self.access = access or Access()
        self.served = False
        """Whether the daemon ever answered this process."""
        self.told_away = False
        """Whether the user was told that it has stopped answering."""
        self._trusted = False
        """Whether the socket's listener is known to be ours."""
        self._watched = 0
        """Process whose end will be told."""
        self._channel: grpc.Channel | None = None
        self._abandoned: grpc.Channel | None = None
        self._channel_lock = threading.Lock()
        self._starting = threading.Lock()
        forking.on_fork(self)

    def _after_fork(self) -> None:
        """Forget the parent's channel without touching it."""
        self._abandoned, self._channel, self.served = self._channel, None, False
        self._trusted, self._watched = False, 0
        self._channel_lock, self._starting = threading.Lock(), threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as an address, without a key: each process has a channel of its own."""
        return connect, (self.address, self.autostart, Access(folder=self.access.folder))

    @property
    def channel(self) -> grpc.Channel:
        """The channel, opened on first use. A socket's listener was checked before.

        Raises:
            Untrusted: Nobody listens on the socket, or another user's process.
            ValueError: Over TCP, the credentials are not there.
        """
        with self._channel_lock:
            target = addresses.tcp_target(self.address)
            if target is None and not self._trusted:
                self._check_listener()
            if self._channel is None:
                self._channel = (
                    self.access.open(target, _TCP_OPTIONS)
                    if target
                    else grpc.insecure_channel(self.address, options=_SOCKET_OPTIONS)
                )
            return self._channel

    def distrust(self) -> None:
        """Have the listener checked again: the connection broke, and the next may be another's."""
        self._trusted = False

    def _check_listener(self) -> None:
        try:
            pid = peer.check_listener(self.address.removeprefix("unix:"))
        except peer.ForeignListenerError as error:
            raise Untrusted(grpc.StatusCode.UNAUTHENTICATED, str(error)) from None
        except OSError as error:
            raise Untrusted(grpc.StatusCode.UNAVAILABLE, f"{self.address}: {error}") from None
        self._trusted = True
        if pid != self._watched:
            self._watched = pid
            loop().call_soon_threadsafe(peer.watch, pid, self._listener_ended)

    def _listener_ended(self) -> None:
        self._trusted, self._watched = False, 0

    async def call(
        self,
        method: str,
        request: Any,
        response: type[Any],
        *,
        timeout_s: float | None = SLICE_S,
        patience_s: float | None = None,
        final: frozenset[str] = frozenset(),
        late_tries: int | None = None,
    ) -> Any:
        """Call a unary RPC; tries again where that is safe and promises something.

        Every RPC of the protocol may be repeated. Commands and what creates or hotloads carry a
        request id; of all others the same again is the same: gone is gone, pinned is pinned, a
        model or an export that is there is compared and answered.

        Args:
            method: `Service/Method`.
            request: A message, or its bytes.
            response: Class of the answer.
            timeout_s: Deadline of one try; None for calls that last as long as their work.
            patience_s: How long to go on trying a daemon that is away; None: PATIENCE_S.
            final: Reasons that another try will not change, though they say UNAVAILABLE.
            late_tries: How many tries may run into `timeout_s`, however long that takes; None: as
                many as there is patience.

        Raises:
            FiretitanError: By reason; DaemonNotRunning where nobody has answered yet.
        """
        patience = Patience(self, patience_s, final)
        late = 0
        while True:
            try:
                rpc = self.channel.unary_unary(
                    f"/firetitan.v1.{method}",
                    request_serializer=None if isinstance(request, bytes) else _serialize,
                    response_deserializer=response.FromString,
                )
                call = forking.begin(functools.partial(rpc.future, request, timeout=timeout_s))
                if timeout_s is None:
                    answer = await self._last(call, patience.patience_s)
                else:
                    answer = await bridge(call)
            except grpc.FutureCancelledError:
                if not forking.was_broken_off(call):
                    raise
            except grpc.RpcError as error:
                counted = late_tries if timeout_s is not None else None
                if counted is None or error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    await patience.after(error)
                    continue
                late += 1
                if late >= counted:
                    raise from_rpc_error(error) from None
                self.served = True
                patience.renew()
            else:
                self.served, self.told_away = True, False
                return answer

    async def _last(self, call: Any, patience_s: float) -> Any:
        """What a call without a deadline brings, however long that takes.

        A daemon that hangs breaks no connection, so it is asked in between whether it is there.

        Raises:
            grpc.RpcError: The call's; DEADLINE_EXCEEDED where nobody was there for too long.
        """
        ask: Any = self.channel.unary_unary("/grpc.health.v1.Health/Check")
        work = asyncio.ensure_future(bridge(call))
        heard = loop().time()
        try:
            while not (await asyncio.wait((work,), timeout=SLICE_S))[0]:
                try:
                    await bridge(forking.begin(lambda: ask.future(b"", timeout=_ASK_S)))
                except grpc.RpcError as error:
                    if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                        continue  # gone, or another now: that ends the call itself
                    if loop().time() - heard > patience_s:
                        raise
                    logger.warning("the daemon at %s does not answer", self.address)
                else:
                    heard = loop().time()
            return await work
        finally:
            work.cancel()

    async def start_missing_daemon(self, error: FiretitanError) -> None:
        """Start a daemon where none has answered and that is wanted; else raise.

        Raises:
            DaemonNotRunning: Nobody listens.
        """
        over_tcp = addresses.tcp_target(self.address) is not None
        if over_tcp or not addresses.autostart_wanted(self.autostart):
            raise addresses.not_running(self.address, error.message) from error
        await asyncio.to_thread(self._start_daemon)

    def _start_daemon(self) -> None:
        with self._starting:
            if self.served:
                return
            # Another home's daemon is not this process's to start.
            if addresses.local_address() != self.address:
                raise addresses.not_running(self.address)
            started = addresses.start_daemon()
            self.served = True
        if started != self.address:
            raise addresses.not_running(self.address)


def _serialize(message: Any) -> bytes:
    content: bytes = message.SerializeToString()
    return content


async def bridge(call: Any) -> Any:
    """Await a `grpc.Future` on the background loop; cancelling the wait cancels the call."""
    waiting = asyncio.get_running_loop()
    done = waiting.create_future()

    def finish() -> None:
        if not done.done():
            done.set_result(None)

    def wake(_: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop ended with the interpreter
            waiting.call_soon_threadsafe(finish)

    call.add_done_callback(wake)
    try:
        await done
    except asyncio.CancelledError:
        forking.cancel(call)
        raise
    return call.result()


async def iterate(call: Any) -> AsyncGenerator[Any, None]:
    """The responses of a streaming call, on the background loop; closing it cancels the call.

    Raises:
        grpc.RpcError: The stream broke or was refused.
    """
    arrived: asyncio.Queue[Any] = asyncio.Queue()
    reader = threading.Thread(
        target=_pass_on,
        args=(call, asyncio.get_running_loop(), arrived),
        name="firetitan-stream",
        daemon=True,
    )
    reader.start()
    try:
        while (item := await arrived.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        forking.cancel(call)


def _pass_on(call: Any, loop: asyncio.AbstractEventLoop, arrived: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop ended with the interpreter
        end: BaseException | None = None
        try:
            for response in call:
                loop.call_soon_threadsafe(arrived.put_nowait, response)
        except grpc.RpcError as error:
            end = error
        loop.call_soon_threadsafe(arrived.put_nowait, end)


def connect(address: str, autostart: bool | None = None, access: Access | None = None) -> Transport:
    """The transport to an address; one per process, address and, over TCP, what is shown."""
    key = (address, access or Access()) if addresses.tcp_target(address) else (address, Access())
    with _lock:
        transport = _transports.get(key)
        if transport is None:
            transport = _transports[key] = Transport(address, autostart, key[1])
        if autostart is not None:
            transport.autostart = autostart
        return transport
