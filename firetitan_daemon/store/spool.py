"""Request and result bytes, one file each.

Knows: files, BLAKE3. Must not know: what the bytes mean. A file is either whole or not there; it
survives the death of the process, the loss of power only where `fsync` asks for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from blake3 import blake3

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.ports import Spool
from firetitan_daemon.core.records import SpoolRef
from firetitan_daemon.disk_errors import cannot_write

logger = logging.getLogger("firetitan.spool")
_P = ParamSpec("_P")
_T = TypeVar("_T")


class FileSpool(Spool):
    """One flat folder of files with random names.

    Args:
        root: The folder; made where there is none.
        fsync: Survive the loss of power too.
    """

    def __init__(self, root: Path, *, fsync: bool = False) -> None:
        durable.make_folder(root, 0o700)
        self._root = root
        self._fsync = fsync
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="firetitan-spool")

    async def write(self, data: bytes) -> SpoolRef:
        """Publish bytes. Raises FiretitanError STATE_DISK_FULL with nothing left behind."""
        return await self._run(self._write, data)

    async def read(self, ref: SpoolRef) -> bytes:
        """Bytes, verified.

        Raises:
            FiretitanError: CHECKSUM_MISMATCH; RECOVERING while the whole folder is away.
        """
        return await self._run(self._read, ref)

    async def there(self) -> bool:
        """Whether the folder is in its place."""
        return await self._run(self._root.is_dir)

    async def remove(self, refs: Sequence[SpoolRef]) -> None:
        """Remove files; those gone already are fine."""
        if refs:
            await self._run(self._remove, refs)

    async def sweep(self, keep: Sequence[SpoolRef]) -> int:
        """At start: remove every file not in `keep`; returns how many."""
        return await self._run(self._sweep, {Path(ref.path).name for ref in keep})

    async def close(self) -> None:
        """Finish what is queued."""
        self._threads.shutdown()

    async def _run(self, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await asyncio.wrap_future(self._threads.submit(call, *args, **kwargs))

    def _write(self, data: bytes) -> SpoolRef:
        path = self._root / uuid.uuid4().hex
        try:
            durable.publish_file(path, data, fsync=self._fsync)
        except OSError as error:
            # Where the last flush failed it has its name already.
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            raise cannot_write(self._root, error, len(data)) from error
        return SpoolRef(str(path), len(data), blake3(data).hexdigest())

    def _read(self, ref: SpoolRef) -> bytes:
        path = self._here(ref)
        try:
            data = path.read_bytes()
        except OSError as error:
            if not self._root.is_dir():
                raise FiretitanError(
                    Reason.RECOVERING,
                    f"the folder {self._root} is gone, with what was asked for; put it back, then "
                    "ask again",
                    path=str(self._root),
                    retry_after_s="0.5",
                ) from error
            raise _damaged(path, ref, error.strerror or "unreadable") from error
        found = blake3(data).hexdigest()
        if found != ref.digest:
            raise _damaged(path, ref, f"{found} over {len(data)} bytes")
        return data

    def _remove(self, refs: Sequence[SpoolRef]) -> None:
        for ref in refs:
            try:
                self._here(ref).unlink(missing_ok=True)
            except OSError as error:  # read-only: no reason to stop what is being done
                logger.warning("left for the next start to remove file=%s: %s", ref.path, error)

    def _sweep(self, keep: set[str]) -> int:
        strays = [path for path in self._root.iterdir() if path.name not in keep]
        for path in strays:
            durable.remove(path)
        return len(strays)

    def _here(self, ref: SpoolRef) -> Path:
        # By name alone: a reference never leads out of the spool, and may move with its folder.
        return self._root / Path(ref.path).name


def _damaged(path: Path, ref: SpoolRef, found: str) -> FiretitanError:
    return FiretitanError(
        Reason.CHECKSUM_MISMATCH,
        f"spool file {path.name} is damaged: expected {ref.digest} over {ref.size_bytes} bytes, "
        f"found {found}",
        file=path.name,
        expected=ref.digest,
        found=found,
    )
