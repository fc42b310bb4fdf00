"""What is left of workers that are gone: their folders, how they ended."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.commands import TRAINER_SPEC

from firetitan_daemon import handshake
from firetitan_daemon.launch import bundle
from firetitan_daemon.launch.bundle import Bundle
from firetitan_daemon.launch.local import LocalLauncher
from firetitan_daemon.launch.process import OsProcess, adopt_child

pytestmark = pytest.mark.timeout(30)


async def test_the_newest_logs_stay_and_no_worker_that_lives_loses_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "KEPT_LOGS", 2)
    launcher = LocalLauncher(tmp_path, tmp_path / "run")
    (tmp_path / "notes").mkdir()  # no worker's
    locks = []
    for number in range(6):
        found = Bundle(tmp_path, f"trainer-{number}")
        lock = found.lock()
        assert lock is not None
        locks.append(lock)
        found.log.write_text("it worked")
        os.utime(found.log, (number, number))
    (tmp_path / "trainer-1" / handshake.SPEC).write_text("{}")  # not cleared away yet
    for lock in locks[1:]:  # the first lives
        os.close(lock)
    os.utime(tmp_path / "trainer-3" / handshake.LOG, (9, 9))
    await launcher.discard(replace(TRAINER_SPEC, worker_id="trainer-3"))
    os.close(locks[0])
    assert names_in(tmp_path) == {"notes", "trainer-0", "trainer-1", "trainer-3", "trainer-5"}
    assert names_in(tmp_path / "trainer-3") == {handshake.LOG}


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits to be ended."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


async def test_a_process_that_a_signal_without_a_name_ended_is_seen_to_end(
    child: subprocess.Popen[bytes],
) -> None:
    process = OsProcess(child.pid, os.pidfd_open(child.pid), str)
    adopt_child(child)
    os.kill(child.pid, signal.SIGRTMIN + 1)
    how = await asyncio.wait_for(process.wait(), 10)
    assert how == f"killed by signal {signal.SIGRTMIN + 1}"
    assert not process.alive
