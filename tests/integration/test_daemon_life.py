"""Starting, finding, stopping a daemon; what it leaves and what it finds again."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest
from firetitan.v1 import (
    operation_service_pb2,
    system_service_pb2,
    trainer_pb2,
    trainer_service_pb2,
    training_service_pb2,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from support.daemon import DaemonProcess
from support.disks import needs_root, sealed
from support.stubs import LaneClient, Stubs, optim_request, reason, status_reason

pytestmark = pytest.mark.timeout(90)


def firetitand(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "firetitan_daemon", *arguments],
        env={**os.environ, "FIRETITAN_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_only_its_owner_can_reach_it(daemon: DaemonProcess) -> None:
    socket = Path(daemon.address.removeprefix("unix:"))
    assert stat.S_IMODE(socket.stat().st_mode) == 0o600
    for folder in (daemon.home, socket.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_it_serves_within_a_second_and_without_torch(daemon: DaemonProcess) -> None:
    announced = json.loads((daemon.home / "daemon.json").read_text())
    assert announced["pid"] == daemon.process.pid and announced["instance_id"]
    while not (told := re.search(r"start_s=(\S+)\n", daemon.log)):
        time.sleep(0.02)
    assert float(told[1]) < 1.0
    maps = Path(f"/proc/{daemon.process.pid}/maps").read_text()
    assert "libtorch" not in maps


def test_health_reflection_and_information(daemon: DaemonProcess) -> None:
    stubs = Stubs(daemon.address)
    health = health_pb2_grpc.HealthStub(stubs.channel)
    for service in ("", "firetitan.v1.TrainingService"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    services = ProtoReflectionDescriptorDatabase(stubs.channel).get_services()
    files = (Path(__file__).parents[2] / "proto" / "firetitan" / "v1").glob("*.proto")
    declared = re.findall(
        r"^service (\w+)", "".join(one.read_text() for one in files), re.MULTILINE
    )
    assert sorted(one for one in services if one.startswith("firetitan.")) == sorted(
        f"firetitan.v1.{name}" for name in declared
    )
    info = stubs.system.GetSystemInfo(system_service_pb2.GetSystemInfoRequest())
    assert info.pid == daemon.process.pid and info.home == str(daemon.home)
    told = {field.name: value for field, value in info.limits.ListFields()}
    assert told.pop("max_connections") >= 64
    assert (
        told
        | {
            "max_message_bytes": 64 * 2**20,
            "max_session_operations": 64,
            "max_operations": 1024,
            "max_queued_bytes": 256 * 2**20,
            "max_streams": 128,
        }
        == told
    )
    assert info.drain_timeout.seconds == 30
    assert info.recovery_limits.enabled and info.recovery_limits.max_spool_bytes == 2**30
    stubs.create_trainer()
    info = stubs.system.GetSystemInfo(system_service_pb2.GetSystemInfoRequest())
    assert [worker.pid for worker in info.workers] == daemon.worker_pids()
    assert info.workers[0].memory_bytes > 1024 * 1024
    stubs.channel.close()


def test_a_second_daemon_names_the_first_and_leaves_it_alone(daemon: DaemonProcess) -> None:
    second = firetitand(daemon.home, "serve")
    assert second.returncode == 3
    assert str(daemon.process.pid) in second.stderr
    assert "Traceback" not in second.stderr
    assert firetitand(daemon.home, "status").returncode == 0


def test_status_stop_and_exit_codes(daemon: DaemonProcess, tmp_path: Path) -> None:
    socket = Path(daemon.address.removeprefix("unix:"))
    shown = firetitand(daemon.home, "status", "--json")
    assert json.loads(shown.stdout)["pid"] == str(daemon.process.pid)
    assert firetitand(daemon.home, "status").stdout.startswith("firetitand ")
    nowhere = firetitand(tmp_path / "other", "status")
    assert nowhere.returncode == 4 and "firetitand serve" in nowhere.stderr
    assert firetitand(tmp_path / "other", "stop").returncode == 4
    assert firetitand(daemon.home, "stop").returncode == 0
    assert daemon.wait_exit(5) == 0
    assert not (daemon.home / "daemon.json").exists()
    assert not socket.exists()
    assert firetitand(daemon.home, "status").returncode == 4


def test_status_after_a_kill_says_that_none_runs(daemon: DaemonProcess) -> None:
    daemon.kill()
    gone = firetitand(daemon.home, "status")
    assert gone.returncode == 4 and str(daemon.process.pid) in gone.stderr


def test_config_shows_every_setting_and_its_origin(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[limits]\nmax_operations = 9\n")
    plain, origins = firetitand(tmp_path, "config"), firetitand(tmp_path, "config", "--origin")
    assert "limits.max_operations = 9" in plain.stdout.splitlines()
    assert 'log.level = "info"' in plain.stdout.splitlines()
    line = next(one for one in origins.stdout.splitlines() if "max_operations = 9" in one)
    assert line.endswith(f"# {tmp_path / 'config.toml'}")


def test_a_wrong_setting_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[server]\ndrain_timeout = 3\n")
    wrong = firetitand(tmp_path, "serve")
    assert wrong.returncode == 2
    assert "server.drain_timeout" in wrong.stderr and "config.toml" in wrong.stderr


def test_a_long_home_still_serves(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path / ("long" * 30))
    daemon.start()
    try:
        run = Path(daemon.address.removeprefix("unix:")).parent
        assert not run.is_relative_to(tmp_path)
        assert stat.S_IMODE(run.stat().st_mode) == 0o700
        stubs = Stubs(daemon.address)
        assert stubs.create_trainer().trainer.state == trainer_pb2.Trainer.STATE_ACTIVE
        stubs.channel.close()
    finally:
        daemon.stop()


def test_a_stop_keeps_queued_commands_for_the_next_start(daemon: DaemonProcess) -> None:
    stubs = Stubs(daemon.address)
    stubs.create_trainer()
    pids = daemon.worker_pids()
    lane = LaneClient(stubs, stubs.session())
    held = lane.optim_step(seq=2)
    drained = firetitand(daemon.home, "drain")
    assert drained.returncode == 0 and "1 pending" in drained.stdout
    assert daemon.wait_exit(5) == 0
    assert daemon.worker_pids() == pids
    daemon.start()
    assert stubs.done(lane.forward_backward(seq=1)).commit_seq == 1
    assert stubs.done(held).optim_step.metrics["step"] == 1
    assert daemon.worker_pids() == pids
    stubs.channel.close()


def test_a_thread_that_hangs_keeps_no_daemon_that_has_ended(tmp_path: Path) -> None:
    """As one that looks at a folder of a file system that does not answer."""
    code = (
        "import asyncio, sys, time\n"
        "from firetitan_daemon import app, cli\n"
        "run = app.Daemon.run\n"
        "async def hanging(daemon):\n"
        "    asyncio.get_running_loop().run_in_executor(None, time.sleep, 3600)\n"
        "    await run(daemon)\n"
        "app.Daemon.run = hanging\n"
        "cli.main(['serve'])\n"
    )
    environment = {**os.environ, "FIRETITAN_HOME": str(tmp_path / "home")}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        deadline = time.monotonic() + 30
        while not (tmp_path / "home" / "daemon.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


@needs_root
def test_a_home_that_is_read_only_when_it_ends(daemon: DaemonProcess) -> None:
    stubs = Stubs(daemon.address)
    stubs.create_trainer()
    lane = LaneClient(stubs, stubs.session())
    lane.step()
    stubs.channel.close()
    assert daemon.process is not None
    with sealed(daemon.home), sealed(Path(daemon.address.removeprefix("unix:")).parent):
        daemon.process.terminate()
        assert daemon.process.wait(30) == 0
    assert "stopped" in daemon.log and "left behind" in daemon.log
    daemon.start()
    stubs = Stubs(daemon.address)
    lane = LaneClient(stubs, lane.session)
    assert lane.step().optim_step.metrics["step"] == 2
    stubs.channel.close()


def test_a_lane_with_a_gap_breaks_and_another_goes_on(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path, {"FIRETITAN_LIMITS_GAP_TIMEOUT_S": "1"})
    daemon.start()
    try:
        stubs = Stubs(daemon.address)
        stubs.create_trainer()
        session = stubs.session()
        lane = LaneClient(stubs, session)
        with lane.watch() as watch:
            held = lane.optim_step(seq=3)
            ended = watch.next()
        assert ended.name == held.name and status_reason(ended.error) == "LANE_BROKEN"
        with pytest.raises(grpc.RpcError) as caught:
            lane.optim_step(seq=1)
        assert reason(caught.value) == "LANE_BROKEN"
        with pytest.raises(grpc.RpcError) as caught:
            LaneClient(stubs, session, lane.client_id)
        assert reason(caught.value) == "LANE_BROKEN"
        LaneClient(stubs, session).step()
        stubs.channel.close()
    finally:
        daemon.stop()


def test_quotas_refuse_with_a_hint(tmp_path: Path) -> None:
    limits = {"FIRETITAN_LIMITS_MAX_SESSION_OPERATIONS": "3"}
    daemon = DaemonProcess(tmp_path, limits)
    daemon.start()
    try:
        stubs = Stubs(daemon.address)
        stubs.create_trainer()
        lane = LaneClient(stubs, stubs.session())
        for seq in (2, 3, 4):
            lane.optim_step(seq=seq)
        with pytest.raises(grpc.RpcError) as caught:
            lane.optim_step(seq=5)
        assert reason(caught.value) == "QUEUE_FULL"
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "max_session_operations" in caught.value.details()
        listed = stubs.operations.ListOperations(
            operation_service_pb2.ListOperationsRequest(parent=lane.session, pending_only=True)
        ).operations
        assert [one.seq for one in listed] == [2, 3, 4]
        # What they wait for is let in all the same: the queue could not empty otherwise.
        stubs.done(lane.forward_backward(seq=1))
        stubs.channel.close()
    finally:
        daemon.stop()


def test_a_request_of_the_limit_passes_and_a_larger_one_does_not(daemon: DaemonProcess) -> None:
    stubs = Stubs(daemon.address)
    stubs.create_trainer()
    lane = LaneClient(stubs, stubs.session())
    message = training_service_pb2.ForwardBackwardRequest(loss_fn="x" * (64 * 2**20 - 1024))
    ended = stubs.wait(lane.send(message).name)
    assert status_reason(ended.error) in ("UNKNOWN_LOSS", "INVALID_ARGUMENT", "INVALID_DATUM")
    lane.seen_failure = 1
    message.loss_fn = "x" * (66 * 2**20)
    with pytest.raises(grpc.RpcError) as caught:
        lane.send(message, seq=2)
    assert reason(caught.value) == "REQUEST_TOO_LARGE"
    assert caught.value.details().startswith("data: ") and "67108864" in caught.value.details()
    message.loss_fn = "x" * (130 * 2**20)
    with pytest.raises(grpc.RpcError) as caught:
        lane.send(message, seq=2)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    stubs.done(lane.forward_backward(seq=2))
    stubs.channel.close()


def test_a_client_that_goes_away_loses_nothing(daemon: DaemonProcess) -> None:
    stubs = Stubs(daemon.address)
    stubs.create_trainer()
    lane = LaneClient(stubs, stubs.session())
    call = stubs.training.OptimStep.future(lane.header(optim_request(), seq=2))
    deadline = time.monotonic() + 10
    request = operation_service_pb2.ListOperationsRequest(parent=lane.session)
    while not stubs.operations.ListOperations(request).operations:
        assert time.monotonic() < deadline
    call.cancel()
    stubs.channel.close()
    again = Stubs(daemon.address)
    other = LaneClient(again, lane.session, lane.client_id)
    assert other.seq == 1
    other.forward_backward(seq=1)
    listed = again.operations.ListOperations(request).operations
    for operation in listed:
        again.done(operation)
    assert sorted(one.seq for one in listed) == [1, 2]
    again.channel.close()


def test_a_deleted_trainer_is_forgotten_at_the_next_start(daemon: DaemonProcess) -> None:
    stubs = Stubs(daemon.address)
    stubs.create_trainer()
    lane = LaneClient(stubs, stubs.session())
    operation = lane.step()
    stubs.trainers.DeleteTrainer(trainer_service_pb2.DeleteTrainerRequest(name="trainers/t"))
    assert stubs.wait(operation.name).optim_step.metrics["step"] == 1
    daemon.kill()
    daemon.start()
    deadline = time.monotonic() + 10
    while stubs.retry(
        stubs.trainers.ListTrainers, trainer_service_pb2.ListTrainersRequest()
    ).trainers:
        assert time.monotonic() < deadline
    with pytest.raises(grpc.RpcError) as caught:
        stubs.wait(operation.name)
    assert reason(caught.value) == "OPERATION_NOT_FOUND"
    stubs.channel.close()
