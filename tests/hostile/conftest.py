"""One daemon for all hostile requests: it must be the same one at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.daemon import DaemonProcess
from support.hostile_world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[World]:
    """A daemon with two models; lanes wait shortly for numbers that never come."""
    daemon = DaemonProcess(
        tmp_path_factory.mktemp("hostile") / "home", {"FIRETITAN_LIMITS_GAP_TIMEOUT_S": "0.5"}
    )
    daemon.start()
    try:
        built = World(daemon, tiny_llama)
        yield built
        built.stubs.channel.close()
    finally:
        daemon.stop()
