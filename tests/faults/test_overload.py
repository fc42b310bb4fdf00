"""More than can be done: what is refused is refused at once, what was accepted is done."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import psutil
import pytest
from firetitan.v1 import operation_pb2, operation_service_pb2, sampling_service_pb2
from support.commands import toy_datum
from support.daemon import DaemonProcess
from support.history import History, Recorder, judge, load
from support.history_client import listed_calls, message_of, note
from support.sizes import figure, percentile, size
from support.slow_readers import SlowReader
from support.stubs import LaneClient, Stubs, reason, retry_delay_s

CAPACITY = 2
"""Few: the flood, on this machine too, is to fill the places and not the cores."""
FLOODERS = 10 * CAPACITY
COMMAND_MS = 20
"""What a command takes in the worker, which needs no core meanwhile: what is compared is then how
long it waits, and not how daemon, worker and flood share this machine."""
SECONDS = size(15, 60)
READERS = 32
ROUNDS, STEPS = size(3, 10), size(15, 100)
LONG = toy_datum([1] * 4096, [2] * 4096)
"""Its result takes 16 KiB: a few of them fill what a stream may send ahead."""
BACKLOG = 16

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


def seconds_of(operation: operation_pb2.Operation) -> float:
    """From its acceptance to its end."""
    span = operation.finish_time.ToNanoseconds() - operation.create_time.ToNanoseconds()
    return float(span) / 1e9


def full_without_a_flood(stubs: Stubs) -> list[float]:
    """How long commands take where as many clients as there are places wait for each of theirs."""
    stubs.create_trainer("alone")
    session = stubs.session("trainers/alone")
    took: list[float] = []
    until = time.monotonic() + SECONDS / 5

    def work() -> None:
        lane = LaneClient(stubs, session)
        while time.monotonic() < until:
            took.append(seconds_of(stubs.done(lane.forward_backward())))

    workers = [threading.Thread(target=work) for _ in range(CAPACITY)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    return took


def test_a_flood_is_refused_and_what_was_accepted_is_done(tmp_path: Path) -> None:
    daemon = DaemonProcess(
        tmp_path / "home",
        {
            "FIRETITAN_LIMITS_MAX_SESSION_OPERATIONS": str(CAPACITY),
            "FIRETITAN_FAILPOINTS": f"worker.admitted=delay({COMMAND_MS})",
        },
    )
    daemon.start()
    stubs = Stubs(daemon.address)
    try:
        stubs.create_trainer()
        session = stubs.session()
        recorder = Recorder(tmp_path / "history.jsonl")
        alone = full_without_a_flood(stubs)
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
                took.append(seconds_of(ended))
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
        alone_p99_s=round(percentile(alone, 99), 3),
    )
    assert len(refusals) > len(took) > FLOODERS


def test_readers_that_never_read_harm_nobody(daemon: DaemonProcess) -> None:
    stubs = Stubs(daemon.address)
    stubs.create_trainer()
    session = stubs.session()
    lane = LaneClient(stubs, session, "lane")
    for _ in range(BACKLOG):
        stubs.done(lane.forward_backward(LONG))
    assert daemon.process is not None
    process = psutil.Process(daemon.process.pid)
    before = process.memory_info().rss
    alone, beside = Steps(lane, process), Steps(lane, process)
    # By turns, as what else the machine does changes too.
    for _ in range(ROUNDS):
        alone.run(STEPS)
        readers = [slow_reader(daemon.address, session) for _ in range(READERS + 1)]
        stopping = threading.Event()
        dripping = threading.Thread(target=readers[0].drip, args=(stopping,))
        dripping.start()
        until(lambda: idle(process), "the daemon goes on working for readers that do not read")
        beside.run(STEPS)
        stopping.set()
        dripping.join()
        for reader in readers:
            reader.close()
    growth = (process.memory_info().rss - before) / 2**20
    figure(
        "R15",
        readers=READERS,
        step_alone_s=round(statistics.median(alone.took_s), 4),
        step_beside_s=round(statistics.median(beside.took_s), 4),
        slower=round(statistics.median(beside.took_s) / statistics.median(alone.took_s), 3),
        more_work=round(beside.cpu_s / alone.cpu_s, 3),
        growth_mib=round(growth, 1),
    )
    assert growth < 64
    # The time of a step depends on what else the machine does, the daemon's work for it does not.
    assert beside.cpu_s < 1.5 * alone.cpu_s
    stubs.channel.close()


class Steps:
    """Steps of a lane: what each took, and what the daemon worked for all of them."""

    def __init__(self, lane: LaneClient, daemon: psutil.Process) -> None:
        self.lane = lane
        self.daemon = daemon
        self.took_s: list[float] = []
        self.cpu_s = 0.0

    def run(self, count: int) -> None:
        """Make some more."""
        self.lane.step()
        before = cpu_s(self.daemon)
        for _ in range(count):
            began = time.monotonic()
            self.lane.step()
            self.took_s.append(time.monotonic() - began)
        self.cpu_s += cpu_s(self.daemon) - before


def cpu_s(process: psutil.Process) -> float:
    """Seconds of a core that a process has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


def idle(process: psutil.Process) -> bool:
    """Whether a process uses no more than a hundredth of a core."""
    before = cpu_s(process)
    time.sleep(1.0)
    return round(cpu_s(process) - before, 3) <= 0.01


def test_streams_beyond_the_limit_are_refused_with_a_hint(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path / "home", {"FIRETITAN_LIMITS_MAX_STREAMS": "3"})
    daemon.start()
    try:
        stubs = Stubs(daemon.address)
        stubs.create_trainer()
        stubs.create_deployment()
        session = stubs.session()
        lane = LaneClient(stubs, session, "lane")
        stubs.done(lane.forward_backward())
        readers = [slow_reader(daemon.address, session) for _ in range(3)]
        assert refusal(lane) == "QUEUE_FULL"
        sampling = sampling_service_pb2.SampleStreamRequest()
        sampling.request.deployment = "deployments/d"
        with pytest.raises(grpc.RpcError) as caught:
            next(stubs.sampling.SampleStream(sampling, timeout=5))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "max_streams is 3" in caught.value.details()
        assert retry_delay_s(caught.value) > 0
        # What is no stream goes on, and a place is free as soon as one has gone away.
        stubs.done(lane.forward_backward())
        readers.pop().close()
        until(lambda: not refusal(lane), "the place is not given back")
        for reader in readers:
            reader.close()
        stubs.channel.close()
    finally:
        daemon.stop()


def slow_reader(address: str, session: str) -> SlowReader:
    """One that watches a lane from its first operation."""
    request = operation_service_pb2.WatchOperationsRequest(session=session, client_id="lane")
    return SlowReader(address, "OperationService/WatchOperations", request)


def refusal(lane: LaneClient) -> str:
    """The reason another stream of a lane is refused for; empty where it is not."""
    with lane.watch() as watch:
        try:
            watch.next()
        except grpc.RpcError as error:
            return reason(error)
    return ""


def until(holds: Callable[[], bool], why: str) -> None:
    """Wait for something that comes soon."""
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, why
        time.sleep(0.05)
