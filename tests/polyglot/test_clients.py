"""The clients of examples/polyglot keep the protocol's rules and survive the daemon's death."""

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
BUILT = {
    "node": POLYGLOT / "node" / "dist" / "src" / "main.js",
    "go": POLYGLOT / "go" / "bin" / "firetitan",
}


@pytest.fixture(params=BUILT)
def client(request: pytest.FixtureRequest) -> list[str]:
    """How to start the client in one language."""
    built = BUILT[request.param]
    if not built.exists():
        pytest.skip(f"examples/polyglot/{request.param} is not built: `make polyglot`")
    return ["node", str(built)] if request.param == "node" else [str(built)]


@pytest.mark.timeout(180)
def test_it_keeps_every_rule(client: list[str]) -> None:
    judged = subprocess.run(
        [sys.executable, POLYGLOT / "conformance.py", "--", *client],
        capture_output=True,
        text=True,
    )
    assert judged.returncode == 0, judged.stdout + judged.stderr
    assert "step 4 loss" in judged.stdout
    assert "sampled " in judged.stdout


@pytest.mark.timeout(180)
def test_it_does_not_notice_that_the_daemon_dies(
    client: list[str], daemon: DaemonProcess, tmp_path: Path
) -> None:
    steps = 40
    stubs = Stubs(daemon.address)
    stubs.create_trainer("t")
    session = stubs.session()
    stubs.create_deployment("d")
    stubs.channel.close()
    errors = tmp_path / "errors"
    with errors.open("w") as stderr:
        process = subprocess.Popen(
            [*client, daemon.address, "t", "d", str(steps)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    assert process.stdout is not None
    with process.stdout:
        try:
            lines = [process.stdout.readline()]
            daemon.kill()
            time.sleep(0.3)
            daemon.start()
            # Not `communicate`, which loses what came with the first line.
            lines += process.stdout.readlines()
            assert process.wait(60) == 0, errors.read_text()
        finally:
            process.kill()
            process.wait()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == [
        str(step) for step in range(1, steps + 1)
    ]
    request = training_service_pb2.GetSessionRequest(name=session)
    assert Stubs(daemon.address).training.GetSession(request).session.step == steps
