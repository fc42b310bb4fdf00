"""Who dies x where x what is going on: every combination of a night, a drawn few of them by day.

Clients train in all of them. The history must be that of a right session, the deployment must
answer from a snapshot it was given, and no worker and no socket must be left over.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import history_client
from support.daemon import DaemonProcess
from support.history import History, judge, load
from support.history_client import Training, TrainingClient, listed_calls
from support.replicas import scale, until_ready
from support.sizes import NIGHTLY, seed
from support.stubs import Stubs

from firetitan_daemon.core.failpoints import NAMES
from firetitan_daemon.places import Places

pytestmark = pytest.mark.timeout(240)

PROCESSES = ("daemon", "trainer", "sampler", "client")
ACTIVITIES = ("idle", "stepping", "saving", "syncing", "adopting")
CELLS = list(itertools.product([*PROCESSES, *NAMES], ACTIVITIES))
SEVERAL = ("sampler.prepared", "hotload.prepared", "hotload.switched", "scale.removed")
"""Places that only a deployment of several samplers passes."""
OFTEN = {"FIRETITAN_RECOVERY_INTERVAL_S": "0", "FIRETITAN_RECOVERY_COST_SHARE": "1000"}


def drawn() -> list[tuple[str, str]]:
    """Cells to run: an activity each by day."""
    if NIGHTLY:
        return CELLS
    generator = random.Random(seed(3))
    return [(generator.choice([*PROCESSES, *NAMES]), activity) for activity in ACTIVITIES]


class Cell:
    """A daemon with a trainer and a deployment, and clients that train on them."""

    def __init__(self, folder: Path, victim: str) -> None:
        self.folder = folder
        self.victim = victim
        self.samplers = 2 if victim in SEVERAL else 1
        self.daemon = DaemonProcess(folder / "home", OFTEN)
        self.daemon.environment["FIRETITAN_FAILPOINTS"] = f"{victim}=kill_once" * (victim in NAMES)
        self.marker = folder / "home" / f"failpoint-{victim}"
        self.done = threading.Event()
        self.guardian = threading.Thread(target=self.guard, daemon=True)
        self.served: list[str] = []

    def guard(self) -> None:
        """Start the daemon again whenever it dies, as a service manager does."""
        while not self.done.wait(0.02):
            assert self.daemon.process is not None
            if self.daemon.process.poll() is not None:
                self.daemon.launch()

    def begin(self) -> None:
        """All of it, up to a snapshot that is served."""
        self.daemon.home.mkdir()
        if not self.victim.startswith("create."):
            self.marker.touch()  # nobody dies yet
        self.daemon.start()
        self.guardian.start()
        self.stubs = Stubs(self.daemon.address)
        self.stubs.create_trainer()
        self.stubs.create_deployment(replicas=self.samplers)
        until_ready(self.stubs, self.samplers)
        self.session = self.stubs.session()
        self.work = Training(self.daemon.address, self.session, self.folder / "history.jsonl")
        self.hand = self.work.add("hand")
        self.hand.open()
        self.hand.send("ForwardBackward", "OptimStep")
        self.sync()

    def sync(self) -> None:
        """Save what is there and serve it."""
        (ended,) = self.hand.send("SaveSnapshot")
        assert not ended.HasField("error"), ended.error
        loaded = self.stubs.hotload("deployments/d", ended.snapshot.name)
        assert not loaded.HasField("error"), loaded.error
        self.served.append(ended.snapshot.name)

    def act(self, activity: str) -> None:
        """What goes on while a process dies."""
        if activity == "saving":
            self.hand.send("SaveState")
        elif activity == "syncing":
            self.sync()
        elif activity == "adopting":
            assert self.daemon.process is not None
            self.daemon.process.kill()
        elif activity == "stepping":
            self.hand.send("ForwardBackward", "OptimStep")

    def kill(self, client: subprocess.Popen[bytes]) -> None:
        """End the victim, or let it end at its place and bring that about where it is rare."""
        if not self.victim.startswith("create."):
            self.marker.unlink(missing_ok=True)
        if self.victim == "scale.removed":
            self.samplers = 1
            scale(self.stubs, 1)
        elif self.victim == "client":
            client.kill()
        elif self.victim == "daemon" or self.victim.startswith("adopt."):
            assert self.daemon.process is not None
            self.daemon.process.kill()
        elif self.victim in PROCESSES or self.victim.startswith("recovery."):
            self.kill_workers(self.victim if self.victim in PROCESSES else "trainer")

    def kill_workers(self, kind: str) -> None:
        for pid in self.daemon.worker_pids(kind):
            os.kill(pid, signal.SIGKILL)

    def until_passed(self) -> None:
        """Train and sample until the victim has ended at its place."""
        deadline = time.monotonic() + 60
        while self.victim in NAMES and not self.marker.exists():
            assert time.monotonic() < deadline, f"{self.victim} was not passed"
            self.hand.send("ForwardBackward")
            if self.victim.startswith("recovery."):
                # Behind a step there may be a point, and nothing to replay.
                self.kill_workers("trainer")
            self.hand.send("OptimStep")
            self.stubs.sample()

    def clients(self, activity: str) -> list[TrainingClient]:
        """Those that train beside; none where all is to be quiet."""
        if activity == "idle":
            return []
        return [self.work.add(f"client-{index}") for index in range(2)]


@contextmanager
def other_process(cell: Cell) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A client in a process of its own, which may be the one that dies."""
    file = cell.folder / "other.jsonl"
    command = [sys.executable, history_client.__file__, cell.daemon.address, cell.session]
    process = subprocess.Popen([*command, "other", str(file), "wait"])
    deadline = time.monotonic() + 60
    while not file.exists() or not load(file).calls:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    try:
        yield process, file
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("victim", "activity"), drawn())
def test_cell(tmp_path: Path, victim: str, activity: str) -> None:
    generator = random.Random(f"{victim} {activity}")
    cell = Cell(tmp_path, victim)
    try:
        cell.begin()
        clients = cell.clients(activity)
        with other_process(cell) as (other, file):
            for client in clients:
                client.start()
            acting = threading.Thread(target=cell.act, args=(activity,))
            acting.start()
            time.sleep(generator.uniform(0.0, 0.3))
            cell.kill(other)
            acting.join(90)
            assert not acting.is_alive()
            steps = [client.steps for client in clients]
            deadline = time.monotonic() + 90
            while any(now.steps <= was for now, was in zip(clients, steps, strict=True)):
                assert time.monotonic() < deadline, [client.failure for client in clients]
                time.sleep(0.02)
        cell.sync()
        cell.until_passed()
        cell.work.stop()
        check(cell, file)
    finally:
        cell.done.set()
        if cell.guardian.is_alive():
            cell.guardian.join()
        cell.daemon.stop()


def check(cell: Cell, other: Path) -> None:
    assert [one.failure for one in cell.work.clients] == [None] * len(cell.work.clients)
    assert cell.stubs.sample().snapshot == cell.served[-1]
    cell.work.recorder.close()
    recorded = load(cell.work.recorder.path, other)
    listed = listed_calls(cell.daemon.address, cell.session)
    assert judge(History(recorded.calls, listed)) == []
    deadline = time.monotonic() + 30
    run = Places(cell.daemon.home).run
    workers = 1 + cell.samplers
    while len(cell.daemon.worker_pids()) != workers or len(list(run.iterdir())) != workers + 1:
        assert time.monotonic() < deadline, (cell.daemon.worker_pids(), list(run.iterdir()))
        time.sleep(0.05)
    cell.stubs.channel.close()
