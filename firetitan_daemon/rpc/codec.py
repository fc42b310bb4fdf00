"""Reads the few requests that control has a part in, writes results: `control.codec.Codec`.

Knows: firetitan.v1. Must not know: managers.
"""

from __future__ import annotations

from typing import TypeVar

from firetitan.v1 import (
    checkpoint_service_pb2,
    deployment_service_pb2,
    operation_pb2,
)
from firetitan.worker.v1 import worker_pb2
from google.protobuf import message

from firetitan_daemon.control.codec import (
    Codec,
    Header,
    HotloadArguments,
    LoadAdapterArguments,
    LoadStateArguments,
    SaveSnapshotArguments,
    SaveStateArguments,
)
from firetitan_daemon.core.records import Checkpoint, Snapshot
from firetitan_daemon.rpc import convert
from firetitan_daemon.rpc.binding import malformed

_M = TypeVar("_M", bound=message.Message)


class ProtobufCodec(Codec):
    """The codec for firetitan.v1."""

    def save_state(self, payload: bytes) -> SaveStateArguments:
        """Read a SaveStateRequest."""
        request = _parse(checkpoint_service_pb2.SaveStateRequest, payload)
        return SaveStateArguments(
            request.checkpoint_id,
            request.keep_existing,
            dict(request.user_metadata),
            _seconds(request),
        )

    def load_state(self, payload: bytes) -> LoadStateArguments:
        """Read a LoadStateRequest."""
        request = _parse(checkpoint_service_pb2.LoadStateRequest, payload)
        return LoadStateArguments(request.checkpoint, request.with_optimizer)

    def load_adapter(self, payload: bytes) -> LoadAdapterArguments:
        """Read a LoadAdapterRequest."""
        return LoadAdapterArguments(
            _parse(checkpoint_service_pb2.LoadAdapterRequest, payload).adapter
        )

    def save_snapshot(self, payload: bytes) -> SaveSnapshotArguments:
        """Read a SaveSnapshotRequest."""
        request = _parse(checkpoint_service_pb2.SaveSnapshotRequest, payload)
        return SaveSnapshotArguments(
            request.snapshot_id,
            # An unknown number is refused by name, as any other unknown kind.
            convert.KIND_NAMES.get(request.kind, str(request.kind)) if request.kind else "",
            _seconds(request),
            request.export_precision != 0,
            dict(request.user_metadata),
        )

    def hotload(self, payload: bytes) -> HotloadArguments:
        """Read a HotloadSnapshotRequest."""
        request = _parse(deployment_service_pb2.HotloadSnapshotRequest, payload)
        return HotloadArguments(
            request.deployment,
            request.snapshot,
            request.etag,
            convert.transition(request.transition),
            request.keep_prompt_cache,
        )

    def checkpoint_result(self, checkpoint: Checkpoint) -> bytes:
        """An Operation with only its result set."""
        result = operation_pb2.Operation(checkpoint=convert.checkpoint(checkpoint))
        return result.SerializeToString()

    def snapshot_result(self, snapshot: Snapshot) -> bytes:
        """An Operation with only its result set."""
        return operation_pb2.Operation(snapshot=convert.snapshot(snapshot)).SerializeToString()

    def load_result(self, checkpoint: Checkpoint, step: int) -> bytes:
        """An Operation with only its result set."""
        load = operation_pb2.LoadResult(checkpoint=convert.checkpoint(checkpoint), step=step)
        return operation_pb2.Operation(load=load).SerializeToString()

    def adapter_result(self, adapter: str, step: int) -> bytes:
        """An Operation with only its result set."""
        load = operation_pb2.LoadResult(adapter=adapter, step=step)
        return operation_pb2.Operation(load=load).SerializeToString()


def read_header(payload: bytes) -> Header:
    """The header of any session command, without reading the rest.

    Raises:
        FiretitanError: INVALID_ARGUMENT.
    """
    return convert.header(_parse(worker_pb2.CommandView, payload).header)


def _seconds(
    request: checkpoint_service_pb2.SaveStateRequest | checkpoint_service_pb2.SaveSnapshotRequest,
) -> float | None:
    return request.ttl.ToNanoseconds() / 1e9 if request.HasField("ttl") else None


def _parse(cls: type[_M], payload: bytes) -> _M:
    try:
        return cls.FromString(payload)
    except message.DecodeError as error:
        raise malformed(cls.__name__) from error
