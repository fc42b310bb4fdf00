"""R9: the state's folders read-only or away: refused by path, the rest goes on, nothing is lost."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from firetitan.v1 import (
    deployment_pb2,
    deployment_service_pb2,
    operation_pb2,
    operation_service_pb2,
)
from support.daemon import DaemonProcess
from support.disks import Disk, needs_root, sealed
from support.stubs import LaneClient, Stubs, reason, status_reason

from firetitan_daemon.doctor import examine
from firetitan_daemon.places import Places

pytestmark = pytest.mark.timeout(120)
SLOW = {"FIRETITAN_FAILPOINTS": "engine.step=4*off->1*delay(1500)"}
"""Once for each of two matrices: the third step is under way while its daemon's folder goes."""


class World:
    """A trainer and a deployment; two steps taken."""

    def __init__(self, home: Path) -> None:
        self.daemon = DaemonProcess(home, SLOW)

    def start(self) -> None:
        self.daemon.start()
        self.stubs = Stubs(self.daemon.address)
        self.stubs.create_trainer()
        self.stubs.create_deployment()
        self.lane = LaneClient(self.stubs, self.stubs.session())
        self.lane.step()
        self.lane.step()
        self.before = self.stubs.sample().sequences

    def send(self) -> list[operation_pb2.Operation]:
        """A slow step, and commands that wait behind it."""
        return [self.lane.forward_backward(), self.lane.optim_step(), self.lane.forward_backward()]

    def check_refused(self, path: Path) -> None:
        """New commands are refused with the path; sampling and reads go on."""
        with pytest.raises(grpc.RpcError) as caught:
            self.lane.forward_backward()
        self.lane.seq -= 1
        assert reason(caught.value) == "STATE_NOT_WRITABLE"
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert str(path) in caught.value.details()
        assert self.stubs.sample().sequences == self.before

    def check_done(self, sent: list[operation_pb2.Operation]) -> None:
        """What was accepted ends well, once; then all goes on as before."""
        for operation in sent:
            self.stubs.done(operation)
        step = self.stubs.done(self.lane.optim_step()).optim_step
        assert step.metrics["step"] == 4
        self.stubs.done(self.lane.save_state("after"))
        assert "internal error" not in self.daemon.log

    def close(self) -> None:
        if hasattr(self, "stubs"):
            self.stubs.channel.close()
        self.daemon.stop()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "home")
    try:
        yield world
    finally:
        world.close()


def not_done(world: World, operation: operation_pb2.Operation, seconds: float) -> None:
    """It is still open after a while: it waits for the disk."""
    request = operation_service_pb2.WaitOperationRequest(name=operation.name)
    request.timeout.FromMilliseconds(int(seconds * 1000))
    assert not world.stubs.operations.WaitOperation(request).operation.done


def test_a_home_that_is_moved_away_and_back(world: World) -> None:
    world.start()
    sent = world.send()
    home = world.daemon.home
    away = home.with_name("away")
    home.rename(away)
    try:
        world.check_refused(home / "spool")
        not_done(world, sent[1], 2.5)
    finally:
        away.rename(home)
    world.check_done(sent)


@pytest.mark.parametrize("dies", ["sampler", "trainer"])
def test_a_worker_that_dies_while_the_home_is_away_is_replaced_behind_it(
    world: World, dies: str
) -> None:
    world.start()
    sent = world.send()
    (dead,) = world.daemon.worker_pids(dies)
    home = world.daemon.home
    away = home.with_name("away")
    home.rename(away)
    try:
        os.kill(dead, signal.SIGKILL)
        log = away / "test-daemon.log"
        until(lambda: log.read_text().count("cannot write to") > 3)
        assert not home.exists()  # nothing stands in its place
    finally:
        away.rename(home)
    world.check_done(sent)
    until(lambda: len(world.daemon.worker_pids()) == 2)
    assert world.stubs.sample().sequences == world.before
    assert dead not in world.daemon.worker_pids()


@needs_root
@pytest.mark.parametrize("folder", ["spool", "store"])
def test_a_folder_that_is_read_only_for_a_while(world: World, tmp_path: Path, folder: str) -> None:
    disk = Disk(world.daemon.home / folder, tmp_path / "image", 4096)
    try:
        world.start()
        sent = world.send()
        disk.read_only(True)
        if folder == "spool":
            world.check_refused(disk.folder)
            not_done(world, sent[1], 2.5)
        else:
            save = world.lane.save_state("refused")
            ended = world.stubs.wait(save.name)
            assert status_reason(ended.error) == "STATE_NOT_WRITABLE"
            assert str(disk.folder) in ended.error.message
            world.lane.seen_failure = save.seq
            assert world.stubs.sample().sequences == world.before
        disk.read_only(False)
        world.check_done(sent)
    finally:
        world.close()
        disk.unmount()


@needs_root
def test_a_disk_that_fails_under_the_whole_home(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "home", tmp_path / "image", 65536)
    world = World(disk.folder)
    # What is not fsynced is lost as with the power.
    world.daemon.environment["FIRETITAN_SERVER_FSYNC_OPERATIONS"] = "true"
    try:
        world.start()
        sent = world.send()
        disk.fail()
        world.check_refused(disk.folder)
        not_done(world, sent[1], 2.5)
        found = examine(Places(disk.folder), {}).findings
        assert any("cannot be written to" in one.what for one in found), found
        # Its file system can only be mounted anew, so all who use it end.
        end_all(world.daemon)
        disk.repair()
        world.daemon.start()
        world.check_done(sent)
        assert world.stubs.sample().sequences == world.before
    finally:
        world.close()
        disk.unmount()


@needs_root
@pytest.mark.parametrize("dies", ["sampler", "trainer"])
@pytest.mark.parametrize("part", ["state.db-wal", "workers"])
def test_what_happens_while_a_part_is_read_only_is_caught_up_with(
    world: World, part: str, dies: str
) -> None:
    """A worker dies, a hotload ends and a step goes on while the ledger or `workers/` is sealed."""
    world.daemon.environment["FIRETITAN_FAILPOINTS"] += ";hotload.applied=note"
    world.start()
    daemon, stubs, home = world.daemon, world.stubs, world.daemon.home
    snapshot = stubs.done(world.lane.save_snapshot("one")).snapshot.name
    stubs.create_deployment("other")
    other, path = deployment(stubs, "other").worker_pid, home / part
    os.kill(other, signal.SIGSTOP)  # the hotload does not end before all is sealed
    request = deployment_service_pb2.HotloadSnapshotRequest(
        deployment="deployments/other", snapshot=snapshot, request_id=uuid.uuid4().hex
    )
    hotload = stubs.deployments.HotloadSnapshot(request).operation
    sent = world.send()
    (dead,) = set(daemon.worker_pids(dies)) - {other}
    with sealed(path):
        if part == "workers":
            refused = stubs.create_trainer("refused")
            assert status_reason(refused.error) == "STATE_NOT_WRITABLE"
            assert str(path) in refused.error.message
        else:
            world.check_refused(home / "state.db")
        told = len(daemon.log)
        os.kill(dead, signal.SIGKILL)
        os.kill(other, signal.SIGCONT)
        until((home / "failpoint-hotload.applied").exists)
        until(lambda: dead not in daemon.worker_pids())
        # It tries, more often than a worker may die in a minute, and says where it cannot write.
        until(lambda: daemon.log[told:].count("cannot write to") > 5)
        if part == "workers":
            stubs.done(hotload)
        else:
            not_done(world, hotload, 2.5)
        for one in ("d", "other"):
            assert deployment(stubs, one).state != deployment_pb2.Deployment.STATE_FAILED
    world.check_done([hotload, *sent])
    check_served(world, snapshot)
    # What was caught up with is in the ledger too.
    pids = sorted(daemon.worker_pids())
    daemon.kill()
    daemon.start()
    check_served(world, snapshot)
    assert sorted(daemon.worker_pids()) == pids


def check_served(world: World, snapshot: str) -> None:
    """Both deployments answer as recorded, and each worker is there once."""
    stubs = world.stubs
    assert stubs.sample().sequences == world.before
    assert stubs.sample("deployments/other").snapshot == snapshot
    for one in ("d", "other"):
        assert deployment(stubs, one).state == deployment_pb2.Deployment.STATE_ACTIVE
    until(lambda: len(world.daemon.worker_pids()) == 3)
    request = operation_service_pb2.ListOperationsRequest(
        parent=world.lane.session, pending_only=True
    )
    assert not stubs.retry(stubs.operations.ListOperations, request).operations


def deployment(stubs: Stubs, deployment_id: str) -> deployment_pb2.Deployment:
    request = deployment_service_pb2.GetDeploymentRequest(name=f"deployments/{deployment_id}")
    return stubs.retry(stubs.deployments.GetDeployment, request).deployment


def until(holds: Callable[[], bool]) -> None:
    """Wait for what happens by itself."""
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


def end_all(daemon: DaemonProcess) -> None:
    daemon.kill()
    daemon.stop()  # what is left of it: the workers
    deadline = time.monotonic() + 30
    while daemon.worker_pids():
        assert time.monotonic() < deadline
        time.sleep(0.02)
