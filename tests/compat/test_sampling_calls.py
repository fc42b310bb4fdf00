"""Every sampling call, on a real daemon and the toy model."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import tinker
from support.daemon import DaemonProcess

from firetitan_client import (
    AdaptiveConcurrencyController,
    ClientClosed,
    DeploymentSampler,
    FiretitanSamplingParams,
    FiretitanServiceClient,
    FixedConcurrencyController,
    ServerMetrics,
)
from firetitan_client.types import FiretitanSampledSequence, FiretitanSampleResponse

pytestmark = pytest.mark.timeout(180)
TOY = "firetitan/toy"
PARAMS = tinker.SamplingParams(max_tokens=6, seed=3)


def test_what_a_sampling_client_is(service: FiretitanServiceClient, tiny_llama: Path) -> None:
    sampler = service.create_sampling_client(tokenizer=str(tiny_llama))
    assert sampler.get_base_model() == asyncio.run(sampler.get_base_model_async()) == TOY
    tokenizer = sampler.get_tokenizer()
    assert tokenizer.decode(tokenizer.encode("Hi")) == "Hi"
    assert sampler.get_telemetry() is None
    assert sampler.result(60) is sampler.future().result() is sampler
    assert asyncio.run(sampler.result_async(60)) is asyncio.run(sampler.coroutine()) is sampler
    native = sampler.deployment_sampler
    assert isinstance(native, DeploymentSampler)
    assert native is sampler.deployment_sampler
    assert native.model == service.deployment_id
    (made,) = asyncio.run(native.sample_with_prompt_tokens([1, 2], max_tokens=6, seed=3))
    answer = sampler.sample([1, 2], 1, PARAMS).result()
    assert made.full_tokens == [1, 2, *answer.sequences[0].tokens]
    assert len(sampler.deployment_sampler.drain_metrics()) == 1


def test_retry_settings_are_told(
    service: FiretitanServiceClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "firetitan"):
        sampler = service.create_sampling_client(retry_config=object())
    assert "retry_config is ignored" in caplog.text
    assert sampler.sample([1], 1, PARAMS).result().sequences


def test_closing_a_sampling_client(service: FiretitanServiceClient) -> None:
    with service.create_sampling_client() as sampler:
        pending = sampler.sample([1], 1, PARAMS)
    sampler.close()
    assert pending.result().sequences[0].tokens
    with pytest.raises(ClientClosed):
        sampler.sample([1], 1, PARAMS)


def test_firetitans_sampling_params(service: FiretitanServiceClient) -> None:
    sampler = service.create_sampling_client()
    ours = FiretitanSamplingParams(
        max_tokens=6, seed=3, stop=[63], temperature=0.7, top_k=5, top_p=0.9
    )
    theirs = tinker.SamplingParams(
        max_tokens=6, seed=3, stop=[63], temperature=0.7, top_k=5, top_p=0.9
    )
    first, second = (sampler.sample([1, 2], 2, params).result() for params in (ours, theirs))
    assert [one.tokens for one in first.sequences] == [one.tokens for one in second.sequences]


def test_result_types(service: FiretitanServiceClient) -> None:
    answer = service.create_sampling_client().sample([1, 2], 1, PARAMS).result()
    assert isinstance(answer, FiretitanSampleResponse)
    assert isinstance(answer, tinker.SampleResponse)
    assert (answer.snapshot, answer.seed) == ("", 3)
    (sequence,) = answer.sequences
    assert isinstance(sequence, FiretitanSampledSequence)
    assert isinstance(sequence, tinker.SampledSequence)
    assert len(sequence.sampling_logprobs) == len(sequence.inference_logprobs) > 0
    assert sequence.routing_matrices is None


def test_a_deployment_sampler_is_closed(service: FiretitanServiceClient, tiny_llama: Path) -> None:
    sampler = service.create_deployment_sampler(tokenizer=str(tiny_llama))
    assert isinstance(sampler.concurrency_controller, AdaptiveConcurrencyController)
    assert sampler.model == service.deployment_id
    assert sampler.base_url == service.base_url.partition("#")[0]
    tokenizer = sampler.tokenizer
    assert tokenizer.decode(tokenizer.encode("Hi")) == "Hi"
    assert sampler.result(60) is sampler.future().result() is sampler
    assert asyncio.run(sampler.result_async(60)) is asyncio.run(sampler.coroutine()) is sampler
    asyncio.run(sampler.sample_with_prompt_tokens([1], max_tokens=2))
    assert len(sampler.drain_metrics()) == 1
    assert sampler.drain_metrics() == []
    sampler.close()
    with pytest.raises(ClientClosed):
        asyncio.run(sampler.sample_with_prompt_tokens([1], max_tokens=2))
    with pytest.warns(DeprecationWarning, match="max_concurrency"):
        old = DeploymentSampler(sampler.base_url, service.deployment_id, max_concurrency=3)
    assert isinstance(old.concurrency_controller, FixedConcurrencyController)
    assert old.concurrency_controller.window_size == 3


async def test_sampler_options(service: FiretitanServiceClient, tiny_llama: Path) -> None:
    sampler = await service.create_deployment_sampler(tokenizer=str(tiny_llama))
    options: dict[str, Any] = {"max_tokens": 6, "seed": 3, "temperature": 0.7}
    plain = await sampler.sample_with_prompt_tokens([1, 2], 2, **options)
    same = await sampler.sample_with_prompt_tokens(
        [1, 2],
        2,
        **options,
        prompt_cache_key="k",
        http_timeout=600,
        logprobs=True,
        sampling_context={"a": "b"},
        timeout_diagnostic_context={"a": "b"},
        top_p=1.0,
        top_k=0,
    )
    assert same == plain
    assert {(one.logprobs_echoed, one.routing_matrices) for one in plain} == {(False, None)}
    narrow = await sampler.sample_with_prompt_tokens([1, 2], 2, top_k=1, **options)
    assert narrow[0].full_tokens == narrow[1].full_tokens
    nucleus = await sampler.sample_with_prompt_tokens([1, 2], 2, top_p=1e-6, **options)
    assert nucleus[0].full_tokens == nucleus[1].full_tokens
    stop = plain[0].full_tokens[2]
    (stopped, _) = await sampler.sample_with_prompt_tokens([1, 2], 2, stop=[stop], **options)
    assert (stopped.completion_len, stopped.finish_reason) == (1, "stop")
    with pytest.raises(TypeError, match="'beams'"):
        await sampler.sample_with_prompt_tokens([1, 2], beams=4)


async def test_server_metrics(toy_daemon: DaemonProcess, service: FiretitanServiceClient) -> None:
    sampler = DeploymentSampler(toy_daemon.address, service.deployment_id)
    result = await sampler.sample_with_prompt_tokens_result([1, 2, 3], max_tokens=4, seed=1)
    (metrics,) = sampler.drain_metrics()
    assert metrics == result.server_metrics
    assert (metrics.prompt_tokens, metrics.completion_tokens) == (
        3,
        result.completions[0].completion_len,
    )
    assert metrics.prefill_duration >= 0 and metrics.prefill_queue_duration > 0
    nobodys = {
        "tokenizer_queue_duration",
        "tokenizer_duration",
        "client_ttft",
        "retry_attempt",
        "response_request_id",
        "backend_host",
    }
    for one in dataclasses.fields(ServerMetrics):
        found = getattr(metrics, one.name)
        assert (found == one.default) == (one.name in {*nobodys, "transport_error"}), one.name
