"""The process that exports: what it runs, and what it says where it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from firetitan_daemon.core.errors import FiretitanError
from firetitan_daemon.core.ports import ExportJob
from firetitan_daemon.launch.export import ProcessExporter

pytestmark = pytest.mark.timeout(60)


async def test_files_of_the_folder_it_is_started_in_are_no_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "ran"
    for name in ("torch", "json", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')\nraise SystemExit(1)\n")
    monkeypatch.chdir(tmp_path)
    missing = (str(tmp_path / "none"), "digest")
    job = ExportJob("snapshots/s", "b", (missing,), False, str(tmp_path / "out"))
    with pytest.raises(FiretitanError, match=r"none/manifest\.json"):
        await ProcessExporter(1).export(job)
    assert not marker.exists()
