"""A disk that is full or not writable: how it is told, by whoever writes to it.

Knows: errno, how much room a disk has. Must not know: what was to be written.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from firetitan_daemon.core.errors import FiretitanError, Reason

_FULL = (errno.ENOSPC, errno.EDQUOT)


def is_full(error: OSError) -> bool:
    """Whether an error says that no space is left."""
    return error.errno in _FULL


def disk_full(folder: Path, needed_bytes: int | None = None) -> FiretitanError:
    """STATE_DISK_FULL for the disk that holds a folder."""
    free = shutil.disk_usage(folder).free
    need = f"{needed_bytes} bytes are needed, {free} are free" if needed_bytes else f"{free} bytes"
    return FiretitanError(
        Reason.STATE_DISK_FULL,
        f"the disk of {folder} is full ({need}); nothing was written. Free space there, e.g. by "
        "deleting checkpoints, and send the request again",
        free_bytes=str(free),
        **({"needed_bytes": str(needed_bytes)} if needed_bytes else {}),
    )


def cannot_write(folder: Path, error: OSError, needed_bytes: int | None = None) -> FiretitanError:
    """STATE_DISK_FULL or STATE_NOT_WRITABLE, for what writing to a folder raised."""
    if is_full(error):
        return disk_full(folder, needed_bytes)
    return not_writable(folder, error.strerror or str(error))


def not_writable(path: Path, why: str) -> FiretitanError:
    """STATE_NOT_WRITABLE for a folder or a file of the state."""
    return FiretitanError(
        Reason.STATE_NOT_WRITABLE,
        f"cannot write to {path}: {why}; nothing was changed. What was accepted waits, what needs "
        "no writing goes on: make the folder writable or put it back, then send the request again",
        path=str(path),
    )
