"""Fixtures of the worker suites: launchers, commands, and workers that end with the test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.commands import CommandWriter

from firetitan_daemon.core.ports import Worker
from firetitan_daemon.launch.local import LocalLauncher


@pytest.fixture
async def ends() -> AsyncIterator[list[Worker]]:
    """Workers to end after the test."""
    workers: list[Worker] = []
    yield workers
    for worker in workers:
        await worker.shutdown()


@pytest.fixture
def local(tmp_path: Path) -> LocalLauncher:
    """Launches real processes."""
    return LocalLauncher(tmp_path / "workers", tmp_path / "run")


@pytest.fixture
def write(tmp_path: Path) -> CommandWriter:
    """Builds commands of one session."""
    folder = tmp_path / "spool"
    folder.mkdir()
    return CommandWriter(folder)
