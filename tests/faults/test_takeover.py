"""A new daemon reaches the workers of the one before at once, all of them side by side."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from firetitan.v1 import system_service_pb2
from support.daemon import DaemonProcess
from support.sizes import figure, percentile, size
from support.stubs import Stubs

WORKERS = 8
ROUNDS = size(3, 25)
SANE_S = 5.0
"""What one adoption takes at most on a machine that does much else besides."""
_ADOPTED = re.compile(r"worker adopted .* seconds=(\S+)")

pytestmark = pytest.mark.timeout(size(180, 900))


def ready(stubs: Stubs) -> int:
    """How many workers are reached."""
    request = system_service_pb2.GetSystemInfoRequest()
    info = stubs.retry(stubs.system.GetSystemInfo, request)
    return sum(one.state == "ready" for one in info.workers)


def until_ready(stubs: Stubs, count: int) -> float:
    """Seconds until so many workers are reached."""
    began = time.monotonic()
    while ready(stubs) != count:
        assert time.monotonic() - began < 60
        time.sleep(0.02)
    return time.monotonic() - began


def test_eight_workers_and_one_that_hangs(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path / "home")
    daemon.start()
    stubs = Stubs(daemon.address)
    hung = 0
    try:
        for index in range(WORKERS // 2):
            stubs.create_trainer(f"t{index}")
            stubs.create_deployment(f"d{index}")
        pids = sorted(daemon.worker_pids())
        assert len(pids) == WORKERS
        outages = []
        for _ in range(ROUNDS):
            daemon.kill()
            died = time.monotonic()
            daemon.start()
            until_ready(stubs, WORKERS)
            outages.append(time.monotonic() - died)
        took = [float(one) for one in _ADOPTED.findall(daemon.log)]
        assert len(took) == ROUNDS * WORKERS
        figure(
            "R1 adoption",
            workers=WORKERS,
            adoptions=len(took),
            adoption_p50_s=round(percentile(took, 50), 4),
            adoption_p99_s=round(percentile(took, 99), 4),
            all_reached_p99_s=round(percentile(outages, 99), 3),
        )
        assert max(took) < SANE_S
        # Nobody waits for one that does not answer.
        hung = pids[0]
        os.kill(hung, signal.SIGSTOP)
        daemon.kill()
        daemon.start()
        assert until_ready(stubs, WORKERS - 1) < SANE_S
        os.kill(hung, signal.SIGCONT)
        until_ready(stubs, WORKERS)
        assert sorted(daemon.worker_pids()) == pids
    finally:
        if hung:
            os.kill(hung, signal.SIGCONT)
        stubs.channel.close()
        daemon.stop()
