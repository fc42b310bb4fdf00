"""Fixtures of the managers' tests."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.commands import SESSION, TRAINER_SPEC
from support.managers import Managers
from support.pipeline import Bench

from firetitan_daemon.launch.in_process import InProcessLauncher
from firetitan_daemon.launch.local import LocalLauncher


@pytest.fixture
async def managers(tmp_path: Path) -> AsyncIterator[Managers]:
    # Sockets need a short path.
    with tempfile.TemporaryDirectory() as run:
        managers = Managers(tmp_path, Path(run))
        yield managers
        await end(managers)


@pytest.fixture
async def processes(tmp_path: Path) -> AsyncIterator[Managers]:
    """Managers whose workers are processes."""
    (tmp_path / "workers").mkdir(mode=0o700)
    with tempfile.TemporaryDirectory() as run:
        launcher = LocalLauncher(tmp_path / "workers", Path(run))
        managers = Managers(tmp_path, Path(run), launcher)
        yield managers
        await end(managers)


async def end(managers: Managers) -> None:
    await managers.supervisor.stop(1.0)
    for spec in managers.pool.specs():
        await managers.pool.stop(spec.worker_id)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    # Sockets need a short path.
    with tempfile.TemporaryDirectory() as run:
        launcher = InProcessLauncher(Path(run))
        worker = await launcher.launch(TRAINER_SPEC)
        await worker.load_model()
        await worker.open_session(SESSION)
        bench = Bench(tmp_path, worker, launcher)
        bench.pipeline.start(worker)
        yield bench
        await bench.pipeline.pause(5)
        await worker.shutdown()
