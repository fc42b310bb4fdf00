"""Folders of checkpoints and snapshots: staged by a worker, published by a rename.

Knows: folders below one root. Must not know: what is in them.

    staging/{id}                 a worker writes here
    checkpoints/{name}-{id}      published; the id of its staging folder makes the name unique
    snapshots/{name}-{id}
    points/{name}-{id}           recovery points
    models/{name}-{id}           promoted models; their files are links to the snapshots'
    adapters/{name}-{id}         copies of users' adapters, while a load may be run again
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

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.ports import ADAPTERS, Folders
from firetitan_daemon.core.worker_ports import LoadSource
from firetitan_daemon.disk_errors import cannot_write
from firetitan_daemon.store.adapters import fetch_adapter, readable_name

logger = logging.getLogger("firetitan.folders")
STAGING = "staging"
KINDS = ("checkpoints", "snapshots", "points", "models", ADAPTERS)

_P = ParamSpec("_P")
_T = TypeVar("_T")


class FileFolders(Folders):
    """Folders below one root, which is one file system.

    Args:
        root: Made where there is none.
        adapter_roots: Below which users' local adapters may be read.
    """

    def __init__(self, root: Path, adapter_roots: Sequence[Path] = (Path("/"),)) -> None:
        self._root = root
        self._adapter_roots = adapter_roots
        for name in (STAGING, *KINDS):
            durable.make_folder(root / name, 0o700)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="firetitan-folders")

    async def there(self, folder: Path) -> bool:
        """Whether what a published folder is in is in its place."""
        return await self._run(_is_folder, folder.parent)

    def staging(self) -> Path:
        """A new empty folder, on the same file system as the published ones."""
        folder = self._root / STAGING / uuid.uuid4().hex
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            raise self._failure(error) from error
        return folder

    async def publish(self, staging: Path, kind: str, name: str) -> Path:
        """Give a sealed staging folder its final name; again is fine."""
        return await self._run(self._publish, staging, kind, name)

    async def copy(self, folder: Path, digest: str, kind: str, name: str) -> Path:
        """Publish a published folder's files once more; no byte of them is copied."""
        # Hashing takes its time: not in the thread that publishes.
        await asyncio.to_thread(durable.verify_folder, folder, digest)
        staging = self.staging()
        try:
            await self._run(self._link, folder, staging)
            return await self.publish(staging, kind, name)
        except FiretitanError:
            await self.discard(staging)
            raise

    async def import_adapter(self, location: str) -> LoadSource:
        """Copy a user's adapter and publish the copy."""
        staging = self.staging()
        try:
            # May take its time: not in the thread that publishes.
            digest = await asyncio.to_thread(fetch_adapter, location, staging, self._adapter_roots)
            folder = await self.publish(staging, ADAPTERS, readable_name(location))
        except OSError as error:
            await self.discard(staging)
            raise self._failure(error) from error
        except FiretitanError:
            await self.discard(staging)
            raise
        return LoadSource(folder, digest)

    async def discard(self, folder: Path) -> None:
        """Remove a staging or a published folder; one that is gone is fine."""
        await self._run(self._discard, folder)

    async def sweep(self, keep: Sequence[str]) -> int:
        """At start: remove staging and published folders that no row names; returns how many."""
        return await self._run(self._sweep, keep)

    async def close(self) -> None:
        """Finish what is queued."""
        self._thread.shutdown()

    async def _run(self, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        # A publish that was begun is finished even if the one who asked stops waiting.
        future = self._thread.submit(call, *args, **kwargs)
        return await asyncio.shield(asyncio.wrap_future(future))

    def _link(self, folder: Path, staging: Path) -> None:
        try:
            for file in folder.iterdir():
                (staging / file.name).hardlink_to(file)
            durable.fsync_path(staging)
        except OSError as error:
            raise self._failure(error) from error

    def _publish(self, staging: Path, kind: str, name: str) -> Path:
        assert kind in KINDS and "/" not in name, f"{kind}/{name} is no place for a folder"
        final = self._root / kind / f"{name}-{staging.name}"
        if not staging.exists():
            if final.exists():
                return final
            raise FiretitanError(
                Reason.CHECKSUM_MISMATCH,
                f"the files of {name} are gone: neither {staging.name} nor {final.name} is there; "
                "save again",
                file=final.name,
            )
        try:
            # Left by a publish whose save was then run again; no row names it.
            durable.remove(final)
            durable.publish_folder(staging, final)
        except OSError as error:
            if not staging.exists():
                # The last flush failed: it has its name already, and no row will.
                with contextlib.suppress(OSError):
                    durable.remove(final)
            raise self._failure(error) from error
        return final

    def _discard(self, folder: Path) -> None:
        inside = folder.parent.parent == self._root and folder.parent.name in (STAGING, *KINDS)
        assert inside, f"{folder} is not a folder of {self._root}"
        if folder.parent.name == STAGING and folder.exists():
            # Whoever still writes there finds it gone, and adds nothing behind the removal.
            folder = folder.rename(folder.with_name(uuid.uuid4().hex))
        durable.remove(folder)

    def _sweep(self, keep: Sequence[str]) -> int:
        kept = {(Path(one).parent.name, Path(one).name) for one in keep}
        publishing = tuple(f"-{name}" for parent, name in kept if parent == STAGING)
        strays = [
            folder
            for parent in (STAGING, *KINDS)
            for folder in (self._root / parent).iterdir()
            if (parent, folder.name) not in kept
            and not (parent != STAGING and folder.name.endswith(publishing))
        ]
        return sum(_removed(folder) for folder in strays)

    def _failure(self, error: OSError) -> FiretitanError:
        return cannot_write(self._root, error)


def _is_folder(path: Path) -> bool:
    """Whether it can be seen to be one: a disk that fails is away, too."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _removed(folder: Path) -> bool:
    """Remove a stray; one that a worker is still writing a recovery point to stays for later."""
    try:
        durable.remove(folder)
    except OSError as error:
        logger.warning("left for the next start to remove folder=%s: %s", folder, error)
        return False
    return True
