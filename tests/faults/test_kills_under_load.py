"""`kill -9` of the daemon, again and again, while four clients train: none of them can tell.

It dies at random moments and at each place on a command's way. What the clients saw must be a
history of one session, and its weights those of an undisturbed run of the same order of commands.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.daemon import DaemonProcess
from support.history import load
from support.history_client import TrainingClient, run_again, training
from support.sizes import figure, percentile, seed, size
from support.stubs import LaneClient, Stubs

from firetitan_daemon.core.failpoints import NAMES

pytestmark = pytest.mark.timeout(size(300, 4 * 3600))

KILLS = size(20, 1000)
CLIENTS = 4
PLACES = [one for one in NAMES if one.startswith("commands.")] + ["adopt.adopted"]


def next_death(generator: random.Random, index: int) -> tuple[str, dict[str, str]]:
    """How the daemon dies the next time: by hand, or at a place it is started with."""
    if index % 2 == 0:
        return "", {}
    place = PLACES[index // 2 % len(PLACES)]
    # A place where saves pass comes rarely, adoption once.
    before = 0 if place in ("adopt.adopted", "commands.published") else generator.randrange(12)
    return place, {"FIRETITAN_FAILPOINTS": f"{place}={before}*off->kill"}


def until_answered(clients: Sequence[TrainingClient], since: float) -> list[float]:
    """Wait until each client had an answer again; seconds each was without."""
    deadline = time.monotonic() + 120
    found = []
    for client in clients:
        while not (after := [one for one in client.answered[-8:] if one > since]):
            assert client.is_alive() and time.monotonic() < deadline, client.failure
            time.sleep(0.005)
        found.append(after[0] - since)
    return found


def test_nothing_is_lost_doubled_or_reordered(tmp_path: Path) -> None:
    generator = random.Random(seed(1))
    daemon = DaemonProcess(tmp_path / "home")
    daemon.start()
    kills, outages = 0, []
    try:
        stubs = Stubs(daemon.address)
        stubs.create_trainer()
        session = stubs.session()
        with training(daemon.address, session, tmp_path, CLIENTS, save_every=8) as clients:
            while kills < KILLS:
                place, environment = next_death(generator, kills)
                if place:
                    # One that is to die somewhere else than by hand takes over first.
                    daemon.kill()
                    daemon.launch(environment)
                    assert daemon.wait_exit(120) == -9, f"{place} was never reached"
                    kills += 1
                else:
                    time.sleep(generator.uniform(0.0, 0.4))
                    daemon.kill()
                kills += 1
                died = time.monotonic()
                daemon.start()
                outages += until_answered(clients, died)
        digest = stubs.done(LaneClient(stubs, session, "end").save_state("end")).checkpoint.digest
        stubs.channel.close()
    finally:
        daemon.stop()
    history = load(tmp_path / "history.jsonl")
    figure(
        "R1",
        kills=kills,
        commands=len(history.listed),
        outage_p50_s=round(percentile(outages, 50), 3),
        outage_p99_s=round(percentile(outages, 99), 3),
    )
    undisturbed = DaemonProcess(tmp_path / "undisturbed")
    undisturbed.start()
    try:
        stubs = Stubs(undisturbed.address)
        stubs.create_trainer()
        assert run_again(stubs, stubs.session(), history) == digest
        stubs.channel.close()
    finally:
        undisturbed.stop()
