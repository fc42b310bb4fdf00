"""Daemon, trainer and sampler killed at once: the next daemon brings all of it back."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from firetitan.v1 import system_service_pb2
from support.daemon import DaemonProcess
from support.history_client import training
from support.stubs import LaneClient, Stubs

from firetitan_daemon.places import Places

pytestmark = pytest.mark.timeout(180)


def kill_all(daemon: DaemonProcess) -> list[int]:
    """One after the other as fast as can be; returns the workers' ids."""
    pids = daemon.worker_pids()
    assert daemon.process is not None and len(pids) == 2
    for pid in (daemon.process.pid, *pids):
        os.kill(pid, signal.SIGKILL)
    daemon.kill()
    return pids


def prepare(daemon: DaemonProcess) -> tuple[Stubs, LaneClient, str]:
    """A session of one step whose snapshot is served."""
    stubs = Stubs(daemon.address)
    stubs.create_trainer()
    lane = LaneClient(stubs, stubs.session())
    lane.step()
    snapshot = stubs.done(lane.save_snapshot("served")).snapshot.name
    assert not stubs.create_deployment().HasField("error")
    assert not stubs.hotload("deployments/d", snapshot).HasField("error")
    return stubs, lane, snapshot


def check_processes(daemon: DaemonProcess, stubs: Stubs, dead: list[int]) -> None:
    """Two workers, both known to the daemon, their sockets and its own."""
    info = stubs.system.GetSystemInfo(system_service_pb2.GetSystemInfoRequest())
    pids = sorted(worker.pid for worker in info.workers)
    assert pids == sorted(daemon.worker_pids()) and not set(pids) & set(dead)
    assert {worker.state for worker in info.workers} == {"ready"}
    assert len(pids) == 2
    sockets = [path.name for path in Places(daemon.home).run.iterdir()]
    assert len(sockets) == 3 and "firetitan.sock" in sockets, sockets


def test_in_quiet(daemon: DaemonProcess) -> None:
    stubs, lane, snapshot = prepare(daemon)
    before = stubs.sample()
    sent = [lane.forward_backward(), lane.optim_step()]
    dead = kill_all(daemon)
    daemon.start()
    assert [stubs.done(one).method for one in sent] == ["ForwardBackward", "OptimStep"]
    after = stubs.sample()
    assert after.snapshot == snapshot and after.sequences == before.sequences
    assert lane.step().optim_step.metrics["step"] == 3
    check_processes(daemon, stubs, dead)
    stubs.channel.close()


def test_under_load(daemon: DaemonProcess, tmp_path: Path) -> None:
    stubs, lane, snapshot = prepare(daemon)
    before = stubs.sample()
    folder = tmp_path / "clients"
    folder.mkdir()
    with training(daemon.address, lane.session, folder, 2) as clients:
        for _ in range(2):
            steps = [client.steps for client in clients]
            while any(now.steps < was + 2 for now, was in zip(clients, steps, strict=True)):
                assert all(client.is_alive() for client in clients)
            dead = kill_all(daemon)
            daemon.start()
            after = stubs.sample()
            assert after.snapshot == snapshot and after.sequences == before.sequences
    check_processes(daemon, stubs, dead)
    stubs.channel.close()
