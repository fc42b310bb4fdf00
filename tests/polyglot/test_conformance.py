"""The script that judges clients finds what bad ones do wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFORMANCE = ROOT / "examples" / "polyglot" / "conformance.py"
CLIENT = Path(__file__).with_name("stub_client.py")


def verdict(*habits: str) -> dict[str, bool]:
    """Which rules the client kept."""
    judged = subprocess.run(
        [sys.executable, CONFORMANCE, "--", sys.executable, CLIENT, *habits],
        capture_output=True,
        text=True,
    )
    found = {
        line[5:]: line.startswith("ok")
        for line in judged.stdout.splitlines()
        if line[4:5] == " " and line[:4] in ("ok  ", "FAIL")
    }
    assert found, judged.stdout + judged.stderr
    assert (judged.returncode == 0) == all(found.values())
    return found


@pytest.mark.timeout(120)
def test_a_good_client_keeps_every_rule() -> None:
    assert all(verdict().values())


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("habit", "broken"),
    [
        ("new-request-id", "request_id"),
        pytest.param("no-pause", "retry", marks=pytest.mark.slow),
        ("no-retry-of-cancelled", "retry"),
        ("not-seen", "seen_failure"),
        ("no-acks", "acknowledgement"),
        pytest.param("from-the-start", "acknowledgement", marks=pytest.mark.slow),
        ("new-seed", "sampling"),
    ],
)
def test_a_bad_habit_is_named(habit: str, broken: str) -> None:
    kept = verdict(habit)
    assert not kept[broken]
