"""SIGSTOP of a trainer, a sampler, the daemon: shown where it can be, and waited for."""

from __future__ import annotations

import re
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from firetitan.v1 import (
    deployment_service_pb2,
    operation_service_pb2,
    system_service_pb2,
    trainer_pb2,
    trainer_service_pb2,
    training_service_pb2,
)
from support.daemon import DaemonProcess
from support.history_client import training
from support.sizes import figure
from support.stopping import stopped
from support.stubs import START_S, LaneClient, Stubs, reason

from firetitan_client import transport
from firetitan_client.errors import FiretitanError

pytestmark = pytest.mark.timeout(180)


def worker(stubs: Stubs, kind: str) -> system_service_pb2.WorkerInfo:
    info = stubs.system.GetSystemInfo(system_service_pb2.GetSystemInfoRequest(), timeout=10)
    (found,) = [one for one in info.workers if one.kind == kind]
    return found


def until(stubs: Stubs, kind: str, state: str) -> float:
    """Wait until a worker is shown in a state; returns the seconds that took."""
    began = time.monotonic()
    while worker(stubs, kind).state != state:
        assert time.monotonic() < began + 60
        time.sleep(0.1)
    return time.monotonic() - began


@pytest.mark.parametrize("daemon_too", [False, True])
def test_a_trainer_that_hangs_is_shown_and_goes_on(daemon: DaemonProcess, daemon_too: bool) -> None:
    stubs = Stubs(daemon.address)
    stubs.create_trainer()
    lane = LaneClient(stubs, stubs.session())
    lane.step()
    pid = worker(stubs, "trainer").pid
    with stopped(pid):
        sent = [lane.forward_backward(), lane.optim_step()]
        if daemon_too:
            # One that takes over has the same worker to wait for.
            daemon.kill()
            daemon.start()
        figure("R23", shown_after_s=round(until(stubs, "trainer", "unresponsive"), 1))
        assert daemon.worker_pids() == [pid], "it is not to be ended"
    until(stubs, "trainer", "ready")
    assert [int(stubs.done(one).optim_step.metrics.get("step", 0)) for one in sent] == [0, 2]
    assert worker(stubs, "trainer").pid == pid
    stubs.channel.close()


@pytest.mark.parametrize("longer_s", [0.0, pytest.param(20.0, marks=pytest.mark.slow)])
def test_a_hotload_waits_for_a_sampler_that_hangs(daemon: DaemonProcess, longer_s: float) -> None:
    stubs = Stubs(daemon.address)
    stubs.create_trainer()
    stubs.create_deployment()
    lane = LaneClient(stubs, stubs.session())
    first, second = (
        stubs.done(lane.save_snapshot(name)).snapshot.name for name in ("first", "second")
    )
    assert not stubs.hotload("deployments/d", first).HasField("error")
    pid = worker(stubs, "sampler").pid
    with stopped(pid):
        loading = stubs.deployments.HotloadSnapshot(
            deployment_service_pb2.HotloadSnapshotRequest(
                deployment="deployments/d", snapshot=second, request_id="hung"
            )
        ).operation
        until(stubs, "sampler", "unresponsive")
        # Training, and whatever else the daemon does, goes on.
        lane.step()
        time.sleep(longer_s)
        ask = operation_service_pb2.WaitOperationRequest(name=loading.name)
        ask.timeout.FromMilliseconds(500)
        assert not stubs.operations.WaitOperation(ask).operation.done
        assert daemon.worker_pids("sampler") == [pid], "it is not to be ended"
    assert not stubs.wait(loading.name).HasField("error")
    assert stubs.sample().snapshot == second and worker(stubs, "sampler").pid == pid
    stubs.channel.close()


def test_a_trainer_that_hangs_holds_up_no_other(daemon: DaemonProcess) -> None:
    stubs = Stubs(daemon.address)
    stubs.create_trainer("hung")
    wanted = training_service_pb2.CreateSessionRequest(trainer="trainers/hung", request_id="wanted")
    with stopped(worker(stubs, "trainer").pid):
        opening = stubs.training.CreateSession.future(wanted, timeout=60)
        assert stubs.create_trainer("other").trainer.state == trainer_pb2.Trainer.STATE_ACTIVE
        deleting = stubs.trainers.DeleteTrainer.future(
            trainer_service_pb2.DeleteTrainerRequest(name="trainers/hung"), timeout=60
        )
        time.sleep(0.5)
        third = stubs.begin_trainer("third")
        LaneClient(stubs, stubs.session("trainers/other")).step()
        stubs.trainers.DeleteTrainer(
            trainer_service_pb2.DeleteTrainerRequest(name="trainers/other"), timeout=20
        )
        # The hung one is given 10 s to end by itself.
        deadline = time.monotonic() + 8
        while not re.search("worker started .* target=trainers/third", daemon.log):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not opening.done() and not deleting.done()
    made = stubs.wait(third.name, timeout_s=START_S)
    assert made.trainer.state == trainer_pb2.Trainer.STATE_ACTIVE
    stubs.trainers.DeleteTrainer(trainer_service_pb2.DeleteTrainerRequest(name="trainers/third"))
    assert deleting.result()
    # Either was first.
    refused = opening.exception()
    assert refused is None or reason(refused) in ("CLOSED", "WORKER_UNAVAILABLE")
    assert daemon.worker_pids() == []
    stubs.channel.close()


def test_a_call_that_lasts_waits_for_its_work_and_not_for_a_daemon_that_hangs(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "SLICE_S", 0.2)
    monkeypatch.setattr(transport, "_ASK_S", 1.0)
    patience_s = 3.0
    stubs = Stubs(daemon.address)
    stubs.create_trainer()
    assert daemon.process is not None

    def delete() -> Future[Any]:
        call = transport.connect(daemon.address).call(
            "TrainerService/DeleteTrainer",
            trainer_service_pb2.DeleteTrainerRequest(name="trainers/t"),
            trainer_service_pb2.DeleteTrainerResponse,
            timeout_s=None,
            patience_s=patience_s,
        )
        return transport.run(call)

    with stopped(worker(stubs, "trainer").pid):
        deleting = delete()
        time.sleep(2 * patience_s)
        assert not deleting.done(), "its work takes long, and the daemon answers"
        with stopped(daemon.process.pid), pytest.raises(FiretitanError) as caught:
            deleting.result(60)
        assert caught.value.reason == "DEADLINE_EXCEEDED"
        deleting = delete()
    deleting.result(60)
    assert daemon.worker_pids() == []
    stubs.channel.close()


def test_a_sampler_that_hangs_is_shown_and_answers_later(daemon: DaemonProcess) -> None:
    stubs = Stubs(daemon.address)
    assert not stubs.create_deployment().HasField("error")
    before = stubs.sample().sequences
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(stubs.sample().sequences))
    with stopped(worker(stubs, "sampler").pid):
        waiting.start()
        until(stubs, "sampler", "unresponsive")
        assert waiting.is_alive()
    waiting.join(60)
    assert answers == [before]
    until(stubs, "sampler", "ready")
    stubs.channel.close()


def test_a_daemon_that_hangs_loses_nothing(daemon: DaemonProcess, tmp_path: Path) -> None:
    stubs = Stubs(daemon.address)
    stubs.create_trainer()
    assert daemon.process is not None
    with training(daemon.address, stubs.session(), tmp_path, 2) as clients:
        for _ in range(3):
            before = [client.steps for client in clients]
            with stopped(daemon.process.pid):
                time.sleep(0.5)
            deadline = time.monotonic() + 60
            while any(now.steps <= was for now, was in zip(clients, before, strict=True)):
                assert time.monotonic() < deadline
                time.sleep(0.02)
    stubs.channel.close()
