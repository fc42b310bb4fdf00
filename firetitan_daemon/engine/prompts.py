"""Prompts that ran a moment ago, for requests that ask for the same one again.

Knows: whole prompts by version name and tokens, and what their caches weigh. Must not know: models,
requests. Only whole prompts match: what is handed out is bit for bit what running the prompt again
would give. Owner: the thread that runs the model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, replace

from firetitan_daemon.engine.api import Int32Array
from firetitan_daemon.engine.decode import Prefill
from firetitan_daemon.engine.sample_api import PromptScores
from firetitan_daemon.engine.score import NOTHING, Scoring


@dataclass(frozen=True)
class _Entry:
    prefill: Prefill
    wanted: Scoring
    num_bytes: int


class PromptCache:
    """The last prompts used, bounded by the memory of their keys and values.

    Args:
        max_bytes: 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[tuple[str, bytes], _Entry] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """Memory of what is kept."""
        return sum(entry.num_bytes for entry in self._entries.values())

    def find(self, version: str, prompt: Int32Array, wanted: Scoring = NOTHING) -> Prefill | None:
        """The prompt under that version, with the scores that are asked for."""
        key = (version, prompt.tobytes())
        entry = self._entries.get(key)
        if entry is None or (wanted and entry.wanted != wanted):
            return None
        self._entries.move_to_end(key)
        return entry.prefill if wanted else replace(entry.prefill, scores=PromptScores())

    def add(
        self,
        version: str,
        prompt: Int32Array,
        prefill: Prefill,
        num_bytes: int,
        wanted: Scoring = NOTHING,
    ) -> None:
        """Keep a prompt and its scores; the ones not used for longest make room."""
        self._entries[version, prompt.tobytes()] = _Entry(prefill, wanted, num_bytes)
        self._entries.move_to_end((version, prompt.tobytes()))
        while self._entries and self.num_bytes > self._max_bytes:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def keep_versions(self, names: Collection[str]) -> None:
        """Forget the prompts of versions that no request can name any more."""
        for key in [key for key in self._entries if key[0] not in names]:
            del self._entries[key]
