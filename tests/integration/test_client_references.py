"""Clients of the frozen model against a real daemon."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import tinker
from support.daemon import DaemonProcess
from support.data import ragged_data

from firetitan_client import FiretitanServiceClient, FiretitanTrainingClient

pytestmark = pytest.mark.timeout(300)

TOY = "firetitan/toy"
ADAM = tinker.AdamParams(learning_rate=5e-2)
DATA = ragged_data(seed=1, count=3, vocab_size=64)


def make_service(daemon: DaemonProcess, **config: Any) -> FiretitanServiceClient:
    settings = {"base_model": TOY, "lora_rank": 4, "create_deployment": False}
    return FiretitanServiceClient.from_firetitan_config(
        address=daemon.address, **{**settings, **config}
    )


def logprobs(client: FiretitanTrainingClient) -> list[list[float]]:
    outputs = client.forward(DATA, "cross_entropy").result().loss_fn_outputs
    return [output["logprobs"].tolist() for output in outputs]


def train(policy: FiretitanTrainingClient, steps: int = 2) -> None:
    for _ in range(steps):
        policy.forward_backward(DATA, "cross_entropy")
        policy.optim_step(ADAM).result()


def refused(call: Any, kind: type[Exception], *words: str) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert [word for word in words if word not in str(caught.value)] == []


def assert_only_forward_works(client: FiretitanTrainingClient) -> None:
    def loss(_: Any, values: list[Any]) -> Any:
        return sum(value.sum() for value in values), {}

    for name, call in {
        "forward_backward": lambda: client.forward_backward(DATA, "cross_entropy"),
        "forward_backward_custom": lambda: client.forward_backward_custom(DATA, loss),
        "forward_backward_contrastive": lambda: client.forward_backward_contrastive(
            DATA, num_queries=1, temperature=1.0
        ),
        "optim_step": lambda: client.optim_step(ADAM),
        "save_state": lambda: client.save_state("s"),
        "load_state": lambda: client.load_state("s"),
        "save_weights_for_sampler": lambda: client.save_weights_for_sampler("s"),
    }.items():
        refused(call, RuntimeError, name)
    refused(lambda: client.load_state_with_optimizer("s"), RuntimeError, "load_state")
    refused(lambda: client.save_weights_for_sampler_ext("s"), RuntimeError, "forward()")
    refused(client.save_weights_and_get_sampling_client, RuntimeError, "forward()")
    with pytest.raises(RuntimeError, match="forward"):
        asyncio.run(client.forward_backward_custom_async(DATA, loss))


@pytest.mark.parametrize("real", [False, True], ids=["toy", "hf"])
def test_a_base_client_is_the_model_before_training(
    daemon: DaemonProcess, tiny_llama: Path, real: bool
) -> None:
    model = str(tiny_llama) if real else TOY
    with make_service(daemon, base_model=model) as service:
        policy = service.create_training_client(model, lora_rank=4)
        untrained = logprobs(policy)
        base = service.create_base_training_client(base_model=model)
        beside = policy.create_base_training_client()
        policy.forward_backward(DATA, "cross_entropy").result()
        assert logprobs(base) == logprobs(beside)
        train(policy)
        # B of a fresh adapter is zero, so the untrained policy was the base model.
        assert logprobs(base) == logprobs(beside) == untrained != logprobs(policy)
        assert base.session_name == policy.session_name
        assert base.get_info().is_lora is False and policy.get_info().is_lora is True
        assert_only_forward_works(base)


def test_a_base_forward_between_backward_and_step_changes_neither(daemon: DaemonProcess) -> None:
    ends = []
    for number in range(2):
        with make_service(daemon, seed=3, trainer_job_id=f"t{number}") as service:
            policy = service.create_training_client()
            base = service.create_base_training_client()
            policy.forward_backward(DATA, "cross_entropy")
            if number:
                base.forward(DATA, "cross_entropy").result()
            norm = policy.optim_step(ADAM).result().metrics["grad_norm"]
            ends.append((norm, logprobs(policy)))
    assert ends[0] == ends[1]


def test_a_base_client_before_any_training_client_opens_its_session(daemon: DaemonProcess) -> None:
    with make_service(daemon) as service:
        base = service.create_base_training_client()
        before = logprobs(base)
        policy = service.create_training_client()
        assert policy.session_name == base.session_name
        train(policy)
        assert logprobs(base) == before


def test_a_refused_base_forward_does_not_stop_the_policy(daemon: DaemonProcess) -> None:
    with make_service(daemon) as service:
        policy = service.create_training_client()
        base = service.create_base_training_client()
        pending = base.forward(ragged_data(seed=2, count=1, vocab_size=9000), "cross_entropy")
        train(policy, steps=1)
        refused(pending.result, ValueError, "data[0]")
        assert logprobs(base)


def test_a_full_parameter_trainer_has_no_base_client(daemon: DaemonProcess) -> None:
    words = ("create_reference_client", "lora_rank")
    with make_service(daemon, lora_rank=0, trainer_job_id="full") as service:
        refused(service.create_base_training_client, ValueError, *words)
        policy = service.create_training_client()
        refused(policy.create_base_training_client, ValueError, *words)
    # Joined by its id alone, the trainer's rank is known only when it is reached.
    bare = FiretitanServiceClient(address=daemon.address, trainer_job_id="full")
    refused(bare.create_base_training_client, ValueError, *words)
    bare.close()


async def test_base_clients_in_an_event_loop(daemon: DaemonProcess) -> None:
    async with make_service(daemon) as service:
        policy = service.create_training_client()
        base = await service.create_base_training_client_async()
        beside = await policy.create_base_training_client_async()
        outputs = [
            await (await one.forward_async(DATA, "cross_entropy")) for one in (base, beside, policy)
        ]
        first = [output.loss_fn_outputs[0]["logprobs"].tolist() for output in outputs]
        assert first[0] == first[1] == first[2]


def test_another_model_is_refused_by_name(daemon: DaemonProcess) -> None:
    with make_service(daemon) as service:
        refused(lambda: service.create_base_training_client("other"), ValueError, "other", TOY)
    refused(service.create_base_training_client, RuntimeError, "FiretitanServiceClient is closed")
