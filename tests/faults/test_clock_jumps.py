"""The wall clock of the daemon and its workers jumps while they work: nothing ends early."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import pytest
from firetitan.v1 import checkpoint_service_pb2, operation_service_pb2
from support.daemon import DaemonProcess
from support.history_client import Training
from support.stubs import LaneClient, Stubs, reason

pytestmark = pytest.mark.timeout(120)

HOUR_S, DAY_S = 3600, 86400
# Python imports a module of this name at its start.
TURNED_CLOCK = """
import os, time
_real, _file = time.time, os.environ["FIRETITAN_TEST_CLOCK"]
def _turned():
    with open(_file) as file:
        return _real() + float(file.read() or 0)
time.time = _turned
"""


def await_a_look_at_what_is_too_old(stubs: Stubs) -> None:
    """Until the row of a creation that ended just now is forgotten; results are looked at first."""
    deadline = time.monotonic() + 60
    request = operation_service_pb2.GetOperationRequest(name=stubs.begin_trainer().name)
    while True:
        try:
            stubs.operations.GetOperation(request)
        except grpc.RpcError as error:
            assert reason(error) == "OPERATION_NOT_FOUND"
            return
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_jumps_end_nothing_early_and_reorder_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules, clock = tmp_path / "modules", tmp_path / "clock"
    modules.mkdir()
    (modules / "sitecustomize.py").write_text(TURNED_CLOCK)
    clock.write_text("0")
    monkeypatch.setenv("PYTHONPATH", str(modules), prepend=":")
    daemon = DaemonProcess(
        tmp_path / "home",
        {
            "FIRETITAN_TEST_CLOCK": str(clock),
            "FIRETITAN_LIMITS_GAP_TIMEOUT_S": "600",
            # It looks as often for results that are too old: after a day, as is usual.
            "FIRETITAN_RETENTION_OPERATIONS_S": "2",
        },
    )
    daemon.start()
    try:
        stubs = Stubs(daemon.address)
        stubs.create_trainer()
        session = stubs.session()
        lane = LaneClient(stubs, session, "lane")
        lane.step()
        # Nobody acknowledges it, and its client has no lease.
        untaken = lane.forward_backward()
        stubs.done(untaken)
        created = [stubs.done(lane.save_state("hour", ttl={"seconds": HOUR_S})).checkpoint]
        # A command that waits for the one before it, on a trainer of its own.
        stubs.create_trainer("u")
        waiting = LaneClient(stubs, stubs.session("trainers/u"))
        held = waiting.optim_step(seq=2)
        work = Training(daemon.address, session, tmp_path / "history.jsonl")
        clients = [work.add("client-0"), work.add("client-1")]
        for client in clients:
            client.start()
        turned = work.add("turned")
        turned.open()
        try:
            for offset in (HOUR_S, -HOUR_S, DAY_S, -DAY_S, 0):
                clock.write_text(str(offset))
                before = [client.steps for client in clients]
                deadline = time.monotonic() + 60
                while any(now.steps < was + 2 for now, was in zip(clients, before, strict=True)):
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                created.append(turned.send("SaveState")[0].checkpoint)
                # More than a look at what has expired takes; those at results are rarer.
                time.sleep(0.6)
                await_a_look_at_what_is_too_old(stubs)
                request = operation_service_pb2.GetOperationRequest(name=untaken.name)
                assert stubs.operations.GetOperation(request).operation.HasField("forward")
                request = operation_service_pb2.GetOperationRequest(name=held.name)
                assert not stubs.operations.GetOperation(request).operation.done
                listed = stubs.checkpoints.ListCheckpoints(
                    checkpoint_service_pb2.ListCheckpointsRequest(parent="trainers/t")
                ).checkpoints
                assert {one.name for one in listed} == {one.name for one in created}
        finally:
            turned.close()
            work.stop()
        work.judge()
        stubs.done(waiting.forward_backward(seq=1))
        assert stubs.done(held).optim_step.metrics["step"] == 1
        moments = [one.create_time.seconds - created[0].create_time.seconds for one in created]
        assert moments[1] > HOUR_S / 2 and moments[4] < -DAY_S / 2, "the clock was not turned"
        stubs.channel.close()
    finally:
        daemon.stop()
