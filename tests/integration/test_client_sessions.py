"""Services that make a session from a checkpoint, join one that is there, and close."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support.daemon import DaemonProcess
from support.stubs import TOY
from support.toy_training import ADAM, loss_of, make_service, toy_data

from firetitan_client import FiretitanServiceClient, FiretitanTrainingClient

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def policy(daemon: DaemonProcess) -> Iterator[FiretitanTrainingClient]:
    with make_service(daemon) as service:
        yield service.create_training_client(base_model=TOY, lora_rank=0)


def test_create_from_state(daemon: DaemonProcess, policy: FiretitanTrainingClient) -> None:
    data = toy_data()
    policy.forward_backward(data, "cross_entropy")
    policy.optim_step(ADAM).result()
    saved = policy.save_state("begin").result()
    with make_service(daemon) as service:
        other = service.create_training_client_from_state_with_optimizer(saved.path)
        assert loss_of(other, data) == loss_of(policy, data)
        other.forward_backward(data, "cross_entropy")
        assert other.optim_step(ADAM).result().metrics["step"] == 2.0
    with make_service(daemon) as service, pytest.raises(KeyError, match="nowhere"):
        service.create_training_client_from_state("nowhere")


def test_create_from_state_where_only_the_checkpoint_says_what_it_is_of(
    daemon: DaemonProcess,
) -> None:
    data = toy_data()
    lora = {"lora_rank": 2, "lora_alpha": 8, "train_attn": False}
    with make_service(daemon, cleanup_trainer_on_close=True, **lora) as service:
        policy = service.create_training_client()
        job = policy.trainer_job_id
        policy.forward_backward(data, "cross_entropy")
        policy.optim_step(ADAM)
        saved = policy.save_state("kept").result()
        policy.forward_backward(data, "cross_entropy")
        policy.optim_step(ADAM).result()
        uninterrupted = loss_of(policy, data)
    # Its trainer is gone, and nobody says model, rank, alpha or layers again.
    for reference in (saved.path, f"cross_job://{job}/kept", f"tinker://{job}/weights/kept"):
        with FiretitanServiceClient(address=daemon.address) as bare:
            other = bare.create_training_client_from_state_with_optimizer(reference)
            assert other.get_info().lora_rank == 2
            other.forward_backward(data, "cross_entropy")
            assert other.optim_step(ADAM).result().metrics["step"] == 2.0
            assert loss_of(other, data) == uninterrupted


def test_create_from_state_says_what_is_wrong(
    daemon: DaemonProcess, policy: FiretitanTrainingClient
) -> None:
    saved = policy.save_state("begin").result()
    with make_service(daemon) as service:
        with pytest.raises(NotImplementedError, match="weights_access_token"):
            service.create_training_client_from_state(saved.path, weights_access_token="t")
        with pytest.raises(ValueError, match="base_model: 'other'"):
            service.create_training_client_from_state(saved.path, base_model="other")
        with pytest.raises(KeyError, match="never"):
            service.create_training_client_from_state(saved.path.replace("begin", "never"))
        # Nothing of it is left in the way.
        assert service.create_training_client_from_state(saved.path, base_model=TOY)
    with FiretitanServiceClient(address=daemon.address) as bare:
        with pytest.raises(ValueError, match="base_model is required"):
            bare.create_training_client_from_state("begin")
        with pytest.raises(KeyError, match="trainer 'nobody' has no checkpoint of this name"):
            bare.create_training_client_from_state("cross_job://nobody/begin")


def test_joining_by_trainer_by_session_and_by_endpoint(
    daemon: DaemonProcess, policy: FiretitanTrainingClient
) -> None:
    policy.forward_backward(toy_data(), "cross_entropy").result()
    joins = (
        make_service(
            daemon, base_model=None, lora_rank=None, seed=None, trainer_job_id=policy.trainer_job_id
        ).create_training_client(),
        FiretitanServiceClient(policy.service.base_url).create_training_client(),
        FiretitanServiceClient(address=daemon.address).create_training_client(
            session=policy.session_name
        ),
    )
    for number, other in enumerate(joins, 1):
        assert other.session_name == policy.session_name
        assert (other.get_info().model_name, other.get_info().is_lora) == (TOY, False)
        step = other.optim_step(ADAM).result()  # of the gradients that the first client left
        assert step.metrics["step"] == float(number)
        policy.forward_backward(toy_data(), "cross_entropy").result()


@pytest.mark.parametrize(
    ("config", "arguments", "text"),
    [
        ({"lora_rank": 8}, {}, "lora_rank: 8 was asked for"),
        ({"base_model": "other"}, {}, "base_model: 'other' was asked for"),
        ({}, {"seed": 6}, "seed"),
    ],
)
def test_joining_with_other_settings_is_refused_by_field(
    daemon: DaemonProcess,
    policy: FiretitanTrainingClient,
    config: dict[str, Any],
    arguments: dict[str, Any],
    text: str,
) -> None:
    service = make_service(
        daemon, **{"lora_rank": None, **config, "trainer_job_id": policy.trainer_job_id}
    )
    with pytest.raises(ValueError, match=text):
        service.create_training_client(**arguments)


def test_lora_settings_are_compared_on_joining(daemon: DaemonProcess) -> None:
    first = make_service(daemon, lora_rank=4)
    policy = first.create_training_client(train_mlp=False, lora_alpha=16)
    assert "LoRA rank 4" in repr(policy)
    assert policy.get_info().lora_rank == 4
    again = make_service(daemon, lora_rank=None, seed=None, trainer_job_id=policy.trainer_job_id)
    with pytest.raises(ValueError, match="alpha"):
        again.create_training_client(lora_alpha=8)
    same = again.create_training_client(lora_alpha=16, train_mlp=False)
    assert same.session_name == policy.session_name


def test_close_deletes_only_what_it_created(daemon: DaemonProcess) -> None:
    owner = make_service(daemon, cleanup_trainer_on_close=True)
    policy = owner.create_training_client()
    with make_service(
        daemon, trainer_job_id=policy.trainer_job_id, cleanup_trainer_on_close=True
    ) as guest:
        guest.create_training_client().forward_backward(toy_data(), "cross_entropy").result()
    assert policy.optim_step(ADAM).result().metrics["step"] == 1.0
    last = policy.save_state("at-the-end")  # called before close, so it still runs
    owner.close()
    assert last.result().path
    with pytest.raises(RuntimeError, match="closed"):
        policy.forward(toy_data(), "cross_entropy")
    stale = FiretitanServiceClient(address=daemon.address, trainer_job_id=policy.trainer_job_id)
    with pytest.raises(KeyError, match=policy.trainer_job_id):
        stale.create_training_client()
