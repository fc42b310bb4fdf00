"""close() and clients that die, with others on the same trainer or deployment: a real daemon."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from firetitan.v1 import lease_service_pb2, lease_service_pb2_grpc
from support.daemon import DaemonProcess
from support.data import ragged_data
from support.other_process import OtherProcess

from firetitan_client import AdamParams, FiretitanServiceClient, NotFound, SamplingParams
from firetitan_client.stubs import Stubs
from firetitan_client.transport import connect

pytestmark = pytest.mark.timeout(240)

TOY = "firetitan/toy"
TTL_S = 6.0
SITUATIONS = ("created", "reattached", "used")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    process = DaemonProcess(
        tmp_path_factory.mktemp("leases") / "home", {"FIRETITAN_LEASES_TTL_S": str(TTL_S)}
    )
    process.start()
    yield process
    process.stop()


@pytest.fixture(scope="module")
def other(daemon: DaemonProcess) -> Iterator[OtherProcess]:
    process = OtherProcess(daemon)
    yield process
    process.end()


def make_service(daemon: DaemonProcess, **config: Any) -> FiretitanServiceClient:
    return FiretitanServiceClient.from_firetitan_config(
        address=daemon.address, **{"base_model": TOY, **config}
    )


def train(service: FiretitanServiceClient) -> float:
    policy = service.create_training_client()
    policy.forward_backward(ragged_data(seed=1, count=2, vocab_size=64), "cross_entropy")
    step: float = policy.optim_step(AdamParams(learning_rate=1e-2)).result().metrics["step"]
    return step


def state(daemon: DaemonProcess, name: str) -> str:
    """A trainer's or deployment's state in a word; `gone` where there is none."""
    stubs = Stubs(connect(daemon.address))
    if name.startswith("trainers/"):
        answer = stubs.trainers.ListTrainers(_empty("trainer")).trainers
    else:
        answer = stubs.deployments.ListDeployments(_empty("deployment")).deployments
    found = {one.name: one for one in answer}
    if name not in found:
        return "gone"
    one = found[name]
    word = one.State.Name(one.state).removeprefix("STATE_").lower()
    if word != "deleting":  # its worker ends meanwhile
        assert (one.worker_pid > 0) == (word == "active")
    return str(word)


def _empty(kind: str) -> Any:
    from firetitan.v1 import deployment_service_pb2, trainer_service_pb2

    if kind == "trainer":
        return trainer_service_pb2.ListTrainersRequest()
    return deployment_service_pb2.ListDeploymentsRequest()


def leases(daemon: DaemonProcess) -> lease_service_pb2.ListLeasesResponse:
    stub = lease_service_pb2_grpc.LeaseServiceStub(connect(daemon.address).channel)
    return stub.ListLeases(lease_service_pb2.ListLeasesRequest())


def labels(daemon: DaemonProcess) -> list[str]:
    return [one.label for one in leases(daemon).leases]


def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)


def deferred(caplog: pytest.LogCaptureFixture, name: str) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if f"clean-up of {name} deferred: used by" in record.getMessage()
    ]


# -- close() -----------------------------------------------------------------------------------


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("cleanup", [False, True])
def test_what_close_does_to_a_trainer(
    daemon: DaemonProcess,
    other: OtherProcess,
    caplog: pytest.LogCaptureFixture,
    situation: str,
    cleanup: bool,
) -> None:
    job = f"t-{situation}-{cleanup}".lower()
    name = f"trainers/{job}"
    settings = {"lora_rank": 0, "trainer_job_id": job, "create_deployment": False}
    if situation == "reattached":
        with make_service(daemon, **settings) as first:
            assert train(first) == 1.0
    service = make_service(daemon, **settings, cleanup_trainer_on_close=cleanup)
    steps = train(service)
    assert steps == (2.0 if situation == "reattached" else 1.0)
    if situation == "used":
        other.tell("open", **settings, base_model=TOY)
        assert other.tell("train") == 2.0
    with caplog.at_level(logging.WARNING):
        service.close()
        service.close()
    removed = cleanup and situation != "reattached"
    if situation == "used":
        assert state(daemon, name) == "active"
        assert other.tell("train") == 3.0
        assert len(deferred(caplog, name)) == (1 if removed else 0)
        assert all(other.label in text for text in deferred(caplog, name))
        other.tell("close")
    else:
        assert deferred(caplog, name) == []
    assert state(daemon, name) == ("gone" if removed else "active")


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("cleanup", [None, "scale_to_zero", "delete"])
def test_what_close_does_to_a_deployment(
    daemon: DaemonProcess,
    other: OtherProcess,
    caplog: pytest.LogCaptureFixture,
    situation: str,
    cleanup: Any,
) -> None:
    deployment_id = f"d-{situation}-{cleanup or 'none'}".replace("_", "-")
    name = f"deployments/{deployment_id}"
    settings = {"deployment_id": deployment_id}
    if situation == "reattached":
        with make_service(daemon, **settings) as first:
            first.create_sampling_client()
    service = make_service(daemon, **settings, cleanup_deployment_on_close=cleanup)
    sampler = service.create_sampling_client()
    params = SamplingParams(max_tokens=4, seed=1)
    tokens = sampler.sample([1, 2, 3], 1, params).result().sequences[0].tokens
    if situation == "used":
        other.tell("open", **settings, base_model=TOY)
        assert other.tell("sample") == tokens
    with caplog.at_level(logging.WARNING):
        service.close()
    after = {None: "active", "scale_to_zero": "stopped", "delete": "gone"}[cleanup]
    if situation == "reattached":
        after = "active"
    if situation == "used":
        assert state(daemon, name) == "active"
        assert other.tell("sample") == tokens
        assert len(deferred(caplog, name)) == (1 if cleanup else 0)
        other.tell("close")
    assert state(daemon, name) == after
    if after == "stopped":
        # The next use starts it.
        with make_service(daemon, **settings) as again:
            found = again.create_sampling_client().sample([1, 2, 3], 1, params).result()
            assert found.sequences[0].tokens == tokens


def test_what_was_accepted_before_close_is_finished_first(daemon: DaemonProcess) -> None:
    settings = {"lora_rank": 0, "trainer_job_id": "t-finish", "create_deployment": False}
    service = make_service(daemon, **settings, cleanup_trainer_on_close=True)
    policy = service.create_training_client()
    pending = []
    for _ in range(20):
        policy.forward_backward(ragged_data(seed=1, count=2, vocab_size=64), "cross_entropy")
        pending.append(policy.optim_step(AdamParams(learning_rate=1e-2)))
    saved = policy.save_state("last")
    service.close()
    assert [one.result(30).metrics["step"] for one in pending] == list(range(1, 21))
    assert saved.result(30).path.endswith("/last")
    assert state(daemon, "trainers/t-finish") == "gone"


def test_close_leaves_no_process(daemon: DaemonProcess) -> None:
    before = set(daemon.worker_pids())
    service = make_service(
        daemon,
        lora_rank=4,
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="delete",
    )
    train(service)
    service.create_sampling_client()
    assert len(set(daemon.worker_pids()) - before) == 2
    service.close()
    assert set(daemon.worker_pids()) - before == set()
    used = [use.name for one in leases(daemon).leases for use in one.uses]
    assert f"trainers/{service._config.trainer_job_id}" not in used


# -- clients that die --------------------------------------------------------------------------


def test_a_deferred_cleanup_runs_when_the_last_user_dies(daemon: DaemonProcess) -> None:
    settings = {"lora_rank": 0, "trainer_job_id": "t-orphan", "create_deployment": False}
    other = OtherProcess(daemon)
    service = make_service(daemon, **settings, cleanup_trainer_on_close=True)
    train(service)
    other.tell("open", **settings, base_model=TOY)
    other.tell("train")
    service.close()
    assert "trainers/t-orphan" in [one.name for one in leases(daemon).cleanups]
    killed = time.monotonic()
    other.kill()
    # Not before its lease is over: it could be a slow client.
    time.sleep(TTL_S / 4)
    assert state(daemon, "trainers/t-orphan") == "active"
    until(lambda: state(daemon, "trainers/t-orphan") == "gone")
    assert time.monotonic() - killed > TTL_S / 2
    assert "trainers/t-orphan" not in [one.name for one in leases(daemon).cleanups]


def test_a_client_that_is_killed_leaves_its_trainer_alone(daemon: DaemonProcess) -> None:
    other = OtherProcess(daemon)
    other.tell(
        "open",
        base_model=TOY,
        lora_rank=0,
        trainer_job_id="t-killed",
        create_deployment=False,
        cleanup_trainer_on_close=True,
    )
    assert other.tell("train") == 1.0
    other.kill()
    until(lambda: other.label not in labels(daemon))
    assert state(daemon, "trainers/t-killed") == "active"
    with make_service(daemon, trainer_job_id="t-killed", create_deployment=False) as service:
        assert train(service) == 2.0


def test_an_exit_without_close_gives_the_lease_back_at_once(daemon: DaemonProcess) -> None:
    other = OtherProcess(daemon)
    other.tell("open", base_model=TOY, deployment_id="d-exit")
    other.tell("sample")
    until(lambda: other.label in labels(daemon))
    other.end()
    # Sooner than the lease could run out.
    until(lambda: other.label not in labels(daemon), TTL_S / 2)
    assert state(daemon, "deployments/d-exit") == "active"


def test_a_restart_drops_no_lease_and_cleans_nothing_up_too_early(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    home = tmp_path_factory.mktemp("restart") / "home"
    daemon = DaemonProcess(home, {"FIRETITAN_LEASES_TTL_S": "4"})
    daemon.start()
    try:
        other = OtherProcess(daemon)
        settings = {"lora_rank": 0, "trainer_job_id": "t", "create_deployment": False}
        service = make_service(daemon, **settings, cleanup_trainer_on_close=True)
        train(service)
        other.tell("open", **settings, base_model=TOY)
        other.tell("train")
        service.close()
        daemon.kill()
        time.sleep(5.0)  # longer than the lease: nobody could renew it
        daemon.start()
        assert [one.name for one in leases(daemon).cleanups] == ["trainers/t"]
        assert other.tell("train") == 3.0
        assert state(daemon, "trainers/t") == "active"
        other.tell("close")
        until(lambda: state(daemon, "trainers/t") == "gone")
        other.end()
    finally:
        daemon.stop()


def test_a_pin_goes_with_the_client_that_set_it(daemon: DaemonProcess) -> None:
    settings = {"trainer_job_id": "t-pins", "deployment_id": "d-pins"}
    with make_service(daemon, lora_rank=4, **settings) as service:
        policy = service.create_training_client()
        first = policy.save_weights_for_sampler("one").result().path
        other = OtherProcess(daemon)
        other.tell("open", **settings, base_model=TOY)
        other.tell("pin", snapshot=first)
        second = policy.save_weights_for_sampler("two").result().path
        service.hotload_sampler_snapshot(second)
        assert other.tell("sample")
        snapshot = first.rpartition("/")[2]
        bound = service.create_sampling_client(first, pinned=True)
        service.hotload_sampler_snapshot(second)
        other.kill()
        until(lambda: other.label not in labels(daemon))
        params = SamplingParams(max_tokens=2, seed=1)
        assert bound.sample([1], 1, params).result().snapshot == snapshot
        assert snapshot in loaded(daemon, "d-pins")
        bound.close()
        until(lambda: snapshot not in loaded(daemon, "d-pins"))


def loaded(daemon: DaemonProcess, deployment: str) -> list[str]:
    """Snapshots that a deployment still answers by, of those the test made."""
    from firetitan.v1 import sampling_service_pb2

    stubs = Stubs(connect(daemon.address))
    found = []
    for snapshot in _snapshots(stubs):
        request = sampling_service_pb2.SampleRequest(
            deployment=f"deployments/{deployment}", snapshot=f"snapshots/{snapshot}", num_samples=1
        )
        request.prompt.chunks.add().encoded_text.token_ids = b"\1\0\0\0"
        request.params.max_tokens = 1
        request.params.seed = 1
        try:
            stubs.sampling.Sample(request)
        except Exception as error:
            assert "SNAPSHOT_NOT_ACTIVE" in str(error) or "not loaded" in str(error), error
        else:
            found.append(snapshot)
    return found


def _snapshots(stubs: Stubs) -> list[str]:
    from firetitan.v1 import checkpoint_service_pb2

    answer = stubs.checkpoints.ListSnapshots(checkpoint_service_pb2.ListSnapshotsRequest())
    return [one.name.rpartition("/")[2] for one in answer.snapshots]


# -- sharing -----------------------------------------------------------------------------------


def test_a_deployment_of_another_trainer_asks_for_a_sync(
    daemon: DaemonProcess, other: OtherProcess
) -> None:
    with make_service(
        daemon, lora_rank=0, trainer_job_id="t-a", deployment_id="d-moved"
    ) as service:
        policy = service.create_training_client()
        path = policy.save_weights_for_sampler("a").result().path
        service.hotload_sampler_snapshot(path)
        assert not service.requires_initial_sampler_sync()
    # The same trainer again: nothing to bring, and the next save is a delta still.
    with make_service(daemon, lora_rank=0, trainer_job_id="t-a", deployment_id="d-moved") as again:
        policy = again.create_training_client()
        assert not again.requires_initial_sampler_sync()
        kind = policy.save_weights_for_sampler("b").result()
        assert getattr(kind, "checkpoint_type", "delta") == "delta"
    moved = {"base_model": TOY, "lora_rank": 0, "trainer_job_id": "t-b"}
    other.tell("open", **moved, deployment_id="d-moved")
    other.tell("train")
    assert other.tell("facts")["needs_sync"] is True
    other.tell("close")
    # It is the deployment's, not the client's: the next one is told too.
    with make_service(daemon, trainer_job_id="t-b", deployment_id="d-moved") as third:
        policy = third.create_training_client()
        assert third.requires_initial_sampler_sync()
        assert third.create_sampling_client().sample([1], 1, _ONE).result().snapshot
        third.hotload_sampler_snapshot(policy.save_weights_for_sampler("c").result().path)
        assert not third.requires_initial_sampler_sync()


_ONE = SamplingParams(max_tokens=1, seed=1)


def test_another_context_length_is_refused_before_anything_is_changed(
    daemon: DaemonProcess,
) -> None:
    with make_service(daemon, lora_rank=0, trainer_job_id="t-len", deployment_id="d-len") as first:
        first.create_training_client()
        length = first.max_context_length
    with make_service(daemon, lora_rank=0, deployment_id="d-len", max_context_length=17) as wrong:
        with pytest.raises(ValueError, match=r"max_context_length.*17.*d-len"):
            wrong.create_training_client()
        assert wrong.managed_trainer_job_id is None
    stubs = Stubs(connect(daemon.address))
    trainers = stubs.trainers.ListTrainers(_empty("trainer")).trainers
    assert not any(one.name.startswith("trainers/training-api-service") for one in trainers)
    (kept,) = [
        one
        for one in stubs.deployments.ListDeployments(_empty("deployment")).deployments
        if one.name == "deployments/d-len"
    ]
    assert kept.trainer == "trainers/t-len" and kept.max_context_length == length
    with make_service(daemon, trainer_job_id="t-len", max_context_length=17) as wrong:
        with pytest.raises(ValueError, match=r"max_context_length.*17.*t-len"):
            wrong.create_training_client()
    # What is the same in other words is fine.
    with make_service(
        daemon, trainer_job_id="t-len", deployment_id="d-len", max_context_length=length
    ) as same:
        same.create_training_client()


def test_a_failed_start_takes_back_what_it_made_and_no_more(daemon: DaemonProcess) -> None:
    with make_service(daemon, lora_rank=0, trainer_job_id="t-old", create_deployment=False) as old:
        train(old)
        broken = make_service(
            daemon,
            lora_rank=0,
            trainer_job_id="t-old",
            deployment_id="d-bad",
            seed=old_seed(old) + 1,
        )
        with pytest.raises(ValueError, match="seed"):
            broken.create_training_client()
        assert state(daemon, "trainers/t-old") == "active"
        assert state(daemon, "deployments/d-bad") == "gone"
        broken.close()
        assert state(daemon, "trainers/t-old") == "active"


def old_seed(service: FiretitanServiceClient) -> int:
    from firetitan.v1 import training_service_pb2

    stubs = Stubs(connect(service.base_url.partition("#")[0].replace("firetitan+", "")))
    request = training_service_pb2.ListSessionsRequest(parent="trainers/t-old")
    return int(stubs.training.ListSessions(request).sessions[0].seed)


def test_a_forked_child_cleans_nothing_up(daemon: DaemonProcess) -> None:
    service = make_service(
        daemon,
        lora_rank=0,
        trainer_job_id="t-fork",
        create_deployment=False,
        cleanup_trainer_on_close=True,
    )
    train(service)
    child = os.fork()
    if not child:
        code = 1
        try:
            service.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert state(daemon, "trainers/t-fork") == "active"
    service.close()
    assert state(daemon, "trainers/t-fork") == "gone"


def test_removing_by_hand_needs_no_leave(daemon: DaemonProcess) -> None:
    with make_service(daemon, lora_rank=0, trainer_job_id="t-hand", create_deployment=False) as one:
        train(one)
        from firetitan.v1 import trainer_service_pb2

        Stubs(connect(daemon.address)).trainers.DeleteTrainer(
            trainer_service_pb2.DeleteTrainerRequest(name="trainers/t-hand")
        )
        assert state(daemon, "trainers/t-hand") == "gone"
        with pytest.raises(NotFound):
            make_service(daemon, base_model=None, trainer_job_id="t-hand").create_training_client()
