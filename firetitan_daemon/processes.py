"""Processes, locks and sockets, looked at from outside: nothing is taken or changed.

Knows: procfs, the owner of a socket, where a daemon says it serves. Must not know: what the
processes are for.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from firetitan_daemon.handshake import socket_owner
from firetitan_daemon.places import Places

_PROC = Path("/proc")


def listener(socket: Path) -> int | None:
    """Process id of whoever listens on a Unix socket, as the kernel knows it; answering or not."""
    try:
        return socket_owner(socket)[0]
    except OSError:
        return None


def find_daemon(places: Places) -> tuple[Places, int | None]:
    """A home's places with the socket that its daemon listens on, and the daemon's process id.

    What it announced counts first: it may have another temporary directory than this process, or
    know the home by another name. But for root, that is passed over where another user listens.

    Returns:
        None for the id where nobody listens.
    """
    address = (places.announced() or {}).get("address")
    if isinstance(address, str) and address.startswith("unix:/"):
        try:
            announced = Path(address.removeprefix("unix:"))
            pid, user = socket_owner(announced)
        except (OSError, ValueError):  # gone, or no path at all
            pass
        else:
            if os.geteuid() in (user, 0):
                return dataclasses.replace(places, found_socket=announced), pid
    return places, listener(places.socket)


def state_of(pid: int) -> str:
    """A process's state in one letter, as in ps; empty where there is none."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def is_locked(path: Path) -> bool:
    """Whether somebody holds a flock on a file; without trying to take it."""
    try:
        found = path.stat()
        locks = (_PROC / "locks").read_text().splitlines()
    except OSError:
        return False
    for line in locks:
        fields = line.split()
        place = fields[-3].split(":")
        if "FLOCK" in fields and int(place[2]) == found.st_ino:
            major, minor = int(place[0], 16), int(place[1], 16)
            # Some file systems show another device to whoever looks at a file.
            if major == 0 or os.makedev(major, minor) == found.st_dev:
                return True
    return False


def daemons() -> list[tuple[int, str]]:
    """This user's daemons: process id, and the home whose lock each holds open."""
    found = []
    for entry in _PROC.iterdir():
        try:
            if not entry.name.isdigit() or entry.stat().st_uid != os.geteuid():
                continue
            command = (entry / "cmdline").read_bytes().split(b"\0")
            if b"serve" not in command or not any(b"firetitan" in one for one in command):
                continue
            links = [one.readlink() for one in (entry / "fd").iterdir()]
        except OSError:
            continue  # it has ended
        homes = {str(one.parent) for one in links if one.name.startswith("state.db")}
        found += [(int(entry.name), home) for home in sorted(homes)]
    return found


def open_files(pid: int) -> int:
    """How many descriptors a process has open; 0 where it cannot be seen."""
    try:
        return len(list((_PROC / str(pid) / "fd").iterdir()))
    except OSError:
        return 0


def file_limit(pid: int, *, hard: bool) -> int | None:
    """How many descriptors a process may have open; None where there is no limit, or none seen."""
    try:
        lines = (_PROC / str(pid) / "limits").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("Max open files"):
            value = line.split()[4 if hard else 3]
            return int(value) if value.isdecimal() else None
    return None
