"""Who owns the state: one daemon at a time, decided by a lock on a file and by nothing else.

Knows: flock. Must not know: sockets. The kernel frees the lock with its owner, so a stale file
never keeps a daemon out; the file itself stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path
from types import TracebackType

_PID_WAIT_S = 1.0


class StateOwned(RuntimeError):  # noqa: N818  # says what is, as FileExistsError's siblings do
    """Another daemon owns the state.

    Args:
        path: The lock file.
        pid: Its owner; None where it did not say in time.
    """

    def __init__(self, path: Path, pid: int | None) -> None:
        owner = f"process {pid}" if pid else "another process"
        super().__init__(
            f"{path.parent} is in use by {owner}; stop that daemon or use another FIRETITAN_HOME"
        )
        self.pid = pid


class StateLock:
    """The lock on a state folder, held until `release` or the end of the process.

    Take it before anything else: before the ledger, before any socket.

    Args:
        path: The lock file; made where there is none. Its folder exists.

    Raises:
        StateOwned: Another process, or another lock in this one, holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # It closes on exec: workers outlive the daemon and must not keep its lock.
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._sign(self._descriptor)
        except BlockingIOError as error:
            self.release()
            raise StateOwned(path, _owner(path)) from error
        except BaseException:
            self.release()
            raise

    def _sign(self, descriptor: int) -> None:
        """Say whose it is; it is held all the same where the disk has no room for that."""
        text = f"{os.getpid()}\n".encode()
        with contextlib.suppress(OSError):
            os.pwrite(descriptor, text, 0)
            os.ftruncate(descriptor, len(text))

    def release(self) -> None:
        """Give the lock up; again is fine."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> StateLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


def _owner(path: Path) -> int | None:
    """The pid in a lock file, waited for: its owner writes it just after taking the lock.

    Until then the file is empty or names the owner before, which is gone.
    """
    until = time.monotonic() + _PID_WAIT_S
    while True:
        text = path.read_text().strip()
        if text.isdecimal() and Path(f"/proc/{text}").exists():
            return int(text)
        if time.monotonic() > until:
            return None
        time.sleep(0.01)
