"""Sampling clients against a real daemon and the toy engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tinker
from firetitan.v1 import checkpoint_service_pb2
from support.daemon import DaemonProcess
from support.stubs import Stubs

from firetitan_client import (
    ClientClosed,
    DeploymentSampler,
    FiretitanSamplingClient,
    FiretitanServiceClient,
    FiretitanTrainingClient,
    SaveSamplerResult,
)

pytestmark = pytest.mark.timeout(120)

TOY = "firetitan/toy"
PROMPT = tinker.ModelInput.from_ints([1, 2, 3])
PARAMS = tinker.SamplingParams(max_tokens=12, seed=7)


@pytest.fixture
def service(daemon: DaemonProcess) -> Iterator[FiretitanServiceClient]:
    with FiretitanServiceClient.from_firetitan_config(
        base_model=TOY, lora_rank=4, seed=5, deployment_id="serve", address=daemon.address
    ) as service:
        yield service


@pytest.fixture
def policy(service: FiretitanServiceClient) -> FiretitanTrainingClient:
    return service.create_training_client()


def train(policy: FiretitanTrainingClient) -> None:
    data = [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints([1, 2, 3, 4]),
            loss_fn_inputs={"target_tokens": [9, 9, 9, 9], "weights": [1.0] * 4},
        )
    ]
    policy.forward_backward(data, "cross_entropy")
    policy.optim_step(tinker.AdamParams(learning_rate=0.5)).result()


def tokens(response: Any) -> list[list[int]]:
    return [sequence.tokens for sequence in response.sequences]


def test_the_documented_lines(
    service: FiretitanServiceClient, policy: FiretitanTrainingClient
) -> None:
    train(policy)
    saved = policy.save_weights_for_sampler("step-1").result()
    sampler = service.create_sampling_client(model_path=saved.path)
    response = sampler.sample(PROMPT, num_samples=4, sampling_params=PARAMS).result()
    assert isinstance(response, tinker.SampleResponse)
    assert response.snapshot == saved.path
    assert saved.path.startswith("step-1-")
    assert len(response.sequences) == 4
    for sequence in response.sequences:
        assert isinstance(sequence, tinker.SampledSequence)
        assert sequence.stop_reason in ("stop", "length")
        assert len(sequence.tokens) == len(sequence.logprobs) <= 12
        assert sequence.logprobs == sequence.sampling_logprobs == sequence.inference_logprobs
    assert service.deployment_id == "serve"
    assert service.max_context_length > 0
    assert sampler.get_base_model() == TOY


def test_equal_seeds_equal_tokens_and_drawn_seeds_are_told(
    policy: FiretitanTrainingClient, service: FiretitanServiceClient
) -> None:
    sampler = service.create_sampling_client()
    first = sampler.sample(PROMPT, 3, PARAMS).result()
    assert tokens(first) == tokens(sampler.sample(PROMPT, 3, PARAMS).result())
    assert len({tuple(one) for one in tokens(first)}) > 1
    free = sampler.sample(PROMPT, 3, tinker.SamplingParams(max_tokens=12)).result()
    again = tinker.SamplingParams(max_tokens=12, seed=free.seed)
    assert tokens(sampler.sample(PROMPT, 3, again).result()) == tokens(free)
    assert free.snapshot == ""


def test_temperature_keeps_both_logprobs_apart(
    policy: FiretitanTrainingClient, service: FiretitanServiceClient
) -> None:
    params = tinker.SamplingParams(max_tokens=12, seed=7, temperature=0.5)
    (sequence,) = service.create_sampling_client().sample(PROMPT, 1, params).result().sequences
    assert sequence.logprobs == sequence.sampling_logprobs
    assert sequence.sampling_logprobs != sequence.inference_logprobs


def test_following_and_pinned_clients(
    service: FiretitanServiceClient, policy: FiretitanTrainingClient
) -> None:
    train(policy)
    first = policy.save_weights_for_sampler_ext("a")
    assert isinstance(first, SaveSamplerResult)
    assert first.path == first.snapshot_name
    following = service.create_sampling_client(model_path=first.snapshot_name)
    pinned = service.create_sampling_client(model_path=first.path, pinned=True)
    before = tokens(following.sample(PROMPT, 2, PARAMS).result())
    train(policy)
    second = policy.save_weights_and_get_sampling_client("b")
    answers = [client.sample(PROMPT, 2, PARAMS).result() for client in (following, pinned, second)]
    assert [answer.snapshot.split("-")[0] for answer in answers] == ["b", "a", "b"]
    assert tokens(answers[1]) == before != tokens(answers[0])
    assert "pinned to snapshots/a-" in repr(pinned)
    pinned.close()
    with pytest.raises(ClientClosed):
        pinned.sample(PROMPT, 1, PARAMS)


def test_a_snapshot_made_for_the_moment_is_removed_by_itself(
    daemon: DaemonProcess, policy: FiretitanTrainingClient
) -> None:
    policy.save_weights_and_get_sampling_client()
    policy.save_weights_and_get_sampling_client("mine")
    stubs = Stubs(daemon.address)
    request = checkpoint_service_pb2.ListSnapshotsRequest()
    rows = stubs.checkpoints.ListSnapshots(request).snapshots
    stays = {row.name.split("/")[1].split("-")[0]: not row.HasField("expire_time") for row in rows}
    assert stays == {"sampler": False, "mine": True}


def test_a_name_used_twice_gets_a_number(
    policy: FiretitanTrainingClient, caplog: pytest.LogCaptureFixture
) -> None:
    first = policy.save_weights_for_sampler("same").result().path
    second = policy.save_weights_for_sampler("same").result().path
    suffix = first.removeprefix("same-")
    assert second == f"same.2-{suffix}"
    assert any("exists and never changes" in record.message for record in caplog.records)


def test_missing_snapshot_is_a_runtime_error_that_names_it(
    service: FiretitanServiceClient, policy: FiretitanTrainingClient
) -> None:
    with pytest.raises(RuntimeError, match="Hotload failed for sampler snapshot 'nothing'"):
        service.create_sampling_client(model_path="nothing")
    with pytest.raises(RuntimeError, match="nothing"):
        service.hotload_sampler_snapshot("nothing")
    with pytest.raises(KeyError, match="nothing"):
        service.create_sampling_client(model_path="nothing", pinned=True)
    sampler = service.create_sampling_client()
    assert sampler.sample(PROMPT, 1, PARAMS).result().sequences


def test_stops(policy: FiretitanTrainingClient, service: FiretitanServiceClient) -> None:
    sampler = service.create_sampling_client()
    (free,) = tokens(sampler.sample(PROMPT, 1, PARAMS).result())
    params = tinker.SamplingParams(max_tokens=12, seed=7, stop=[free[2]])
    (stopped,) = sampler.sample(PROMPT, 1, params).result().sequences
    end = free.index(free[2]) + 1
    assert stopped.tokens == free[:end]
    assert stopped.stop_reason == "stop"


def test_prompt_logprobs(policy: FiretitanTrainingClient, service: FiretitanServiceClient) -> None:
    sampler = service.create_sampling_client()
    found = sampler.compute_logprobs(PROMPT).result()
    assert found[0] is None
    data = [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints([1, 2]),
            loss_fn_inputs={"target_tokens": [2, 3], "weights": [1.0, 1.0]},
        )
    ]
    output = policy.forward(data, "cross_entropy").result()
    assert found[1:] == pytest.approx(output.loss_fn_outputs[0]["logprobs"].data, abs=1e-5)
    last = sampler.sample(
        PROMPT, 1, PARAMS, include_prompt_logprobs=True, prompt_logprobs_last_n=1
    ).result()
    assert last.prompt_logprobs == [None, None, found[2]]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"prompt": []}, ValueError, "prompt: has no tokens"),
        ({"num_samples": 0}, ValueError, "num_samples: is 0"),
        ({"topk_prompt_logprobs": -3}, ValueError, "topk_prompt_logprobs: is -3"),
        ({"images": [b"png"]}, NotImplementedError, "images"),
        ({"prompt_logprobs_last_n": 3}, ValueError, "include_prompt_logprobs"),
        (
            {"sampling_params": tinker.SamplingParams(stop=[""])},
            ValueError,
            r"stop\[0\]",
        ),
    ],
)
def test_wrong_arguments_raise_in_the_call(
    service: FiretitanServiceClient,
    arguments: dict[str, Any],
    error: type[Exception],
    text: str,
) -> None:
    sampler = service.create_sampling_client()
    with pytest.raises(error, match=text):
        sampler.sample(**{"prompt": PROMPT, "sampling_params": PARAMS, **arguments})


def test_what_the_worker_refuses(service: FiretitanServiceClient) -> None:
    sampler = service.create_sampling_client()
    with pytest.raises(ValueError, match="out of vocabulary"):
        sampler.sample([1, 99], 1, PARAMS).result()
    with pytest.raises(ValueError, match="temperature"):
        sampler.sample(PROMPT, 1, tinker.SamplingParams(temperature=-1.0)).result()


async def test_async_sampling(service: FiretitanServiceClient) -> None:
    sampler = await service.create_sampling_client_async()
    many = [asyncio.create_task(sampler.sample(PROMPT, 1, PARAMS).coroutine()) for _ in range(20)]
    answers = await asyncio.gather(*many)
    assert all(tokens(answer) == tokens(answers[0]) for answer in answers)
    assert tokens(await sampler.sample_async(PROMPT, 1, PARAMS)) == tokens(answers[0])
    opening = service.create_sampling_client()  # inside a loop: at once
    assert tokens(await opening.sample(PROMPT, 1, PARAMS)) == tokens(answers[0])


def test_sampling_goes_on_over_a_daemon_restart(
    daemon: DaemonProcess, service: FiretitanServiceClient
) -> None:
    sampler = service.create_sampling_client()
    wanted = tokens(sampler.sample(PROMPT, 2, PARAMS).result())
    daemon.kill()
    pending = [sampler.sample(PROMPT, 2, PARAMS) for _ in range(4)]
    starting = threading.Timer(0.3, daemon.start)
    starting.start()
    assert [tokens(future.result(60)) for future in pending] == [wanted] * 4
    starting.join()


class WordTokenizer:
    """Enough of a tokenizer: a word is its number."""

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> list[int]:
        return [int(word) for message in messages for word in message["content"].split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(str(token) for token in ids)


async def test_deployment_sampler(
    daemon: DaemonProcess, service: FiretitanServiceClient, policy: FiretitanTrainingClient
) -> None:
    train(policy)
    saved = await policy.save_weights_for_sampler("s")
    sampler = await service.create_deployment_sampler(saved.path, tokenizer=WordTokenizer())
    options: dict[str, Any] = {"max_tokens": 8, "seed": 3}
    made = await sampler.sample_with_prompt_tokens([1, 2, 3], n=2, **options)
    assert len(made) == 2
    for one in made:
        assert one.full_tokens[:3] == [1, 2, 3]
        assert one.prompt_len == 3
        assert one.completion_len == len(one.full_tokens) - 3 == len(one.sampling_logprobs or [])
        # At temperature 1 nothing lies between the two.
        assert one.inference_logprobs == pytest.approx(one.sampling_logprobs)
        assert one.text == " ".join(str(token) for token in one.full_tokens[3:])
        assert one.snapshot == saved.path
        assert one.finish_reason in ("stop", "length")
    chat = [{"role": "user", "content": "1 2 3"}]
    assert await sampler.sample_with_tokens(chat, n=2, **options) == made
    metrics = sampler.drain_metrics()
    assert [one.prompt_tokens for one in metrics] == [3, 3]
    assert sampler.drain_metrics() == []
    assert await sampler.sample_with_prompt_tokens([1, 2, 3], max_seq_len=3) == []
    with pytest.raises(ValueError, match="max_seq_len is 3"):
        await sampler.sample_with_prompt_tokens_result([1, 2, 3], max_seq_len=3)
    with pytest.raises(NotImplementedError, match="images"):
        await sampler.sample_with_tokens(chat, images=[b"png"])
    with pytest.raises(TypeError, match="'temprature'"):
        await sampler.sample_with_prompt_tokens([1, 2, 3], temprature=1)
    elsewhere = DeploymentSampler(sampler.base_url, sampler.model)
    same = await elsewhere.sample_with_prompt_tokens([1, 2, 3], n=2, **options)
    assert [one.full_tokens for one in same] == [one.full_tokens for one in made]
    with pytest.raises(ValueError, match="needs a tokenizer"):
        await elsewhere.sample_with_tokens(chat)
    plain = FiretitanSamplingClient.create(sampler.base_url, sampler.model)
    answer = await plain.sample([1, 2, 3], 2, tinker.SamplingParams(max_tokens=8, seed=3))
    assert [[1, 2, 3, *one.tokens] for one in answer.sequences] == [one.full_tokens for one in made]


def test_attaching_anothers_deployment_asks_for_a_sync(
    daemon: DaemonProcess, service: FiretitanServiceClient, policy: FiretitanTrainingClient
) -> None:
    assert not service.requires_initial_sampler_sync()
    with FiretitanServiceClient.from_firetitan_config(
        base_model=TOY,
        lora_rank=4,
        deployment_id="serve",
        address=daemon.address,
        cleanup_deployment_on_close="delete",
    ) as guest:
        trainer = guest.create_training_client()
        assert guest.requires_initial_sampler_sync()
        guest.hotload_sampler_snapshot(trainer.save_weights_for_sampler("mine").result())
        assert not guest.requires_initial_sampler_sync()
    answer = service.create_sampling_client().sample(PROMPT, 1, PARAMS).result()  # still there
    assert answer.snapshot.startswith("mine-")


def test_created_deployments_are_cleaned_up(daemon: DaemonProcess) -> None:
    with FiretitanServiceClient.from_firetitan_config(
        base_model=TOY,
        address=daemon.address,
        cleanup_deployment_on_close="delete",
        cleanup_trainer_on_close=True,
    ) as service:
        service.create_training_client()
        name = service.deployment_id
        assert name.startswith("toy-")
    with pytest.raises(KeyError, match=name):
        FiretitanSamplingClient.create(daemon.address, name).sample(PROMPT, 1, PARAMS).result()


def test_scaled_to_zero_comes_back(daemon: DaemonProcess) -> None:
    def service() -> FiretitanServiceClient:
        return FiretitanServiceClient.from_firetitan_config(
            base_model=TOY,
            deployment_id="sleeper",
            address=daemon.address,
            cleanup_deployment_on_close="scale_to_zero",
        )

    with service() as first:
        policy = first.create_training_client()
        train(policy)
        sampler = first.create_sampling_client(policy.save_weights_for_sampler("w").result())
        wanted = tokens(sampler.sample(PROMPT, 2, PARAMS).result())
    again = service()
    assert tokens(again.create_sampling_client().sample(PROMPT, 2, PARAMS).result()) == wanted


def test_without_a_deployment(daemon: DaemonProcess) -> None:
    service = FiretitanServiceClient.from_firetitan_config(
        base_model=TOY, create_deployment=False, address=daemon.address
    )
    with pytest.raises(NotImplementedError, match="create_deployment=False"):
        service.create_sampling_client()


def test_numpy_prompts(service: FiretitanServiceClient) -> None:
    sampler = service.create_sampling_client()
    wanted = tokens(sampler.sample(PROMPT, 1, PARAMS).result())
    assert tokens(sampler.sample(np.array([1, 2, 3]), 1, PARAMS).result()) == wanted
