"""The Node client of examples/polyglot: keeps the protocol's rules, survives the daemon's death."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from firetitan.v1 import training_service_pb2
from support.daemon import DaemonProcess
from support.stubs import Stubs

POLYGLOT = Path(__file__).resolve().parents[2] / "examples" / "polyglot"
NODE_CLIENT = POLYGLOT / "node" / "dist" / "src" / "main.js"

pytestmark = pytest.mark.skipif(
    not NODE_CLIENT.exists(), reason="examples/polyglot/node is not built: `make polyglot`"
)


@pytest.mark.timeout(180)
def test_the_node_client_keeps_every_rule() -> None:
    judged = subprocess.run(
        [sys.executable, POLYGLOT / "conformance.py", "--", "node", NODE_CLIENT],
        capture_output=True,
        text=True,
    )
    assert judged.returncode == 0, judged.stdout + judged.stderr
    assert "step 4 loss" in judged.stdout
    assert "sampled " in judged.stdout


@pytest.mark.timeout(180)
def test_the_node_client_does_not_notice_that_the_daemon_dies(daemon: DaemonProcess) -> None:
    steps = 40
    stubs = Stubs(daemon.address)
    stubs.create_trainer("t")
    session = stubs.session()
    stubs.create_deployment("d")
    stubs.channel.close()
    client = subprocess.Popen(
        ["node", NODE_CLIENT, daemon.address, "t", "d", str(steps)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert client.stdout is not None
    lines = [client.stdout.readline()]
    daemon.kill()
    time.sleep(0.3)
    daemon.start()
    rest, errors = client.communicate(timeout=120)
    lines += rest.splitlines(keepends=True)
    assert client.returncode == 0, errors
    assert [line.split()[1] for line in lines if line.startswith("step ")] == [
        str(step) for step in range(1, steps + 1)
    ]
    request = training_service_pb2.GetSessionRequest(name=session)
    assert Stubs(daemon.address).training.GetSession(request).session.step == steps
