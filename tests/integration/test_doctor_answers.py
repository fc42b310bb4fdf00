"""`firetitand doctor` on a daemon that refuses, or takes its time: it is told as what it is.

What answers here is a server of the test on the home's socket; nothing else of a daemon runs.
"""

from __future__ import annotations

import importlib.metadata
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from firetitan.v1 import system_service_pb2

from firetitan_daemon import answers
from firetitan_daemon.doctor import Report, examine
from firetitan_daemon.places import Places

pytestmark = pytest.mark.timeout(60)
Answer = Callable[[system_service_pb2.GetSystemInfoRequest, grpc.ServicerContext], None]


class Services(grpc.GenericRpcHandler):
    """Every RPC, with an empty answer; GetSystemInfo with what doctor looks at."""

    def __init__(self, places: Places, before: Answer) -> None:
        self._info = system_service_pb2.GetSystemInfoResponse(
            version=importlib.metadata.version("firetitan"), home=str(places.home)
        )
        self._before = before

    def service(self, call: grpc.HandlerCallDetails) -> Any:
        asked = call.method.endswith("/GetSystemInfo")
        return grpc.unary_unary_rpc_method_handler(self._information if asked else self._nothing)

    def _information(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self._before(system_service_pb2.GetSystemInfoRequest.FromString(request), context)
        return self._info.SerializeToString()

    def _nothing(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        return b""


@contextmanager
def serving(home: Path, before: Answer) -> Iterator[Places]:
    """A server on the socket of a home.

    Args:
        home: Is made.
        before: Called before GetSystemInfo is answered.
    """
    places = Places(home)
    places.make()
    server = grpc.server(ThreadPoolExecutor(2), handlers=(Services(places, before),))
    server.add_insecure_port(f"unix:{places.socket}")
    server.start()
    try:
        yield places
    finally:
        server.stop(None).wait()


def only(report: Report, check: str) -> str:
    """The one finding of a check, as it is printed."""
    found = [str(one) for one in report.findings if one.check == check]
    assert len(found) == 1, report.findings
    return found[0]


def test_a_daemon_that_refuses_is_not_called_silent(tmp_path: Path) -> None:
    def refuse(request: Any, context: grpc.ServicerContext) -> None:
        context.abort(grpc.StatusCode.INTERNAL, "GetSystemInfo failed, id 123")

    with serving(tmp_path / "home", refuse) as places:
        report = examine(places, {})
    assert report.state == "running"
    told = only(report, "daemon")
    assert "INTERNAL" in told and "id 123" in told and "its log" in told
    assert "kill" not in told and "does not answer" not in told


@pytest.mark.parametrize("code", ["UNAVAILABLE", "DEADLINE_EXCEEDED"])
def test_one_that_does_not_answer_is(tmp_path: Path, code: str) -> None:
    def fail(request: Any, context: grpc.ServicerContext) -> None:
        context.abort(grpc.StatusCode[code], "")

    with serving(tmp_path / "home", fail) as places:
        report = examine(places, {})
    assert report.state == "silent"
    assert f"does not answer: {code}" in only(report, "daemon")


def test_a_ledger_that_takes_long_does_not_make_its_daemon_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "ANSWER_S", 0.5)
    looked = []

    def look(request: Any, context: grpc.ServicerContext) -> None:
        if request.check_ledger:
            looked.append(True)
            threading.Event().wait(1.5)

    with serving(tmp_path / "home", look) as places:
        report = examine(places, {})
    assert looked and report.state == "running"
    assert not report.findings


@pytest.mark.parametrize("code", ["DEADLINE_EXCEEDED", "INTERNAL"])
def test_a_ledger_that_could_not_be_looked_over_is_told(tmp_path: Path, code: str) -> None:
    def fail(request: Any, context: grpc.ServicerContext) -> None:
        if request.check_ledger:
            context.abort(grpc.StatusCode[code], "no room")

    with serving(tmp_path / "home", fail) as places:
        report = examine(places, {})
    assert report.state == "running"
    told = only(report, "ledger")
    assert code in told and "damaged" not in told and "kill" not in told
