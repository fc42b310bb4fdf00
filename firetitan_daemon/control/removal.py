"""Removing what was saved: by hand, or because its time is over; never what is in use.

Knows: what keeps a checkpoint or a snapshot. Must not know: RPCs, what the files hold. The row goes
first, then the files: what a death leaves between the two is swept at the next start.
"""

from __future__ import annotations

import logging
from pathlib import Path

from firetitan_daemon.control.checkpoints import CheckpointManager
from firetitan_daemon.control.deployments import DeploymentManager
from firetitan_daemon.control.services import Services
from firetitan_daemon.control.sessions import SessionManager
from firetitan_daemon.core import names
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.expiry import is_due
from firetitan_daemon.core.ports import Change
from firetitan_daemon.core.records import Checkpoint, Snapshot

logger = logging.getLogger("firetitan.removal")
_IN_USE = (Reason.SNAPSHOT_IN_USE, Reason.CHECKPOINT_IN_USE)


class SavedRemover:
    """Removes checkpoints and snapshots."""

    def __init__(
        self,
        services: Services,
        checkpoints: CheckpointManager,
        sessions: SessionManager,
        deployments: DeploymentManager,
    ) -> None:
        self._services = services
        self._checkpoints = checkpoints
        self._sessions = sessions
        self._deployments = deployments
        self._kept: set[str] = set()
        """Names that are due and were said to be in use."""

    async def delete_checkpoint(self, name: str) -> None:
        """Remove a checkpoint. One that is gone already is fine.

        Raises:
            FiretitanError: NAME_INVALID, CHECKPOINT_IN_USE while it is being loaded.
        """
        names.parse_checkpoint(name)
        checkpoint = await self._services.store.checkpoint(name)
        if checkpoint is not None:
            await self._remove_checkpoint(checkpoint)

    async def delete_snapshot(self, reference: str) -> None:
        """Remove a snapshot. One that is gone already is fine.

        Raises:
            FiretitanError: NAME_INVALID, SNAPSHOT_IN_USE naming what keeps it.
        """
        snapshot = await self._services.store.snapshot(names.parse_snapshot(reference, "name"))
        if snapshot is not None:
            await self._remove_snapshot(snapshot)

    async def expire(self) -> None:
        """Remove what is due; what is in use stays until it is not."""
        clock = self._services.clock
        due = [one for one in self._checkpoints.expiring.values() if is_due(one, clock)]
        # Deltas before what they stand on, so that a chain that is due goes as a whole.
        for saved in sorted(due, key=lambda one: one.commit_seq, reverse=True):
            try:
                if isinstance(saved, Snapshot):
                    await self._remove_snapshot(saved)
                else:
                    await self._remove_checkpoint(saved)
            except FiretitanError as error:
                if error.reason not in _IN_USE:
                    raise
                if saved.name not in self._kept:
                    logger.info("expired but kept name=%s: %s", saved.name, error)
                self._kept.add(saved.name)
            else:
                self._kept.discard(saved.name)
                logger.info("expired name=%s", saved.name)

    async def _remove_checkpoint(self, checkpoint: Checkpoint) -> None:
        services = self._services
        # One that was loaded may go: its files stay for as long as a replay would read them.
        for holder in services.operations.holds.holders(checkpoint.folder):
            loading = services.operations.current(holder)
            if loading is not None:
                raise FiretitanError(
                    Reason.CHECKPOINT_IN_USE,
                    f"{checkpoint.name} stays: {loading.target} is loading it; try again later",
                    checkpoint=checkpoint.name,
                    used_by=loading.name,
                )
        row = (checkpoint.name, checkpoint.folder)
        await services.store.write(Change(deleted_checkpoints=[row], durable=True))
        self._checkpoints.forget(checkpoint)
        await services.operations.holds.retire(Path(checkpoint.folder), services.folders)

    async def _remove_snapshot(self, snapshot: Snapshot) -> None:
        services = self._services
        self._check_snapshot(snapshot)
        await services.store.write(Change(deleted_snapshots=[snapshot.id], durable=True))
        self._checkpoints.forget(snapshot)
        await services.operations.holds.retire(Path(snapshot.folder), services.folders)

    def _check_snapshot(self, snapshot: Snapshot) -> None:
        """Refuse to remove what is served or needed; that deltas stand on it the store knows."""
        user = next(
            (
                deployment.name
                for deployment in self._deployments.all()
                if snapshot.id == deployment.active_snapshot
                or snapshot.id in self._services.pins.snapshots(deployment.id)
            ),
            None,
        )
        if user is not None:
            raise _kept(snapshot, f"{user} serves it, or a client has pinned it there", user)
        if self._services.operations.holds.held(snapshot.folder):
            raise _kept(snapshot, "it is being loaded or copied", "")
        for session in self._sessions.all(names.trainer_name(snapshot.session.split("/")[1])):
            saving = self._services.operations.open_of(session.name, "SaveSnapshot")
            if saving and session.chain_head == snapshot.id:
                raise _kept(snapshot, "a delta on it is being saved", saving[0].name)


def _kept(snapshot: Snapshot, why: str, by: str) -> FiretitanError:
    return FiretitanError(
        Reason.SNAPSHOT_IN_USE,
        f"{snapshot.name} stays: {why}",
        snapshot=snapshot.name,
        used_by=by,
    )
