"""What runs on each trainer and deployment outside the ledger, and when it was last used.

Knows: names, a clock. Must not know: what is done. Nothing here survives the daemon: after a start
everything counts as used just then.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from firetitan_daemon.core.ports import Clock


class Activity:
    """Uses by the name of the trainer or deployment."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._start = clock.monotonic()
        self._last: dict[str, float] = {}
        self._running: Counter[str] = Counter()
        self._ended: dict[str, asyncio.Event] = {}

    def touch(self, name: str) -> None:
        """It is used now."""
        self._last[name] = self._clock.monotonic()

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """It is used until the block ends."""
        self.touch(name)
        self._running[name] += 1
        try:
            yield
        finally:
            self._running[name] -= 1
            self.touch(name)
            if not self._running[name]:
                del self._running[name]
                ended = self._ended.pop(name, None)
                if ended is not None:
                    ended.set()

    def idle_s(self, name: str) -> float:
        """Seconds since it was last used; 0 while it is."""
        if self._running[name]:
            return 0.0
        return self._clock.monotonic() - self._last.get(name, self._start)

    async def ended(self, name: str) -> None:
        """Wait until nothing runs on it; what begins meanwhile is waited for too."""
        while self._running[name]:
            await self._ended.setdefault(name, asyncio.Event()).wait()

    def forget(self, name: str) -> None:
        """It is gone."""
        self._last.pop(name, None)
