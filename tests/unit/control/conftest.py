"""Fixtures of the managers' tests."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.managers import Managers


@pytest.fixture
async def managers(tmp_path: Path) -> AsyncIterator[Managers]:
    # Sockets need a short path.
    with tempfile.TemporaryDirectory() as run:
        managers = Managers(tmp_path, Path(run))
        yield managers
        await managers.supervisor.stop(1.0)
        for spec in managers.pool.specs():
            await managers.pool.stop(spec.worker_id)
