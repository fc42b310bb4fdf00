"""Rows of what was saved, expiry and deletion, over a real daemon and the toy engine."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tinker
from firetitan.v1 import checkpoint_service_pb2, trainer_service_pb2
from support.daemon import DaemonProcess
from support.stopping import stopped, worker_of

from firetitan_client import (
    FailedPrecondition,
    FiretitanServiceClient,
    FiretitanTrainingClient,
    FireworksClient,
    NotFound,
)

pytestmark = pytest.mark.timeout(150)
TOY = "firetitan/toy"
DATUM = tinker.Datum(
    model_input=tinker.ModelInput.from_ints([1, 2, 3]),
    loss_fn_inputs={"target_tokens": [2, 3, 4]},
)


def service_of(daemon: DaemonProcess, trainer: str, rank: int = 0, **more: Any) -> Any:
    return FiretitanServiceClient.from_firetitan_config(
        address=daemon.address, base_model=TOY, lora_rank=rank, trainer_job_id=trainer, **more
    )


@pytest.fixture
def service(daemon: DaemonProcess) -> Iterator[FiretitanServiceClient]:
    with service_of(daemon, "full", deployment_id="d") as service:
        yield service


@pytest.fixture
def policy(service: FiretitanServiceClient) -> FiretitanTrainingClient:
    return service.create_training_client(base_model=TOY, lora_rank=0)


@pytest.fixture
def control(daemon: DaemonProcess) -> FireworksClient:
    return FireworksClient(address=daemon.address)


def step(policy: FiretitanTrainingClient) -> None:
    policy.forward_backward([DATUM], "cross_entropy")
    policy.optim_step(tinker.AdamParams(learning_rate=0.5)).result()


def loss(policy: FiretitanTrainingClient) -> float:
    return float(policy.forward([DATUM], "cross_entropy").result().metrics["loss:sum"])


def folders(daemon: DaemonProcess, kind: str) -> list[str]:
    return sorted(path.name.rpartition("-")[0] for path in (daemon.home / "store" / kind).iterdir())


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def ids(control: FireworksClient, job: str = "full") -> list[str]:
    try:
        return [row["name"].rpartition("/")[2] for row in control.list_checkpoints(job)]
    except NotFound:
        return []


def test_rows_say_what_was_saved(
    daemon: DaemonProcess, control: FireworksClient, policy: FiretitanTrainingClient
) -> None:
    step(policy)
    state = policy.save_state("step-10", user_metadata={"why": "test"}).result()
    base = policy.save_weights_for_sampler("s").result()
    step(policy)
    delta = policy.save_weights_for_sampler("s", ttl_seconds=3600).result()
    policy.save_state("step-2").result()
    with service_of(daemon, "lora", 4, create_deployment=False) as other:
        lora_policy = other.create_training_client()
        lora_policy.save_state("mine").result()
        adapter = lora_policy.save_weights_for_sampler("a").result()
    rows = control.list_checkpoints("full", page_size=1)
    prefix = "accounts/local/rlorTrainerJobs/full/checkpoints/"
    assert [row["name"] for row in rows] == [
        prefix + "step-10", prefix + base.path, prefix + delta.path, prefix + "step-2",
    ]  # fmt: skip
    assert [(row["checkpointType"], row["promotable"]) for row in rows] == [
        ("CHECKPOINT_TYPE_TRAINING", False),
        ("CHECKPOINT_TYPE_INFERENCE_BASE", True),
        ("CHECKPOINT_TYPE_INFERENCE_ARC_V2", False),
        ("CHECKPOINT_TYPE_TRAINING", False),
    ]
    lora = control.list_checkpoints("accounts/me/rlorTrainerJobs/lora")
    assert [(row["checkpointType"], row["promotable"], row["loraRank"]) for row in lora] == [
        ("CHECKPOINT_TYPE_TRAINING_LORA", False, 4),
        ("CHECKPOINT_TYPE_INFERENCE_LORA", True, 4),
    ]
    assert lora[1]["name"].endswith(f"/lora/checkpoints/{adapter.path}")
    assert re.fullmatch(r"s-[0-9a-f]{8}", base.path) and state.path.endswith("/step-10")
    assert [row["step"] for row in rows] == [1, 1, 2, 2]
    assert [row["seq"] for row in rows] == [3, 4, 7, 8]
    for row in rows:
        assert row["session"] == policy.session_name
        assert row["baseModel"] == TOY and re.fullmatch("[0-9a-f]{64}", row["baseModelFingerprint"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", row["createTime"])
        assert row["createTime"] == row["updateTime"] and row["sizeBytes"] > 0
        assert ("expireTime" in row) == (row["name"] == prefix + delta.path)
    assert policy.list_checkpoints() == ["step-2", "step-10"]
    policy.service.stubs.trainers.DeleteTrainer(
        trainer_service_pb2.DeleteTrainerRequest(name="trainers/full")
    )
    assert control.list_checkpoints("full") == rows


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), True, "60", 1e12])
def test_a_time_to_live_that_is_none_is_refused_in_the_call(
    policy: FiretitanTrainingClient, ttl: Any
) -> None:
    with pytest.raises(ValueError, match="ttl_seconds"):
        policy.save_state("x", ttl_seconds=ttl)
    with pytest.raises(ValueError, match="ttl_seconds"):
        policy.save_weights_for_sampler("x", ttl_seconds=ttl)


def test_what_expired_is_gone_from_list_and_disk(
    daemon: DaemonProcess, control: FireworksClient, policy: FiretitanTrainingClient
) -> None:
    policy.save_state("short", ttl_seconds=1)
    policy.save_state("long", ttl_seconds=3600).result()
    gone = policy.save_weights_for_sampler_ext("short", ttl_seconds=1)
    until(lambda: ids(control) == ["long"], "the expired ones are listed")
    until(lambda: folders(daemon, "checkpoints") == ["long"], "the folder is still there")
    until(lambda: folders(daemon, "snapshots") == [], "the folder is still there")
    assert policy.list_checkpoints() == ["long"]
    with pytest.raises(NotFound, match="short"):
        policy.load_state("short").result()
    again = policy.save_weights_for_sampler_ext("short")
    assert again.path != gone.path and again.path.startswith("short.2-")


def test_a_served_snapshot_and_its_ancestors_outlive_their_time(
    service: FiretitanServiceClient,
    daemon: DaemonProcess,
    control: FireworksClient,
    policy: FiretitanTrainingClient,
) -> None:
    base = policy.save_weights_for_sampler("base", ttl_seconds=5).result().path
    step(policy)
    delta = policy.save_weights_for_sampler("delta", ttl_seconds=5).result().path
    service.hotload_sampler_snapshot(delta)
    with pytest.raises(FailedPrecondition, match=r"deployments/d serves it"):
        control.delete_checkpoint(f"accounts/local/rlorTrainerJobs/full/checkpoints/{delta}")
    time.sleep(6)
    assert ids(control) == [base, delta]
    daemon.kill()
    daemon.start()
    time.sleep(1)
    assert ids(control) == [base, delta]
    assert service.create_sampling_client().sample(
        tinker.ModelInput.from_ints([1]), 1, tinker.SamplingParams(max_tokens=1)
    ).result().snapshot == delta  # fmt: skip
    other = policy.save_weights_for_sampler("other", checkpoint_type="base").result().path
    service.hotload_sampler_snapshot(other)
    until(lambda: ids(control) == [other], "what is served no more is still listed")
    until(lambda: folders(daemon, "snapshots") == [other], "a folder is still there")


def test_checkpoints_and_snapshots_are_deleted_by_hand(
    daemon: DaemonProcess, control: FireworksClient, policy: FiretitanTrainingClient
) -> None:
    policy.save_state("a").result()
    base = policy.save_weights_for_sampler("a").result().path
    delta = policy.save_weights_for_sampler("b").result().path
    prefix = "accounts/local/rlorTrainerJobs/full/checkpoints/"
    with pytest.raises(FailedPrecondition, match=f"snapshots/{delta} stands on it") as kept:
        control.delete_checkpoint(prefix + base)
    assert kept.value.reason == "SNAPSHOT_IN_USE"
    for name in (delta, base, "a", "never"):
        control.delete_checkpoint(prefix + name)
    assert ids(control) == []
    assert folders(daemon, "snapshots") == folders(daemon, "checkpoints") == []
    with pytest.raises(ValueError, match="list_checkpoints row"):
        control.delete_checkpoint("a")
    # The chain goes on from a base: what the next delta would stand on is gone.
    stub = policy.service.stubs.checkpoints
    path = policy.save_weights_for_sampler("c").result().path
    request = checkpoint_service_pb2.GetSnapshotRequest(name=path)
    assert stub.GetSnapshot(request).snapshot.kind == 1


@pytest.mark.parametrize("kill", [False, True], ids=["alive", "daemon killed"])
def test_a_checkpoint_that_is_overwritten_while_it_loads_elsewhere_loads_as_it_was(
    daemon: DaemonProcess, policy: FiretitanTrainingClient, kill: bool
) -> None:
    step(policy)
    before = loss(policy)
    policy.save_state("x").result()
    with service_of(daemon, "reader", create_deployment=False) as reading:
        reader = reading.create_training_client()
        pid = worker_of(reader)
        assert pid in daemon.worker_pids()
        with stopped(pid):
            loading = reader.load_state_with_optimizer("cross_job://full/x")
            with pytest.raises(TimeoutError):
                loading.result(1)
            step(policy)
            policy.save_state("x").result()
            assert folders(daemon, "checkpoints") == ["x", "x"]
            if kill:
                daemon.kill()
                daemon.start()
                assert folders(daemon, "checkpoints") == ["x", "x"]
        loading.result()
        assert loss(reader) == before != loss(policy)
