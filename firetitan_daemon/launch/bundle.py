"""A worker's folder: what it was started for, that it serves, how it ended, its log.

Knows: the files, atomic writes. Must not know: processes, gRPC. Nothing in a bundle is trusted
before it was checked: the folder must be this user's alone, and whoever answers at the address
must be who the bundle says.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import stat
from pathlib import Path

from firetitan.worker.v1 import worker_pb2
from google.protobuf import json_format

from firetitan_daemon import durable, handshake
from firetitan_daemon.core.errors import FiretitanError, Reason

_WORKER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_TAIL_BYTES = 64 * 1024
KEPT_LOGS = 50
"""Logs of workers that are gone; each start of a worker has a folder of its own."""


class BundleError(Exception):
    """A bundle that must not be used; the text says why."""


class BundleUnreadableError(BundleError):
    """A file that is there and cannot be read, maybe for the moment: it proves nothing."""


class Bundle:
    """The folder `workers/<id>`.

    Args:
        workers: Folder of all bundles.
        worker_id: Whose.

    Raises:
        FiretitanError: NAME_INVALID for an id that is no plain file name.
    """

    def __init__(self, workers: Path, worker_id: str) -> None:
        if not _WORKER_ID.fullmatch(worker_id):
            raise FiretitanError(
                Reason.NAME_INVALID,
                f"worker_id: {worker_id!r}; use letters, digits, '.', '_' and '-', at most 128, "
                "a letter or a digit first",
                field="worker_id",
            )
        self.worker_id = worker_id
        self.folder = workers / worker_id

    @property
    def log(self) -> Path:
        """Everything the worker printed, over all its starts."""
        return self.folder / handshake.LOG

    @property
    def lock_path(self) -> Path:
        """Locked by a worker for as long as it lives."""
        return self.folder / handshake.LOCK

    def prepare(self, spec: worker_pb2.WorkerSpec) -> None:
        """Forget a former start (its log stays), write the specification; under the lock."""
        self.forget()
        text = json_format.MessageToJson(spec, always_print_fields_with_no_presence=True)
        durable.publish_file(self.folder / handshake.SPEC, text.encode())

    def lock(self) -> int | None:
        """Take the lock that a worker holds for as long as it lives.

        Returns:
            An open descriptor to hand to the worker; None where one lives, serving or not yet.
        """
        durable.make_folder(self.folder, 0o700)
        descriptor = os.open(self.lock_path, os.O_RDWR | os.O_CREAT, 0o600)
        return descriptor if _taken(descriptor) else None

    def locked(self) -> bool:
        """Whether a worker lives in this folder; writes nothing, a full disk can be asked too."""
        try:
            descriptor = os.open(self.lock_path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return False
        if not _taken(descriptor):
            return True
        os.close(descriptor)
        return False

    def check_owned(self) -> None:
        """Refuse a folder that someone else could have written to.

        Raises:
            BundleError: It is missing, a link, another user's, or writable by others.
            OSError: It cannot be looked at.
        """
        try:
            check_owned(self.folder)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BundleError(f"{self.folder}: {error.strerror}") from error

    def read_spec(self) -> worker_pb2.WorkerSpec:
        """What the worker was started for.

        Raises:
            BundleError: No such file, or not such a message.
            BundleUnreadableError: It cannot be read.
        """
        spec = worker_pb2.WorkerSpec()
        self._read(handshake.SPEC, spec)
        return spec

    def read_bootstrap(self) -> worker_pb2.BootstrapResult:
        """What the worker wrote once it served.

        Raises:
            BundleError: No such file, or not such a message.
            BundleUnreadableError: It cannot be read.
        """
        result = worker_pb2.BootstrapResult()
        self._read(handshake.BOOTSTRAP, result)
        return result

    def read_exit(self) -> str:
        """How the worker ended, in its own words; empty where it left none."""
        try:
            word = json.loads((self.folder / handshake.EXIT).read_text(encoding="utf-8"))
            return f"exited with code {int(word['code'])}: {word['cause']}"
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def serves(self) -> bool:
        """Whether the worker wrote that it serves."""
        return (self.folder / handshake.BOOTSTRAP).exists()

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of the log; empty where there is none."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
                text = file.read().decode("utf-8", errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def forget(self) -> None:
        """Remove what a start left, but its log."""
        for name in (handshake.SPEC, handshake.BOOTSTRAP, handshake.EXIT):
            (self.folder / name).unlink(missing_ok=True)
        durable.sweep_temporaries(self.folder)

    def discard(self) -> None:
        """Remove everything but the log; where nothing was logged, the folder too."""
        self.forget()
        self.lock_path.unlink(missing_ok=True)
        if self.folder.is_dir() and not (self.log.exists() and self.log.stat().st_size):
            shutil.rmtree(self.folder)

    def _read(self, name: str, message: worker_pb2.WorkerSpec | worker_pb2.BootstrapResult) -> None:
        path = self.folder / name
        try:
            # A newer release may have written more than is known here; whether its worker can be
            # spoken with, the protocol's version says.
            json_format.Parse(path.read_text(encoding="utf-8"), message, ignore_unknown_fields=True)
        except (FileNotFoundError, UnicodeDecodeError, json_format.ParseError) as error:
            raise BundleError(f"{path}: {error}") from error
        except OSError as error:
            raise BundleUnreadableError(f"{path}: {error}") from error


def sweep_logs(workers: Path) -> None:
    """Remove the folders of workers that are gone, but for the newest `KEPT_LOGS`.

    Raises:
        OSError: One cannot be looked at or removed.
    """
    logged = [folder for folder in workers.iterdir() if (folder / handshake.LOG).is_file()]
    cleared = [folder for folder in logged if not (folder / handshake.SPEC).exists()]
    gone = [folder for folder in cleared if not Bundle(workers, folder.name).locked()]
    gone.sort(key=lambda folder: (folder / handshake.LOG).stat().st_mtime, reverse=True)
    for folder in gone[KEPT_LOGS:]:
        shutil.rmtree(folder)


def check_owned(folder: Path) -> None:
    """Refuse a folder that someone else could have written to.

    Raises:
        BundleError: It is a link or a file, another user's, or writable by others.
        OSError: It is missing, or cannot be looked at.
    """
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise BundleError(f"{folder} is not a folder")
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise BundleError(
            f"{folder} belongs to user {found.st_uid} with mode "
            f"{stat.S_IMODE(found.st_mode):o}; it must be this user's alone"
        )


def _taken(descriptor: int) -> bool:
    """Lock an open file; closes it where another has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    except OSError:
        os.close(descriptor)
        raise
    return True
