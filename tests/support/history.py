"""What clients of a session sent and what came back, and a judge of it.

A `Recorder` appends to a file as things happen, so that a client's death loses nothing. `judge`
holds the whole against the only thing a session may look like from outside: one order of commands,
a counter of steps, each command in it exactly once. `python tests/support/history.py FILE` judges
a saved file again.

Times are seconds of the monotonic clock, which processes of one machine share.
"""

from __future__ import annotations

import bisect
import itertools
import json
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

STEP = "OptimStep"
READ = "GetSession"
COMMITTED, FAILED, CANCELLED = "committed", "failed", "cancelled"
LOST, UNKNOWN = "lost", "unknown"
PLACED = (COMMITTED, FAILED, CANCELLED)
"""Ends of commands that keep their place in the order."""
CASCADE = "PRECEDING_FAILED"


@dataclass(frozen=True)
class Call:
    """One call of a client, from before it was sent until after its answer came.

    The same command sent again, by whomever, is another call with the same request id.
    """

    client: str
    method: str
    request_id: str
    invoked: float
    returned: float = float("inf")
    outcome: str = UNKNOWN
    """`UNKNOWN`: the client never saw an answer."""
    seq: int = 0
    """Place in the client's lane; 0 for reads."""
    commit_seq: int = 0
    step: int = 0
    """After an OptimStep, or what a read saw."""
    digest: str = ""
    """Of everything in the answer."""
    operation: str = ""
    """Its name."""
    reason: str = ""
    """Of its error."""
    seen_failure: int = 0
    """Up to which place of its lane the client knew of failures when it sent this."""


@dataclass(frozen=True)
class History:
    """Calls of one session, and what it says itself at the end."""

    calls: Sequence[Call]
    listed: Sequence[Call] = ()
    """Every operation in the session's own order, as listed when all was quiet."""
    lost: frozenset[str] = field(default_factory=frozenset)
    """Operations that a SessionLoss named."""
    cancelled: frozenset[str] = field(default_factory=frozenset)
    """Operations that CancelOperation answered to be cancelled."""


class Recorder:
    """Writes calls to a file, a line when each begins and one when it ends; for any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a", buffering=1)
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._source = f"{path.name}-{time.monotonic_ns()}"

    def invoked(
        self, client: str, method: str, request_id: str, seq: int = 0, seen_failure: int = 0
    ) -> str:
        """A call is about to be sent; returns its key for `returned`."""
        key = f"{self._source}-{next(self._numbers)}"
        now = time.monotonic()
        call = Call(client, method, request_id, now, seq=seq, seen_failure=seen_failure)
        self._write("invoked", key, call)
        return key

    def returned(self, key: str, outcome: str, **fields: int | str) -> None:
        """An answer came."""
        now = time.monotonic()
        self._write("returned", key, {"returned": now, "outcome": outcome, **fields})

    def listed(self, calls: Iterable[Call]) -> None:
        """What the session lists, in its order, when all is quiet."""
        for call in calls:
            self._write("listed", "", call)

    def lost(self, operation: str) -> None:
        """A SessionLoss named this operation."""
        self._write("lost", "", {"operation": operation})

    def cancelled(self, operation: str) -> None:
        """CancelOperation answered that this operation is cancelled."""
        self._write("cancelled", "", {"operation": operation})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: str, key: str, content: Call | dict[str, object]) -> None:
        fields = asdict(content) if isinstance(content, Call) else content
        with self._lock:
            self._file.write(json.dumps({"event": event, "key": key, **fields}) + "\n")


def load(*paths: Path) -> History:
    """The history in the files of its recorders; a last line cut off by a death is left out."""
    calls: dict[str, Call] = {}
    listed: list[Call] = []
    told: dict[str, set[str]] = {"lost": set(), "cancelled": set()}
    for path in paths:
        for line in path.read_text().splitlines():
            try:
                fields = json.loads(line)
            except json.JSONDecodeError:
                continue
            event, key = fields.pop("event"), fields.pop("key")
            if event == "invoked":
                calls[key] = Call(**fields)
            elif event == "returned":
                calls[key] = replace(calls[key], **fields)
            elif event == "listed":
                listed.append(Call(**fields))
            else:
                told[event].add(fields["operation"])
    return History(
        list(calls.values()), listed, frozenset(told["lost"]), frozenset(told["cancelled"])
    )


def judge(history: History) -> list[str]:
    """What is wrong, in words; nothing where the history could be that of a right session."""
    return [
        *_exactly_once(history),
        *_dense(history),
        *_program_order(history),
        *_real_time_order(history),
        *_reads(history),
        *_losses(history),
        *_cancellations(history),
        *_cascades(history),
    ]


def _committed(history: History) -> list[Call]:
    """Calls of commands that came back with a place in the order."""
    return [one for one in history.calls if one.outcome in PLACED and one.commit_seq]


def _order(history: History) -> list[Call]:
    """One call a command, in the session's order: as listed, else as clients were told."""
    found = {one.commit_seq: one for one in _committed(history)}
    found |= {one.commit_seq: one for one in history.listed}
    return [found[place] for place in sorted(found)]


def _exactly_once(history: History) -> list[str]:
    problems = []
    places: dict[str, dict[int, Call]] = defaultdict(dict)
    owners: dict[int, str] = {}
    for call in [*_committed(history), *history.listed]:
        former = places[call.request_id].setdefault(call.commit_seq, call)
        if (former.outcome, former.step) != (call.outcome, call.step) or (
            former.digest and call.digest and former.digest != call.digest
        ):
            problems.append(f"{call.request_id} was answered in two ways: {former}, {call}")
        owner = owners.setdefault(call.commit_seq, call.request_id)
        if owner != call.request_id:
            problems.append(
                f"{owner} and {call.request_id} both have place {call.commit_seq} in the order"
            )
    for request_id, found in places.items():
        if len(found) > 1:
            problems.append(f"{request_id} was applied {len(found)} times, at {sorted(found)}")
    if history.listed:
        known = {one.request_id for one in history.listed}
        problems += [
            f"{one.request_id} was acknowledged at {one.commit_seq} and is gone"
            for one in _committed(history)
            if one.request_id not in known
        ]
        sent = {one.request_id for one in history.calls}
        problems += [f"{one} was sent by nobody" for one in sorted(known - sent)]
    return problems


def _dense(history: History) -> list[str]:
    problems = []
    order = _order(history)
    if history.listed:
        places = [one.commit_seq for one in order]
        if places != list(range(1, len(places) + 1)):
            problems.append(f"places in the order are not 1..n: {places}")
    steps = [one.step for one in order if one.method == STEP and one.outcome == COMMITTED]
    wanted = list(range(1, len(steps) + 1)) if history.listed else sorted(set(steps))
    if steps != wanted:
        problems.append(f"steps are not {'1..n' if history.listed else 'in order'}: {steps}")
    return problems


def _program_order(history: History) -> list[str]:
    problems = []
    lanes: dict[str, dict[int, int]] = defaultdict(dict)
    for call in [*_committed(history), *history.listed]:
        if call.seq:
            lanes[call.client][call.seq] = call.commit_seq
    for client, lane in lanes.items():
        ordered = [lane[seq] for seq in sorted(lane)]
        if ordered != sorted(ordered):
            problems.append(f"{client} sent in another order than it was run: {ordered}")
    return problems


def _real_time_order(history: History) -> list[str]:
    """What had come back before another was sent is ahead of it in the order."""
    first_sent: dict[str, float] = {}
    first_answer: dict[str, Call] = {}
    for call in history.calls:
        sent = first_sent.get(call.request_id, call.invoked)
        first_sent[call.request_id] = min(sent, call.invoked)
        if call.outcome in PLACED and call.commit_seq:
            former = first_answer.setdefault(call.request_id, call)
            if call.returned < former.returned:
                first_answer[call.request_id] = call
    problems = []
    sent_latest, latest = float("-inf"), ""
    for call in _order(history):
        answer = first_answer.get(call.request_id)
        if answer is not None and answer.returned < sent_latest:
            problems.append(
                f"{call.request_id} had been answered before {latest} was sent, yet it is behind it"
            )
        sent = first_sent.get(call.request_id, float("-inf"))
        if sent > sent_latest:
            sent_latest, latest = sent, call.request_id
    return problems


def _reads(history: History) -> list[str]:
    """Reads of the step counter are linearised with the steps.

    The order is known, so the earliest moment of each thing in it is too: not before it was sent,
    not before what is ahead of it. It fits where none of these moments is after the answer.
    """
    sent: dict[str, float] = {}
    answered: dict[str, float] = {}
    for call in history.calls:
        if call.method != READ:
            sent[call.request_id] = min(sent.get(call.request_id, call.invoked), call.invoked)
            if call.outcome == COMMITTED:
                before = answered.get(call.request_id, float("inf"))
                answered[call.request_id] = min(before, call.returned)
    seen: dict[int, list[Call]] = defaultdict(list)
    for call in history.calls:
        if call.method == READ and call.outcome == COMMITTED:
            seen[call.step].append(call)
    order = _order(history)
    taken = {one.step: one for one in order if one.method == STEP and one.outcome == COMMITTED}
    problems = []
    moment = float("-inf")
    for step in sorted({0, *taken, *seen}):
        change, reads = taken.get(step), seen[step]
        if change is not None:
            moment = max(moment, sent.get(change.request_id, moment))
            if moment > answered.get(change.request_id, float("inf")):
                problems.append(f"step {step} was acknowledged before a read that saw less began")
        elif step and history.listed:
            problems.append(f"a read saw step {step}, which was never taken")
        for read in reads:
            if moment > read.returned:
                problems.append(f"{read.client} read step {step} before it can have been taken")
        # The step behind these is taken after they began.
        moment = max([moment, *(read.invoked for read in reads)])
    return problems


def _losses(history: History) -> list[str]:
    told = {one.operation for one in history.calls if one.outcome == LOST}
    done = {one.operation for one in history.calls if one.outcome == COMMITTED and one.operation}
    return [
        *(f"{one} ended as lost, and no loss names it" for one in sorted(told - history.lost)),
        *(f"{one} was acknowledged, and a loss names it" for one in sorted(done & history.lost)),
    ]


def _cancellations(history: History) -> list[str]:
    """What was answered to be cancelled stays so: it never ran, then or later.

    That a step of it was taken in silence shows in the steps behind it, which `_dense` counts.
    """
    told = [one for one in [*history.calls, *history.listed] if one.outcome != UNKNOWN]
    known = {one.operation for one in history.listed} if history.listed else history.cancelled
    return [
        *(
            f"{one.operation} was answered to be cancelled, yet it ended {one.outcome}: {one}"
            for one in told
            if one.operation in history.cancelled and (one.outcome != CANCELLED or one.step)
        ),
        *(
            f"{one} was answered to be cancelled and is gone"
            for one in sorted(history.cancelled - known)
        ),
    ]


def _cascades(history: History) -> list[str]:
    """A command fails with those before it only where one of its lane did by itself, unseen.

    A cancelled one did not. Judged where everything is listed: what is not may have failed.
    """
    if not history.listed:
        return []
    failed: dict[str, list[int]] = defaultdict(list)
    for call in sorted(history.listed, key=lambda one: one.seq):
        if call.outcome == FAILED and call.reason != CASCADE:
            failed[call.client].append(call.seq)
    problems = []
    for call in history.calls:
        if call.reason == CASCADE:
            seqs = failed[call.client]
            latest = bisect.bisect_left(seqs, call.seq) - 1
            if latest < 0 or seqs[latest] <= call.seen_failure:
                problems.append(f"{call.request_id} failed with none before it that failed: {call}")
    return problems


def main() -> int:
    """Judge the files named on the command line."""
    history = load(*map(Path, sys.argv[1:]))
    problems = judge(history)
    print(*problems, sep="\n")
    print(f"{len(history.calls)} calls, {len(history.listed)} listed, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
