"""`kill -9` of clients while they send and wait: what was accepted is done, and others find it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import history_client
from support.daemon import DaemonProcess
from support.history import History, judge, load
from support.history_client import listed_calls
from support.sizes import figure, seed, size
from support.stubs import LaneClient, Stubs

pytestmark = pytest.mark.timeout(size(180, 3600))

KILLS = size(4, 100)
LEAST_COMMANDS = 25


def run_client(address: str, session: str, name: str, file: Path, waiting: str) -> None:
    """Let a client of its own process work for a while, then kill it."""
    command = [sys.executable, history_client.__file__, address, session, name, str(file), waiting]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    assert process.stderr is not None
    deadline = time.monotonic() + 90
    while not file.exists() or sum(one.seq > 0 for one in load(file).calls) < LEAST_COMMANDS:
        assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    time.sleep(random.uniform(0.0, 0.1))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()


def test_what_dead_clients_sent_is_done_and_found(daemon: DaemonProcess, tmp_path: Path) -> None:
    random.seed(seed(1))
    stubs = Stubs(daemon.address)
    stubs.create_trainer()
    session = stubs.session()
    files = []
    for index in range(KILLS):
        files.append(tmp_path / f"client-{index}.jsonl")
        waiting = ("wait", "stream")[index % 2]
        run_client(daemon.address, session, f"client-{index}", files[-1], waiting)
    # Another client: lists, waits for what still runs, fetches every result.
    listed = listed_calls(daemon.address, session)
    recorded = load(*files)
    sent = {one.request_id for one in recorded.calls if one.seq}
    figure("R5", kills=KILLS, commands=len(listed), sent=len(sent))
    assert len(listed) >= KILLS * LEAST_COMMANDS
    assert judge(History(recorded.calls, listed)) == []
    # Its own work goes on behind theirs.
    lane = LaneClient(stubs, session)
    stubs.done(lane.forward_backward())
    steps = sum(one.step > 0 for one in listed)
    assert stubs.done(lane.optim_step()).optim_step.metrics["step"] == steps + 1
    stubs.channel.close()
