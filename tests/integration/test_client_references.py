"""Clients of the frozen model against a real daemon."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import tinker
from firetitan.v1 import trainer_service_pb2
from support.daemon import DaemonProcess
from support.data import ragged_data

from firetitan_client import (
    FiretitanServiceClient,
    FiretitanTrainingClient,
    TrainerJobConfig,
    TrainerJobManager,
)

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


def make_full(daemon: DaemonProcess, **config: Any) -> FiretitanServiceClient:
    return make_service(daemon, lora_rank=0, **config)


def trainers(service: FiretitanServiceClient) -> dict[str, bool]:
    """Every trainer of the daemon by id, and whether it is forward-only."""
    listed = service.stubs.trainers.ListTrainers(trainer_service_pb2.ListTrainersRequest())
    return {one.name.rpartition("/")[2]: one.forward_only for one in listed.trainers}


def test_a_lora_reference_shares_the_policys_trainer(daemon: DaemonProcess) -> None:
    with make_service(daemon) as service:
        policy = service.create_training_client(TOY, lora_rank=4)
        before = logprobs(policy)
        reference = service.create_reference_client(TOY, lora_rank=0)
        train(policy)
        assert logprobs(reference) == before != logprobs(policy)
        assert_only_forward_works(reference)
        assert service.reference_trainer_job_id is None
        assert service.reference_client_job_id == service.trainer_job_id
        assert service.create_reference_client(policy_client=policy) is reference
        assert list(trainers(service)) == [service.trainer_job_id]
        service.release_references()
        service.release_references()
        refused(lambda: reference.forward(DATA, "cross_entropy"), RuntimeError, "closed")
        train(policy, steps=1)


@pytest.mark.parametrize("real", [False, True], ids=["toy", "hf"])
def test_a_full_parameter_reference_has_a_trainer_of_its_own(
    daemon: DaemonProcess, tiny_llama: Path, real: bool
) -> None:
    model = str(tiny_llama) if real else TOY
    with make_full(daemon, base_model=model) as service:
        policy = service.create_training_client(model, lora_rank=0)
        before = logprobs(policy)
        reference = service.create_reference_client(model, lora_rank=0, user_metadata={"a": "b"})
        train(policy)
        assert logprobs(reference) == before != logprobs(policy)
        assert_only_forward_works(reference)
        own = service.reference_trainer_job_id
        assert own is not None and own != service.trainer_job_id
        assert service.reference_client_job_id == own
        assert trainers(service) == {own: True, service.trainer_job_id: False}
        assert service.create_reference_client() is reference


def test_a_released_reference_is_made_again_where_it_is_wanted(daemon: DaemonProcess) -> None:
    with make_full(daemon) as service:
        before = logprobs(service.create_training_client())
        service.create_reference_client()
        own = service.reference_trainer_job_id
        service.release_references()
        assert service.reference_trainer_job_id is None
        assert trainers(service) == {service.trainer_job_id: False}
        again = service.create_reference_client()
        assert logprobs(again) == before
        assert service.reference_trainer_job_id not in (None, own)
        policy_id = service.trainer_job_id
        stubs = service
    assert trainers(stubs) == {policy_id: False}


def test_a_forward_only_service(daemon: DaemonProcess) -> None:
    with make_full(daemon, forward_only=True, trainer_job_id="frozen") as service:
        frozen = service.create_training_client()
        assert_only_forward_works(frozen)
        assert logprobs(service.create_reference_client()) == logprobs(frozen)
        assert service.reference_trainer_job_id is None
        assert trainers(service) == {"frozen": True}
    # Joined by its id, as another language's client would: the daemon stands in the way.
    with FiretitanServiceClient(address=daemon.address, trainer_job_id="frozen") as bare:
        plain = bare.create_training_client()
        assert type(plain) is FiretitanTrainingClient
        before = logprobs(plain)
        for call in (
            lambda: plain.forward_backward(DATA, "cross_entropy"),
            lambda: plain.optim_step(ADAM),
            lambda: plain.save_state("s"),
            lambda: plain.save_weights_for_sampler("s"),
        ):
            refused(call().result, RuntimeError, "frozen model")
        assert logprobs(plain) == before


def test_a_reference_trainer_that_existed_is_left_alone(daemon: DaemonProcess) -> None:
    manager = TrainerJobManager(address=daemon.address)
    manager.create_and_wait(
        TrainerJobConfig(base_model=TOY, forward_only=True, requested_job_id="kept")
    )
    with make_service(daemon, reference_trainer_job_id="kept") as service:
        policy = service.create_training_client(TOY, lora_rank=4)
        before = logprobs(policy)
        reference = service.create_reference_client()
        train(policy)
        assert logprobs(reference) == before
        assert service.reference_trainer_job_id == "kept"
        service.release_references()
        assert trainers(service) == {"kept": True, service.trainer_job_id: False}
    manager.delete("kept")


@pytest.mark.parametrize("cleanup", [True, False])
def test_closing_deletes_only_the_reference_it_made(daemon: DaemonProcess, cleanup: bool) -> None:
    service = make_full(
        daemon,
        trainer_job_id="policy",
        reference_trainer_job_id="made",
        reference_required=True,
        cleanup_reference_trainer_on_close=cleanup,
    )
    service.create_training_client()
    # Required, so there before anyone asked for the client.
    assert trainers(service) == {"policy": False, "made": True}
    service.create_reference_client().forward(DATA, "cross_entropy")
    service.close()
    left = {"policy": False} if cleanup else {"policy": False, "made": True}
    assert trainers(service) == left


def test_a_shape_of_its_own_is_a_trainer_of_its_own(daemon: DaemonProcess) -> None:
    with make_service(daemon, reference_training_shape_id="any") as service:
        policy = service.create_training_client()
        assert logprobs(service.create_reference_client()) == logprobs(policy)
        assert service.reference_trainer_job_id is not None
        assert len(trainers(service)) == 2


def test_a_reference_before_its_policy(daemon: DaemonProcess) -> None:
    with make_full(daemon) as service:
        reference = service.create_reference_client()
        policy = service.create_training_client()
        assert logprobs(reference) == logprobs(policy)
        assert len(trainers(service)) == 2
        before = logprobs(policy)
    with FiretitanServiceClient(address=daemon.address) as bare:
        assert logprobs(bare.create_reference_client(TOY)) == before


def test_what_a_reference_cannot_be_is_said(daemon: DaemonProcess) -> None:
    with make_service(daemon, trainer_job_id="lora") as service, make_full(daemon) as other:
        policy = service.create_training_client()
        for call, words in (
            (lambda: service.create_reference_client("other"), ("base_model", "other", TOY)),
            (lambda: service.create_reference_client(TOY, lora_rank=8), ("lora_rank", "8", "4")),
            (
                lambda: other.create_reference_client(policy_client=policy),
                ("policy_client", "another service"),
            ),
        ):
            refused(call, ValueError, *words)
    # A trainer that trains is no reference; what fails is not remembered.
    with make_full(daemon, reference_trainer_job_id="lora") as service:
        service.create_training_client()
        refused(service.create_reference_client, ValueError, "lora")
        service._config.reference_trainer_job_id = None
        assert logprobs(service.create_reference_client())
    with pytest.raises(ValueError, match="lora_rank"):
        make_service(daemon, forward_only=True)
    refused(service.create_reference_client, RuntimeError, "FiretitanServiceClient is closed")


def test_a_reference_outlives_its_worker(daemon: DaemonProcess) -> None:
    with make_full(daemon) as service:
        before = logprobs(service.create_training_client())
        reference = service.create_reference_client()
        name = f"trainers/{service.reference_trainer_job_id}"
        found = service.stubs.trainers.GetTrainer(trainer_service_pb2.GetTrainerRequest(name=name))
        os.kill(found.trainer.worker_pid, signal.SIGKILL)
        assert logprobs(reference) == before


def test_a_required_reference_that_fails_leaves_nothing_behind(daemon: DaemonProcess) -> None:
    with make_service(daemon, trainer_job_id="lora") as first:
        first.create_training_client()
        with make_full(daemon, reference_required=True, reference_trainer_job_id="lora") as service:
            refused(service.create_training_client, ValueError, "lora")
            assert trainers(service) == {"lora": False}


async def test_references_in_an_event_loop(daemon: DaemonProcess) -> None:
    async with make_full(daemon) as service:
        policy = service.create_training_client()
        reference = service.create_reference_client()
        beside = await service.create_reference_client_async()
        assert beside is reference
        outputs = [
            await (await one.forward_async(DATA, "cross_entropy")) for one in (reference, policy)
        ]
        first = [output.loss_fn_outputs[0]["logprobs"].tolist() for output in outputs]
        assert first[0] == first[1]
        assert service.reference_trainer_job_id is not None
