"""What control needs to know of a message's content, as plain values.

Knows: arguments of the commands that the daemon itself has a part in. Must not know: protobuf;
`rpc.codec` implements the protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from firetitan_daemon.core.records import Checkpoint, HotloadTransition, Snapshot


@dataclass(frozen=True)
class Header:
    """Who sends which command as the how-many-eth."""

    session: str
    epoch: int
    client_id: str
    seq: int
    request_id: str
    part: int = 0
    parts: int = 0
    seen_failure: int = 0


@dataclass(frozen=True)
class SaveStateArguments:
    """Of SaveState."""

    checkpoint_id: str
    keep_existing: bool = False
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    ttl_s: float | None = None


@dataclass(frozen=True)
class LoadStateArguments:
    """Of LoadState."""

    checkpoint: str
    with_optimizer: bool = False


@dataclass(frozen=True)
class LoadAdapterArguments:
    """Of LoadAdapter."""

    adapter: str


@dataclass(frozen=True)
class SaveSnapshotArguments:
    """Of SaveSnapshot."""

    snapshot_id: str
    kind: str = ""
    """`base`, `delta`, `merged_base` or empty: the daemon chooses."""
    ttl_s: float | None = None
    with_precision: bool = False
    """Whether it says in what a merged base is to be written."""
    user_metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class HotloadArguments:
    """Of HotloadSnapshot."""

    deployment: str
    snapshot: str
    etag: str = ""
    transition: HotloadTransition | None = None
    """None: the deployment's own."""
    keep_prompt_cache: bool = False


class Codec(Protocol):
    """Reads requests and writes results.

    Reading raises FiretitanError INVALID_ARGUMENT where the bytes are not such a message.
    """

    def save_state(self, payload: bytes) -> SaveStateArguments:
        """Read a SaveStateRequest."""

    def load_state(self, payload: bytes) -> LoadStateArguments:
        """Read a LoadStateRequest."""

    def load_adapter(self, payload: bytes) -> LoadAdapterArguments:
        """Read a LoadAdapterRequest."""

    def save_snapshot(self, payload: bytes) -> SaveSnapshotArguments:
        """Read a SaveSnapshotRequest."""

    def hotload(self, payload: bytes) -> HotloadArguments:
        """Read a HotloadSnapshotRequest."""

    def checkpoint_result(self, checkpoint: Checkpoint) -> bytes:
        """An Operation with only its result set: a Checkpoint."""

    def snapshot_result(self, snapshot: Snapshot) -> bytes:
        """An Operation with only its result set: a Snapshot."""

    def load_result(self, checkpoint: Checkpoint, step: int) -> bytes:
        """An Operation with only its result set: a LoadResult."""

    def adapter_result(self, adapter: str, step: int) -> bytes:
        """An Operation with only its result set: a LoadResult of an adapter."""
