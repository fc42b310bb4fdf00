"""SIGTERM with commands running and waiting: one ends, the others are the next daemon's."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import grpc
import pytest
from support.daemon import DaemonProcess
from support.history_client import message_of
from support.stubs import LaneClient, Stubs, reason

pytestmark = pytest.mark.timeout(120)

SLOW = {"FIRETITAN_FAILPOINTS": "engine.step=delay(2000)"}


@pytest.mark.parametrize(("grace_s", "signals"), [("30", 1), ("30", 3), ("1", 1)])
def test_sigterm(tmp_path: Path, grace_s: str, signals: int) -> None:
    daemon = DaemonProcess(tmp_path / "home", {**SLOW, "FIRETITAN_SERVER_DRAIN_TIMEOUT_S": grace_s})
    daemon.start()
    try:
        stubs = Stubs(daemon.address)
        stubs.create_trainer()
        session = stubs.session()
        lane, late = LaneClient(stubs, session, "lane"), LaneClient(stubs, session, "late")
        sent = []
        for _ in range(2):
            sent += [lane.forward_backward(), lane.optim_step()]
        stubs.done(sent[0])
        refused: list[str] = []
        asking = threading.Thread(target=lambda: refused.append(until_refused(late)))
        assert daemon.process is not None
        asking.start()
        for _ in range(signals):
            daemon.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        # With little grace the step that runs is left with the trainer.
        assert daemon.wait_exit(60) == 0
        asking.join(60)
        assert refused == ["DAEMON_DRAINING"]
        pids = daemon.worker_pids()
        daemon.start()
        assert daemon.worker_pids() == pids
        ended = [stubs.done(one) for one in sent]
        assert [int(ended[index].optim_step.metrics["step"]) for index in (1, 3)] == [1, 2]
        assert [one.commit_seq for one in ended] == [1, 2, 3, 4]
        stubs.channel.close()
    finally:
        daemon.stop()


def until_refused(lane: LaneClient) -> str:
    """Send commands until the daemon says why not."""
    while True:
        message = lane.header(message_of("ForwardBackward", "late", 1))
        try:
            lane.stubs.training.ForwardBackward(message, timeout=10)
        except grpc.RpcError as error:
            return reason(error)
