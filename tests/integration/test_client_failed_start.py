"""A call that makes things and fails: nothing is left, nothing of others changed, try again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from firetitan.v1 import (
    deployment_pb2,
    trainer_service_pb2,
    training_service_pb2,
)
from support.daemon import DaemonProcess
from support.data import ragged_data
from support.stubs import Stubs

from firetitan_client import AdamParams, DaemonNotRunning, FiretitanServiceClient, NotFound

pytestmark = pytest.mark.timeout(120)

TOY = "firetitan/toy"
DATA = ragged_data(seed=1, count=2, vocab_size=64)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    process = DaemonProcess(tmp_path_factory.mktemp("failed") / "home")
    process.start()
    yield process
    process.stop()


def make_service(daemon: DaemonProcess, **config: Any) -> FiretitanServiceClient:
    return FiretitanServiceClient.from_firetitan_config(
        **{"address": daemon.address, "base_model": TOY, "lora_rank": 0, **config}
    )


def trainers(daemon: DaemonProcess) -> set[str]:
    stubs = Stubs(daemon.address)
    names = set(stubs.all_trainers())
    stubs.channel.close()
    return names


def deployments(daemon: DaemonProcess) -> dict[str, deployment_pb2.Deployment]:
    stubs = Stubs(daemon.address)
    found = stubs.all_deployments()
    stubs.channel.close()
    for one in found.values():
        one.ClearField("last_use_time")
    return found


@pytest.fixture
def owner(daemon: DaemonProcess) -> Iterator[FiretitanServiceClient]:
    """A trainer and a deployment that serves a snapshot of it."""
    with make_service(
        daemon,
        trainer_job_id="owner",
        deployment_id="served",
        deployment_shape="local-cpu",
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="delete",
    ) as service:
        policy = service.create_training_client()
        service.hotload_sampler_snapshot(policy.save_weights_for_sampler("a").result().path)
        yield service


def test_a_deployment_of_another_trainer_stays_that_trainers(
    daemon: DaemonProcess, owner: FiretitanServiceClient
) -> None:
    before = deployments(daemon)
    with make_service(
        daemon, trainer_job_id="second", create_deployment=False, cleanup_trainer_on_close=True
    ) as second:
        second.create_training_client()
        broken = make_service(
            daemon, trainer_job_id="second", deployment_id="served", seed=123_456_789
        )
        with pytest.raises(ValueError, match="seed"):
            broken.create_training_client()
        broken.close()
        assert deployments(daemon) == before
        # Where nothing fails, it goes over, and asks for a snapshot of its new trainer.
        good = make_service(daemon, trainer_job_id="second", deployment_id="served")
        policy = good.create_training_client()
        assert deployments(daemon)["deployments/served"].trainer == "trainers/second"
        assert good.requires_initial_sampler_sync()
        good.create_sampling_client(policy.save_weights_for_sampler("b").result())
        assert not good.requires_initial_sampler_sync()
        good.close()


def test_another_shape_is_refused_before_anything_is_made(
    daemon: DaemonProcess, owner: FiretitanServiceClient
) -> None:
    before = trainers(daemon), deployments(daemon)
    with make_service(daemon, deployment_id="served", deployment_shape="local") as service:
        with pytest.raises(ValueError, match="deployment_shape: this service has 'local', but"):
            service.create_training_client()
        assert service.managed_trainer_job_id is None
        assert (trainers(daemon), deployments(daemon)) == before
    same = "accounts/local/deploymentShapes/local-cpu"
    with make_service(
        daemon, trainer_job_id="owner", deployment_id="served", deployment_shape=same
    ) as service:
        assert service.create_training_client()


@pytest.mark.parametrize("pinned", [False, True])
def test_an_unknown_snapshot_makes_nothing(daemon: DaemonProcess, pinned: bool) -> None:
    with make_service(daemon) as service:
        with pytest.raises((RuntimeError, NotFound), match="typo-00000000"):
            service.create_sampling_client("typo-00000000", pinned=pinned)
        assert (trainers(daemon), deployments(daemon)) == (set(), {})


@pytest.mark.parametrize("reference", ["cross_job://nobody/typo", "typo"])
def test_an_unknown_checkpoint_leaves_nothing(
    daemon: DaemonProcess, caplog: pytest.LogCaptureFixture, reference: str
) -> None:
    with make_service(daemon) as service:
        with pytest.raises(NotFound, match="typo"):
            service.create_training_client_from_state(reference)
        assert (trainers(daemon), deployments(daemon)) == (set(), {})
    assert "unnoticed" not in caplog.text


def test_a_snapshot_that_does_not_fit_leaves_nothing(
    daemon: DaemonProcess, owner: FiretitanServiceClient
) -> None:
    """It is found, so the deployment is made, and refuses it."""
    before = trainers(daemon), deployments(daemon)
    policy = owner._policy
    assert policy is not None
    snapshot = policy.save_weights_for_sampler("other").result().path
    with make_service(daemon, lora_rank=None, base_model="firetitan/toy-wide") as service:
        with pytest.raises(RuntimeError):
            service.create_sampling_client(snapshot)
    assert (trainers(daemon), deployments(daemon)) == before


def test_a_failed_call_can_be_repeated_with_other_settings(
    daemon: DaemonProcess, owner: FiretitanServiceClient
) -> None:
    service = make_service(daemon, base_model=None, lora_rank=None)
    session = "trainers/owner/sessions/00000000"
    with pytest.raises((ValueError, NotFound)):
        service.create_training_client("wrong/model", session=session)
    assert service.config.trainer_job_id is None
    with pytest.raises(NotFound, match=r"typo/model"):
        service.create_sampling_client(base_model="typo/model")
    assert service.config.base_model is None
    assert service.create_sampling_client(base_model=TOY).get_base_model() == TOY
    service.close()


def test_a_snapshot_is_brought_to_where_the_sampler_samples(
    daemon: DaemonProcess, owner: FiretitanServiceClient
) -> None:
    policy = owner._policy
    assert policy is not None
    policy.forward_backward(DATA, "cross_entropy")
    policy.optim_step(AdamParams(learning_rate=0.1)).result()
    saved = policy.save_weights_for_sampler("b").result()
    sampler = owner.create_deployment_sampler()
    follows = owner.create_sampling_client(saved, deployment_sampler=sampler)
    assert follows.sample([1, 2]).result().snapshot == saved.path
    later = policy.save_weights_for_sampler("c").result()
    pinned = owner.create_sampling_client(later, deployment_sampler=sampler, pinned=True)
    assert pinned.sample([1, 2]).result().snapshot == later.path
    assert later.path in repr(pinned)
    asked = owner.create_sampling_client(deployment_sampler=sampler)
    assert asked.sample([1, 2]).result().snapshot == later.path
    # Of one that stays with its snapshot it takes the deployment alone.
    again = owner.create_sampling_client(saved, deployment_sampler=pinned.deployment_sampler)
    assert again.sample([1, 2]).result().snapshot == saved.path


def test_that_no_daemon_runs_is_no_failed_hotload(tmp_path: Path) -> None:
    service = FiretitanServiceClient.from_firetitan_config(
        address=f"unix:{tmp_path}/nobody.sock", base_model=TOY, autostart=False
    )
    with pytest.raises(DaemonNotRunning):
        service.create_sampling_client("step-00000000")
    trainer_only = FiretitanServiceClient.from_firetitan_config(
        address=f"unix:{tmp_path}/nobody.sock", base_model=TOY, create_deployment=False
    )
    with pytest.raises(NotImplementedError, match="no deployment"):
        trainer_only.create_sampling_client("step-00000000")


async def test_whether_a_sync_is_needed_is_known_once_it_is_attached(
    daemon: DaemonProcess, owner: FiretitanServiceClient
) -> None:
    guest = make_service(
        daemon, trainer_job_id="guest", deployment_id="served", cleanup_trainer_on_close=True
    )
    guest.create_training_client()  # in a loop: returns at once
    assert guest.requires_initial_sampler_sync()
    guest.close()


def test_alpha_is_twice_the_rank_that_a_joined_trainer_has(daemon: DaemonProcess) -> None:
    stubs = Stubs(daemon.address)
    stubs.create_trainer("rank-eight", rank=8)
    bare = FiretitanServiceClient(address=daemon.address, trainer_job_id="rank-eight")
    policy = bare.create_training_client(lora_alpha=None)
    request = training_service_pb2.GetSessionRequest(name=policy.session_name)
    assert stubs.training.GetSession(request).session.lora.alpha == 16.0
    again = FiretitanServiceClient(address=daemon.address, trainer_job_id="rank-eight")
    assert again.create_training_client(lora_alpha=None)
    third = FiretitanServiceClient(address=daemon.address, trainer_job_id="rank-eight")
    with pytest.raises(ValueError, match="alpha"):
        third.create_training_client(lora_alpha=32)
    stubs.trainers.DeleteTrainer(
        trainer_service_pb2.DeleteTrainerRequest(name="trainers/rank-eight")
    )
    for one in (bare, again, third):
        one.close()
    stubs.channel.close()
