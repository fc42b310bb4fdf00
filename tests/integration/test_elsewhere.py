"""A home too long for a socket's path: found by its daemons, commands and clients in any shell.

Its sockets are in the temporary directory, which TMPDIR names: another in a batch job, in a service
and in the user's shell.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.daemon import DaemonProcess
from support.stubs import LaneClient, Stubs

from firetitan_client import address

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def shells() -> Iterator[list[dict[str, str]]]:
    """Environments that differ in the temporary directory alone."""
    # Not below pytest's own: a socket's path has 107 bytes.
    folders = [tempfile.mkdtemp(prefix="ft") for _ in range(3)]
    yield [{"TMPDIR": folder} for folder in folders]
    for folder in folders:
        shutil.rmtree(folder)


def firetitand(
    home: Path, shell: dict[str, str], *arguments: str
) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **shell}
    variables.pop("FIRETITAN_ADDRESS", None)
    return subprocess.run(
        [sys.executable, "-m", "firetitan_daemon", *arguments, "--home", str(home)],
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_daemon_and_its_workers_are_found_from_every_shell(
    tmp_path: Path, shells: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, service, notebook = shells
    daemon = DaemonProcess(tmp_path / ("long" * 30))
    daemon.start(job)
    try:
        stubs = Stubs(daemon.address)
        stubs.create_trainer()
        lane = LaneClient(stubs, stubs.session())
        lane.step()
        stubs.channel.close()
        pids = daemon.worker_pids()
        daemon.kill()
        daemon.start(service)
        assert Path(daemon.address.removeprefix("unix:")).is_relative_to(service["TMPDIR"])
        stubs = Stubs(daemon.address)
        lane = LaneClient(stubs, lane.session)
        assert lane.step().optim_step.metrics["step"] == 2
        assert daemon.worker_pids() == pids and len(pids) == 1
        stubs.channel.close()
        link = tmp_path / "link"
        link.symlink_to(tmp_path)
        for home in (daemon.home, link / daemon.home.name):
            shown = firetitand(home, notebook, "status")
            assert shown.returncode == 0, shown.stderr
            assert f"pid {daemon.process.pid}" in shown.stdout
            assert firetitand(home, notebook, "ls").returncode == 0
            looked = firetitand(home, notebook, "doctor")
            assert (looked.returncode, looked.stderr) == (0, ""), looked.stdout
            monkeypatch.setenv("FIRETITAN_HOME", str(home))
            monkeypatch.setenv("TMPDIR", notebook["TMPDIR"])
            assert address.resolve().address == daemon.address
        stopped = firetitand(daemon.home, notebook, "stop")
        assert stopped.returncode == 0, stopped.stderr
        assert daemon.wait_exit(5) == 0
    finally:
        daemon.stop()
