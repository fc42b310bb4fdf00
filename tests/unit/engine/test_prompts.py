"""Kept prompts: found by version and tokens, bounded by bytes, dropped with their version."""

from __future__ import annotations

import numpy as np

from firetitan_daemon.engine.decode import Prefill
from firetitan_daemon.engine.prompts import PromptCache
from firetitan_daemon.engine.sample_api import PromptScores
from firetitan_daemon.engine.score import Scoring

ROW = np.zeros(3, np.float32)
NONE = PromptScores()
LOGPROBS = Scoring(logprobs=True)


def _prompt(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def test_found_by_version_and_tokens_and_logprobs() -> None:
    cache = PromptCache(100)
    plain, scored = Prefill("plain", ROW, NONE), Prefill("scored", ROW, PromptScores(ROW))
    cache.add("a", _prompt(1, 2), plain, 10)
    assert cache.find("a", _prompt(1, 2)) == plain
    assert cache.find("a", _prompt(1, 2), LOGPROBS) is None
    assert cache.find("b", _prompt(1, 2)) is None
    assert cache.find("a", _prompt(1)) is None
    cache.add("a", _prompt(1, 2), scored, 10, LOGPROBS)
    assert cache.find("a", _prompt(1, 2), LOGPROBS) is scored
    assert cache.find("a", _prompt(1, 2), Scoring(logprobs=True, top_k=2)) is None
    unscored = cache.find("a", _prompt(1, 2))
    assert unscored is not None and unscored.scores.logprobs is None
    assert cache.num_bytes == 10


def test_the_longest_unused_goes_first() -> None:
    cache = PromptCache(30)
    for token in range(3):
        cache.add("a", _prompt(token), Prefill(token, ROW, NONE), 10)
    cache.find("a", _prompt(0))
    cache.add("a", _prompt(3), Prefill(3, ROW, NONE), 10)
    left = [token for token in range(4) if cache.find("a", _prompt(token))]
    assert left == [0, 2, 3]
    cache.add("a", _prompt(4), Prefill(4, ROW, NONE), 31)
    assert cache.num_bytes == 0


def test_versions_take_their_prompts_along() -> None:
    cache = PromptCache(30)
    cache.add("a", _prompt(1), Prefill(1, ROW, NONE), 10)
    cache.add("b", _prompt(1), Prefill(2, ROW, NONE), 10)
    cache.keep_versions(("b", "c"))
    assert cache.find("a", _prompt(1)) is None
    assert cache.find("b", _prompt(1)) is not None
