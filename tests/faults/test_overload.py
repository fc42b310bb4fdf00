"""More than can be done: what is refused is refused at once, what was accepted is done."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from firetitan.v1 import operation_service_pb2
from support.daemon import DaemonProcess
from support.history import History, Recorder, judge, load
from support.history_client import listed_calls, message_of, note
from support.sizes import figure, percentile, size
from support.stubs import LaneClient, Stubs, reason

CAPACITY = 4
FLOODERS = 10 * CAPACITY
SECONDS = size(8, 60)
READERS = 32

pytestmark = pytest.mark.timeout(SECONDS + 240)


class Flooder(threading.Thread):
    """Sends one command after the other, again at once where it is refused, and never waits."""

    def __init__(self, address: str, session: str, name: str, recorder: Recorder) -> None:
        super().__init__(name=name, daemon=True)
        self.address = address
        self.session = session
        self.recorder = recorder
        self.stopping = threading.Event()
        self.accepted: list[tuple[str, str]] = []
        self.refused_after_s: list[float] = []
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self.flood()
        except BaseException as error:
            self.failure = error

    def flood(self) -> None:
        stubs = Stubs(self.address)
        lane = LaneClient(stubs, self.session, self.name)
        seq = 1
        while not self.stopping.is_set():
            message = lane.header(message_of("ForwardBackward", self.name, seq), seq=seq)
            request_id = message.header.request_id
            key = self.recorder.invoked(self.name, "ForwardBackward", request_id, seq)
            began = time.monotonic()
            try:
                operation = stubs.training.ForwardBackward(message, timeout=30).operation
            except grpc.RpcError as error:
                self.refused_after_s.append(time.monotonic() - began)
                assert reason(error) == "QUEUE_FULL", error
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                time.sleep(0.02)
                continue
            self.accepted.append((key, operation.name))
            seq += 1
        stubs.channel.close()


def test_a_flood_is_refused_and_what_was_accepted_is_done(tmp_path: Path) -> None:
    daemon = DaemonProcess(
        tmp_path / "home", {"FIRETITAN_LIMITS_MAX_SESSION_OPERATIONS": str(CAPACITY)}
    )
    daemon.start()
    stubs = Stubs(daemon.address)
    try:
        stubs.create_trainer()
        session = stubs.session()
        recorder = Recorder(tmp_path / "history.jsonl")
        flooders = [
            Flooder(daemon.address, session, f"flood-{index}", recorder)
            for index in range(FLOODERS)
        ]
        for one in flooders:
            one.start()
        time.sleep(SECONDS)
        for one in flooders:
            one.stopping.set()
        for one in flooders:
            one.join(60)
        assert [one.failure for one in flooders] == [None] * FLOODERS
        took = []
        for one in flooders:
            for key, name in one.accepted:
                ended = stubs.wait(name)
                note(recorder, key, ended)
                span = ended.finish_time.ToNanoseconds() - ended.create_time.ToNanoseconds()
                took.append(span / 1e9)
        recorder.close()
        history = History(load(recorder.path).calls, listed_calls(daemon.address, session))
        assert judge(history) == []
    finally:
        stubs.channel.close()
        daemon.stop()
    refusals = [seconds for one in flooders for seconds in one.refused_after_s]
    figure(
        "R17",
        refused=len(refusals),
        refused_p99_s=round(percentile(refusals, 99), 3),
        accepted=len(took),
        done_p99_s=round(percentile(took, 99), 3),
    )
    assert len(refusals) > len(took) > FLOODERS


def test_readers_that_never_read_harm_nobody(daemon: DaemonProcess) -> None:
    stubs = Stubs(daemon.address)
    stubs.create_trainer()
    session = stubs.session()
    lane = LaneClient(stubs, session, "lane")

    def steps(count: int) -> float:
        began = time.monotonic()
        for _ in range(count):
            lane.step()
        return (time.monotonic() - began) / count

    steps(5)
    alone_s = steps(20)
    assert daemon.process is not None
    process = psutil.Process(daemon.process.pid)
    before = process.memory_info().rss
    readers = [Stubs(daemon.address) for _ in range(READERS)]
    watches = []
    for reader in readers:
        first = operation_service_pb2.WatchOperationsRequest(session=session, client_id="lane")
        # The first request is sent, then nothing is asked for or taken.
        gate = threading.Event()
        watches.append((gate, reader.operations.WatchOperations(_then_wait(first, gate))))
    beside_s = steps(20)
    growth = (process.memory_info().rss - before) / 2**20
    figure(
        "R15",
        readers=READERS,
        step_alone_s=round(alone_s, 4),
        step_beside_s=round(beside_s, 4),
        growth_mib=round(growth, 1),
    )
    assert growth < 64
    for gate, watch in watches:
        gate.set()
        watch.cancel()
    for reader in readers:
        reader.channel.close()
    stubs.channel.close()


def _then_wait(first: object, gate: threading.Event) -> Iterator[object]:
    yield first
    gate.wait()
