"""Scores, echoes and metrics of samples against a real daemon and the toy engine."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from support.daemon import DaemonProcess
from support.stubs import Stubs

from firetitan_client import (
    AdaptiveConcurrencyController,
    DeploymentSampler,
    DeploymentSamplerTimeoutError,
    FiretitanSamplingClient,
    FiretitanSamplingParams,
)

pytestmark = pytest.mark.timeout(180)

PROMPT = [1, 2, 3, 7, 5]
PARAMS = tinker.SamplingParams(max_tokens=6, seed=7, temperature=0.5, stop=[])
OPTIONS: dict[str, Any] = {"max_tokens": 6, "seed": 7, "temperature": 0.5, "stop": []}
CONTEXT = 8192


class WordTokenizer:
    """Enough of a tokenizer: a token's text is its number and a space."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{token} " for token in ids)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    daemon = DaemonProcess(Path(tmp_path_factory.mktemp("scores")) / "home")
    daemon.start()
    stubs = Stubs(daemon.address)
    stubs.create_deployment()
    stubs.channel.close()
    yield daemon.address
    daemon.stop()


@pytest.fixture
def client(address: str) -> FiretitanSamplingClient:
    return FiretitanSamplingClient.create(address, "d")


@pytest.fixture
def sampler(address: str) -> DeploymentSampler:
    return DeploymentSampler(address, "d", tokenizer=WordTokenizer())


def test_the_likeliest_tokens_of_prompt_and_sample(client: FiretitanSamplingClient) -> None:
    answer = client.sample(
        PROMPT, 2, PARAMS, True, topk_prompt_logprobs=64, topk_sample_logprobs=64
    ).result()
    assert answer.topk_prompt_logprobs[0] is None
    for position in range(1, len(PROMPT)):
        row = answer.topk_prompt_logprobs[position]
        assert [value for _, value in row] == sorted((value for _, value in row), reverse=True)
        assert np.exp([value for _, value in row]).sum() == pytest.approx(1.0, abs=1e-4)
        assert dict(row)[PROMPT[position]] == pytest.approx(answer.prompt_logprobs[position])
    for sequence in answer.sequences:
        for token, logprob, row in zip(
            sequence.tokens, sequence.inference_logprobs, sequence.topk_logprobs, strict=True
        ):
            assert dict(row)[token] == pytest.approx(logprob, abs=1e-6)
    fewer = client.sample(PROMPT, 1, PARAMS, True, topk_prompt_logprobs=2).result()
    assert [row[:2] for row in answer.topk_prompt_logprobs[1:]] == fewer.topk_prompt_logprobs[1:]
    assert not fewer.sequences[0].topk_logprobs


def test_given_tokens_dense_and_sparse(client: FiretitanSamplingClient) -> None:
    every = client.sample(PROMPT, 1, PARAMS, True, topk_prompt_logprobs=64).result()
    dense = np.array([[2, -1, 4], [3, 3, -1], [-1, -1, -1], [0, 63, 5]])
    found = client.sample(PROMPT, 1, PARAMS, target_prompt_logprobs=dense).result()
    assert found.prompt_logprobs is None
    got = found.target_prompt_logprobs.to_numpy()
    assert got.shape == (4, 3)
    for row, column in np.ndindex(4, 3):
        wanted = 0.0
        if dense[row, column] >= 0:
            wanted = dict(every.topk_prompt_logprobs[row + 1])[dense[row, column]]
        assert got[row, column] == pytest.approx(wanted)
    sparse = tinker.TensorData(
        data=[9, 3],
        dtype="int64",
        shape=[4, 40],
        sparse_crow_indices=[0, 0, 1, 1, 2],
        sparse_col_indices=[17, 39],
    )
    answer = client.sample(PROMPT, 1, PARAMS, target_prompt_logprobs=sparse).result()
    cells = answer.target_prompt_logprobs
    assert list(cells.sparse_crow_indices) == [0, 0, 1, 1, 2]
    assert list(cells.sparse_col_indices) == [17, 39]
    tops = [dict(row) for row in every.topk_prompt_logprobs[1:]]
    assert list(cells.data) == pytest.approx([tops[1][9], tops[3][3]])


def test_alternatives_and_the_end_of_the_prompt(client: FiretitanSamplingClient) -> None:
    answer = client.sample(
        PROMPT,
        1,
        PARAMS,
        True,
        topk_prompt_logprobs=3,
        prompt_alt_tokens_k=2,
        prompt_logprobs_last_n=2,
    ).result()
    assert answer.prompt_logprobs[:3] == [None] * 3 and None not in answer.prompt_logprobs[3:]
    assert [row is None for row in answer.topk_prompt_logprobs] == [True] * 3 + [False] * 2
    assert answer.prompt_alt_tokens.tokens.to_numpy().shape == (4, 2)
    assert (answer.prompt_alt_tokens.logprobs.to_numpy() < 0).all()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"target_prompt_logprobs": [[1]]}, r"target_prompt_logprobs: has shape \[1, 1\]"),
        ({"target_prompt_logprobs": [[0.5]] * 4}, "target_prompt_logprobs: is float64"),
        ({"prompt_logprobs_last_n": 2}, "include_prompt_logprobs"),
        (
            {"prompt_logprobs_last_n": 5, "include_prompt_logprobs": True},
            "prompt_logprobs_last_n: is 5",
        ),
        ({"prompt_alt_tokens_k": -1}, "prompt_alt_tokens_k: is -1"),
        ({"topk_prompt_logprobs": 65}, "topk_prompt_logprobs: is 65; at most 64"),
    ],
)
def test_refusals_name_the_argument(
    client: FiretitanSamplingClient, arguments: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        client.sample(PROMPT, 1, PARAMS, **arguments).result()


def test_a_prompt_that_fills_the_context_is_scored(client: FiretitanSamplingClient) -> None:
    prompt = [1 + position % 60 for position in range(CONTEXT)]
    found = client.compute_logprobs(prompt).result()
    assert len(found) == CONTEXT and found[0] is None and None not in found[1:]
    assert found[1:60] == pytest.approx(found[61:120])  # the toy looks at one token only
    with pytest.raises(ValueError, match="max_tokens"):
        client.sample(prompt, 1, tinker.SamplingParams(max_tokens=1)).result()
    with pytest.raises(ValueError, match="max_tokens: is 0"):
        client.sample(PROMPT, 1, tinker.SamplingParams(max_tokens=0))


def test_top_sampling_logprobs_where_nothing_truncates(client: FiretitanSamplingClient) -> None:
    params = FiretitanSamplingParams(max_tokens=3, seed=1, stop=[], top_sampling_logprobs=2)
    (sequence,) = client.sample(PROMPT, 1, params).result().sequences
    assert [len(row) for row in sequence.topk_logprobs] == [2, 2, 2]
    hot = FiretitanSamplingParams(temperature=0.5, top_sampling_logprobs=2)
    with pytest.raises(NotImplementedError, match="top_sampling_logprobs"):
        client.sample(PROMPT, 1, hot)


async def test_echo_has_one_entry_less_than_tokens(
    sampler: DeploymentSampler, client: FiretitanSamplingClient
) -> None:
    (plain,) = await sampler.sample_with_prompt_tokens(PROMPT, 1, **OPTIONS)
    (whole,) = await sampler.sample_with_prompt_tokens(
        PROMPT, 1, echo=True, top_logprobs=5, **OPTIONS
    )
    scored = await client.compute_logprobs(whole.full_tokens)
    assert whole.full_tokens == plain.full_tokens
    assert whole.logprobs_echoed and whole.echoed_prompt_logprob_count == len(PROMPT) - 1
    assert whole.inference_logprobs == pytest.approx(scored[1:], abs=1e-5)
    assert len(whole.inference_logprobs or []) == len(whole.full_tokens) - 1
    assert whole.sampling_logprobs == [None] * 4 + (plain.sampling_logprobs or [])
    assert [len(row) for row in whole.inference_topk_token_ids or []] == [5] * 10
    for token, logprob, ids, values in zip(
        whole.full_tokens[1:],
        whole.inference_logprobs or [],
        whole.inference_topk_token_ids or [],
        whole.inference_topk_logprobs or [],
        strict=True,
    ):
        assert dict(zip(ids, values, strict=True)).get(token, logprob) == pytest.approx(logprob)
    for last, count in ((2, 2), (5, 4), (9, 4), (0, 0)):
        (end,) = await sampler.sample_with_prompt_tokens(PROMPT, 1, echo_last=last, **OPTIONS)
        assert end.echoed_prompt_logprob_count == count
        assert end.logprobs_echoed == (last > 0)
        assert end.inference_logprobs == (whole.inference_logprobs or [])[4 - count :]
    assert not plain.logprobs_echoed and plain.inference_topk_logprobs is None


async def test_the_completions_response(sampler: DeploymentSampler) -> None:
    options = {**OPTIONS, "logprobs": True, "echo": True, "raw_output": True, "top_logprobs": 3}
    response, metrics = await sampler.async_completions_stream(PROMPT, http_timeout=60, **options)
    (choice,) = response["choices"]
    shown = choice["raw_output"]["completion_token_ids"]
    content = choice["logprobs"]["content"]
    assert shown[: len(PROMPT)] == PROMPT and len(shown) == len(content) == len(PROMPT) + 6
    assert [one["token_id"] for one in content] == shown
    assert [one["token"] for one in content] == [f"{token} " for token in shown]
    assert choice["text"] == "".join(f"{token} " for token in shown)
    assert choice["finish_reason"] == "length"
    assert content[0] == {
        "token_id": 1,
        "token": "1 ",
        "logprob": 0.0,
        "sampling_logprob": None,
        "top_logprobs": [{"token_id": 1, "logprob": 0.0}],
    }
    assert all(len(one["top_logprobs"]) == 3 for one in content[1:])
    assert [one["sampling_logprob"] is None for one in content] == [True] * 5 + [False] * 6
    (same,) = await sampler.sample_with_prompt_tokens(PROMPT, 1, echo=True, **OPTIONS)
    assert [one["logprob"] for one in content[1:]] == same.inference_logprobs
    assert response["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    assert metrics in sampler.drain_metrics()
    plain, _ = await sampler.async_completions_stream(PROMPT, **OPTIONS)
    assert set(plain["choices"][0]) == {"index", "text", "finish_reason"}
    assert plain["choices"][0]["text"] == "".join(f"{token} " for token in shown[5:])


async def test_a_teacher_scores_a_text_that_fills_the_context(sampler: DeploymentSampler) -> None:
    prompt = [1 + position % 60 for position in range(CONTEXT)]
    response, _ = await sampler.async_completions_stream(
        prompt, max_tokens=0, echo=True, logprobs=True
    )
    content = response["choices"][0]["logprobs"]["content"]
    assert [one["token_id"] for one in content] == prompt
    with pytest.raises(ValueError, match="max_tokens: is 0"):
        await sampler.async_completions_stream(prompt, max_tokens=0)


async def test_the_rules_of_max_seq_len(sampler: DeploymentSampler) -> None:
    assert await sampler.sample_with_prompt_tokens(PROMPT, max_seq_len=5, **OPTIONS) == []
    assert await sampler.sample_with_prompt_tokens(PROMPT, 2, max_seq_len=10, **OPTIONS) == []
    assert len(await sampler.sample_with_prompt_tokens(PROMPT, 2, max_seq_len=11, **OPTIONS)) == 2
    dropped = await sampler.sample_with_prompt_tokens_result(PROMPT, max_seq_len=10, **OPTIONS)
    assert dropped.completions == []
    kept = await sampler.sample_with_prompt_tokens_result(PROMPT, max_seq_len=11, **OPTIONS)
    assert len(kept.completions) == 1
    assert kept.server_metrics.completion_tokens == 6
    assert kept.wall_seconds > 0 and kept.logical_request_id


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"top_logprobs": 6}, ValueError, "top_logprobs: is 6; give 0 to 5"),
        ({"echo_last": -1}, ValueError, "nonnegative"),
        ({"echo_last": True}, ValueError, "nonnegative"),
        ({"images": ["x"]}, NotImplementedError, "images"),
        ({"n": 2}, ValueError, "one completion"),
        ({"temprature": 1}, TypeError, "'temprature'"),
    ],
)
async def test_wrong_options(
    sampler: DeploymentSampler, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        await sampler.async_completions_stream(PROMPT, **options)


async def test_a_request_that_is_late_in_every_try(sampler: DeploymentSampler) -> None:
    with pytest.raises(DeploymentSamplerTimeoutError) as late:
        await sampler.sample_with_prompt_tokens(
            PROMPT, 512, max_tokens=8000, stop=[], http_timeout=0.05
        )
    assert late.value.final_status == 504


def test_the_controller_hears_of_real_queues_in_every_loop(address: str) -> None:
    controller = AdaptiveConcurrencyController(
        initial_window=8, prefill_queue_target=1e-9, adjustment_interval=0
    )
    sampler = DeploymentSampler(address, "d", concurrency_controller=controller)

    async def burst() -> None:
        calls = [
            sampler.sample_with_prompt_tokens(PROMPT, 4, max_tokens=200, stop=[]) for _ in range(12)
        ]
        await asyncio.gather(*calls)

    for window in (8, 4, 2):
        assert controller.window_size == window
        asyncio.run(burst())
        step = controller.step_completed()
        assert step["requests"] == 12 and step["avg_pq"] > 0
    metrics = sampler.drain_metrics()
    assert len(metrics) == 36
    for one in metrics:
        assert one.prefill_queue_duration is not None and one.prefill_queue_duration >= 0
        assert one.server_processing_time is not None and one.server_ttft is not None
        assert 0 < one.server_ttft <= one.server_processing_time
        assert one.http_status_code == 200 and one.deployment == "d"
        assert one.generation_queue_duration is not None and one.generation_queue_duration >= 0
        assert one.generation_duration is not None and one.generation_duration > 0
        assert one.cached_prompt_tokens is not None
    assert max(one.num_concurrent_requests or 0 for one in metrics) > 1
