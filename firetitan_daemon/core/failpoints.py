"""Places where a test may stop the process: no-ops unless FIRETITAN_FAILPOINTS is set.

Knows: names and actions. Must not know: what happens at the places. The variable holds
`name=action` pairs separated by `;`, an action being a chain of `[count*]what` joined by `->`:
`commands.spooled=2*off->kill` kills the process the third time the place is reached. What there is:
`off`, `kill` (SIGKILL to this process), `kill_once` (the same, but in the first process of this
FIRETITAN_HOME alone), `exit_once(code)` (likewise, by `os._exit`), `note` (leave a file that says
it was reached), `enospc` (OSError ENOSPC), `delay(ms)`.

Places that begin with `worker.`, `engine.` and `sampler.` are passed by workers, the others by the
daemon.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

NAMES = (
    "commands.spooled",
    "commands.accepted",
    "commands.dispatched",
    "commands.applied",
    "commands.result_spooled",
    "commands.published",
    "commands.settled",
    "worker.admitted",
    "engine.step",
    "worker.saved",
    "worker.applied",
    "worker.stored",
    "point.begun",
    "worker.point_copied",
    "worker.point_written",
    "point.published",
    "point.made",
    "recovery.launched",
    "recovery.replayed",
    "recovery.restored",
    "sampler.prepared",
    "hotload.prepared",
    "sampler.applying",
    "sampler.applied",
    "hotload.switched",
    "hotload.applied",
    "sampler.generated",
    "create.loaded",
    "adopt.adopted",
    "scale.removed",
)
"""Every place, in the order a command passes them."""

_STEP = re.compile(r"(?:(\d+)\*)?(off|kill_once|kill|exit_once|note|enospc|delay)(?:\((\d+)\))?")


@dataclass
class _Step:
    left: int | None
    what: str
    argument: int


def parse(text: str) -> dict[str, list[_Step]]:
    """Read the variable's syntax.

    Raises:
        ValueError: An unknown place or action.
    """
    points: dict[str, list[_Step]] = {}
    for pair in filter(None, (part.strip() for part in text.split(";"))):
        name, _, chain = pair.partition("=")
        if name not in NAMES:
            raise ValueError(f"FIRETITAN_FAILPOINTS: no place is named {name!r}; there are {NAMES}")
        steps = []
        for step in chain.split("->"):
            match = _STEP.fullmatch(step.strip())
            if match is None:
                raise ValueError(f"FIRETITAN_FAILPOINTS: cannot read {step!r} of {name!r}")
            count, what, argument = match.groups()
            steps.append(_Step(int(count) if count else None, what, int(argument or 0)))
        points[name] = steps
    return points


_points = parse(os.environ.get("FIRETITAN_FAILPOINTS", ""))


def _is_first(name: str) -> bool:
    """Leave a file in the home; False where another process, or this one before, has left it."""
    marker = Path(os.environ["FIRETITAN_HOME"]) / f"failpoint-{name}"
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def failpoint(name: str) -> None:
    """Do what FIRETITAN_FAILPOINTS asks for at this place; nothing where it is not named.

    Args:
        name: One of `NAMES`.

    Raises:
        OSError: ENOSPC where the action is `enospc`.
    """
    for step in _points.get(name, ()):
        if step.left == 0:
            continue
        if step.left is not None:
            step.left -= 1
        if step.what == "kill" or (step.what == "kill_once" and _is_first(name)):
            os.kill(os.getpid(), signal.SIGKILL)
        elif step.what == "exit_once" and _is_first(name):
            os._exit(step.argument)
        elif step.what == "note":
            _is_first(name)
        elif step.what == "enospc":
            raise OSError(errno.ENOSPC, f"failpoint {name}")
        elif step.what == "delay":
            time.sleep(step.argument / 1000)
        return
