"""The program in the README runs as it stands, on a tiny model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.daemon import DaemonProcess

README = Path(__file__).resolve().parents[2] / "README.md"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.timeout(120)
def test_the_program_runs(daemon: DaemonProcess, tiny_llama: Path, tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert MODEL in program
    done = subprocess.run(
        [sys.executable, "-c", program.replace(MODEL, str(tiny_llama))],
        cwd=tmp_path,
        env={**os.environ, "FIRETITAN_ADDRESS": daemon.address},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line) for line in done.stdout.splitlines()[:10]]
    assert losses[-1] < losses[0]
