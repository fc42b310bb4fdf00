"""Many clients at everything at once: nothing lost or doubled, memory and descriptors stay flat."""

from __future__ import annotations

import functools
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from firetitan.v1 import operation_service_pb2, system_service_pb2
from support.daemon import DaemonProcess
from support.history import CANCELLED, STEP
from support.history_client import Training, TrainingClient
from support.sizes import figure, size
from support.stubs import Stubs

SECONDS = size(45, 600)
CLIENTS = size(12, 64)
FEWEST_COMMANDS_A_SECOND = 5
MOST_GROWTH_MIB_A_MINUTE = size(24, 1)
CANCELLERS = 4
CANCEL_WITHIN_S = size(0.3, 1.0)
"""About what a command takes to its end, so that some are cancelled as they run."""
DEATHS = ("worker.applied", "sampler.applying")
FAILPOINTS = ";".join(
    (
        # Commands run long enough to be cancelled while they do, or wait behind one that does.
        "engine.step=delay(2)",
        f"worker.applied={size(200, 5_000)}*off->kill_once",
        f"sampler.applying={size(2, 6)}*off->kill_once",
    )
)
"""Slow steps; a trainer dies once in a command it has run, a sampler in a hotload."""

pytestmark = pytest.mark.timeout(SECONDS + size(240, 1800))


class Repeat(threading.Thread):
    """Does something again and again until told to stop."""

    def __init__(self, work: Callable[[], object], pause_s: float) -> None:
        super().__init__(daemon=True)
        self.work = work
        self.pause_s = pause_s
        self.stopping = threading.Event()
        self.times = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.stopping.wait(self.pause_s):
                self.work()
                self.times += 1
        except BaseException as error:
            self.failure = error


def watch_process(pid: int) -> list[tuple[float, int, int]]:
    """(seconds, resident bytes, open descriptors), twice a second for as long as the soak takes."""
    process, began, found = psutil.Process(pid), time.monotonic(), []
    while (now := time.monotonic() - began) < SECONDS:
        found.append((now, process.memory_info().rss, process.num_fds()))
        time.sleep(0.5)
    return found


def test_many_clients_at_everything(tmp_path: Path) -> None:
    settings = {"FIRETITAN_RECOVERY_INTERVAL_S": "2", "FIRETITAN_FAILPOINTS": FAILPOINTS}
    daemon = DaemonProcess(tmp_path / "home", settings)
    daemon.start()
    stubs = Stubs(daemon.address)
    try:
        stubs.create_trainer()
        stubs.create_deployment()
        session = stubs.session()
        work = Training(daemon.address, session, tmp_path / "history.jsonl")
        for index in range(CLIENTS):
            work.add(f"client-{index}", save_every=size(40, 400)).start()
        saver = work.add("saver")
        cancellers = [work.add(f"canceller-{index}") for index in range(CANCELLERS)]
        for one in (saver, *cancellers):
            one.open()

        def sync() -> None:
            (ended,) = saver.send("SaveSnapshot")
            if not ended.HasField("error"):
                loaded = stubs.hotload("deployments/d", ended.snapshot.name)
                assert not loaded.HasField("error"), loaded.error

        def cancel(client: TrainingClient) -> None:
            client.send("ForwardBackward", STEP, cancel_within_s=CANCEL_WITHIN_S)

        def look() -> None:
            stubs.system.GetSystemInfo(system_service_pb2.GetSystemInfoRequest())
            stubs.operations.ListOperations(
                operation_service_pb2.ListOperationsRequest(parent=session, pending_only=True)
            )

        others = [
            Repeat(sync, size(3.0, 10.0)),
            Repeat(lambda: stubs.sample(), 0.1),
            *(Repeat(functools.partial(cancel, one), 0.05) for one in cancellers),
            Repeat(look, 0.2),
        ]
        for one in others:
            one.start()
        assert daemon.process is not None
        measured = watch_process(daemon.process.pid)
        for one in others:
            one.stopping.set()
        work.stop()
        for one in others:
            one.join(60)
        assert [one.failure for one in others] == [None] * len(others)
        assert all(one.times for one in others), [one.times for one in others]
        history = work.judge()
    finally:
        stubs.channel.close()
        daemon.stop()
    cancelled = [one for one in history.listed if one.outcome == CANCELLED]
    assert cancelled and {one.operation for one in cancelled} == history.cancelled
    assert all((daemon.home / f"failpoint-{place}").exists() for place in DEATHS)
    # The first third warms up.
    late = measured[len(measured) // 3 :]
    slope, _ = statistics.linear_regression([at for at, _, _ in late], [rss for _, rss, _ in late])
    growth = slope * 60 / 2**20
    rate = len(history.listed) / SECONDS
    descriptors = [count for _, _, count in late]
    figure(
        "R12",
        seconds=SECONDS,
        clients=CLIENTS,
        commands=len(history.listed),
        commands_a_second=round(rate, 1),
        cancelled=len(cancelled),
        refused_for_now=sum(one.refused for one in work.clients),
        growth_mib_a_minute=round(growth, 2),
        descriptors=max(descriptors),
    )
    assert rate >= FEWEST_COMMANDS_A_SECOND, "too little was at work to show anything"
    assert growth < MOST_GROWTH_MIB_A_MINUTE
    assert max(descriptors) - min(descriptors) < 3 * CLIENTS
