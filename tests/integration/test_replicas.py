"""Several samplers behind one deployment of a real daemon."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from firetitan.v1 import (
    deployment_pb2,
    deployment_service_pb2,
    sampling_service_pb2,
    trainer_service_pb2,
)
from support.daemon import DaemonProcess
from support.models import save_tiny
from support.replicas import (
    begin,
    deployment,
    request,
    scale,
    snapshots,
    until_ready,
    until_running,
)
from support.stubs import LaneClient, Stubs, status_reason

from firetitan_client import DeploymentConfig, DeploymentManager, FiretitanServiceClient
from firetitan_daemon.resources import Resources

pytestmark = pytest.mark.timeout(180)
TOY = "firetitan/toy"
LONG = {"max_tokens": 8000, "samples": 16}
"""Runs for seconds."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    process = DaemonProcess(Path(tmp_path_factory.mktemp("replicas")) / "home")
    process.start()
    yield process
    process.stop()


@pytest.fixture
def stubs(home: DaemonProcess) -> Iterator[Stubs]:
    """Of a daemon whose deployment `d` has two samplers; it is gone afterwards."""
    stubs = Stubs(home.address)
    assert not stubs.create_deployment(replicas=2).HasField("error")
    until_ready(stubs, 2)
    yield stubs
    gone = deployment_service_pb2.DeleteDeploymentRequest(name="deployments/d")
    stubs.deployments.DeleteDeployment(gone)
    stubs.channel.close()


@pytest.fixture
def lane(stubs: Stubs) -> Iterator[LaneClient]:
    stubs.create_trainer()
    yield LaneClient(stubs, stubs.session())
    stubs.trainers.DeleteTrainer(trainer_service_pb2.DeleteTrainerRequest(name="trainers/t"))


def test_requests_are_spread_and_their_answers_do_not_tell(
    home: DaemonProcess, stubs: Stubs
) -> None:
    found = deployment(stubs)
    assert (found.replicas, found.ready_replicas, len(found.workers)) == (2, 2, 2)
    assert found.worker_pid == found.workers[0].pid
    assert {one.pid for one in found.workers} == set(home.worker_pids("sampler"))
    alone = [stubs.sampling.Sample(request(seed)).sequences for seed in range(6)]
    calls = begin(stubs, 6, **LONG)
    assert [one.running for one in deployment(stubs).workers] == [3, 3]
    # The same seeds, beside the long ones, on whichever has fewer.
    beside = [stubs.sampling.Sample.future(request(seed)) for seed in range(6)]
    assert [call.result().sequences for call in beside] == alone
    streamed = list(
        stubs.sampling.SampleStream(sampling_service_pb2.SampleStreamRequest(request=request(0)))
    )
    tokens = b"".join(part.token_ids for one in streamed for part in one.tokens)
    assert tokens == alone[0][0].token_ids
    for call in calls:
        call.cancel()
    (row,) = [one for one in Resources(stubs.channel).rows() if one.name == "deployments/d"]
    assert row.what == f"{TOY}: the base model, 2 of 2 samplers"


def test_scaling_while_it_serves(home: DaemonProcess, stubs: Stubs, lane: LaneClient) -> None:
    first, second = snapshots(stubs, lane, 2)
    assert not stubs.hotload("deployments/d", first).HasField("error")
    expected = [stubs.sampling.Sample(request(seed, 400)).sequences for seed in range(4)]
    calls = begin(stubs, 4, max_tokens=8000, samples=4)
    scaled = scale(stubs, 1)
    assert (scaled.replicas, len(scaled.workers)) == (1, 1)
    # Who is taken away answers what it has begun, then ends.
    assert {call.result().snapshot for call in calls} == {first}
    deadline = time.monotonic() + 30
    while len(home.worker_pids("sampler")) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (left,) = until_ready(stubs, 1)
    # Who is added answers once it serves what the others serve; at once, for this one is busy.
    busy = begin(stubs, 1, **LONG)
    scale(stubs, 3)
    seen = []
    while deployment(stubs).ready_replicas < 3:
        seen.append(stubs.sampling.Sample(request(0, 8)))
    assert {one.snapshot for one in seen} == {first}
    assert left in until_ready(stubs, 3)
    for call in busy:
        call.cancel()
    seen = [stubs.sampling.Sample(request(seed, 400)) for seed in range(4)]
    spread = begin(stubs, 3, **LONG)
    assert [one.running for one in deployment(stubs).workers] == [1, 1, 1]
    seen += [stubs.sampling.Sample(request(seed, 400)) for seed in range(4)]
    assert [one.sequences for one in seen] == expected * 2
    assert {one.snapshot for one in seen} == {first}
    for call in spread:
        call.cancel()
    assert not stubs.hotload("deployments/d", second).HasField("error")
    # Stopped, and as many as before with the next use.
    stopped = scale(stubs, 0)
    assert stopped.state == deployment_pb2.Deployment.STATE_STOPPED
    assert (stopped.replicas, len(stopped.workers)) == (3, 0)
    assert not home.worker_pids("sampler")
    assert stubs.sampling.Sample(request(), timeout=60).snapshot == second
    until_ready(stubs, 3)


@pytest.mark.parametrize("transition", ["FINISH", "SYNC", "ASYNC"])
def test_every_answer_of_a_hotload_is_of_one_version(
    stubs: Stubs, lane: LaneClient, transition: str
) -> None:
    names = snapshots(stubs, lane, 3)
    kind = deployment_pb2.HotloadTransition.Value(f"HOTLOAD_TRANSITION_{transition}")
    stubs.hotload("deployments/d", names[0])
    ended = threading.Event()
    answers: list[list[str]] = [[] for _ in range(4)]
    faults: list[str] = []

    def ask(mine: list[str]) -> None:
        while not ended.is_set():
            answer = stubs.sampling.Sample(request(1, 60), timeout=60)
            mine.append(answer.snapshot)
            if transition != "ASYNC" and len(answer.sequences[0].made_by) > 1:
                faults.append(f"{answer}")

    threads = [threading.Thread(target=ask, args=(mine,)) for mine in answers]

    def until_all_were_answered_by(name: str) -> None:
        deadline = time.monotonic() + 60
        while not all(mine and mine[-1] == name for mine in answers):
            assert time.monotonic() < deadline, answers
            time.sleep(0.02)

    for thread in threads:
        thread.start()
    until_all_were_answered_by(names[0])
    for name in names[1:]:
        # Beside those of the threads: something to wait for or to take over.
        running = [stubs.sampling.Sample.future(request(1, 8000, 8), timeout=90) for _ in range(2)]
        until_running(stubs, 6)
        operation = stubs.hotload("deployments/d", name, transition=kind)
        assert not operation.HasField("error"), operation.error
        if transition == "SYNC":
            # They have ended; what is on its way to us arrives.
            time.sleep(2)
            assert all(call.done() for call in running)
        else:
            for call in running:
                call.cancel()
        until_all_were_answered_by(name)
    ended.set()
    for thread in threads:
        thread.join()
    assert not faults
    for mine in answers:
        # Whoever has been answered by the new one is never answered by the former one again.
        assert [names.index(one) for one in mine] == sorted(names.index(one) for one in mine)
        assert set(mine) == set(names)


def test_a_snapshot_that_one_cannot_load_none_serves(
    home: DaemonProcess, stubs: Stubs, lane: LaneClient
) -> None:
    good, bad = snapshots(stubs, lane, 2)
    stubs.hotload("deployments/d", good)
    before = stubs.sampling.Sample(request())
    (folder,) = (home.home / "store" / "snapshots").glob(f"*{bad.partition('/')[2]}*")
    file = folder / "delta.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    failed = stubs.hotload("deployments/d", bad)
    assert status_reason(failed.error) == "CHECKSUM_MISMATCH"
    found = deployment(stubs)
    assert found.active_snapshot == good and "delta.safetensors" in found.error.message
    busy = begin(stubs, 1, **LONG)
    assert stubs.sampling.Sample(request()).sequences == before.sequences
    assert stubs.sampling.Sample(request(), timeout=30).snapshot == good
    for call in busy:
        call.cancel()
    file.write_bytes(content)
    assert not stubs.hotload("deployments/d", bad).HasField("error")
    assert not deployment(stubs).HasField("error")


def test_a_pinned_adapter_is_in_every_one_of_them(stubs: Stubs) -> None:
    stubs.create_trainer("lora", rank=2)
    lane = LaneClient(stubs, stubs.session("trainers/lora"))
    pinned, active = snapshots(stubs, lane, 2)
    stubs.hotload("deployments/d", pinned)
    pin = deployment_service_pb2.PinSnapshotRequest(
        deployment="deployments/d", snapshot=pinned, holder="h"
    )
    stubs.deployments.PinSnapshot(pin)
    stubs.hotload("deployments/d", active)
    scale(stubs, 3)
    until_ready(stubs, 3)
    named = request()
    named.snapshot = pinned
    busy: list[grpc.Future] = []
    answers = []
    for _ in range(3):
        answers.append(stubs.sampling.Sample(named))
        busy += begin(stubs, 1, **LONG)
    assert [one.running for one in deployment(stubs).workers] == [1, 1, 1]
    assert {one.snapshot for one in answers} == {pinned}
    assert all(one.sequences == answers[0].sequences for one in answers)
    for call in busy:
        call.cancel()


def test_too_many_are_refused_by_the_limit(stubs: Stubs) -> None:
    for call in (lambda: stubs.create_deployment("e", replicas=9), lambda: scale(stubs, 9)):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "replicas: 9" in caught.value.details()
        assert "limits.max_replicas" in caught.value.details()
    with pytest.raises(grpc.RpcError):
        scale(stubs, -1)
    assert deployment(stubs).replicas == 2


def test_attaching_never_takes_samplers_away(stubs: Stubs) -> None:
    assert stubs.create_deployment().deployment.replicas == 2
    assert stubs.create_deployment(replicas=1).deployment.replicas == 2
    assert stubs.create_deployment(replicas=3).deployment.replicas == 3
    until_ready(stubs, 3)


def test_as_a_client_asks_for_them(home: DaemonProcess, stubs: Stubs) -> None:
    with FiretitanServiceClient.from_firetitan_config(
        base_model=TOY,
        address=home.address,
        deployment_id="d",
        deployment_replica_count=3,
    ) as service:
        sampler = service.create_sampling_client()
        assert len(until_ready(stubs, 3)) == 3
        assert sampler.sample([1, 2], 1).result().sequences
    manager = DeploymentManager(address=home.address)
    manager.create_or_get(DeploymentConfig("d", TOY, max_replica_count=2))
    assert deployment(stubs).replicas == 3
    manager.update("d", {"maxReplicaCount": 2}, "maxReplicaCount")
    assert len(until_ready(stubs, 2)) == 2
    manager.update("d", {"minReplicaCount": 1}, "minReplicaCount")
    status = manager.hotload_check_status("d", TOY)
    assert [one["readiness"] for one in status["replicas"]] == [True, True]
    manager.scale_to_zero("d")
    manager.update("d", {"minReplicaCount": 1, "maxReplicaCount": 2}, "min_replica_count")
    assert deployment(stubs).replicas == 1
    manager.scale_to_zero("d")
    assert manager.wait_for_ready("d").state == "READY"
    with pytest.raises(ValueError, match=r"limits\.max_replicas"):
        manager.update("d", {"maxReplicaCount": 9}, "maxReplicaCount")
    with pytest.raises(ValueError, match="minReplicaCount: is 3, above maxReplicaCount=2"):
        manager.update(
            "d", {"minReplicaCount": 3, "maxReplicaCount": 2}, "minReplicaCount,maxReplicaCount"
        )


def test_a_real_model_in_two_samplers(tmp_path: Path, stubs: Stubs) -> None:
    model = save_tiny(tmp_path / "tiny", dtype="bfloat16")
    stubs.create_trainer("real", base_model=str(model), rank=4)
    lane = LaneClient(stubs, stubs.session("trainers/real"))
    first, second = snapshots(stubs, lane, 2)
    gone = deployment_service_pb2.DeleteDeploymentRequest(name="deployments/d")
    stubs.deployments.DeleteDeployment(gone)
    assert not stubs.create_deployment(base_model=str(model), replicas=2).HasField("error")
    pids = until_ready(stubs, 2)
    answers = []
    for snapshot in ("", first, second):
        if snapshot:
            assert not stubs.hotload("deployments/d", snapshot).HasField("error")
        calls = [stubs.sampling.Sample.future(request(5, 24, 2), timeout=60) for _ in range(4)]
        found = [call.result() for call in calls]
        assert {one.snapshot for one in found} == {snapshot}
        assert all(one.sequences == found[0].sequences for one in found)
        answers.append(found[0].sequences)
    assert answers[0] != answers[1] != answers[2]
    # What all of them serve of the base model is in memory once.
    for pid in pids:
        assert str(model / "model.safetensors") in Path(f"/proc/{pid}/maps").read_text()
    stubs.trainers.DeleteTrainer(trainer_service_pb2.DeleteTrainerRequest(name="trainers/real"))
