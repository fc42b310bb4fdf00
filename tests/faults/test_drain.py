"""SIGTERM with commands running and waiting: one ends, the others are the next daemon's.

Who started the daemon as a service is told when it serves and when it begins to stop.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import uuid
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner
from firetitan.v1 import system_service_pb2
from firetitan.v1.trainer_service_pb2 import DeleteTrainerRequest
from firetitan.v1.training_service_pb2 import CloseSessionRequest
from support.daemon import DaemonProcess
from support.history_client import message_of
from support.stubs import LaneClient, Stubs, reason

from firetitan_daemon import cli

pytestmark = pytest.mark.timeout(120)

SLOW = {"FIRETITAN_FAILPOINTS": "engine.step=delay(2000)"}


@pytest.mark.parametrize(("grace_s", "signals"), [("30", 1), ("30", 3), ("1", 1)])
def test_sigterm(tmp_path: Path, grace_s: str, signals: int) -> None:
    daemon = DaemonProcess(tmp_path / "home", {**SLOW, "FIRETITAN_SERVER_DRAIN_TIMEOUT_S": grace_s})
    daemon.start()
    try:
        stubs = Stubs(daemon.address)
        stubs.create_trainer()
        session = stubs.session()
        lane, late = LaneClient(stubs, session, "lane"), LaneClient(stubs, session, "late")
        sent = []
        for _ in range(2):
            sent += [lane.forward_backward(), lane.optim_step()]
        stubs.done(sent[0])
        refused: list[str] = []
        asking = threading.Thread(target=lambda: refused.extend(refusals(stubs, late)))
        assert daemon.process is not None
        asking.start()
        for _ in range(signals):
            daemon.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        # With little grace the step that runs is left with the trainer.
        assert daemon.wait_exit(60) == 0
        asking.join(60)
        assert refused == ["DAEMON_DRAINING"] * 3
        pids = daemon.worker_pids()
        daemon.start()
        assert daemon.worker_pids() == pids
        ended = [stubs.done(one) for one in sent]
        assert [int(ended[index].optim_step.metrics["step"]) for index in (1, 3)] == [1, 2]
        assert [one.commit_seq for one in ended] == [1, 2, 3, 4]
        stubs.channel.close()
    finally:
        daemon.stop()


@pytest.mark.parametrize("command", ["stop", "drain"])
def test_who_stops_it_waits_as_long_as_it_was_told_to_drain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Not as long as the shell of the one who stops it, or the file since, would say."""
    monkeypatch.setattr(cli, "_STOP_MARGIN_S", 1.0)
    daemon = DaemonProcess(
        tmp_path / "home",
        {"FIRETITAN_FAILPOINTS": "engine.step=delay(4000)"},
    )
    daemon.start({"FIRETITAN_SERVER_DRAIN_TIMEOUT_S": "600"})
    try:
        stubs = Stubs(daemon.address)
        stubs.create_trainer()
        lane = LaneClient(stubs, stubs.session())
        stubs.done(lane.forward_backward())
        step = lane.optim_step()
        (daemon.home / "config.toml").write_text("[server\n")
        shell = {"FIRETITAN_SERVER_DRAIN_TIMEOUT_S": "0"}
        stopping = CliRunner().invoke(cli.main, [command, "--home", str(daemon.home)], env=shell)
        assert stopping.exit_code == 0, stopping.output
        assert daemon.wait_exit(5) == 0
        (daemon.home / "config.toml").unlink()
        daemon.start()
        assert stubs.done(step).optim_step.metrics["step"] == 1
        stubs.channel.close()
    finally:
        daemon.stop()


def test_one_that_does_not_tell_how_long_it_drains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs, or is of a release that does not say: it is stopped all the same."""
    monkeypatch.setattr(cli, "_ANSWER_S", 0.5)
    daemon = DaemonProcess(tmp_path / "home")
    daemon.start()
    try:
        assert daemon.process is not None
        process = daemon.process
        process.send_signal(signal.SIGSTOP)
        (daemon.home / "config.toml").write_text("[server\n")
        threading.Timer(2, process.send_signal, (signal.SIGCONT,)).start()
        stopping = CliRunner().invoke(cli.main, ["stop", "--home", str(daemon.home)])
        assert stopping.exit_code == 0, stopping.output
        assert daemon.wait_exit(5) == 0
    finally:
        daemon.stop()


@pytest.mark.parametrize("abstract", [False, True])
def test_the_service_manager_hears_of_start_and_stop(tmp_path: Path, abstract: bool) -> None:
    address = f"@firetitan-{uuid.uuid4().hex}" if abstract else str(tmp_path / "notify")
    daemon = DaemonProcess(tmp_path / "home", {"NOTIFY_SOCKET": address})
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{address[1:]}" if abstract else address)
        manager.settimeout(30)
        process = daemon.launch()
        try:
            assert manager.recv(4096) == b"READY=1"
            stubs = Stubs(daemon.address)
            # Served at once, without being sent again.
            stubs.system.GetSystemInfo(system_service_pb2.GetSystemInfoRequest())
            stubs.create_trainer()
            lane = LaneClient(stubs, stubs.session())
            (worker,) = daemon.worker_pids()
            assert b"NOTIFY_SOCKET" not in Path(f"/proc/{worker}/environ").read_bytes()
            # A command that cannot end: it holds the drain up.
            os.kill(worker, signal.SIGSTOP)
            running = lane.forward_backward()
            process.send_signal(signal.SIGTERM)
            assert manager.recv(4096) == b"STOPPING=1"
            assert process.poll() is None
            os.kill(worker, signal.SIGCONT)
            assert daemon.wait_exit(60) == 0
            manager.setblocking(False)
            with pytest.raises(BlockingIOError):
                manager.recv(4096)
            daemon.start({"NOTIFY_SOCKET": ""})
            stubs.done(running)
            stubs.channel.close()
        finally:
            daemon.stop()


def test_a_service_manager_that_does_not_listen_keeps_nobody(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path / "home", {"NOTIFY_SOCKET": str(tmp_path / "nobody")})
    try:
        daemon.start()
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.wait_exit(60) == 0
        assert daemon.log.count("the service manager was not told") == 2
    finally:
        daemon.stop()


def refusals(stubs: Stubs, lane: LaneClient) -> list[str]:
    """What a daemon that ends says to a command, and to what would end those that wait."""
    found = [until_refused(lane)]
    for ending in (
        lambda: stubs.training.CloseSession(CloseSessionRequest(name=lane.session)),
        lambda: stubs.trainers.DeleteTrainer(DeleteTrainerRequest(name="trainers/t")),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            ending()
        found.append(reason(caught.value))
    return found


def until_refused(lane: LaneClient) -> str:
    """Send commands until the daemon says why not."""
    while True:
        message = lane.header(message_of("ForwardBackward", "late", 1))
        try:
            lane.stubs.training.ForwardBackward(message, timeout=10)
        except grpc.RpcError as error:
            return reason(error)
