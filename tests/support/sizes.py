"""How large the tests of reliability are: small by default, as large as a night allows if asked.

`FIRETITAN_TEST_SIZE=nightly` makes them large, `FIRETITAN_TEST_SEED` repeats a run.
"""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

NIGHTLY = os.environ.get("FIRETITAN_TEST_SIZE") == "nightly"


def size(small: T, nightly: T) -> T:
    """One of the two."""
    return nightly if NIGHTLY else small


def seed(default: int = 0) -> int:
    """What moments and places are drawn from; printed, so that a failed run can be repeated."""
    given = os.environ.get("FIRETITAN_TEST_SEED")
    chosen = int(given) if given else size(default, random.SystemRandom().randrange(2**31))
    print(f"FIRETITAN_TEST_SEED={chosen}")
    return chosen


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that `percent` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def figure(promise: str, **values: float) -> None:
    """Print what was measured; also appended to the file FIRETITAN_TEST_FIGURES names."""
    line = json.dumps({"promise": promise, "nightly": NIGHTLY, **values})
    print(line)
    path = os.environ.get("FIRETITAN_TEST_FIGURES")
    if path:
        with Path(path).open("a") as file:
            file.write(line + "\n")
