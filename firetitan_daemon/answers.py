"""What the daemon of a home answers `firetitand doctor`: how it is, a refusal, or nothing.

Knows: how it is asked, what a missing answer means. Must not know: what else may be wrong with it.
Only one that does not answer at all is called silent: the advice for that ends it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from firetitan_daemon.health import Finding
from firetitan_daemon.places import Places
from firetitan_daemon.processes import state_of
from firetitan_daemon.resources import Resources, View

ANSWER_S = 5.0
LEDGER_S = 120.0
"""For a ledger of many GB on a slow disk."""
_SILENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def ask(places: Places, pid: int | None) -> tuple[str, View | None, list[Finding]]:
    """What a daemon tells of itself, and of its ledger.

    Args:
        places: Of its home.
        pid: Of the process that serves there; None: none does.

    Returns:
        `running`, `silent` or `none`; what it told, where it did; what is wrong with its answers.
    """
    if pid is None:
        return "none", None, []
    with grpc.insecure_channel(f"unix:{places.socket}") as channel:
        resources = Resources(channel, ANSWER_S)
        try:
            view = resources.view()
        except grpc.RpcError as error:
            if error.code() in _SILENT:
                return "silent", None, [_silent(pid, error)]
            return "running", None, [_refused(pid, error)]
        # Asked for alone: a large ledger takes longer than any answer of a daemon that is well.
        return "running", view, list(_look_ledger_over(places, resources, view))


def _look_ledger_over(places: Places, resources: Resources, view: View) -> Iterator[Finding]:
    """Add what is wrong with a running daemon's ledger to its view."""
    _read_through(places.database)
    try:
        view.info.ledger_problems.extend(resources.ledger_problems(LEDGER_S))
    except grpc.RpcError as error:
        cause: Any = error
        yield Finding(
            "ledger",
            str(places.database),
            f"the daemon did not look it over: {cause.code().name}: {cause.details()}",
            "ask again; if it lasts, see the daemon's log, and the disk of that file",
        )


def _read_through(path: Path) -> None:
    """Have the system read a file: the daemon's commands wait while it reads that itself."""
    with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
        while file.read(2**20):
            pass


def _refused(pid: int, error: Any) -> Finding:
    return Finding(
        "daemon",
        "firetitand",
        f"process {pid} answers, and cannot tell how it is: {error.code().name}: {error.details()}",
        "look for that in its log; if it lasts: firetitand stop, then firetitand serve; workers go "
        "on",
    )


def _silent(pid: int, error: Any) -> Finding:
    if state_of(pid) in ("T", "t"):
        return Finding(
            "daemon",
            "firetitand",
            f"process {pid} is stopped (SIGSTOP) and does not answer",
            f"kill -CONT {pid}",
        )
    return Finding(
        "daemon",
        "firetitand",
        f"process {pid} does not answer: {error.code().name}",
        f"see its log; kill -9 {pid} loses nothing (workers go on), then: firetitand serve",
    )
