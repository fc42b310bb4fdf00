"""Failpoints: their syntax, and that they are off by default."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from firetitan_daemon.core.failpoints import NAMES, failpoint, parse

_PROGRAM = """
from firetitan_daemon.core.failpoints import failpoint
for number in range(4):
    print(number, flush=True)
    failpoint("commands.applied")
    failpoint("commands.settled")
"""


def test_nothing_happens_by_default() -> None:
    for name in NAMES:
        failpoint(name)


@pytest.mark.parametrize("text", ["nowhere=kill", "commands.applied=explode", "commands.applied"])
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="FIRETITAN_FAILPOINTS"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "reached", "code"),
    [
        ("commands.applied=2*off->kill", 3, -9),
        ("commands.settled=kill", 1, -9),
        ("commands.applied=1*delay(1)->off; commands.settled=3*off->kill", 4, -9),
        ("commands.applied=2*off->exit_once(5)", 3, 5),
        ("commands.applied=enospc", 1, 1),
    ],
)
def test_actions_come_in_their_turn(tmp_path: Path, text: str, reached: int, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        env={**os.environ, "FIRETITAN_FAILPOINTS": text, "FIRETITAN_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (len(done.stdout.split()), done.returncode) == (reached, code)
    if code == 1:
        assert f"Errno {errno.ENOSPC}" in done.stderr
