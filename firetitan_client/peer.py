"""Who listens on a Unix socket, by the kernel's word, and until when.

Knows: SO_PEERCRED, pidfd. Must not know: gRPC, what is said over the socket.

The socket's folder is its owner's alone, so nobody else can listen there; a path that someone gave,
or that was free when another came first, may be in another folder. gRPC connects again by itself:
once the process has ended, whoever listens next is asked about before a request is made.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable

_ROOT = 0


class ForeignListenerError(PermissionError):
    """Another user's process listens, or may; nothing was sent to it."""


def check_listener(path: str, timeout_s: float = 1.0) -> int:
    """See that who listens on a socket is of this user, or of root; returns its process id.

    Raises:
        ForeignListenerError: It is another's.
        OSError: Nobody listens.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(path)
            credentials = connection.getsockopt(
                socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
            )
    except PermissionError:
        raise ForeignListenerError(
            f"the socket {path} is another user's: only who started a daemon can call it; start "
            "one of your own, or ask for an address over TCP"
        ) from None
    pid, owner, _ = struct.unpack("3i", credentials)
    if owner not in (os.geteuid(), _ROOT):
        raise ForeignListenerError(
            f"who listens at {path} is of user {owner}, not of you ({os.geteuid()}); nothing was "
            "sent to it. Look whether FIRETITAN_ADDRESS and FIRETITAN_HOME are yours"
        )
    return int(pid)


def watch(pid: int, ended: Callable[[], None]) -> None:
    """Have something called once a process has ended; to be called on an event loop."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        ended()
        return
    except OSError:  # a process of another namespace has no id here
        return
    loop = asyncio.get_running_loop()

    def tell() -> None:
        loop.remove_reader(descriptor)
        os.close(descriptor)
        ended()

    loop.add_reader(descriptor, tell)
