"""What is in use while an operation is open: folders being read, snapshots being brought somewhere.

Knows: keys and their holders. Must not know: what a key names. Rows say what is in use for long
(a snapshot that is served, a delta's parent); this is for the time in between.

Whoever takes a key looks up once more that what it names is still there. Whoever removes checks
`held` and writes the removal without waiting in between. So one of them sees the other.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from firetitan_daemon.core.errors import FiretitanError
from firetitan_daemon.core.ports import Folders

logger = logging.getLogger("firetitan.control")


class Holds:
    """Keys and who holds them: ids of operations."""

    def __init__(self) -> None:
        self._holders: dict[str, set[str]] = {}
        self._keys: dict[str, set[str]] = {}
        self._retired: dict[str, Folders] = {}
        self._removals: set[asyncio.Task[None]] = set()

    def take(self, key: str, holder: str) -> None:
        """Keep what a key names; again is fine."""
        self._holders.setdefault(key, set()).add(holder)
        self._keys.setdefault(holder, set()).add(key)

    def held(self, key: str) -> bool:
        """Whether anyone holds a key."""
        return key in self._holders

    def holders(self, key: str) -> frozenset[str]:
        """Who holds a key."""
        return frozenset(self._holders.get(key, ()))

    def release(self, holder: str) -> None:
        """Let go of everything a holder has; again is fine."""
        for key in self._keys.pop(holder, ()):
            holders = self._holders[key]
            holders.discard(holder)
            if holders:
                continue
            del self._holders[key]
            folders = self._retired.pop(key, None)
            if folders is not None:
                removal = asyncio.create_task(discard(folders, Path(key)))
                self._removals.add(removal)
                removal.add_done_callback(self._removals.discard)

    async def retire(self, folder: Path, folders: Folders) -> None:
        """Remove a folder that no row names any more, once nobody holds it."""
        if self.held(str(folder)):
            self._retired[str(folder)] = folders
        else:
            await discard(folders, folder)

    async def close(self) -> None:
        """Finish the removals that were begun."""
        if self._removals:
            await asyncio.wait(list(self._removals))


async def discard(folders: Folders, folder: Path) -> None:
    """Remove a folder; one that cannot be is left for the next start."""
    try:
        await folders.discard(folder)
    except (FiretitanError, OSError) as error:
        logger.warning("left for the next start to remove folder=%s: %s", folder, error)
