"""A worker that dies while nobody waits for it: whoever looks sees that, and why."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from firetitan.v1 import session_pb2, trainer_pb2, trainer_service_pb2, training_service_pb2
from support.daemon import DaemonProcess
from support.sizes import figure
from support.stubs import LaneClient, Stubs

pytestmark = pytest.mark.timeout(120)


def test_a_trainer_that_cannot_be_replaced(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path / "home", {"FIRETITAN_RECOVERY_ENABLED": "0"})
    daemon.start()
    try:
        stubs = Stubs(daemon.address)
        stubs.create_trainer()
        lane = LaneClient(stubs, stubs.session())
        lane.step()
        (pid,) = daemon.worker_pids()
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        request = trainer_service_pb2.GetTrainerRequest(name="trainers/t")
        while True:
            shown = stubs.trainers.GetTrainer(request).trainer
            if shown.state == trainer_pb2.Trainer.STATE_FAILED:
                break
            assert time.monotonic() < killed + 60, shown
            time.sleep(0.01)
        figure("R30", shown_after_s=round(time.monotonic() - killed, 3))
        assert (
            "SIGKILL" in shown.error.message and "create the trainer again" in shown.error.message
        )
        session = stubs.training.GetSession(
            training_service_pb2.GetSessionRequest(name=lane.session)
        ).session
        assert session.state == session_pb2.Session.STATE_LOST
        command = [sys.executable, "-m", "firetitan_daemon", "status", "--json", "--home"]
        status = subprocess.run([*command, str(daemon.home)], capture_output=True, text=True)
        assert status.returncode == 0 and str(pid) not in json.dumps(json.loads(status.stdout))
        stubs.channel.close()
    finally:
        daemon.stop()
