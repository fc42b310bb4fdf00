"""What the sampling engine promises a caller: refusals, stops, cancellation, isolation, closing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.sampling import bits

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import ModelSpec
from firetitan_daemon.engine.hf_sample import HfSampleEngine
from firetitan_daemon.engine.sample_api import NewTokens, SampleRequest, StopReason
from firetitan_daemon.engine.scheduler import SamplerConfig

pytestmark = pytest.mark.timeout(60)

PROMPT = np.frombuffer(b"once upon a time", np.uint8).astype(np.int32)
REQUEST = SampleRequest(PROMPT, 2, 12, seed=3, use_eos=False)
LONG = SampleRequest(PROMPT, 4, 200, seed=3, use_eos=False)


@pytest.fixture(scope="module")
def engine(tiny_llama: Path) -> Iterator[HfSampleEngine]:
    engine = HfSampleEngine(ModelSpec(str(tiny_llama)), SamplerConfig(max_rows=8, branch_rows=4))
    yield engine
    engine.close()


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"prompt": np.zeros(0, np.int32)}, "prompt", "at least one token"),
        ({"prompt": np.array([1, 2, 272], np.int32)}, "prompt[2]", "is 272; .* 0 to 271"),
        ({"prompt": np.array([1, -1], np.int32)}, "prompt[1]", "is -1"),
        ({"max_tokens": 0}, "max_tokens", "is 0, which only scores"),
        ({"max_tokens": -1}, "max_tokens", "is -1; at least 1"),
        ({"max_tokens": 241}, "max_tokens", "is 241; with the prompt.s 16 tokens .* above 256"),
        ({"num_samples": 0}, "num_samples", "is 0; at least 1"),
        ({"temperature": -0.1}, "temperature", "-0.1"),
        ({"temperature": float("nan")}, "temperature", "nan"),
        ({"temperature": float("inf")}, "temperature", "inf"),
        ({"top_p": 0.0}, "top_p", "above 0"),
        ({"top_p": 1.01}, "top_p", "1.01"),
        ({"top_p": float("nan")}, "top_p", "nan"),
        ({"stop": ("a", "")}, "stop", "empty string"),
    ],
)
def test_bad_requests_name_the_field_and_the_value(
    engine: HfSampleEngine, change: dict[str, object], field: str, message: str
) -> None:
    with pytest.raises(FiretitanError, match=message) as caught:
        engine.submit(replace(REQUEST, **change))  # type: ignore[arg-type]
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_ARGUMENT, field)


def test_the_whole_context_can_be_used(engine: HfSampleEngine) -> None:
    result = engine.submit(replace(REQUEST, max_tokens=240, num_samples=1)).result()
    assert len(result.sequences[0].token_ids) == 240


def test_unknown_snapshots_are_refused(engine: HfSampleEngine) -> None:
    with pytest.raises(FiretitanError, match="'nope' is not loaded") as caught:
        engine.submit(replace(REQUEST, snapshot="nope"))
    assert caught.value.reason == Reason.SNAPSHOT_NOT_ACTIVE


def test_same_seed_same_tokens_other_samples_and_seeds_other_tokens(
    engine: HfSampleEngine,
) -> None:
    first, again, other = (
        engine.submit(replace(REQUEST, seed=seed)).result() for seed in (3, 3, 4)
    )
    tokens = [[s.token_ids.tolist() for s in r.sequences] for r in (first, again, other)]
    assert tokens[0] == tokens[1]
    assert tokens[0][0] != tokens[0][1]
    assert tokens[0] != tokens[2]


def test_more_samples_do_not_change_the_first_ones_of_a_branch(engine: HfSampleEngine) -> None:
    few = engine.submit(replace(REQUEST, num_samples=4)).result().sequences
    many = engine.submit(replace(REQUEST, num_samples=11)).result().sequences
    assert len(many) == 11
    for one, same in zip(few, many, strict=False):
        assert one.token_ids.tolist() == same.token_ids.tolist()


def test_one_token_is_enough_to_get_the_prompts_logprobs(engine: HfSampleEngine) -> None:
    result = engine.submit(
        replace(REQUEST, num_samples=1, max_tokens=1, prompt_logprobs=True)
    ).result()
    assert result.prompt.logprobs is not None
    assert result.prompt.logprobs.shape == PROMPT.shape
    assert np.isnan(result.prompt.logprobs[0])
    assert (result.prompt.logprobs[1:] < 0).all()
    assert len(result.sequences[0].token_ids) == 1
    assert result.snapshot == ""
    assert result.times.queue_s >= 0.0 < result.times.prefill_s


def test_a_stop_token_ends_the_sequence_and_stays_in_it(engine: HfSampleEngine) -> None:
    free = engine.submit(REQUEST).result().sequences
    token = int(free[0].token_ids[5])
    stopped = engine.submit(replace(REQUEST, stop_token_ids=(token,))).result().sequences
    for before, after in zip(free, stopped, strict=True):
        tokens = before.token_ids.tolist()
        if token in tokens:
            assert after.token_ids.tolist() == tokens[: tokens.index(token) + 1]
            assert after.stop_reason is StopReason.STOP
            assert len(after.sampling_logprobs) == len(after.token_ids)
        else:
            assert after.stop_reason is StopReason.LENGTH


def test_the_models_own_end_token_counts_unless_switched_off(engine: HfSampleEngine) -> None:
    request = replace(REQUEST, num_samples=40, max_tokens=60, seed=9, temperature=1.5)
    free = engine.submit(request).result().sequences
    assert all(sequence.stop_reason is StopReason.LENGTH for sequence in free)
    assert any(257 in sequence.token_ids for sequence in free)
    ended = engine.submit(replace(request, use_eos=True)).result().sequences
    for before, after in zip(free, ended, strict=True):
        tokens = before.token_ids.tolist()
        expected = tokens[: tokens.index(257) + 1] if 257 in tokens else tokens
        assert after.token_ids.tolist() == expected


def test_a_stop_string_ends_at_the_token_that_completes_it(engine: HfSampleEngine) -> None:
    free = engine.submit(replace(REQUEST, num_samples=1, max_tokens=30)).result().sequences[0]
    texts = [engine._decode_text(free.token_ids[: n + 1].tolist()) for n in range(30)]
    end = next(n for n in range(8, 30) if "\ufffd" not in texts[n][-2:] and len(texts[n]) > 4)
    stop = texts[end][-2:]
    first = next(n for n in range(30) if stop in texts[n])
    stopped = engine.submit(
        replace(REQUEST, num_samples=1, max_tokens=30, stop=("never!", stop))
    ).result()
    (sequence,) = stopped.sequences
    assert sequence.token_ids.tolist() == free.token_ids[: first + 1].tolist()
    assert sequence.stop_reason is StopReason.STOP


def test_progress_brings_every_token_once_before_the_end(engine: HfSampleEngine) -> None:
    told: list[NewTokens] = []
    future = engine.submit(replace(REQUEST, num_samples=6), told.extend)
    sequences = future.result().sequences
    for index, sequence in enumerate(sequences):
        mine = [news for news in told if news.sequence == index]
        assert [news.first_token for news in mine] == list(range(len(mine)))
        assert np.concatenate([news.token_ids for news in mine]).tolist() == (
            sequence.token_ids.tolist()
        )
        logprobs = np.concatenate([news.sampling_logprobs for news in mine])
        assert logprobs.tobytes() == sequence.sampling_logprobs.tobytes()
        assert [news.stop_reason for news in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].stop_reason is sequence.stop_reason


def test_cancelling_frees_the_rows_and_touches_nobody(engine: HfSampleEngine) -> None:
    expected = engine.submit(REQUEST).result().sequences[0].token_ids.tolist()
    running = [engine.submit(replace(LONG, seed=seed)) for seed in (1, 2)]
    waiting = engine.submit(LONG)
    mine = engine.submit(REQUEST)
    time.sleep(0.02)
    assert running[0].cancel()
    assert waiting.cancel()
    assert mine.result().sequences[0].token_ids.tolist() == expected
    assert not running[1].done()
    with pytest.raises(CancelledError):
        running[0].result()
    assert len(running[1].result().sequences) == 4


def test_one_requests_trouble_is_its_own(
    engine: HfSampleEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.submit(REQUEST).result().sequences[1].token_ids.tolist()
    poison = replace(REQUEST, prompt=PROMPT[:7], max_tokens=9)
    run = engine._loaded.run_packed

    def fails_with_poison(tokens, positions, layout):
        if any(cache.length == 10 and cache.prompt_length == 7 for cache in layout.caches):
            raise MemoryError("no room")
        return run(tokens, positions, layout)

    monkeypatch.setattr(engine._loaded, "run_packed", fails_with_poison)
    bad, good = engine.submit(poison), engine.submit(REQUEST)
    wait([bad, good])
    with pytest.raises(FiretitanError, match="not enough memory") as caught:
        bad.result()
    assert caught.value.reason == Reason.DEVICE_OUT_OF_MEMORY
    assert good.result().sequences[1].token_ids.tolist() == expected


def test_a_prompt_asked_for_again_runs_once_and_gives_the_same_bits(tiny_llama: Path) -> None:
    asked = [replace(REQUEST, seed=seed % 3, prompt_logprobs=seed > 3) for seed in range(6)]
    found = []
    for prompt_bytes, passes in ((0, 6), (1 << 20, 2)):
        config = SamplerConfig(max_rows=8, branch_rows=4, prompt_bytes=prompt_bytes)
        engine = HfSampleEngine(ModelSpec(str(tiny_llama)), config)
        prefill, prompts = engine._decoder.prefill, []
        engine._decoder.prefill = lambda prompt, wanted, run=prefill, seen=prompts: (
            seen.append(prompt) or run(prompt, wanted)
        )
        found.append([bits(engine.submit(request).result()) for request in asked])
        assert len(prompts) == passes
        engine.close()
    assert found[0] == found[1]


def test_a_small_cache_serves_one_after_the_other(tiny_llama: Path) -> None:
    config = SamplerConfig(max_rows=8, branch_rows=4, cache_bytes=1)
    engine = HfSampleEngine(ModelSpec(str(tiny_llama)), config)
    futures = [engine.submit(replace(REQUEST, num_samples=6, seed=seed)) for seed in range(3)]
    assert [len(future.result().sequences) for future in futures] == [6, 6, 6]
    engine.close()


def test_a_full_queue_says_so(tiny_llama: Path) -> None:
    config = SamplerConfig(max_rows=4, branch_rows=4, max_waiting=1)
    engine = HfSampleEngine(ModelSpec(str(tiny_llama)), config)
    futures = []
    with pytest.raises(FiretitanError) as caught:
        for _ in range(20):
            futures.append(engine.submit(LONG))
    assert caught.value.reason == Reason.QUEUE_FULL
    engine.close()


def test_closing_fails_what_is_left(tiny_llama: Path) -> None:
    engine = HfSampleEngine(ModelSpec(str(tiny_llama)), SamplerConfig(max_rows=4, branch_rows=4))
    futures = [engine.submit(LONG) for _ in range(3)]
    engine.close()
    for future in futures:
        with pytest.raises(FiretitanError) as caught:
            future.result(timeout=10)
        assert caught.value.reason == Reason.CLOSED
    with pytest.raises(FiretitanError) as caught:
        engine.submit(REQUEST)
    assert caught.value.reason == Reason.CLOSED
