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
    needed: bool


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
        self.expire()
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

    def make_room(self, num_bytes: int, *, needed: bool = False) -> bool:
        """Whether a graph of this size may be built; drops the oldest ones for it.

        Call before the forward: a graph over the whole budget must never come to exist.

        Args:
            num_bytes: What it takes.
            needed: Build it in any case (see `put`).
        """
        self.expire()
        staying = [entry.num_bytes for entry in self._entries.values() if entry.needed]
        if not needed and not self._fits(len(staying), sum(staying) + num_bytes):
            return False
        for handle in [key for key, entry in self._entries.items() if not entry.needed]:
            if self._fits(len(self._entries), self.num_bytes + num_bytes):
                break
            del self._entries[handle]
        return True

    def _fits(self, others: int, num_bytes: int) -> bool:
        return others < self._limits.max_count and num_bytes <= self._limits.max_bytes

    def put(self, kept: Kept, num_bytes: int, *, needed: bool = False) -> str:
        """Keep a graph; returns its handle.

        Args:
            kept: What is kept.
            num_bytes: What it takes.
            needed: It stays, whatever its age and what others take, until it is used, released or
                the weights change.
        """
        handle = uuid.uuid4().hex
        self._entries[handle] = _Entry(self, kept, num_bytes, self._clock(), needed)
        return handle

    def get(self, handle: str) -> Kept:
        """The graph under a handle, still kept.

        Raises:
            FiretitanError: GRAPH_EXPIRED.
        """
        self.expire()
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

    def expire(self) -> None:
        """Drop what is too old; every call of the table does it too."""
        limit = self._clock() - self._limits.max_age_s
        old = (key for key, one in self._entries.items() if one.born_s < limit and not one.needed)
        for handle in list(old):
            del self._entries[handle]
