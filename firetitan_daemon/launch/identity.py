"""Whether a process is beyond doubt the worker of a bundle, and whether it can be reached.

Knows: what a bundle says, pidfds, who listens on a socket, who has a lock open. Must not know: what
becomes of a worker. Who listens must be the process that the bundle names, which must be the one
that wrote it: by its boot, id and start time. Where its socket lies proves nothing, and so may be
another place than this daemon would choose.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

from firetitan.worker.v1 import worker_pb2

from firetitan_daemon import handshake
from firetitan_daemon.launch.bundle import Bundle, BundleError, check_owned
from firetitan_daemon.launch.process import OsProcess


class NobodyListensError(ConnectionError):
    """No process listens on a worker's socket, or none has its path."""


def sockets_of(known: worker_pb2.WorkerSpec, run: Path) -> tuple[Path, ...]:
    """Where a worker may be listening: where it was told to, and under that name in `run`.

    The first was chosen by whoever started it: a daemon with another temporary directory, or that
    knew the same home by another name. The second is for a home that was moved since.

    Raises:
        BundleError: Its address is no path of a socket.
    """
    kind, _, path = known.address.partition(":")
    told, here = Path(path), run / Path(path).name
    if kind != "unix" or not path.startswith("/") or "\0" in path or not _fits(told):
        raise BundleError(f"its address is {known.address[:200]!r}")
    return (told, here) if _fits(here) and here != told else (told,)


def _fits(socket: Path) -> bool:
    return len(os.fsencode(socket)) <= handshake.MAX_SOCKET_PATH_BYTES


def hold(bundle: Bundle) -> OsProcess:
    """The process a bundle names, if it lives and is the one that wrote it.

    Raises:
        BundleError: It is not.
        OSError: It cannot be told for the moment.
    """
    word = bundle.read_bootstrap()
    if word.boot_id != handshake.boot_id() or word.pid < 2:
        raise BundleError("its bootstrap is from another boot of this machine")
    try:
        pidfd = os.pidfd_open(word.pid)
    except ProcessLookupError as error:
        raise BundleError(f"no process {word.pid}") from error
    try:
        # After the descriptor is held, so the id cannot come to mean another process.
        same = handshake.start_ticks(word.pid) == word.start_ticks
    except ProcessLookupError:
        same = False
    except BaseException:
        os.close(pidfd)
        raise
    if not same:
        os.close(pidfd)
        raise BundleError(f"process {word.pid} is another than the one that wrote the bundle")
    return OsProcess(word.pid, pidfd, bundle.read_exit)


async def find_listener(
    bundle: Bundle, pid: int, incarnation: str, sockets: Sequence[Path]
) -> Path:
    """The one of some sockets that a process listens on; it is of the start its bundle is of.

    Raises:
        BundleError: The bundle names another, another listens, or others could.
        NobodyListensError: Nobody does. A worker binds its socket once, before its bundle says that
            it serves: it ends, or its socket was taken away.
        OSError: It cannot be told for the moment: the worker is too busy to accept, this process
            has no descriptors left.
    """
    word = bundle.read_bootstrap()
    if (word.pid, word.incarnation) != (pid, incarnation):
        raise BundleError("its bootstrap names another start")
    for socket in sockets:
        try:
            # Between this and every later connection, nobody else can come to listen there.
            check_owned(socket.parent)
            owner, user = await asyncio.to_thread(handshake.socket_owner, socket)
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            continue
        if (owner, user) != (pid, os.geteuid()):
            raise BundleError(f"process {owner} of user {user} listens on its socket")
        return socket
    raise NobodyListensError(f"process {pid} lives, but nobody listens on {sockets[0]}")


def check_has_lock(bundle: Bundle, pid: int) -> None:
    """See that a process has a bundle's lock open, as nobody but the worker started with it.

    The proof where there is no listener to ask the kernel about.

    Raises:
        BundleError: It has not.
        OSError: It cannot be told, or the process is gone.
    """
    lock = bundle.lock_path.stat()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found = descriptor.stat()
        except FileNotFoundError:  # closed since
            continue
        if os.path.samestat(found, lock):
            return
    raise BundleError(f"process {pid} does not hold its lock")
