"""`make bench` runs through: every comparison, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.models import save_tiny

BENCH = Path(__file__).resolve().parents[2] / "bench" / "run.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_comparison_runs(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama", dtype="bfloat16")
    out = tmp_path / "bench.json"
    command = [sys.executable, str(BENCH), "--quick", "--threads", "1"]
    subprocess.run([*command, "--model", str(tmp_path / "model"), "--out", str(out)], check=True)
    found = json.loads(out.read_text())
    names = " ".join(finding["name"] for finding in found["findings"])
    for what in ("8 x 256", "ragged", "loss's fall", "custom loss", "sampling", "hotload"):
        assert what in names
    assert "death" in names and "ledger" in names
    assert all(finding["ratio"] > 0 for finding in found["findings"])
