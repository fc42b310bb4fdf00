"""Decides where a sequence ends: stop token ids, end-of-sequence tokens, stop strings.

Knows: token ids and a function that decodes them. Must not know: models, logits, requests.
A stop string is found at the token that completes it; that token stays in the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens kept, nothing cleaned up."""

_UNFINISHED = "\ufffd"
"""What decoding yields for the first bytes of a character whose last bytes are still to come."""
_CONTEXT_TOKENS = 4
"""Prompt tokens decoded along, so that the first new token keeps its leading space."""
_LONGEST_CHARACTER = 8
"""Tokens after which an unfinished character is taken for what the model meant."""


def eos_token_ids(*sources: Any) -> frozenset[int]:
    """End-of-sequence ids of a tokenizer, a config or a generation config.

    Args:
        sources: Objects with an `eos_token_id` that is an int, several, or None; None is skipped.
    """
    ids: set[int] = set()
    for source in sources:
        value = getattr(source, "eos_token_id", None)
        if isinstance(value, int):
            ids.add(value)
        elif value is not None:
            ids.update(int(each) for each in value)
    return frozenset(ids)


class StopStrings:
    """Watches one sequence for the first of several strings.

    Text is decoded piece by piece: a piece is final once it no longer ends inside a character, and
    only the unfinished end is decoded again.
    """

    def __init__(self, strings: Iterable[str], decode: Decode, prompt: Sequence[int]) -> None:
        self._strings = tuple(strings)
        self._decode = decode
        self._ids = [int(token) for token in prompt[-_CONTEXT_TOKENS:]]
        self._before = 0
        """Where the piece before the unfinished one starts; it gives the decoder context."""
        self._final = len(self._ids)
        """Tokens before this index have been turned into text."""
        self._tail = ""
        """The end of the final text: what a match may still need."""
        self._tail_length = max((len(each) for each in self._strings), default=1) - 1

    def push(self, token: int) -> bool:
        """Add a token; True where it completes one of the strings."""
        self._ids.append(token)
        known = self._decode(self._ids[self._before : self._final])
        text = self._decode(self._ids[self._before :])
        if not text.startswith(known):
            known = known.rstrip(_UNFINISHED)
        new = text[len(known) :]
        visible = self._tail + new.rstrip(_UNFINISHED)
        if any(each in visible for each in self._strings):
            return True
        pending = len(self._ids) - self._final
        if new and (not new.endswith(_UNFINISHED) or pending >= _LONGEST_CHARACTER):
            self._advance(self._tail + new)
        return False

    def _advance(self, text: str) -> None:
        self._tail = text[-self._tail_length :] if self._tail_length else ""
        self._before = self._final
        self._final = len(self._ids)
        if self._before > 4 * _LONGEST_CHARACTER:
            del self._ids[: self._before]
            self._final -= self._before
            self._before = 0
