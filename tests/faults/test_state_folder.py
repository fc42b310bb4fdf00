"""R9: the state's folders read-only or away: refused by path, the rest goes on, nothing is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from firetitan.v1 import operation_pb2, operation_service_pb2
from support.daemon import DaemonProcess
from support.disks import Disk, needs_root
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


def end_all(daemon: DaemonProcess) -> None:
    daemon.kill()
    daemon.stop()  # what is left of it: the workers
    deadline = time.monotonic() + 30
    while daemon.worker_pids():
        assert time.monotonic() < deadline
        time.sleep(0.02)
