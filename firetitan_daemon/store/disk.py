"""The reserve that lets the ledger free space on a full disk.

Knows: files. Must not know: tables, records.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

logger = logging.getLogger("firetitan.store")
BALLAST_BYTES = 4 * 1024 * 1024


class Ballast:
    """A file of nothing, given up when the disk is full: in SQLite, deleting needs space too."""

    def __init__(self, path: Path, size_bytes: int = BALLAST_BYTES) -> None:
        self._path = path
        self._size_bytes = size_bytes

    def ensure(self) -> bool:
        """Take the space again if it can be had; whether it is there."""
        try:
            if self._path.exists():
                return True
            with self._path.open("xb") as file:
                os.posix_fallocate(file.fileno(), 0, self._size_bytes)
        except OSError as error:
            logger.warning("no reserve against a full disk path=%s: %s", self._path, error)
            with contextlib.suppress(OSError):  # as read-only as what made it fail
                self._path.unlink(missing_ok=True)
            return False
        return True

    def release(self) -> bool:
        """Give the space up; whether there was any."""
        there = self._path.exists()
        self._path.unlink(missing_ok=True)
        return there
