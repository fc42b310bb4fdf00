"""Forward passes kept for a later backward: bounded in number, bytes and age.

Knows: handles, budgets, a clock. Must not know: what a graph holds.

A graph is a promise that weights have not changed: whoever writes a parameter clears the table
first. Autograd's own check is not enough, fused updates and `.data` writes escape it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from firetitan_daemon.core.errors import FiretitanError, Reason

Kept = TypeVar("Kept")


@dataclass(frozen=True)
class GraphLimits:
    """What the table may hold."""

    max_count: int = 8
    max_bytes: int = 4 << 30
    max_age_s: float = 600.0


@dataclass
class _Entry(Generic[Kept]):
    owner: object
    kept: Kept
    num_bytes: int
    born_s: float


class GraphTable(Generic[Kept]):
    """Kept graphs by handle.

    Args:
        limits: Count, bytes and age.
        clock: Seconds, monotonic.
    """

    def __init__(
        self, limits: GraphLimits | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits = limits or GraphLimits()
        self._clock = clock
        self._entries: dict[str, _Entry[Kept]] = {}

    def __len__(self) -> int:
        self._expire()
        return len(self._entries)

    def beside(self) -> GraphTable[Kept]:
        """A table of other graphs under the same limits, which both fill together."""
        other: GraphTable[Kept] = GraphTable(self._limits, self._clock)
        other._entries = self._entries
        return other

    @property
    def num_bytes(self) -> int:
        """Bytes charged for what is kept."""
        return sum(entry.num_bytes for entry in self._entries.values())

    def make_room(self, num_bytes: int) -> bool:
        """Whether a graph of this size may be built; drops the oldest ones for it.

        Call before the forward: a graph over the whole budget must never come to exist.
        """
        self._expire()
        if num_bytes > self._limits.max_bytes or self._limits.max_count < 1:
            return False
        while self._entries and (
            len(self._entries) >= self._limits.max_count
            or self.num_bytes + num_bytes > self._limits.max_bytes
        ):
            del self._entries[next(iter(self._entries))]
        return True

    def put(self, kept: Kept, num_bytes: int) -> str:
        """Keep a graph; returns its handle."""
        handle = uuid.uuid4().hex
        self._entries[handle] = _Entry(self, kept, num_bytes, self._clock())
        return handle

    def get(self, handle: str) -> Kept:
        """The graph under a handle, still kept.

        Raises:
            FiretitanError: GRAPH_EXPIRED.
        """
        self._expire()
        entry = self._entries.get(handle)
        if entry is None or entry.owner is not self:
            raise FiretitanError(
                Reason.GRAPH_EXPIRED,
                f"graph {handle} is gone: used, released, older than "
                f"{self._limits.max_age_s:g} s, or the weights changed; send the gradients as "
                "cross_entropy weights instead",
                field="graph",
            )
        return entry.kept

    def release(self, handle: str) -> None:
        """Drop a graph; unknown handles are fine."""
        self._entries.pop(handle, None)

    def clear(self) -> None:
        """Drop all of this table's: weights are about to change."""
        for handle in [key for key, entry in self._entries.items() if entry.owner is self]:
            del self._entries[handle]

    def _expire(self) -> None:
        limit = self._clock() - self._limits.max_age_s
        for handle in [key for key, entry in self._entries.items() if entry.born_s < limit]:
            del self._entries[handle]
