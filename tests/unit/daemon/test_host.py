"""How many GPUs the daemon counts, how many clients it lets in."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from firetitan_daemon.host import count_gpus, max_connections


@pytest.mark.parametrize(
    ("visible", "count"), [(None, 2), ("0", 1), ("0,1,2", 2), ("", 0), ("-1", 0)]
)
def test_device_files_and_the_variable_say(tmp_path: Path, visible: str | None, count: int) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert count_gpus(environment, tmp_path) == count


@pytest.mark.parametrize(
    ("files", "clients"),
    [(1024, 960), (128, 64), (100, 50), (resource.RLIM_INFINITY, 2**31 - 1), (2**40, 2**31 - 1)],
)
def test_clients_leave_descriptors_for_the_state(
    files: int, clients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert max_connections() == clients
