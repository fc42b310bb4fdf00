"""What the launcher and the worker agree on besides the protocol: files, versions, identity.

Knows: the names in a worker's folder, procfs, socket options. Must not know: how a worker is
started or what it computes.
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
from pathlib import Path

from firetitan_daemon.core.errors import FiretitanError, Reason

PROTOCOL_VERSION = 2
"""Counts releases whose worker protocol has something that a worker of the one before lacks.

1: the first. 2: a sampler drops single snapshots (`Retain`).
"""
OLDEST_PROTOCOL_VERSION = PROTOCOL_VERSION - 1
"""A daemon speaks its version and the one before: it asks no worker for what that one lacks."""

SPEC = "spec.json"
"""Written by the launcher: a WorkerSpec message as JSON."""
BOOTSTRAP = "bootstrap.json"
"""Written by the worker once it serves: a BootstrapResult message as JSON."""
EXIT = "exit.json"
"""Written by the worker as its last act; absent after a crash."""
LOG = "worker.log"
LOCK = "worker.lock"
"""Locked by the launcher before the start and held by the worker, from exec to its end."""

MAX_SOCKET_PATH_BYTES = 107


def boot_id() -> str:
    """Id of this boot of the machine; process ids mean nothing across boots."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def start_ticks(pid: int) -> int:
    """Start time of a process in clock ticks since boot, against reuse of its id.

    Raises:
        ProcessLookupError: No such process.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError as error:
        raise ProcessLookupError(pid) from error
    # The command name, in parentheses, may itself hold spaces and parentheses.
    return int(stat.rpartition(")")[2].split()[19])


def socket_name(worker_id: str, incarnation: str) -> str:
    """What the socket of one start of a worker is called."""
    digest = hashlib.blake2b(f"{worker_id}\0{incarnation}".encode(), digest_size=8).hexdigest()
    return f"w-{digest}.sock"


def socket_path(run: Path, worker_id: str, incarnation: str) -> Path:
    """Where a worker serves: a short name of its own for each start.

    Raises:
        FiretitanError: INVALID_ARGUMENT where the folder's path leaves no room.
    """
    path = run / socket_name(worker_id, incarnation)
    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH_BYTES:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"socket path {path} has {length} bytes, {MAX_SOCKET_PATH_BYTES} is the limit; "
            "use a shorter run folder",
            field="run",
        )
    return path


def socket_owner(path: Path, timeout_s: float = 1.0) -> tuple[int, int]:
    """Process id and user id of whoever listens on a Unix socket.

    Raises:
        OSError: Nobody listens.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        connection.connect(os.fspath(path))
        credentials = connection.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
        )
    pid, uid, _ = struct.unpack("3i", credentials)
    return pid, uid
