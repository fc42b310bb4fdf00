"""Prompts that ran a moment ago, for requests that ask for the same one again.

Knows: whole prompts by version name and tokens, and what their caches weigh. Must not know: models,
requests. Only whole prompts match: what is handed out is bit for bit what running the prompt again
would give. Owner: the thread that runs the model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from firetitan_daemon.engine.api import Int32Array
from firetitan_daemon.engine.decode import Prefill


class PromptCache:
    """The last prompts used, bounded by the memory of their keys and values.

    Args:
        max_bytes: 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[tuple[str, bytes], tuple[Prefill, int]] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """Memory of what is kept."""
        return sum(size for _, size in self._entries.values())

    def find(self, version: str, prompt: Int32Array, *, logprobs: bool) -> Prefill | None:
        """The prompt under that version, with its logprobs where they are asked for."""
        key = (version, prompt.tobytes())
        entry = self._entries.get(key)
        if entry is None or (logprobs and entry[0].logprobs is None):
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def add(self, version: str, prompt: Int32Array, prefill: Prefill, num_bytes: int) -> None:
        """Keep a prompt; the ones not used for longest make room."""
        self._entries[version, prompt.tobytes()] = (prefill, num_bytes)
        self._entries.move_to_end((version, prompt.tobytes()))
        while self._entries and self.num_bytes > self._max_bytes:
            self._entries.popitem(last=False)

    def keep_versions(self, names: Collection[str]) -> None:
        """Forget the prompts of versions that no request can name any more."""
        for key in [key for key in self._entries if key[0] not in names]:
            del self._entries[key]
