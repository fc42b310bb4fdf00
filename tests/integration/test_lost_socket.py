"""A worker whose socket was deleted while no daemon ran: replaced, and not left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.daemon import DaemonProcess
from support.stubs import LaneClient, Stubs

from firetitan_daemon.places import Places

pytestmark = pytest.mark.timeout(90)
IMPATIENT = """
from firetitan_daemon import cli
from firetitan_daemon.launch.local import LocalLauncher

LocalLauncher.__init__.__kwdefaults__["lost_socket_s"] = 1.0
cli.main(["serve"])
"""


class ImpatientDaemon(DaemonProcess):
    """One that waits a second, not half a minute, for a socket to come back."""

    def launch(self, environment: dict[str, str] | None = None) -> subprocess.Popen[Any]:
        with (self.home / "test-daemon.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", IMPATIENT],
                env={**os.environ, "FIRETITAN_HOME": str(self.home)},
                stdout=log,
                stderr=log,
            )
        return self.process


def test_its_trainer_goes_on_and_no_process_is_left(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path / "home")
    daemon.start()
    try:
        stubs = Stubs(daemon.address)
        stubs.create_trainer()
        lane = LaneClient(stubs, stubs.session())
        for _ in range(2):
            lane.step()
        stubs.channel.close()
        (pid,) = daemon.worker_pids()
        daemon.kill()
        (socket,) = Places(daemon.home).run.glob("w-*.sock")
        socket.unlink()
        daemon = ImpatientDaemon(daemon.home)
        daemon.start()
        stubs = Stubs(daemon.address)
        lane = LaneClient(stubs, lane.session)
        assert lane.step().optim_step.metrics["step"] == 3
        (successor,) = daemon.worker_pids()
        assert successor != pid
        assert "nobody listens" in daemon.log and "event=ended_lost" in daemon.log
        stubs.channel.close()
    finally:
        daemon.stop()
