"""A full disk: refused or failed by name, with nothing changed; once there is room, on it goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from firetitan.v1 import checkpoint_service_pb2, operation_service_pb2, training_service_pb2
from support.commands import GOOD, toy_datum
from support.daemon import DaemonProcess
from support.disks import Disk, needs_root
from support.stubs import LaneClient, Stubs, reason, status_reason

from firetitan_daemon.places import Places

pytestmark = [pytest.mark.timeout(120), needs_root]
SIZE_KB = 1024


class World:
    """A daemon one of whose folders is a small disk; a session with a gradient pending."""

    def __init__(self, home: Path, folder: str, size_kb: int = SIZE_KB) -> None:
        self.disk = Disk(home / folder, home.parent / "image", size_kb)
        self.daemon = DaemonProcess(home)

    def start(self) -> None:
        self.daemon.start()
        self.stubs = Stubs(self.daemon.address)
        self.stubs.create_trainer()
        self.lane = LaneClient(self.stubs, self.stubs.session())
        self.lane.step()
        self.stubs.done(self.lane.forward_backward())

    def state(self) -> tuple[str, list[int]]:
        """Digest of weights, optimizer and gradients; the daemon and its workers."""
        saved = self.stubs.done(self.lane.save_state("probe")).checkpoint
        return saved.digest, [self.daemon.process.pid, *self.daemon.worker_pids()]

    def listed(self) -> list[str]:
        """Ids of the checkpoints and snapshots there are."""
        calls = self.stubs.checkpoints
        checkpoints = calls.ListCheckpoints(
            checkpoint_service_pb2.ListCheckpointsRequest(parent=self.lane.session)
        ).checkpoints
        snapshots = calls.ListSnapshots(
            checkpoint_service_pb2.ListSnapshotsRequest(parent=self.lane.session)
        ).snapshots
        return [one.name.rpartition("/")[2] for one in (*checkpoints, *snapshots)]


@pytest.fixture
def world(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(tmp_path / "home", request.param)
    try:
        world.start()
        yield world
        world.stubs.channel.close()
    finally:
        world.daemon.stop()
        world.disk.unmount()


@pytest.mark.parametrize("world", ["spool"], indirect=True)
def test_no_room_for_a_request(world: World) -> None:
    before = world.state()
    big = training_service_pb2.ForwardBackwardRequest(
        data=[toy_datum(row, row) for row in np.ones((200, 100), int).tolist()],
        loss_fn="cross_entropy",
    )
    world.disk.fill(8192)
    with pytest.raises(grpc.RpcError) as caught:
        world.lane.send(big)
    world.lane.seq -= 1
    assert reason(caught.value) == "STATE_DISK_FULL"
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    for text in (str(world.disk.folder), "is full", "bytes are needed", "send the request again"):
        assert text in caught.value.details()
    world.disk.free()
    assert world.state() == before
    assert world.lane.step().optim_step.metrics["step"] == 2


@pytest.mark.parametrize("world", ["spool"], indirect=True)
def test_no_room_for_a_result_waits_for_room(world: World) -> None:
    """The worker has run it: failing it would be a lie, so it ends once there is room."""
    before = world.state()[1]
    data = [toy_datum(row, row) for row in np.ones((20, 100), int).tolist()]
    forward = training_service_pb2.ForwardRequest(data=data, loss_fn="cross_entropy")
    world.disk.fill(-(-forward.ByteSize() // 4096) * 4096)  # room for the request alone
    operation = world.lane.send(forward)
    wait = operation_service_pb2.WaitOperationRequest(name=operation.name)
    wait.timeout.FromMilliseconds(1500)
    waiting = world.stubs.operations.WaitOperation(wait).operation
    world.disk.free()
    assert not waiting.done
    assert len(world.stubs.done(operation).forward.outputs) == 20
    assert world.state()[1] == before


@pytest.mark.parametrize("world", ["store"], indirect=True)
@pytest.mark.parametrize("method", ["save_state", "save_snapshot"])
def test_no_room_for_a_save(world: World, method: str) -> None:
    before = world.state()
    world.disk.fill(8192)
    save = getattr(world.lane, method)
    operation = save("more")
    ended = world.stubs.wait(operation.name)
    assert status_reason(ended.error) == "STATE_DISK_FULL", ended.error
    for text in (
        "no space left",
        str(world.disk.folder),
        "bytes free",
        "nothing was saved",
        "free some space",
    ):
        assert text in ended.error.message
    assert "Traceback" not in str(ended.error)
    world.lane.seen_failure = operation.seq
    deadline = time.monotonic() + 20  # it is removed once the failure is written down
    while list((world.disk.folder / "staging").iterdir()):
        assert time.monotonic() < deadline, "what was half written stays"
        time.sleep(0.02)
    assert world.listed() == ["probe"]
    world.disk.free()
    assert world.state() == before
    world.stubs.done(save("more"))
    assert len(world.listed()) == 2
    assert world.lane.step().optim_step.metrics["step"] == 2
    world.disk.fill()
    assert world.stubs.done(world.lane.load_state("probe")).load.step == 1, "the old one loads"


@pytest.mark.parametrize("world", ["store"], indirect=True)
def test_training_goes_on_without_room_for_saves(world: World) -> None:
    world.disk.fill()
    assert world.lane.step().optim_step.metrics["step"] == 2
    world.stubs.done(world.lane.forward_backward(GOOD))


def test_a_daemon_starts_on_a_full_disk_and_space_is_freed_through_it(tmp_path: Path) -> None:
    world = World(tmp_path / "home", ".", size_kb=16384)
    try:
        world.start()
        world.stubs.done(world.lane.save_state("kept"))
        world.stubs.channel.close()
        world.daemon.kill()
        world.disk.fill()
        world.daemon.launch()
        stubs = Stubs(f"unix:{Places(world.daemon.home).socket}")
        grpc.channel_ready_future(stubs.channel).result(20)
        assert world.daemon.process is not None and world.daemon.process.poll() is None
        name = f"{world.lane.session}/checkpoints/kept"
        stubs.checkpoints.DeleteCheckpoint(
            checkpoint_service_pb2.DeleteCheckpointRequest(name=name), timeout=20
        )
        assert not list((world.daemon.home / "store" / "checkpoints").iterdir())
        world.disk.free()
        assert LaneClient(stubs, world.lane.session).step().optim_step.metrics["step"] == 2
        stubs.channel.close()
    finally:
        world.daemon.stop()
        world.disk.unmount()
