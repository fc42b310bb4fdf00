"""Exports of what was saved to a user's folder.

Knows: rows, chains. Must not know: files' content, who writes them.
"""

from __future__ import annotations

import asyncio
import os
import uuid
from pathlib import Path

from firetitan_daemon import durable
from firetitan_daemon.control.checkpoints import CheckpointManager, find_snapshot
from firetitan_daemon.control.services import Services, logger
from firetitan_daemon.core import chain, names
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.ports import Exporter, ExportJob
from firetitan_daemon.core.records import Checkpoint, Snapshot


class ExportManager:
    """Writes checkpoints and snapshots of any kind as plain folders.

    Args:
        services: The ports.
        checkpoints: Finds them.
        exporter: Writes them.
        home: Nothing is exported to: what no row names there is removed at the next start.
    """

    def __init__(
        self,
        services: Services,
        checkpoints: CheckpointManager,
        exporter: Exporter,
        home: Path,
    ) -> None:
        self._services = services
        self._checkpoints = checkpoints
        self._exporter = exporter
        self._home = home
        self._running: dict[Path, tuple[str, asyncio.Task[Path]]] = {}
        """By folder: what is being written to it."""

    async def export(self, reference: str, folder: str) -> Path:
        """Write what was saved to a folder; returns it. The same again is the same export.

        Args:
            reference: A snapshot, a checkpoint's full name, or the documented name of either.
            folder: Absolute; does not exist, is empty, or holds this very export.

        Raises:
            FiretitanError: NAME_INVALID, SNAPSHOT_NOT_FOUND, CHAIN_BROKEN, INVALID_ARGUMENT for
                the folder or a base model that has changed, CHECKSUM_MISMATCH, STATE_DISK_FULL.
        """
        target = await asyncio.to_thread(_check_folder, folder, self._home)
        running = self._running.get(target)
        if running is None:
            task = asyncio.create_task(self._export(reference, target))
            self._running[target] = reference, task
            task.add_done_callback(lambda _: self._running.pop(target))
        else:
            written, task = running
            if written != reference:
                raise _bad(f"{written} is being exported to {target}; choose another")
        return await asyncio.shield(task)

    async def _export(self, reference: str, target: Path) -> Path:
        holds, holder = self._services.operations.holds, f"export {uuid.uuid4().hex}"
        try:
            saved = await self._layers(reference)
            for one in saved:
                holds.take(one.folder, holder)
            # Once more, now that what is found stays.
            saved = await self._layers(reference)
            job = ExportJob(
                name=saved[-1].name,
                base_model=self._services.models.reference(saved[-1].base_model),
                layers=tuple((one.folder, one.digest) for one in saved),
                is_state=isinstance(saved[-1], Checkpoint),
                target=str(target),
            )
            await self._exporter.export(job)
        finally:
            holds.release(holder)
        logger.info("exported name=%s folder=%s", job.name, target)
        return target

    async def _layers(self, reference: str) -> list[Checkpoint] | list[Snapshot]:
        store = self._services.store
        if "/sessions/" in reference:
            return [await self._checkpoints.get(reference)]
        saved = names.parse_saved(reference)
        if saved.trainer is not None:
            rows = await store.checkpoints(saved.trainer)
            named = [row for row in rows if names.last_segment(row.name) == saved.id]
            if named:
                return [max(named, key=lambda row: row.create_time)]
        snapshot = await find_snapshot(store, saved.id)
        known = {row.id: row for row in await store.snapshots(snapshot.session.split("/")[1])}
        return chain.plan(snapshot.id, (), known.get)


def _check_folder(text: str, home: Path) -> Path:
    """The folder; one with a manifest is compared with what is exported when that is made."""
    folder = Path(text)
    if not folder.is_absolute() or "\0" in text:
        raise _bad(f"{text[:200]!r} is no absolute path")
    if Path(os.path.realpath(folder)).is_relative_to(home):
        raise _bad(f"{text[:200]!r} is in the daemon's own home; choose one elsewhere")
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        taken = taken and not (folder / durable.MANIFEST).is_file()
    except OSError as error:
        raise _bad(f"{text[:200]!r} cannot be written to: {error.strerror}") from error
    if taken:
        raise _bad(f"{text} is there and not empty; choose another")
    return folder


def _bad(why: str) -> FiretitanError:
    return FiretitanError(Reason.INVALID_ARGUMENT, f"folder: {why}", field="folder")
