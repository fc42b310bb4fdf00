"""A store that holds a write back, so that something can happen while a row is being written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from firetitan_daemon.core.ports import Change, Store


class HeldWrites:
    """Writes of some kind wait in the middle until they are let go on.

    Args:
        store: Whose writes.
        patch: Puts the store's own `write` back.
        held: Whether a change is one of them.
    """

    def __init__(
        self, store: Store, patch: pytest.MonkeyPatch, held: Callable[[Change], bool]
    ) -> None:
        self.begun = asyncio.Event()
        """Such a write has begun."""
        self.going = asyncio.Event()
        """Set, they go on."""
        write = store.write

        async def slow(change: Change) -> None:
            if held(change):
                self.begun.set()
                await self.going.wait()
            await write(change)

        patch.setattr(store, "write", slow)
