"""What is wrong with a running daemon, as it tells of itself; a check is a function.

Knows: the public messages, what to do about each state. Must not know: files, processes, the
command line, how a daemon is asked.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from firetitan.v1 import deployment_pb2, session_pb2, trainer_pb2
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2

from firetitan_daemon.resources import View

STUCK_S = 120.0
"""An operation that is not done for so long is shown."""
FULL_BYTES = 16 * 2**20
"""With less room than this a disk counts as full."""


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be."""

    check: str
    """Which check found it."""
    subject: str
    """The resource, process or path."""
    what: str
    todo: str
    """What to do."""

    def __str__(self) -> str:
        return f"{self.subject}: {self.what} -> {self.todo}"


def check_daemon(view: View) -> Iterator[Finding]:
    """It takes new work."""
    if view.info.draining:
        yield Finding(
            "daemon",
            "firetitand",
            f"draining: takes no new work and is about to end; pid {view.info.pid}",
            "start the next one when it has ended: firetitand serve",
        )


def check_folders(view: View) -> Iterator[Finding]:
    """Its folders are there, can be written to and have room."""
    needed = sum(one.point_bytes for one in view.info.recoveries)
    for folder in view.info.folders:
        if not folder.exists:
            yield Finding(
                "folders", folder.path, "gone", "bring it back, or stop the daemon and start anew"
            )
        elif not folder.writable:
            yield Finding(
                "folders",
                folder.path,
                "cannot be written to: nothing new is accepted",
                "make its file system writable again, or give its owner the right to write",
            )
        elif folder.free_bytes < FULL_BYTES:
            yield Finding(
                "folders",
                folder.path,
                f"disk full: {_size(folder.free_bytes)} free, "
                f"{_size(folder.reserve_bytes)} in reserve",
                "free space there, e.g. by deleting checkpoints and snapshots; what waits goes on",
            )
        elif folder.free_bytes < needed:
            yield Finding(
                "folders",
                folder.path,
                f"disk nearly full: {_size(folder.free_bytes)} free, the next recovery points "
                f"need {_size(needed)}",
                "free space there, e.g. by deleting checkpoints and snapshots",
            )


def check_ledger(view: View) -> Iterator[Finding]:
    """Its ledger is whole, where that was asked for."""
    for problem in view.info.ledger_problems:
        yield broken_ledger("state.db", problem)


def broken_ledger(subject: str, problem: str) -> Finding:
    """A ledger that SQLite finds fault with."""
    return Finding(
        "ledger",
        subject,
        f"damaged: {problem}",
        "save a copy of the home, check the disk, restore a backup of state.db or begin with "
        "another home; checkpoints and snapshots in store/ can be copied out",
    )


def check_workers(view: View) -> Iterator[Finding]:
    """Its workers answer."""
    for worker in view.info.workers:
        if worker.state == "unresponsive":
            yield Finding(
                "workers",
                worker.target,
                f"its {worker.kind} (pid {worker.pid}, {worker.id}) has not answered for "
                f"{worker.silent_for.seconds} s: stopped, swapping, or in one long computation",
                f"wait, or see why (ps -o state= -p {worker.pid}; kill -CONT {worker.pid}); "
                f"kill -9 {worker.pid} has it replaced",
            )
        elif worker.state == "unsupported":
            yield Finding(
                "workers",
                worker.target,
                f"its {worker.kind} (pid {worker.pid}, {worker.id}) is left alone: "
                f"{worker.problem}",
                "run the firetitan it was started by, save, and create it anew with this one",
            )
        elif worker.state == "gone":
            yield Finding(
                "workers",
                worker.target,
                f"its {worker.kind} ({worker.id}) has ended",
                f"nothing: it is being replaced; why it ended is in workers/{worker.id}/worker.log",
            )


def check_trainers(view: View) -> Iterator[Finding]:
    """Its trainers serve."""
    states = trainer_pb2.Trainer
    for one in view.trainers:
        if one.state == states.STATE_FAILED:
            yield Finding("trainers", one.name, f"failed: {_text(one.error)}", _again(one.name))
        elif one.state == states.STATE_RECOVERING:
            yield _recovering("trainers", one.name, view)


def check_sessions(view: View) -> Iterator[Finding]:
    """Its sessions have their weights."""
    recoveries = {one.session: one for one in view.info.recoveries}
    for one in view.sessions:
        if one.state == session_pb2.Session.STATE_LOST:
            trainer = one.name.partition("/sessions/")[0]
            yield Finding(
                "sessions",
                one.name,
                "lost: its worker ended and could not be replaced",
                f"create {trainer} again with the same id, open its session and load the last "
                "checkpoint",
            )
        elif one.state == session_pb2.Session.STATE_RECOVERING:
            left = recoveries[one.name].to_replay if one.name in recoveries else 0
            yield _recovering("sessions", one.name, view, f"; {left} commands to run again")


def check_deployments(view: View) -> Iterator[Finding]:
    """Its deployments serve what they should."""
    states = deployment_pb2.Deployment
    for one in view.deployments:
        if one.state == states.STATE_FAILED:
            yield Finding("deployments", one.name, f"failed: {_text(one.error)}", _again(one.name))
        elif one.state == states.STATE_RECOVERING:
            yield _recovering("deployments", one.name, view)
        elif one.state == states.STATE_ACTIVE and one.ready_replicas < one.replicas:
            some = f"; {one.ready_replicas} of its {one.replicas} samplers answer"
            yield _recovering("deployments", one.name, view, some)
        elif one.error.message:
            served = one.active_snapshot or "the base model"
            yield Finding(
                "deployments",
                one.name,
                f"its last hotload failed, {served} is served: {_text(one.error)}",
                "hotload another snapshot, e.g. a new base",
            )
        if one.requires_sync:
            yield Finding(
                "deployments",
                one.name,
                f"attached to {one.trainer}, it still serves what its former trainer made",
                "hotload a snapshot of its trainer",
            )


def check_work(view: View) -> Iterator[Finding]:
    """What was accepted gets done."""
    for one in view.info.open_work:
        age_s = _age_s(one.create_time)
        if age_s < STUCK_S and not one.held:
            continue
        why = ", which waits for an earlier command of its client" if one.held else ""
        todo = (
            "see the state of its worker and its disk"
            if not one.held
            else ("nothing: its lane is closed after limits.gap_timeout_s, and the client told")
        )
        yield Finding(
            "work",
            one.target,
            f"{one.operations} operations are not done, the oldest {one.method} {one.oldest} for "
            f"{age_s:.0f} s{why}",
            todo,
        )


_AFTER = {
    "POISON_COMMAND": "make it smaller; see the worker's log under workers/",
    "SESSION_LOSS": "read its hint: from which checkpoint to go on",
    "STATE_DISK_FULL": "free space in the home and send it again",
    "DEVICE_OUT_OF_MEMORY": "fewer or shorter sequences a call, a smaller model, or LoRA",
    "CHECKSUM_MISMATCH": "use another checkpoint, or save a new base snapshot",
    "INTERNAL": "look for its id in the daemon's and the worker's log",
}


def check_failures(view: View) -> Iterator[Finding]:
    """What failed lately failed by its sender's fault."""
    for one in view.info.failures:
        reason = _reason(one.error)
        yield Finding(
            "failures",
            one.target,
            f"{one.method} {one.operation} failed {_age_s(one.finish_time):.0f} s ago: {reason}: "
            f"{_text(one.error)}",
            _AFTER.get(reason, "send it again when what it names is mended"),
        )


def check_cleanups(view: View) -> Iterator[Finding]:
    """Nothing waits to be cleaned up."""
    users: dict[str, set[str]] = {}
    for lease in view.leases:
        for use in lease.uses:
            users.setdefault(use.name.partition("/sessions/")[0], set()).add(lease.label)
    for one in view.cleanups:
        what = {1: "stopped", 2: "deleted"}.get(one.cleanup, "cleaned up")
        by = ", ".join(sorted(users.get(one.name, ())))
        if one.error.message:
            yield Finding(
                "cleanups",
                one.name,
                f"is to be {what}, which failed: {_text(one.error)}",
                "nothing, it is tried again; where it goes on failing, mend what it names",
            )
        else:
            yield Finding(
                "cleanups",
                one.name,
                f"is to be {what} as {one.asked_by} asked, when its users have left: {by}",
                f"end those, or: firetitand rm --force {one.name}",
            )


CHECKS = (
    check_daemon,
    check_folders,
    check_ledger,
    check_workers,
    check_trainers,
    check_sessions,
    check_deployments,
    check_work,
    check_failures,
    check_cleanups,
)


def findings(view: View) -> Sequence[Finding]:
    """What every check finds."""
    return [finding for check in CHECKS for finding in check(view)]


def _recovering(check: str, name: str, view: View, left: str = "") -> Finding:
    target = name.partition("/sessions/")[0]
    ends = (one for one in view.info.worker_ends if one.target == target)
    last = next((f" (the last one {one.cause})" for one in ends), "")
    return Finding(
        check,
        name,
        f"recovering: its worker is being reached or replaced{last}{left}",
        "wait; if it lasts, see the daemon's log and the worker's, workers/*/worker.log",
    )


def _again(name: str) -> str:
    return f"mend what it names and create {name} again with the same id, or: firetitand rm {name}"


def _text(error: status_pb2.Status) -> str:
    return " ".join(error.message.split())


def _reason(error: status_pb2.Status) -> str:
    info = error_details_pb2.ErrorInfo()
    for detail in error.details:
        if detail.Unpack(info):
            return str(info.reason)
    return "INTERNAL"


def _age_s(moment: Timestamp) -> float:
    return max(0.0, time.time() - moment.ToNanoseconds() / 1e9)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"
