"""Samplers of one deployment, and its daemon, killed at work."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from firetitan.v1 import deployment_pb2, deployment_service_pb2
from support.daemon import DaemonProcess
from support.replicas import ACTIVE, begin, deployment, request, scale, snapshots, until_ready
from support.stopping import stopped
from support.stubs import LaneClient, Stubs, status_reason

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[DaemonProcess]:
    daemon = DaemonProcess(tmp_path / "home")
    yield daemon
    daemon.stop()


def serve(daemon: DaemonProcess, replicas: int, failpoints: str = "") -> Stubs:
    """A daemon with a deployment of the toy."""
    daemon.start({"FIRETITAN_FAILPOINTS": failpoints})
    stubs = Stubs(daemon.address)
    assert not stubs.create_deployment(replicas=replicas).HasField("error")
    until_ready(stubs, replicas)
    return stubs


def trained(stubs: Stubs, count: int) -> list[str]:
    stubs.create_trainer()
    return snapshots(stubs, LaneClient(stubs, stubs.session()), count)


def of_each(stubs: Stubs, replicas: int, seed: int = 3) -> set[bytes]:
    """What each sampler makes of one request, with the snapshot it names."""
    seen, busy = set(), []
    for _ in range(replicas):
        answer = stubs.sampling.Sample(request(seed), timeout=60)
        seen.add(answer.snapshot.encode() + b": " + answer.sequences[0].token_ids)
        busy += begin(stubs, 1, max_tokens=8000, samples=16)
    assert [one.running for one in deployment(stubs).workers] == [1] * replicas
    for call in busy:
        call.cancel()
    return seen


def test_the_others_serve_on_and_answer_for_the_dead_one(home: DaemonProcess) -> None:
    stubs = serve(home, 2)
    alone = [stubs.sampling.Sample(request(seed, 2000, 4)).sequences for seed in range(4)]
    calls = begin(stubs, 4, max_tokens=2000, samples=4)
    first, second = (one.pid for one in deployment(stubs).workers)
    os.kill(first, signal.SIGKILL)
    # Without a retry of ours: what the dead one had begun the other has answered.
    assert [call.result().sequences for call in calls] == alone
    state = deployment_pb2.Deployment.STATE_ACTIVE
    seen = []
    while len(pids := [one.pid for one in deployment(stubs).workers if one.state == ACTIVE]) < 2:
        assert deployment(stubs).state == state
        seen.append(stubs.sampling.Sample(request(0, 2000, 4)).sequences)
    assert all(one == alone[0] for one in seen)
    assert first not in pids and second in pids
    stubs.channel.close()


def test_one_that_hangs_is_left_alone(home: DaemonProcess) -> None:
    stubs = serve(home, 2)
    expected = stubs.sampling.Sample(request()).sequences
    first = deployment(stubs).workers[0]
    with stopped(first.pid):
        deadline = time.monotonic() + 30
        while not deployment(stubs).workers[0].unresponsive:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        answers = [stubs.sampling.Sample(request(), timeout=10).sequences for _ in range(4)]
    assert answers == [expected] * 4
    while deployment(stubs).workers[0].unresponsive:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert deployment(stubs).workers[0].pid == first.pid, "it is not to be ended"
    stubs.channel.close()


@pytest.mark.parametrize("place", ["sampler.prepared", "sampler.applying", "sampler.applied"])
def test_a_hotload_reaches_all_though_one_dies_on_the_way(home: DaemonProcess, place: str) -> None:
    # In the second hotload; each has passed the place in the first.
    stubs = serve(home, 2, f"{place}=1*off->kill_once")
    first, second = trained(stubs, 2)
    for snapshot in (first, second):
        operation = stubs.hotload("deployments/d", snapshot)
        assert not operation.HasField("error"), operation.error
    assert (home.home / f"failpoint-{place}").exists()
    until_ready(stubs, 2)
    (answer,) = of_each(stubs, 2)
    assert answer.startswith(second.encode())
    stubs.channel.close()


def hotload_request(snapshot: str) -> deployment_service_pb2.HotloadSnapshotRequest:
    return deployment_service_pb2.HotloadSnapshotRequest(
        deployment="deployments/d", snapshot=snapshot, request_id="killed"
    )


@pytest.mark.parametrize("place", ["hotload.prepared", "hotload.switched", "hotload.applied"])
def test_the_next_daemon_finishes_a_hotload_in_all_of_them(home: DaemonProcess, place: str) -> None:
    stubs = serve(home, 2)
    first, second = trained(stubs, 2)
    stubs.hotload("deployments/d", first)
    home.kill()
    home.start({"FIRETITAN_FAILPOINTS": f"{place}=kill"})
    pids = until_ready(stubs, 2)
    # It may die before it has answered; a future that nobody holds is cancelled.
    call = stubs.deployments.HotloadSnapshot.future(hotload_request(second))
    home.wait_exit()
    call.exception()
    home.start({"FIRETITAN_FAILPOINTS": ""})
    again = stubs.retry(stubs.deployments.HotloadSnapshot, hotload_request(second)).operation
    assert not stubs.wait(again.name).HasField("error")
    assert until_ready(stubs, 2) == pids
    (answer,) = of_each(stubs, 2)
    assert answer.startswith(second.encode())
    stubs.channel.close()


def test_where_a_first_hotload_cannot_be_finished_all_serve_the_base_model(
    home: DaemonProcess,
) -> None:
    stubs = serve(home, 2)
    (snapshot,) = trained(stubs, 1)
    home.kill()
    home.start({"FIRETITAN_FAILPOINTS": "hotload.switched=kill"})
    until_ready(stubs, 2)
    # It may die before it has answered; a future that nobody holds is cancelled.
    call = stubs.deployments.HotloadSnapshot.future(hotload_request(snapshot))
    home.wait_exit()
    call.exception()
    for payload in (home.home / "spool").rglob("*"):
        if payload.is_file():
            payload.unlink()
    home.start({"FIRETITAN_FAILPOINTS": ""})
    again = stubs.retry(stubs.deployments.HotloadSnapshot, hotload_request(snapshot)).operation
    assert status_reason(stubs.wait(again.name).error) == "CHECKSUM_MISMATCH"
    until_ready(stubs, 2)
    (answer,) = of_each(stubs, 2)
    assert answer.startswith(b": "), "it is of the snapshot"
    stubs.channel.close()


def test_all_of_them_are_taken_over_and_those_taken_away_are_not(home: DaemonProcess) -> None:
    stubs = serve(home, 3)
    pids = until_ready(stubs, 3)
    home.kill()
    home.start({"FIRETITAN_FAILPOINTS": "scale.removed=kill"})
    assert until_ready(stubs, 3) == pids == sorted(pids, key=pids.index)
    os.kill(pids[1], signal.SIGKILL)
    until_ready(stubs, 3, other_than=pids[1])
    message = deployment_service_pb2.ScaleDeploymentRequest(name="deployments/d", replicas=1)
    # A future that nobody holds is cancelled.
    call = stubs.deployments.ScaleDeployment.future(message)
    home.wait_exit()
    assert call.exception() is not None
    home.start({"FIRETITAN_FAILPOINTS": ""})
    (left,) = until_ready(stubs, 1)
    deadline = time.monotonic() + 30
    while home.worker_pids("sampler") != [left]:
        assert time.monotonic() < deadline, home.worker_pids("sampler")
        time.sleep(0.05)
    stubs.channel.close()


def test_one_that_is_given_up_is_missing_by_name_until_it_is_asked_for(
    home: DaemonProcess,
) -> None:
    stubs = serve(home, 2)
    kept, pid = (one.pid for one in deployment(stubs).workers)
    for _ in range(3):
        os.kill(pid, signal.SIGKILL)
        (pid,) = set(until_ready(stubs, 2, other_than=pid)) - {kept}
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while len(deployment(stubs).workers) != 1:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    found = deployment(stubs)
    assert (found.state, found.replicas, found.ready_replicas) == (ACTIVE, 2, 1)
    assert "4 times within 60 s" in found.error.message
    assert stubs.sampling.Sample(request()).sequences
    scale(stubs, 2)
    assert kept in until_ready(stubs, 2)
    assert not deployment(stubs).HasField("error")
    stubs.channel.close()
