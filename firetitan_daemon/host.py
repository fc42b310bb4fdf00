"""What this machine has and lets this user have: GPUs, open files, room on disks.

Knows: device files, CUDA's variable, limits of the process, file systems. Must not know: torch,
which the daemon does not load; what is in a folder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_RESERVED_FILES = 64
"""Descriptors that no client may take: the state's files, two for each worker."""
_INT32_MAX = 2**31 - 1


def raise_file_limit() -> None:
    """Allow as many open files as the system lets this user have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def max_connections() -> int:
    """How many clients may be connected: as many as there may be open files, less a reserve."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return _INT32_MAX
    return min(max(allowed - _RESERVED_FILES, allowed // 2), _INT32_MAX)


def count_gpus(environment: Mapping[str, str] | None = None, devices: Path = Path("/dev")) -> int:
    """GPUs that workers can use: those CUDA_VISIBLE_DEVICES leaves, or all of NVIDIA's.

    Args:
        environment: Stands in for `os.environ`.
        devices: Folder of the device files.
    """
    there = sum(path.name.removeprefix("nvidia").isdigit() for path in devices.glob("nvidia*"))
    visible = (os.environ if environment is None else environment).get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return there
    return min(there, len([one for one in visible.split(",") if one.strip() not in ("", "-1")]))


@dataclass(frozen=True)
class Folder:
    """A folder and the disk it is on."""

    path: Path
    exists: bool
    writable: bool
    free_bytes: int


def look_at(folder: Path) -> Folder:
    """Whether a folder is there and can be written to, and how much room there is."""
    try:
        disk = os.statvfs(folder)
    except OSError:
        return Folder(folder, exists=False, writable=False, free_bytes=0)
    return Folder(folder, True, _can_write(folder), disk.f_bavail * disk.f_frsize)


def _can_write(folder: Path) -> bool:
    """Whether files can be made; a disk that has failed tells only who tries."""
    if not os.access(folder, os.W_OK):
        return False
    try:
        # Without a name: nothing is seen of it.
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o600))
    except OSError as error:
        # A full disk is told by its free bytes; some file systems know no files without a name.
        return error.errno not in (errno.EROFS, errno.EIO)
    return True


def one_a_disk(folders: Iterable[Path]) -> list[Folder]:
    """The first folder on each disk; those that are gone each by itself."""
    found: dict[object, Folder] = {}
    for folder in folders:
        try:
            device: object = folder.stat().st_dev
        except OSError:
            device = folder
        found.setdefault(device, look_at(folder))
    return list(found.values())
