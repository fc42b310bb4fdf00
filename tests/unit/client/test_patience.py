"""Which failed calls are made again."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path

import grpc
import pytest
from firetitan.v1 import operation_pb2
from google.rpc import status_pb2

from firetitan_client import address as addresses
from firetitan_client import patience as patience_module
from firetitan_client.errors import Busy, DaemonNotRunning, FiretitanError, from_status
from firetitan_client.patience import Patience
from firetitan_client.transport import Transport, run


class Ended(grpc.RpcError):
    """A call that ended with a code and no details of ours."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._code.name

    def trailing_metadata(self) -> tuple[()]:
        return ()


async def wait_after(code: grpc.StatusCode) -> None:
    await Patience(Transport("unix:/nobody/listens.sock"), patience_s=5).after(Ended(code))


def test_a_call_that_an_ending_daemon_cancelled_is_made_again() -> None:
    run(wait_after(grpc.StatusCode.CANCELLED)).result(5)


def test_what_another_try_would_not_change_is_raised() -> None:
    with pytest.raises(FiretitanError):
        run(wait_after(grpc.StatusCode.NOT_FOUND)).result(5)


async def gone_after(patience: Patience, worked_s: float) -> None:
    await asyncio.sleep(worked_s)
    await patience.after(Ended(grpc.StatusCode.UNAVAILABLE))


def test_patience_begins_when_the_daemon_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when the work began, which may take longer than that."""
    monkeypatch.setattr(patience_module, "_CONNECTED_S", 0.2)
    daemon = Transport("unix:/nobody/listens.sock")
    daemon.served = True

    async def patience() -> Patience:
        return Patience(daemon, patience_s=0.1)

    run(gone_after(run(patience()).result(5), 0.4)).result(5)
    monkeypatch.setattr(patience_module, "_CONNECTED_S", 60)
    short = run(patience()).result(5)
    with pytest.raises(DaemonNotRunning):  # it was away all the time
        run(gone_after(short, 0.15)).result(5)


def test_work_that_ends_its_worker_again_and_again_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However long each of its tries takes."""
    monkeypatch.setattr(patience_module, "_CONNECTED_S", 0.0)
    answered = from_status(status_pb2.Status(code=14, message="its worker ended"))
    answered.reason = "WORKER_UNAVAILABLE"
    monkeypatch.setattr(patience_module, "from_rpc_error", lambda _: answered)

    async def tries() -> int:
        patience = Patience(Transport("unix:/nobody/listens.sock"), patience_s=0.1)
        for number in range(100):
            try:
                await gone_after(patience, 0.15)
            except FiretitanError:
                return number
        return 100

    assert run(tries()).result(20) == 3


def test_late_tries_are_counted_however_long_they_take(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:  # takes connections and says nothing
        listener.bind(str(path))
        listener.listen()
        daemon = Transport(f"unix:{path}")
        call = daemon.call(
            "SystemService/GetStatus",
            b"",
            operation_pb2.Operation,
            timeout_s=0.2,
            patience_s=0.1,
            late_tries=3,
        )
        began = time.monotonic()
        with pytest.raises(FiretitanError) as caught:
            run(call).result(20)
    assert caught.value.reason == "DEADLINE_EXCEEDED"
    assert time.monotonic() - began > 0.55
    assert daemon.served, "somebody is there, late"


def test_no_daemon_is_started_for_an_address_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "start_daemon", lambda: pytest.fail("started"))
    elsewhere = Transport("unix:/nobody/listens.sock", autostart=True)
    with pytest.raises(DaemonNotRunning, match="nobody/listens"):
        run(elsewhere.call("SystemService/GetStatus", b"", operation_pb2.Operation)).result(10)
    assert not elsewhere.served


def test_who_is_refused_for_now_has_heard_of_the_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it is refused: a restart behind that is waited for."""
    daemon = Transport("unix:/nobody/listens.sock")
    daemon.served = True

    async def refused_then_gone() -> None:
        patience = Patience(daemon, patience_s=0.2)
        await asyncio.sleep(0.3)
        with monkeypatch.context() as patch:
            full = Busy("the queue is full", retry_after_s=0.01)
            patch.setattr(patience_module, "from_rpc_error", lambda _: full)
            await patience.after(Ended(grpc.StatusCode.RESOURCE_EXHAUSTED))
        await patience.after(Ended(grpc.StatusCode.UNAVAILABLE))

    run(refused_then_gone()).result(5)
