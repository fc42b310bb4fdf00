"""CheckpointService: what sessions saved. Its commands go through `training.Commands`.

Knows: messages, the manager. Must not know: rules.
"""

from __future__ import annotations

from firetitan.v1 import checkpoint_service_pb2

from firetitan_daemon.control.checkpoints import CheckpointManager
from firetitan_daemon.control.removal import SavedRemover
from firetitan_daemon.rpc import convert
from firetitan_daemon.rpc.paging import page


class CheckpointServicer:
    """Shows and deletes checkpoints and snapshots."""

    def __init__(self, checkpoints: CheckpointManager, remover: SavedRemover) -> None:
        self._checkpoints = checkpoints
        self._remover = remover

    async def GetCheckpoint(
        self, request: checkpoint_service_pb2.GetCheckpointRequest
    ) -> checkpoint_service_pb2.GetCheckpointResponse:
        """One checkpoint."""
        record = await self._checkpoints.get(request.name)
        return checkpoint_service_pb2.GetCheckpointResponse(checkpoint=convert.checkpoint(record))

    async def ListCheckpoints(
        self, request: checkpoint_service_pb2.ListCheckpointsRequest
    ) -> checkpoint_service_pb2.ListCheckpointsResponse:
        """Checkpoints of a trainer or a session."""
        records, following = page(
            await self._checkpoints.list_checkpoints(request.parent),
            request.page_size,
            request.page_token,
        )
        return checkpoint_service_pb2.ListCheckpointsResponse(
            checkpoints=[convert.checkpoint(record) for record in records],
            next_page_token=following,
        )

    async def GetSnapshot(
        self, request: checkpoint_service_pb2.GetSnapshotRequest
    ) -> checkpoint_service_pb2.GetSnapshotResponse:
        """One snapshot."""
        record = await self._checkpoints.get_snapshot(request.name)
        return checkpoint_service_pb2.GetSnapshotResponse(snapshot=convert.snapshot(record))

    async def ListSnapshots(
        self, request: checkpoint_service_pb2.ListSnapshotsRequest
    ) -> checkpoint_service_pb2.ListSnapshotsResponse:
        """Snapshots, all or of one trainer or session."""
        records, following = page(
            await self._checkpoints.list_snapshots(request.parent),
            request.page_size,
            request.page_token,
        )
        return checkpoint_service_pb2.ListSnapshotsResponse(
            snapshots=[convert.snapshot(record) for record in records], next_page_token=following
        )

    async def DeleteCheckpoint(
        self, request: checkpoint_service_pb2.DeleteCheckpointRequest
    ) -> checkpoint_service_pb2.DeleteCheckpointResponse:
        """Removes a checkpoint; refused while it is in use."""
        await self._remover.delete_checkpoint(request.name)
        return checkpoint_service_pb2.DeleteCheckpointResponse()

    async def DeleteSnapshot(
        self, request: checkpoint_service_pb2.DeleteSnapshotRequest
    ) -> checkpoint_service_pb2.DeleteSnapshotResponse:
        """Removes a snapshot; refused while it is in use."""
        await self._remover.delete_snapshot(request.name)
        return checkpoint_service_pb2.DeleteSnapshotResponse()
