"""What happens when this process forks: what is told, and what is kept out of gRPC meanwhile.

Knows: os.register_at_fork, calls as things that can be cancelled. Must not know: what a call is
for.

A child has this process's memory as it was, and of its threads only the one that forked. Were
another inside gRPC just then, the child has a library in the middle of something: one in 150
crashed. So a fork breaks off the calls that run, which lets gRPC prepare itself; they are made
again afterwards, as every call of the protocol may be. What must begin anew in a child says so by
`on_fork`.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

_Call = TypeVar("_Call")

_PREPARATION_S = 1.0
"""How long a fork waits for calls to end; then it goes ahead."""
_POLL_S = 0.0005
_GRPC_THREAD = "channel_spin"
"""Part of the name of the threads in which gRPC waits for its calls."""

_gate = threading.RLock()
"""Held by a thread that enters gRPC, and while the process forks."""
_running: set[Any] = set()
_broken_off: weakref.WeakSet[Any] = weakref.WeakSet()
_told: weakref.WeakSet[Any] = weakref.WeakSet()


def on_fork(thing: Any) -> None:
    """Have `thing._after_fork()` called in a forked child."""
    _told.add(thing)


def begin(start: Callable[[], _Call]) -> _Call:
    """Start a call that may be made again; a fork breaks it off."""
    with _gate:
        call: Any = start()
        _running.add(call)
    call.add_done_callback(_running.discard)
    started: _Call = call
    return started


def cancel(call: Any) -> None:
    """End a call that nobody waits for any more."""
    with _gate:
        call.cancel()


def was_broken_off(call: Any) -> bool:
    """Whether a call ended because this process forked; it is to be made again."""
    return call in _broken_off


def _before() -> None:
    _gate.acquire()
    calls = list(_running)
    _broken_off.update(calls)
    for call in calls:
        call.cancel()
    deadline = time.monotonic() + _PREPARATION_S
    while (_running or _in_grpc()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _in_grpc() -> bool:
    return any(_GRPC_THREAD in thread.name for thread in threading.enumerate())


def _after_in_parent() -> None:
    _gate.release()


def _after_in_child() -> None:
    global _gate
    _gate = threading.RLock()
    _running.clear()
    for thing in list(_told):
        thing._after_fork()


os.register_at_fork(
    before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
)
