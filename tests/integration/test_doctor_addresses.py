"""`firetitand doctor` and FIRETITAN_ADDRESS: every form clients take, and nothing untrue of any."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.daemon import DaemonProcess
from support.tcp import TcpDaemon

from firetitan_client.address import resolve
from firetitan_daemon.doctor import examine
from firetitan_daemon.places import Places

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TcpDaemon]:
    found = TcpDaemon(tmp_path_factory.mktemp("addresses") / "home", "0.0.0.0")
    found.start()
    yield found
    found.stop()


def said(daemon: DaemonProcess, address: str, **more: str) -> list[str]:
    """What doctor finds wrong with an address of clients."""
    report = examine(Places(daemon.home), {"FIRETITAN_ADDRESS": address, **more})
    assert report.state == "running"
    return [str(one) for one in report.findings if "FIRETITAN_ADDRESS" in one.subject]


def ways_to(daemon: TcpDaemon) -> list[str]:
    path, port = daemon.address.removeprefix("unix:"), daemon.target.rpartition(":")[2]
    return [
        path, f"unix:{path}", f"unix://{path}", f"firetitan+unix:{path}",
        f"firetitan+unix:{path}#trainer-1", f"unix:{daemon.home}/../home/run/firetitan.sock",
        daemon.target, f"tcp:{daemon.target}", f"firetitan+tcp:{daemon.target}#t",
        f"localhost:{port}", f"LocalHost:{port}", f"{socket.gethostname()}:{port}",
    ]  # fmt: skip


def test_every_way_to_this_daemon_is_right(daemon: TcpDaemon, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(daemon.home)
    for address in [*ways_to(daemon), f"unix:{link}/run/firetitan.sock"]:
        resolve(address=address)  # clients take it
        assert said(daemon, address) == [], address


def test_names_that_are_configured_are_this_daemons(daemon: TcpDaemon) -> None:
    port = daemon.target.rpartition(":")[2]
    assert said(daemon, f"gpubox:{port}", FIRETITAN_TCP_NAMES="router, gpubox") == []


def test_another_machine_may_be_meant(daemon: TcpDaemon) -> None:
    for address in ("gpubox.example:7465", "tcp:203.0.113.9:1", "[2001:db8::1]:7465"):
        assert said(daemon, address) == []
    report = examine(Places(daemon.home), {"FIRETITAN_ADDRESS": "gpubox.example:7465"})
    assert report.facts["clients go to"] == "gpubox.example:7465"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "tcp:[::1]:1"])
def test_another_port_of_this_machine_is_not_this_daemon(daemon: TcpDaemon, address: str) -> None:
    (told,) = said(daemon, address)
    assert f"sends clients to {address}, where it does not listen" in told
    assert daemon.address in told and daemon.target.rpartition(":")[2] in told
    assert "unset" in told


def test_another_socket_and_what_is_no_address(daemon: TcpDaemon, tmp_path: Path) -> None:
    (told,) = said(daemon, f"unix:{tmp_path}/other.sock")
    assert "sends clients to" in told and daemon.address in told
    for address in ("localhost", "http://127.0.0.1:7465", "~nobody-here/x"):
        assert len(said(daemon, address)) == 1, address


def test_a_daemon_without_tcp_listens_at_no_port(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path / "home")
    daemon.start()
    try:
        (told,) = said(daemon, "127.0.0.1:7465")
        assert "where it does not listen" in told and f"is at {daemon.address} ->" in told
    finally:
        daemon.stop()
