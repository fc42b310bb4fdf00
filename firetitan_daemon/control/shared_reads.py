"""One read for all who want the same at the same time.

Knows: keys and reads that run. Must not know: what is read. Nothing is kept: whoever comes after a
read has ended begins another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, Generic, TypeVar

ResultT = TypeVar("ResultT")


class SharedReads(Generic[ResultT]):
    """Reads that run, by key. An impatient reader leaves; the read goes on for the others."""

    def __init__(self) -> None:
        self._running: dict[Hashable, asyncio.Task[ResultT]] = {}

    async def read(
        self, key: Hashable, begin: Callable[[], Coroutine[Any, Any, ResultT]]
    ) -> ResultT:
        """What the read under a key gives; begun where none runs."""
        task = self._running.get(key)
        if task is None:
            task = self._running[key] = asyncio.create_task(begin())
            task.add_done_callback(lambda ended: self._end(key, ended))
        return await asyncio.shield(task)

    def _end(self, key: Hashable, task: asyncio.Task[ResultT]) -> None:
        del self._running[key]
        if not task.cancelled():
            task.exception()  # seen, even where every reader has left
