"""Fixtures for every kind of test."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from support.daemon import DaemonProcess
from support.models import save_tiny

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A shell has its background jobs ignore Ctrl-C; some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)


# A busy machine holds up any call for longer than a deadline that would mean something.
hypothesis.settings.register_profile("firetitan", deadline=None)
hypothesis.settings.load_profile("firetitan")


@pytest.fixture(scope="session", autouse=True)
def no_group_is_killed() -> Iterator[None]:
    """An id that is not known yet is 0, and `os.kill(0, ...)` ends the tests and what runs them."""
    kill = os.kill

    def kill_one(pid: int, number: int) -> None:
        assert pid > 0, f"{pid} is no process: wait until the worker's id is known"
        kill(pid, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "kill", kill_one)
        yield


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama folder, tied embeddings, fp32."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    """A running daemon on a fresh home; it and its workers are ended afterwards."""
    process = DaemonProcess(tmp_path / "home")
    process.start()
    yield process
    process.stop()
