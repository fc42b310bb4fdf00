"""Prompt scores against one plain forward pass of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.models import save_tiny
from support.sampling import plain_model

from firetitan_daemon.core.errors import FiretitanError
from firetitan_daemon.engine.api import ModelSpec
from firetitan_daemon.engine.hf_sample import HfSampleEngine
from firetitan_daemon.engine.sample_api import SampleRequest

pytestmark = pytest.mark.timeout(180)

PROMPT = np.random.default_rng(3).integers(0, 256, 40).astype(np.int32)
SCORE = SampleRequest(PROMPT, 1, 0, seed=9, prompt_logprobs=True)
UNSCORED = -99999.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("scores") / "model")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[HfSampleEngine]:
    engine = HfSampleEngine(ModelSpec(str(folder)))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def expected(folder: Path) -> np.ndarray:
    """Logprobs of every token at positions 1 to P - 1; [P - 1, V]."""
    return table(folder, PROMPT)


def table(folder: Path, tokens: np.ndarray) -> np.ndarray:
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.no_grad():
        logits = plain_model(folder)(input_ids=ids).logits[0].float()
    return torch.log_softmax(logits, -1)[:-1].numpy()


def test_a_prompt_can_be_scored_alone(engine: HfSampleEngine, expected: np.ndarray) -> None:
    result = engine.submit(SCORE).result()
    (sequence,) = result.sequences
    assert (len(sequence.token_ids), sequence.stop_reason) == (0, "length")
    assert result.prompt.logprobs is not None
    own = expected[np.arange(len(PROMPT) - 1), PROMPT[1:]]
    assert np.isnan(result.prompt.logprobs[0])
    assert np.abs(result.prompt.logprobs[1:] - own).max() < 1e-4


def test_a_prompt_that_fills_the_context_can_be_scored(
    engine: HfSampleEngine, folder: Path
) -> None:
    length = engine.info.max_context_length
    prompt = np.random.default_rng(1).integers(0, 256, length).astype(np.int32)
    result = engine.submit(replace(SCORE, prompt=prompt)).result()
    assert result.prompt.logprobs is not None
    own = table(folder, prompt)[np.arange(length - 1), prompt[1:]]
    assert np.abs(result.prompt.logprobs[1:] - own).max() < 1e-4
    with pytest.raises(FiretitanError, match="max_tokens is 1; with the prompt"):
        engine.submit(replace(SCORE, prompt=prompt, max_tokens=1))


def test_the_likeliest_tokens_of_each_position(
    engine: HfSampleEngine, expected: np.ndarray
) -> None:
    result = engine.submit(replace(SCORE, topk_prompt_logprobs=5)).result()
    top = result.prompt.top
    assert top is not None and top.token_ids.shape == top.logprobs.shape == (len(PROMPT), 5)
    assert top.token_ids[0].tolist() == [0] * 5
    assert top.logprobs[0].tolist() == [UNSCORED] * 5
    best = np.argsort(-expected, axis=1, kind="stable")[:, :5]
    assert np.array_equal(top.token_ids[1:], best)
    assert np.abs(top.logprobs[1:] - np.take_along_axis(expected, best, 1)).max() < 1e-4


def test_given_tokens(engine: HfSampleEngine, expected: np.ndarray) -> None:
    targets = np.random.default_rng(2).integers(0, 256, (len(PROMPT) - 1, 3))
    targets[::4, 1] = -1
    request = replace(SCORE, prompt_logprobs=False, target_prompt_logprobs=targets)
    found = engine.submit(request).result().prompt
    assert found.logprobs is None and found.targets is not None
    wanted = np.take_along_axis(expected, np.maximum(targets, 0), 1)
    assert found.targets[targets < 0].tolist() == [0.0] * int((targets < 0).sum())
    assert np.abs((found.targets - wanted)[targets >= 0]).max() < 1e-4


def test_only_the_end(engine: HfSampleEngine) -> None:
    whole = engine.submit(replace(SCORE, topk_prompt_logprobs=2)).result().prompt
    part = (
        engine.submit(replace(SCORE, topk_prompt_logprobs=2, prompt_logprobs_last_n=7))
        .result()
        .prompt
    )
    assert whole.logprobs is not None and part.logprobs is not None
    assert np.isnan(part.logprobs[:-7]).all()
    assert part.logprobs[-7:].tobytes() == whole.logprobs[-7:].tobytes()
    assert whole.top is not None and part.top is not None
    assert (part.top.logprobs[:-7] == UNSCORED).all()
    assert part.top.token_ids[-7:].tobytes() == whole.top.token_ids[-7:].tobytes()


def test_alternatives_are_draws_from_each_position(
    engine: HfSampleEngine, expected: np.ndarray
) -> None:
    request = replace(SCORE, prompt_alt_tokens_k=400, temperature=0.5)
    drawn = engine.submit(request).result().prompt.alternatives
    again = engine.submit(request).result().prompt.alternatives
    other = engine.submit(replace(request, seed=10)).result().prompt.alternatives
    assert drawn is not None and again is not None and other is not None
    assert drawn.token_ids.tobytes() == again.token_ids.tobytes()
    assert drawn.token_ids.tobytes() != other.token_ids.tobytes()
    raw = np.take_along_axis(expected, drawn.token_ids.astype(np.int64), 1)
    assert np.abs(drawn.logprobs - raw).max() < 1e-4
    scaled = np.exp(2.0 * expected)
    probabilities = scaled / scaled.sum(1, keepdims=True)
    found = np.stack([np.bincount(row, minlength=expected.shape[1]) for row in drawn.token_ids])
    # 39 positions of 400 draws: the mean squared distance of counts that follow the distribution.
    variance = 400 * (probabilities * (1 - probabilities)).sum()
    assert 0.8 < ((found - 400 * probabilities) ** 2).sum() / variance < 1.25


def test_the_likeliest_tokens_of_what_is_sampled(engine: HfSampleEngine, folder: Path) -> None:
    request = SampleRequest(PROMPT, 3, 8, seed=4, temperature=0.7, topk_sample_logprobs=4)
    for sequence in engine.submit(request).result().sequences:
        tokens = np.concatenate((PROMPT, sequence.token_ids))
        raw = table(folder, tokens)[len(PROMPT) - 1 :]
        assert sequence.top_logprobs is not None
        best = np.argsort(-raw, axis=1, kind="stable")[:, :4]
        assert np.array_equal(sequence.top_logprobs.token_ids, best)
        gap = sequence.top_logprobs.logprobs - np.take_along_axis(raw, best, 1)
        assert np.abs(gap).max() < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk_prompt_logprobs": -1}, "topk_prompt_logprobs: is -1"),
        ({"topk_prompt_logprobs": 1000}, "topk_prompt_logprobs: is 1000; at most 272"),
        ({"prompt_alt_tokens_k": -2}, "prompt_alt_tokens_k: is -2"),
        ({"prompt_logprobs_last_n": 40}, "prompt_logprobs_last_n: is 40; 1 to 39"),
        ({"prompt_logprobs_last_n": 2, "prompt_logprobs": False}, "needs prompt_logprobs"),
        ({"target_prompt_logprobs": np.zeros((40, 1), np.int64)}, r"shape \[40, 1\]; .* \[39, K\]"),
        (
            {"target_prompt_logprobs": np.full((39, 2), 272)},
            r"target_prompt_logprobs\[0, 0\]: is 272",
        ),
        ({"prompt_logprobs": False}, "max_tokens: is 0, which only scores"),
    ],
)
def test_refusals(engine: HfSampleEngine, change: dict[str, object], message: str) -> None:
    with pytest.raises(FiretitanError, match=message):
        engine.submit(replace(SCORE, **change))  # type: ignore[arg-type]


def test_times_and_the_prompt_cache(engine: HfSampleEngine) -> None:
    prompt = PROMPT[::-1].copy()
    request = SampleRequest(prompt, 2, 6, seed=1, use_eos=False)
    first, second = (engine.submit(request).result() for _ in range(2))
    assert (first.cached_prompt_tokens, second.cached_prompt_tokens) == (0, len(prompt))
    assert first.num_concurrent == 1
    times = first.times
    assert 0 <= times.queue_s <= times.queue_s + times.prefill_s <= times.first_token_s + 1e-6
    assert times.generation_s > 0 <= times.generation_queue_s
    many = [engine.submit(replace(request, seed=seed)) for seed in range(12)]
    assert max(future.result().num_concurrent for future in many) > 1
    assert max(future.result().times.queue_s for future in many) > 0
