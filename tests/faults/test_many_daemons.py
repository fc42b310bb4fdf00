"""Eight daemons started at once on one state folder: one serves, the others say who."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from firetitan.v1 import system_service_pb2
from support.daemon import DaemonProcess
from support.sizes import figure, size
from support.stubs import Stubs

from firetitan_daemon.places import Places

pytestmark = pytest.mark.timeout(size(180, 3600))

DAEMONS = 8
ROUNDS = size(2, 50)


def homes_of(folder: Path) -> Sequence[Path]:
    """One folder by several names, too long for sockets in it: each has them somewhere else."""
    parents = [folder / (name + "-" * 60) for name in ("state", "link", "other")]
    (parents[0] / "home").mkdir(mode=0o700, parents=True)
    for link in parents[1:]:
        link.symlink_to(parents[0])
    homes = [parent / "home" for parent in parents]
    assert len({Places(home).run for home in homes}) == len(homes)
    return homes


def race(homes: Sequence[Path]) -> list[subprocess.Popen[str]]:
    """Start them all."""
    return [
        subprocess.Popen(
            [sys.executable, "-m", "firetitan_daemon", "serve"],
            env={**os.environ, "FIRETITAN_HOME": str(homes[index % len(homes)])},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(DAEMONS)
    ]


def test_exactly_one_serves(tmp_path: Path) -> None:
    homes = homes_of(tmp_path)
    for _ in range(ROUNDS):
        started = race(homes)
        try:
            check(started, homes[0])
        finally:
            for process in started:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                process.wait(60)
                assert process.stderr is not None
                process.stderr.close()
    for home in homes:
        shutil.rmtree(Places(home).run, ignore_errors=True)
    figure("R20", rounds=ROUNDS, daemons=DAEMONS)


def check(started: list[subprocess.Popen[str]], home: Path) -> None:
    texts = {}
    while len(texts) < DAEMONS - 1:
        for process in started:
            if process.pid not in texts and process.poll() is not None:
                assert process.stderr is not None
                texts[process.pid] = process.stderr.read()
        time.sleep(0.02)
    (winner,) = [one for one in started if one.pid not in texts]
    assert {one.returncode for one in started if one is not winner} == {3}, texts
    for text in texts.values():
        assert re.search(rf"in use by process {winner.pid};", text), text
    # The losers took nothing away: the address is where it was, and its owner answers there.
    daemon = DaemonProcess(home)
    daemon.process = winner
    daemon.until_serving()
    stubs = Stubs(daemon.address)
    info = stubs.system.GetSystemInfo(system_service_pb2.GetSystemInfoRequest(), timeout=30)
    assert info.pid == winner.pid
    assert Path(daemon.address.removeprefix("unix:")).is_socket()
    stubs.channel.close()
