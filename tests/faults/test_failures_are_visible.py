"""What goes wrong while nobody waits for it: whoever looks sees that, why, and what to do.

Each state is brought about and looked for in what `firetitand status` and `doctor` print.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from firetitan.v1 import (
    lease_service_pb2,
    lease_service_pb2_grpc,
    session_pb2,
    trainer_pb2,
    trainer_service_pb2,
    training_service_pb2,
)
from support.daemon import DaemonProcess
from support.sizes import figure
from support.stopping import stopped
from support.stubs import LaneClient, Stubs

from firetitan_daemon.health import Finding, findings
from firetitan_daemon.resources import Resources

pytestmark = pytest.mark.timeout(120)

HANG_S = 15.0


@pytest.fixture
def home(tmp_path: Path) -> Iterator[DaemonProcess]:
    """Not started yet; ended afterwards."""
    daemon = DaemonProcess(tmp_path / "home")
    yield daemon
    daemon.stop()


class Watcher:
    """Looks at a daemon as `firetitand status` does, but more often than that could be started."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self._daemon = daemon
        self._channel = grpc.insecure_channel(daemon.address)
        self._resources = Resources(self._channel)

    def until(self, check: str, *words: str, what: str = "", timeout_s: float = 60.0) -> Finding:
        """Wait until a check finds something that says all of this; measures the time."""
        began = time.monotonic()
        while True:
            found = findings(self._resources.view())
            for one in found:
                if one.check == check and all(word in one.what for word in words):
                    figure("R30", **{what or check: round(time.monotonic() - began, 3)})
                    return one
            assert time.monotonic() < began + timeout_s, found
            time.sleep(0.01)

    def shown(self, finding: Finding, *commands: str) -> None:
        """Both commands print it, with what to do."""
        for command in commands or ("status", "doctor"):
            printed = firetitand(self._daemon, command).stdout
            assert f"! {finding.subject}: " in printed and finding.todo in printed, printed

    def close(self) -> None:
        self._channel.close()


def firetitand(daemon: DaemonProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "firetitan_daemon", *arguments, "--home", str(daemon.home)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_trainer_that_cannot_be_replaced(home: DaemonProcess) -> None:
    home.start({"FIRETITAN_RECOVERY_ENABLED": "0"})
    stubs, watcher = Stubs(home.address), Watcher(home)
    stubs.create_trainer()
    lane = LaneClient(stubs, stubs.session())
    lane.step()
    (pid,) = home.worker_pids()
    os.kill(pid, signal.SIGKILL)
    watcher.until("trainers", "recovering", "killed by SIGKILL", what="trainer_killed_s")
    failed = watcher.until("trainers", "failed", "SIGKILL", what="trainer_given_up_s")
    lost = watcher.until("sessions", "lost", what="session_lost_s")
    assert "create trainers/t again" in failed.todo and "load the last checkpoint" in lost.todo
    watcher.shown(failed)
    request = trainer_service_pb2.GetTrainerRequest(name="trainers/t")
    trainer = stubs.trainers.GetTrainer(request).trainer
    assert trainer.state == trainer_pb2.Trainer.STATE_FAILED
    assert "create the trainer again" in trainer.error.message
    session = stubs.training.GetSession(
        training_service_pb2.GetSessionRequest(name=lane.session)
    ).session
    assert session.state == session_pb2.Session.STATE_LOST
    status = firetitand(home, "status", "--json")
    shown = json.loads(status.stdout)
    assert status.returncode == 0 and not shown.get("workers")
    assert {"trainers", "sessions"} <= {one["check"] for one in shown["findings"]}
    assert firetitand(home, "doctor").returncode == 1
    watcher.close()
    stubs.channel.close()


def test_workers_that_die_and_are_replaced(home: DaemonProcess) -> None:
    home.start()
    stubs, watcher = Stubs(home.address), Watcher(home)
    stubs.create_trainer()
    LaneClient(stubs, stubs.session()).step()
    assert not stubs.create_deployment().HasField("error")
    assert findings(Resources(stubs.channel).view()) == []
    for kind, check in (("trainer", "trainers"), ("sampler", "deployments")):
        (pid,) = home.worker_pids(kind)
        os.kill(pid, signal.SIGKILL)
        watcher.until(check, "recovering", "killed by SIGKILL", what=f"{kind}_killed_s")
        deadline = time.monotonic() + 60
        while findings(Resources(stubs.channel).view()):
            assert time.monotonic() < deadline, "what is mended is not shown any more"
    watcher.close()
    stubs.channel.close()


def test_a_sampler_that_dies_again_and_again(home: DaemonProcess) -> None:
    home.start({"FIRETITAN_FAILPOINTS": "sampler.generated=kill"})
    stubs, watcher = Stubs(home.address), Watcher(home)
    assert not stubs.create_deployment().HasField("error")
    with pytest.raises(grpc.RpcError):
        stubs.sample()
    failed = watcher.until("deployments", "failed", what="sampler_failed_s")
    assert "deployments/d" in failed.todo
    watcher.close()
    stubs.channel.close()


def test_a_worker_that_hangs_and_a_daemon_that_drains(home: DaemonProcess) -> None:
    home.start()
    stubs, watcher = Stubs(home.address), Watcher(home)
    stubs.create_trainer()
    lane = LaneClient(stubs, stubs.session())
    (pid,) = home.worker_pids()
    with stopped(pid):
        lane.forward_backward()
        hung = watcher.until("workers", "has not answered for", what="worker_hung_s")
        assert f"kill -CONT {pid}" in hung.todo
        watcher.shown(hung)
        assert home.process is not None
        home.process.send_signal(signal.SIGTERM)
        draining = watcher.until("daemon", "draining", what="draining_s")
        watcher.shown(draining)
    assert home.wait_exit() == 0
    watcher.close()
    stubs.channel.close()


def test_a_poison_command(home: DaemonProcess) -> None:
    home.start({"FIRETITAN_FAILPOINTS": "worker.admitted=1*off->kill->off"})
    stubs, watcher = Stubs(home.address), Watcher(home)
    stubs.create_trainer()
    lane = LaneClient(stubs, stubs.session())
    stubs.done(lane.forward_backward())
    poison = lane.forward_backward()
    found = watcher.until("failures", "POISON_COMMAND", poison.name, what="poison_s")
    assert "make it smaller" in found.todo
    watcher.shown(found)
    watcher.close()
    stubs.channel.close()


def test_a_cleanup_that_waits(home: DaemonProcess) -> None:
    home.start()
    stubs, watcher = Stubs(home.address), Watcher(home)
    assert not stubs.create_deployment().HasField("error")
    leases = lease_service_pb2_grpc.LeaseServiceStub(stubs.channel)
    use = lease_service_pb2.Use(name="deployments/d")
    leases.HoldLease(
        lease_service_pb2.HoldLeaseRequest(
            client_id=uuid.uuid4().hex, label="other.py (pid 7)", uses=[use]
        )
    )
    use.cleanup = lease_service_pb2.CLEANUP_DELETE
    leases.ReleaseLease(lease_service_pb2.ReleaseLeaseRequest(client_id="asker", uses=[use]))
    found = watcher.until("cleanups", "to be deleted as asker asked", "other.py", what="cleanup_s")
    assert found.todo.endswith("firetitand rm --force deployments/d")
    (row,) = json.loads(firetitand(home, "ls", "--json").stdout)["resources"]
    assert row["memory_bytes"] > 2**20 and row["idle_s"] is not None and row["cleanup"] == "delete"
    assert " MiB  idle " in firetitand(home, "ls").stdout
    watcher.close()
    stubs.channel.close()


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a tmpfs needs root"
)
def test_a_full_disk(home: DaemonProcess) -> None:
    spool = home.home / "spool"
    spool.mkdir(mode=0o700, parents=True)
    options = ["mount", "-t", "tmpfs", "-o", "size=32m,mode=700", "tmpfs", str(spool)]
    if subprocess.run(options, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        home.start()
        watcher = Watcher(home)
        (spool / "filler").write_bytes(bytes(shutil.disk_usage(spool).free))
        found = watcher.until("folders", "disk full: 0.0 MiB free", what="disk_full_s")
        assert found.subject == str(spool) and "free space" in found.todo
        watcher.shown(found)
        watcher.close()
        home.stop()
    finally:
        subprocess.run(["umount", "-l", str(spool)], check=True)
