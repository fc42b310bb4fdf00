"""`kill -9` of samplers at work: hotloads go on, requests are sent again with their seed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from firetitan.v1 import deployment_pb2, deployment_service_pb2, operation_pb2
from google.rpc import error_details_pb2, status_pb2
from support.daemon import DaemonProcess
from support.stubs import TOY, LaneClient, Stubs, reason, status_reason

from firetitan_client import FiretitanServiceClient

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[DaemonProcess]:
    daemon = DaemonProcess(tmp_path / "home")
    yield daemon
    daemon.stop()


def serve(daemon: DaemonProcess, failpoints: str = "") -> tuple[Stubs, LaneClient]:
    """A daemon with a trainer and a deployment of the toy."""
    daemon.start({"FIRETITAN_FAILPOINTS": failpoints})
    stubs = Stubs(daemon.address)
    stubs.create_trainer()
    assert not stubs.create_deployment().HasField("error")
    return stubs, LaneClient(stubs, stubs.session(), "script")


def deployment(stubs: Stubs) -> deployment_pb2.Deployment:
    request = deployment_service_pb2.GetDeploymentRequest(name="deployments/d")
    return stubs.retry(stubs.deployments.GetDeployment, request).deployment


def kill_sampler(stubs: Stubs) -> None:
    """Kill the one that serves; it has been seen to be gone when this returns."""
    pid = until_active(stubs).worker_pid
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while deployment(stubs).worker_pid == pid:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def until_active(stubs: Stubs) -> deployment_pb2.Deployment:
    deadline = time.monotonic() + 60
    while (found := deployment(stubs)).state != deployment_pb2.Deployment.STATE_ACTIVE:
        assert found.state != deployment_pb2.Deployment.STATE_FAILED, found.error
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found


def until_exists(marker: Path) -> None:
    deadline = time.monotonic() + 60
    while not marker.exists():
        assert time.monotonic() < deadline, marker
        time.sleep(0.02)


def snapshots(stubs: Stubs, lane: LaneClient) -> list[str]:
    """A base and two deltas."""
    names = []
    for name in ("one", "two", "three"):
        lane.step()
        names.append(stubs.done(lane.save_snapshot(name)).snapshot.name)
    return names


@pytest.mark.parametrize("place", ["sampler.applying", "sampler.applied"])
def test_a_hotload_outlives_the_sampler_it_kills(home: DaemonProcess, place: str) -> None:
    # While the third snapshot is applied onto the second.
    stubs, lane = serve(home, f"{place}=2*off->kill_once")
    base, delta, last = snapshots(stubs, lane)
    for snapshot in (base, delta, last):
        operation = stubs.hotload("deployments/d", snapshot)
        assert not operation.HasField("error"), operation.error
    assert (home.home / f"failpoint-{place}").exists()
    answer = stubs.sample()
    assert answer.snapshot == last
    # What a sampler that never died serves.
    stubs.create_deployment("other")
    stubs.hotload("deployments/other", last)
    assert stubs.sample("deployments/other").sequences == answer.sequences
    stubs.channel.close()


def test_a_snapshot_that_kills_every_sampler_fails_and_the_former_one_is_served(
    home: DaemonProcess,
) -> None:
    stubs, lane = serve(home)
    base, delta, _ = snapshots(stubs, lane)
    stubs.hotload("deployments/d", base)
    before = stubs.sample()
    home.kill()
    home.start({"FIRETITAN_FAILPOINTS": "sampler.applying=1*off->kill"})
    # Samplers from here on apply one snapshot, what was served, and die in the next.
    kill_sampler(stubs)
    until_active(stubs)
    failed = stubs.wait(hotload(stubs, delta).name, 90)
    assert status_reason(failed.error) == "WORKER_UNAVAILABLE"
    home.kill()
    home.start({"FIRETITAN_FAILPOINTS": ""})
    if deployment(stubs).state == deployment_pb2.Deployment.STATE_FAILED:
        stubs.create_deployment()
    after = stubs.sample()
    assert after.snapshot == base and after.sequences == before.sequences
    stubs.channel.close()


def hotload(stubs: Stubs, snapshot: str) -> operation_pb2.Operation:
    request = deployment_service_pb2.HotloadSnapshotRequest(
        deployment="deployments/d", snapshot=snapshot, request_id="poison"
    )
    return stubs.deployments.HotloadSnapshot(request).operation


def test_a_sampler_that_dies_while_it_is_restored_is_replaced_too(home: DaemonProcess) -> None:
    stubs, lane = serve(home)
    base, *_ = snapshots(stubs, lane)
    stubs.hotload("deployments/d", base)
    before = stubs.sample()
    home.kill()
    home.start({"FIRETITAN_FAILPOINTS": "sampler.applying=kill_once"})
    kill_sampler(stubs)
    until_exists(home.home / "failpoint-sampler.applying")
    until_active(stubs)
    after = stubs.sample()
    assert after.snapshot == base and after.sequences == before.sequences
    stubs.channel.close()


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_what_was_pinned_is_in_its_successor(
    home: DaemonProcess, tiny_llama: Path, lora_rank: int
) -> None:
    home.start()
    stubs = Stubs(home.address)
    stubs.create_trainer(base_model=str(tiny_llama), rank=lora_rank)
    stubs.create_deployment(base_model=str(tiny_llama))
    base, delta, last = snapshots(stubs, LaneClient(stubs, stubs.session(), "script"))
    for snapshot in (base, delta):
        assert not stubs.hotload("deployments/d", snapshot).HasField("error")
    stubs.deployments.PinSnapshot(
        deployment_service_pb2.PinSnapshotRequest(
            deployment="deployments/d", snapshot=delta, holder="h"
        )
    )
    assert not stubs.hotload("deployments/d", last).HasField("error")
    before = [stubs.sample(snapshot=delta), stubs.sample()]
    kill_sampler(stubs)
    until_active(stubs)
    after = [stubs.sample(snapshot=delta), stubs.sample()]
    assert [one.snapshot for one in after] == [delta, last]
    assert [one.sequences for one in after] == [one.sequences for one in before]
    assert before[0].sequences != before[1].sequences
    stubs.channel.close()


def test_a_request_in_flight_fails_by_name_and_gives_the_same_tokens_again(
    home: DaemonProcess,
) -> None:
    stubs, _ = serve(home, "sampler.generated=1*off->kill_once")
    before = stubs.sample()
    with pytest.raises(grpc.RpcError) as caught:
        stubs.retry = lambda call, request, timeout_s=30.0: call(request)  # type: ignore
        stubs.sample()
    assert reason(caught.value) == "WORKER_UNAVAILABLE"
    assert "deployments/d" in caught.value.details()
    (packed,) = [
        value for key, value in caught.value.trailing_metadata() if key == "grpc-status-details-bin"
    ]
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status_pb2.Status.FromString(packed).details)
    del stubs.retry
    assert stubs.sample().sequences == before.sequences
    stubs.channel.close()


def test_clients_in_flight_get_what_they_would_have_got(home: DaemonProcess) -> None:
    import tinker

    def sample() -> list[list[int]]:
        futures = [
            sampler.sample(
                tinker.ModelInput.from_ints([1, 2, 3]),
                num_samples=2,
                sampling_params=tinker.SamplingParams(max_tokens=400, seed=seed, stop=[]),
            )
            for seed in range(8)
        ]
        begun.set()
        return [one.tokens for future in futures for one in future.result().sequences]

    home.start()
    begun = threading.Event()
    service = FiretitanServiceClient.from_firetitan_config(address=home.address, base_model=TOY)
    sampler = service.create_sampling_client()
    before = sample()
    begun.clear()
    killer = threading.Thread(target=lambda: (begun.wait(), kill_every_worker(home)))
    killer.start()
    after = sample()
    killer.join()
    assert after == before
    service.close()


def kill_every_worker(home: DaemonProcess) -> None:
    time.sleep(0.05)
    for pid in home.worker_pids():
        os.kill(pid, signal.SIGKILL)


def test_one_that_dies_again_and_again_is_given_up_by_name(home: DaemonProcess) -> None:
    stubs, _ = serve(home)
    for _ in range(3):
        kill_sampler(stubs)
    os.kill(until_active(stubs).worker_pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while deployment(stubs).state != deployment_pb2.Deployment.STATE_FAILED:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert "4 times within 60 s" in deployment(stubs).error.message
    # The way out that the message names.
    assert not stubs.create_deployment().HasField("error")
    assert stubs.sample().sequences
    stubs.channel.close()
