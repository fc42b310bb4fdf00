"""Every place where a test may stop a process is passed by the things that clients do."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from support.daemon import DaemonProcess
from support.replicas import scale, until_ready
from support.stubs import LaneClient, Stubs

from firetitan_daemon.core.failpoints import NAMES

pytestmark = pytest.mark.timeout(120)

EVERYWHERE = {
    "FIRETITAN_FAILPOINTS": ";".join(f"{name}=note" for name in NAMES),
    "FIRETITAN_RECOVERY_INTERVAL_S": "0",
    "FIRETITAN_RECOVERY_COST_SHARE": "1000",
}


def test_each_is_reached(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path / "home", EVERYWHERE)
    daemon.start()
    try:
        stubs = Stubs(daemon.address)
        stubs.create_trainer()
        lane = LaneClient(stubs, stubs.session())
        (trainer,) = daemon.worker_pids()
        lane.step()
        stubs.done(lane.save_state("state"))
        snapshot = stubs.done(lane.save_snapshot("snapshot")).snapshot.name
        stubs.create_deployment(replicas=2)
        until_ready(stubs, 2)
        stubs.hotload("deployments/d", snapshot)
        scale(stubs, 1)
        stubs.sample()
        # Behind the last recovery point, so that there is something to run again.
        stubs.done(lane.forward_backward())
        os.kill(trainer, signal.SIGKILL)
        stubs.done(lane.optim_step())
        daemon.kill()
        daemon.start()
        lane.step()
        deadline = time.monotonic() + 30
        while missing := set(NAMES) - {
            path.name.removeprefix("failpoint-") for path in daemon.home.glob("failpoint-*")
        }:
            assert time.monotonic() < deadline, f"no test can stop a process at {sorted(missing)}"
            time.sleep(0.05)
        stubs.channel.close()
    finally:
        daemon.stop()
