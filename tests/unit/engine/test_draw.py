"""One row at a time: the right distribution, the right two logprobs, the same number each time."""

from __future__ import annotations

import numpy as np
import pytest

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.draw import DrawParams, draw, token_logprobs, uniform

VOCAB = 700


def _logits(seed: int = 0, vocab: int = VOCAB, spread: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=vocab) * spread).astype(np.float32)


def _reference(logits: np.ndarray, params: DrawParams) -> np.ndarray:
    """Probabilities by the plainest route, in float64."""
    scaled = logits.astype(np.float64) / params.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    if params.top_k > 0:
        probs[order[params.top_k :]] = 0.0
        probs /= probs.sum()
    if params.top_p < 1.0:
        mass_before = np.cumsum(probs[order]) - probs[order]
        probs[order[mass_before >= params.top_p]] = 0.0
        probs /= probs.sum()
    return probs


CUTS = [
    DrawParams(),
    DrawParams(temperature=0.6),
    DrawParams(temperature=1.7),
    DrawParams(top_k=7),
    DrawParams(top_p=0.8),
    DrawParams(temperature=0.8, top_k=20, top_p=0.9),
    DrawParams(temperature=1.3, top_p=0.999),
]


@pytest.mark.parametrize("params", CUTS, ids=str)
def test_frequencies_follow_the_distribution(params: DrawParams) -> None:
    logits = _logits(1, vocab=300, spread=2.0)
    expected = _reference(logits, params)
    draws = 8000
    counts = np.zeros(len(logits))
    for sample in range(draws):
        counts[draw(logits, params, uniform(17, sample, 3)).token] += 1
    assert counts[expected == 0].sum() == 0
    common = expected * draws >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * draws
    wanted[wanted == 0] = 1e-9
    chi_square = ((observed - wanted) ** 2 / wanted)[wanted > 1e-6].sum()
    freedom = max(1, int((wanted > 1e-6).sum()) - 1)
    assert chi_square < freedom + 4.5 * np.sqrt(2 * freedom) + 6


@pytest.mark.parametrize("params", CUTS, ids=str)
def test_both_logprobs(params: DrawParams) -> None:
    logits = _logits(2)
    sampling = _reference(logits, params)
    raw = _reference(logits, DrawParams())
    for sample in range(50):
        drawn = draw(logits, params, uniform(5, sample, 0))
        assert drawn.sampling_logprob == pytest.approx(np.log(sampling[drawn.token]), abs=1e-5)
        assert drawn.inference_logprob == pytest.approx(np.log(raw[drawn.token]), abs=1e-5)
        assert drawn.inference_logprob == token_logprobs(logits, np.array([drawn.token]))[0]


def test_logprobs_are_the_same_number_where_nothing_is_cut() -> None:
    for sample in range(20):
        drawn = draw(_logits(sample), DrawParams(top_k=VOCAB, top_p=1.0), uniform(1, sample, 2))
        assert drawn.sampling_logprob == drawn.inference_logprob


def test_temperature_zero_takes_the_first_of_the_largest_and_raw_logprobs() -> None:
    logits = _logits(3)
    logits[[40, 600]] = logits.max() + 1
    drawn = draw(logits, DrawParams(temperature=0.0, top_k=3, top_p=0.1), 0.999)
    assert drawn.token == 40
    assert (
        drawn.sampling_logprob
        == drawn.inference_logprob
        == token_logprobs(logits, np.array([40]))[0]
    )
    assert drawn.inference_logprob < np.log(0.5) + 1e-6


def test_ties_at_the_cut_keep_the_lower_ids() -> None:
    logits = np.zeros(600, dtype=np.float32)
    seen = {draw(logits, DrawParams(top_k=3), n).token for n in np.linspace(0, 0.999, 50)}
    assert seen == {0, 1, 2}
    seen = {draw(logits, DrawParams(top_p=0.0049), n).token for n in np.linspace(0, 0.999, 50)}
    assert seen == {0, 1, 2}


def test_every_number_of_the_unit_interval_gives_a_possible_token() -> None:
    logits = _logits(4)
    logits[::3] = -np.inf
    logits[-1] = -np.inf
    for params in CUTS:
        for number in (0.0, 1e-300, 0.5, np.nextafter(1.0, 0.0)):
            drawn = draw(logits, params, number)
            assert np.isfinite(logits[drawn.token])
            assert np.isfinite(drawn.sampling_logprob)


@pytest.mark.parametrize("temperature", [1e-45, 1e-12, 1e-3])
def test_tiny_temperatures_are_greedy_not_broken(temperature: float) -> None:
    logits = _logits(6)
    logits[100] = logits.max() + 1
    drawn = draw(logits, DrawParams(temperature=temperature), 0.7)
    assert drawn.token == 100
    assert drawn.sampling_logprob == 0.0
    assert drawn.inference_logprob < 0.0


def test_wide_nucleus_over_a_large_flat_vocabulary() -> None:
    logits = _logits(7, vocab=9000, spread=0.1)
    params = DrawParams(top_p=0.97)
    expected = _reference(logits, params)
    kept = {draw(logits, params, n).token for n in np.linspace(0, 0.99999, 3000)}
    assert all(expected[token] > 0 for token in kept)
    drawn = draw(logits, params, 0.4)
    assert drawn.sampling_logprob == pytest.approx(np.log(expected[drawn.token]), abs=1e-5)


def test_uniform_depends_on_its_key_alone_and_fills_the_interval() -> None:
    numbers = [uniform(s, j, p) for s in range(4) for j in range(40) for p in range(40)]
    assert len(set(numbers)) == len(numbers)
    assert 0.0 <= min(numbers) < 0.01
    assert 0.99 < max(numbers) < 1.0
    assert abs(float(np.mean(numbers)) - 0.5) < 0.02
    assert uniform(3, 1, 2) == uniform(3, 1, 2)
    assert uniform(-1, 0, 0) == uniform(2**64 - 1, 0, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_unusable_logits_are_refused(bad: float) -> None:
    logits = _logits(5)
    logits[17] = bad
    with pytest.raises(FiretitanError, match="logits hold") as caught:
        draw(logits, DrawParams(), 0.5)
    assert caught.value.reason == Reason.NON_FINITE
