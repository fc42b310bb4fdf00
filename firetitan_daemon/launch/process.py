"""A process of the operating system, held by a pidfd: no id that could come to mean another.

Knows: pidfds, signals, children. Must not know: what the process does. `kill(pid, 0)` calls a
zombie alive and a reused id the same process; a pidfd does neither.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable
from typing import Protocol

_children: dict[int, subprocess.Popen[bytes]] = {}
"""Those this process started and has not reaped: workers outlive every launcher object."""


class Process(Protocol):
    """A worker's process, whether one of its own or not."""

    @property
    def pid(self) -> int:
        """Its id."""

    @property
    def alive(self) -> bool:
        """Whether it runs."""

    async def wait(self) -> str:
        """Wait until it is gone; says how it ended."""

    def terminate(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """End it."""


class OsProcess:
    """A process held by its pidfd; to be made inside a running event loop.

    Args:
        pid: Its id.
        pidfd: From `os.pidfd_open`; owned from now on.
        last_word: Reads what the process left about its end, where it is not our child.
    """

    def __init__(self, pid: int, pidfd: int, last_word: Callable[[], str]) -> None:
        self._pid = pid
        self._pidfd = pidfd
        self._last_word = last_word
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(pidfd, self._on_end)

    @property
    def pid(self) -> int:
        """Its id."""
        return self._pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return not self._ended.done()

    async def wait(self) -> str:
        """Wait until it is gone; says how it ended."""
        return await asyncio.shield(self._ended)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._signal(signal.SIGKILL)

    def release(self) -> None:
        """Let go of a process that nobody waits for; it lives on."""
        if self.alive:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._ended.cancel()

    def _signal(self, number: signal.Signals) -> None:
        if self.alive:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                return

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._ended.set_result(self._how())

    def _how(self) -> str:
        child = _children.pop(self._pid, None)
        if child is not None:
            code = child.wait()
            if code == -signal.SIGKILL:
                return "killed by SIGKILL, by hand or by the system for lack of memory"
            if code < 0:
                return f"killed by {_signal_name(-code)}"
            return f"exited with code {code}"
        return (
            self._last_word() or "ended without a word, as after SIGKILL, lack of memory or a crash"
        )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have none
        return f"signal {number}"


def adopt_child(child: subprocess.Popen[bytes]) -> None:
    """Keep a started process until its end is seen, so that it is reaped."""
    _children[child.pid] = child
