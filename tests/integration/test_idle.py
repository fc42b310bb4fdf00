"""Workers that nobody uses are stopped, and nothing is lost: a real daemon."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from firetitan.v1 import training_service_pb2
from support.daemon import DaemonProcess
from support.data import ragged_data
from support.stopping import stopped

from firetitan_client import (
    AdamParams,
    FiretitanServiceClient,
    SamplingParams,
    TrainerJobConfig,
    TrainerJobManager,
)
from firetitan_client.stubs import Stubs
from firetitan_client.transport import connect

pytestmark = pytest.mark.timeout(240)

TOY = "firetitan/toy"
DATA = ragged_data(seed=1, count=2, vocab_size=64)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    process = DaemonProcess(tmp_path_factory.mktemp("idle") / "home")
    process.start()
    yield process
    process.stop()


def firetitand(daemon: DaemonProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "firetitan_daemon", *arguments, "--home", str(daemon.home)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def listed(daemon: DaemonProcess) -> dict[str, dict[str, Any]]:
    rows = json.loads(firetitand(daemon, "ls", "--json").stdout)["resources"]
    return {row["name"]: row for row in rows}


def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.2)


def make_service(daemon: DaemonProcess, **config: Any) -> FiretitanServiceClient:
    settings = {"base_model": TOY, "lora_rank": 4, "seed": 3}
    return FiretitanServiceClient.from_firetitan_config(
        address=daemon.address, **{**settings, **config}
    )


def test_what_is_idle_is_stopped_and_goes_on_where_it_was(daemon: DaemonProcess) -> None:
    with make_service(
        daemon, trainer_job_id="t-idle", deployment_id="d-idle", inactivity_timeout="2s"
    ) as service:
        policy = service.create_training_client()
        policy.forward_backward(DATA, "cross_entropy")
        policy.optim_step(AdamParams(learning_rate=1e-2)).result()
        policy.forward_backward(DATA, "cross_entropy").result()
        before = policy.forward(DATA, "cross_entropy").result().loss_fn_outputs
        service.hotload_sampler_snapshot(policy.save_weights_for_sampler("s").result().path)
        sampler = service.create_sampling_client()
        params = SamplingParams(max_tokens=4, seed=1)
        tokens = sampler.sample([1, 2], 1, params).result().sequences[0].tokens
        until(lambda: listed(daemon)["trainers/t-idle"]["state"] == "stopped")
        until(lambda: listed(daemon)["deployments/d-idle"]["state"] == "stopped")
        assert daemon.worker_pids() == []
        # The next use starts both, with weights, moments and gradients.
        assert sampler.sample([1, 2], 1, params).result().sequences[0].tokens == tokens
        after = policy.forward(DATA, "cross_entropy").result().loss_fn_outputs
        assert [one["logprobs"].tolist() for one in after] == [
            one["logprobs"].tolist() for one in before
        ]
        assert policy.optim_step(AdamParams(learning_rate=1e-2)).result().metrics["step"] == 2.0


def test_a_trainer_made_by_hand_rests(daemon: DaemonProcess) -> None:
    manager = TrainerJobManager(address=daemon.address)
    for job, forever in (("t-rests", False), ("t-wakes", True)):
        manager.create_and_wait(
            TrainerJobConfig(
                TOY,
                requested_job_id=job,
                inactivity_timeout="2s",
                disable_inactivity_cleanup=forever,
            )
        )
    until(lambda: manager.get("t-rests")["state"] == "JOB_STATE_PAUSED")
    assert manager.get("t-wakes")["state"] == "JOB_STATE_RUNNING"
    assert manager.resume_and_wait("t-rests").job_id == "t-rests"
    for job in ("t-rests", "t-wakes"):
        manager.delete(job)


def test_loading_is_no_idle_time(tmp_path: Path) -> None:
    """A worker that takes long to load is not stopped the moment it is ready."""
    process = DaemonProcess(
        tmp_path / "home", {"FIRETITAN_FAILPOINTS": "create.loaded=delay(4000)"}
    )
    process.start()
    try:
        manager = TrainerJobManager(address=process.address)
        config = TrainerJobConfig(TOY, requested_job_id="t-slow", inactivity_timeout="3s")
        manager.create_and_wait(config)
        until(lambda: manager.get("t-slow")["state"] == "JOB_STATE_PAUSED")
        started, stopped = (
            datetime.datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f")
            for line in process.log.splitlines()
            if "target=trainers/t-slow" in line
        )
        assert (stopped - started).total_seconds() > 4.0 + 2.9
    finally:
        process.stop()


def test_what_is_to_stay_stays(daemon: DaemonProcess) -> None:
    with make_service(
        daemon,
        trainer_job_id="t-stays",
        create_deployment=False,
        inactivity_timeout="1s",
        disable_inactivity_cleanup=True,
    ) as service:
        service.create_training_client()
        time.sleep(3.0)
        assert listed(daemon)["trainers/t-stays"]["state"] == "active"


def test_listing_and_removing(daemon: DaemonProcess) -> None:
    with make_service(daemon, trainer_job_id="t-ls", create_deployment=False) as service:
        service.create_training_client()
        row = listed(daemon)["trainers/t-ls"]
        assert row["state"] == "active" and f"(pid {os.getpid()})" in row["used_by"][0]
        assert "trainers/t-ls" in firetitand(daemon, "ls").stdout
        refused = firetitand(daemon, "rm", "trainers/t-ls")
        assert refused.returncode == 1 and "is used by" in refused.stderr
        assert firetitand(daemon, "rm", "--force", "trainers/t-ls").returncode == 0
        assert "trainers/t-ls" not in listed(daemon)
    assert firetitand(daemon, "rm", "trainers/nowhere").returncode == 1


def test_a_worker_that_does_not_answer_is_said_to(daemon: DaemonProcess) -> None:
    with make_service(daemon, trainer_job_id="t-stuck", create_deployment=False) as service:
        service.create_training_client()
        stubs = Stubs(connect(daemon.address))

        def states() -> dict[str, str]:
            from firetitan.v1 import system_service_pb2

            answer = stubs.system.GetSystemInfo(system_service_pb2.GetSystemInfoRequest())
            return {one.target: one.state for one in answer.workers}

        (pid,) = (
            int(entry)
            for entry in map(str, daemon.worker_pids())
            if "t-stuck" in _bundle(daemon, entry)
        )
        until(lambda: states()["trainers/t-stuck"] == "ready")
        with stopped(pid):
            until(lambda: states()["trainers/t-stuck"] == "unresponsive")
        until(lambda: states()["trainers/t-stuck"] == "ready")


def _bundle(daemon: DaemonProcess, pid: str) -> str:
    for spec in (daemon.home / "workers").glob("*/spec.json"):
        boot = spec.with_name("bootstrap.json")
        if boot.exists() and str(json.loads(boot.read_text())["pid"]) == pid:
            return spec.read_text()
    return ""


def test_a_failed_trainer_answers_at_once(daemon: DaemonProcess) -> None:
    import grpc

    with make_service(
        daemon, base_model="/nowhere/at/all", trainer_job_id="t-failed", create_deployment=False
    ) as service:
        with pytest.raises(Exception, match="nowhere"):
            service.create_training_client()
    stubs = Stubs(connect(daemon.address))
    with pytest.raises(grpc.RpcError) as caught:
        stubs.training.CreateSession(
            training_service_pb2.CreateSessionRequest(trainer="trainers/t-failed"), timeout=30
        )
    assert caught.value.code() in (
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
    )
