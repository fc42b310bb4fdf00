"""More connections than there are descriptors: who is there is served, and saves find theirs."""

from __future__ import annotations

import contextlib
import resource
import socket
import time
from pathlib import Path

import grpc
import psutil
import pytest
from firetitan.v1 import system_service_pb2
from support.daemon import DaemonProcess
from support.sizes import figure
from support.stubs import LaneClient, Stubs

MAX_FILES = 128
CONNECTS = 500
RECOVERY_S = 5.0

pytestmark = pytest.mark.timeout(120)


def test_a_flood_of_connections_leaves_clients_and_saves_alone(tmp_path: Path) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    daemon = DaemonProcess(tmp_path / "home", max_files=MAX_FILES)
    daemon.start()
    try:
        stubs = Stubs(daemon.address)
        stubs.create_trainer()
        lane = LaneClient(stubs, stubs.session(), "lane")
        lane.step()
        allowed = information(stubs).limits.max_connections
        assert 0 < allowed < MAX_FILES
        assert daemon.process is not None
        process = psutil.Process(daemon.process.pid)
        with contextlib.ExitStack() as connections:
            for _ in range(CONNECTS):
                connection = connections.enter_context(socket.socket(socket.AF_UNIX))
                connection.connect(daemon.address.removeprefix("unix:"))
            deadline = time.monotonic() + 10
            while process.num_fds() < allowed and time.monotonic() < deadline:
                time.sleep(0.05)
            assert allowed <= process.num_fds() < MAX_FILES
            refused = Stubs(daemon.address)
            with pytest.raises(grpc.RpcError) as caught:
                refused.system.GetSystemInfo(request(), timeout=5)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            for index in range(3):
                lane.step()
                saved = stubs.done(lane.save_state(f"flooded-{index}")).checkpoint
                assert saved.size_bytes
                stubs.done(lane.save_snapshot(f"flooded-{index}"))
            assert process.num_fds() < MAX_FILES
        gone = time.monotonic()
        # One that was refused, and one that never tried.
        for client in (refused, Stubs(daemon.address)):
            information(client)
            client.channel.close()
        recovered_s = time.monotonic() - gone
        figure("R16", connects=CONNECTS, allowed=allowed, recovered_s=round(recovered_s, 2))
        assert recovered_s < RECOVERY_S
        lane.step()
        stubs.channel.close()
    finally:
        daemon.stop()


def request() -> system_service_pb2.GetSystemInfoRequest:
    """Asks the daemon about itself."""
    return system_service_pb2.GetSystemInfoRequest()


def information(stubs: Stubs) -> system_service_pb2.GetSystemInfoResponse:
    """What the daemon says about itself, sooner or later."""
    return stubs.retry(stubs.system.GetSystemInfo, request())
