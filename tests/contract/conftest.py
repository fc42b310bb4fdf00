"""Fixtures of the suites: engines, launchers, commands, and workers that end with the test."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from support.commands import CommandWriter

from firetitan_daemon.core.worker_ports import Worker
from firetitan_daemon.engine.api import ModelSpec, TrainEngine
from firetitan_daemon.engine.factory import TOY_MODEL, make_train_engine
from firetitan_daemon.launch.local import LocalLauncher

KINDS = ["toy"]
if importlib.util.find_spec("firetitan_daemon.engine.hf_train") is not None:
    KINDS.append("hf")


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest) -> Iterator[Callable[[], TrainEngine]]:
    """Make engines of one kind, closed afterwards."""
    base = TOY_MODEL
    if request.param == "hf":
        base = str(request.getfixturevalue("tiny_llama"))
    engines: list[TrainEngine] = []

    def new() -> TrainEngine:
        engines.append(make_train_engine(ModelSpec(base, device="cpu")))
        return engines[-1]

    yield new
    for engine in engines:
        engine.close()


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
