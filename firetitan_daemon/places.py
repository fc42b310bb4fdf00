"""Where everything lives under FIRETITAN_HOME, and how its folders are kept to their owner.

Knows: names of files and folders. Must not know: what is in them.

    config.toml     settings, if there are any
    lock            held by the daemon that owns the state
    state.db        the ledger
    spool/          payloads and results
    store/          checkpoints and snapshots
    workers/{id}/   what a worker was started for, its log
    run/            sockets; in the temporary directory where this path is too long for one
    daemon.json     address and process id of the running daemon
    credentials/    what clients need over TCP, where that was asked for
    ca.key          what signs their certificates
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firetitan_daemon import durable

logger = logging.getLogger("firetitan.app")
MAX_SOCKET_PATH = 107
"""Bytes of the longest path a Unix socket can be bound to."""
_LONGEST_NAME = 40
"""More than any socket's file name has."""


class PlaceError(RuntimeError):
    """A folder that cannot be used; the text says which and why."""


@dataclass(frozen=True)
class Places:
    """Paths below one home."""

    home: Path
    found_socket: Path | None = None
    """Where its daemon was found to listen; see `processes.find_daemon`."""

    @property
    def lock(self) -> Path:
        """Held by the daemon that owns the state."""
        return self.home / "lock"

    @property
    def database(self) -> Path:
        """The ledger."""
        return self.home / "state.db"

    @property
    def ballast(self) -> Path:
        """Room that the ledger gives up when the disk is full."""
        return self.home / "state.db.ballast"

    @property
    def spool(self) -> Path:
        """Payloads and results."""
        return self.home / "spool"

    @property
    def store(self) -> Path:
        """Checkpoints and snapshots."""
        return self.home / "store"

    @property
    def workers(self) -> Path:
        """A folder a worker."""
        return self.home / "workers"

    @property
    def announcement(self) -> Path:
        """Address and process id of the running daemon."""
        return self.home / "daemon.json"

    def announced(self) -> dict[str, Any] | None:
        """What the last daemon announced; None where nothing is."""
        try:
            found = json.loads(self.announcement.read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    @property
    def credentials(self) -> Path:
        """Token and certificates of clients over TCP."""
        return self.home / "credentials"

    @property
    def ca_key(self) -> Path:
        """Signs those certificates."""
        return self.home / "ca.key"

    @property
    def run(self) -> Path:
        """Folder of the sockets."""
        wanted = self.home / "run"
        if len(os.fsencode(wanted)) + 1 + _LONGEST_NAME <= MAX_SOCKET_PATH:
            return wanted
        digest = hashlib.blake2b(os.fsencode(self.home), digest_size=8).hexdigest()
        return Path(tempfile.gettempdir()) / f"firetitan-{os.getuid()}-{digest}"

    @property
    def socket(self) -> Path:
        """Where the daemon serves: as it was found, else where this process would have it serve."""
        return self.found_socket or self.run / "firetitan.sock"

    def make(self) -> None:
        """Make the folders that are missing, for this user alone.

        Raises:
            PlaceError: One cannot be made, or belongs to someone else.
        """
        for folder in (self.home, self.spool, self.store, self.workers, self.run):
            make_private(folder)

    def leave(self) -> None:
        """Remove a run folder in the temporary directory, unless workers still have sockets there.

        Whoever calls this holds the lock.
        """
        if self.run.parent != self.home:
            with contextlib.suppress(OSError):
                self.run.rmdir()


def remove_at_end(path: Path) -> None:
    """Remove a file as the daemon ends; one that stays is removed by the next start."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("left behind file=%s: %s", path, error)


def make_private(folder: Path) -> None:
    """Make a folder that only this user can enter, and see that it is one.

    What others could write before may hold what others put there: that is for its owner to look at.

    Raises:
        PlaceError: It cannot be made or kept to its owner, is not a folder, belongs to someone
            else, or others can write in it.
    """
    try:
        durable.make_folder(folder, 0o700)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise PlaceError(f"{folder} is not a folder (or a link to one); move it away")
        _check_owner(folder, found)
        if found.st_mode & 0o022:
            raise PlaceError(
                f"{folder} can be written by others (mode {stat.S_IMODE(found.st_mode):04o}); see "
                f"that everything in it is yours, then: chmod 700 {folder}"
            )
        if found.st_mode & 0o777 != 0o700:
            folder.chmod(0o700)
            _check_mode(folder, 0o700)
    except FileExistsError as error:
        raise PlaceError(f"{error.filename} is not a folder; move it away") from error
    except OSError as error:
        raise PlaceError(f"{folder} cannot be used: {error.strerror or error}") from error


def remove_stale_socket(path: Path) -> None:
    """Remove what a daemon that died left where the next one serves. The caller holds the lock.

    Raises:
        PlaceError: Something else is there.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise PlaceError(f"{path} is there and is no socket; see what it is and move it away")
    _check_owner(path, found)
    path.unlink()


def check_socket(path: Path) -> None:
    """See that a socket in use is its owner's alone.

    Raises:
        PlaceError: It is not.
    """
    found = path.lstat()
    if not stat.S_ISSOCK(found.st_mode):
        raise PlaceError(f"{path} was taken away while the daemon started")
    _check_owner(path, found)
    _check_mode(path, 0o600)


def check_private_file(path: Path) -> None:
    """See that a secret is its owner's alone.

    Raises:
        PlaceError: It is not.
    """
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise PlaceError(f"{path} is no file (or a link to one); move it away")
    _check_owner(path, found)
    if found.st_mode & 0o077:
        raise PlaceError(
            f"{path} can be read by others (mode {stat.S_IMODE(found.st_mode):04o}); delete it, a "
            "new one is made, or: chmod 600"
        )


def _check_owner(path: Path, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid():
        raise PlaceError(
            f"{path} belongs to user {found.st_uid}, not to you ({os.geteuid()}); move it away"
        )


def _check_mode(path: Path, wanted: int) -> None:
    mode = stat.S_IMODE(path.lstat().st_mode) & 0o777
    if mode != wanted:
        raise PlaceError(
            f"{path} stays open to others (mode {mode:04o}): this file system keeps no modes; "
            "choose a FIRETITAN_HOME on one that does"
        )
