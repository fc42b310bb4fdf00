"""The judge of histories: right ones pass, each kind of wrong one is found."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support import history as module
from support.history import (
    CANCELLED,
    CASCADE,
    COMMITTED,
    FAILED,
    LOST,
    READ,
    STEP,
    Call,
    History,
    Recorder,
    judge,
    load,
)


def simulate(seed: int, clients: int = 3, commands: int = 60) -> History:
    """Clients of a session that is right: each command takes effect between its call and answer."""
    generator = random.Random(seed)
    free = [0.0] * clients
    seqs = [0] * clients
    planned = []
    for number in range(commands):
        client = generator.randrange(clients)
        invoked = free[client] + generator.random()
        applied = invoked + generator.random()
        returned = free[client] = applied + generator.random()
        method = generator.choice([STEP, "ForwardBackward", READ])
        planned.append((applied, number, client, method, invoked, returned))
    calls, listed, step, cancelled = [], [], 0, set()
    for applied, number, client, method, invoked, returned in sorted(planned):
        outcome = CANCELLED if method != READ and number % 9 == 8 else COMMITTED
        step += method == STEP and outcome == COMMITTED
        call = Call(f"c{client}", method, f"r{number}", invoked, returned, outcome, step=step)
        if outcome == CANCELLED:
            cancelled.add(f"operations/{number}")
        if method != READ:
            seqs[client] += 1
            call = replace(
                call,
                seq=seqs[client],
                commit_seq=len(listed) + 1,
                step=step if method == STEP and outcome == COMMITTED else 0,
                digest=f"d{number}",
                operation=f"operations/{number}",
            )
            listed.append(replace(call, invoked=0.0, returned=float("inf"), digest=""))
        calls.append(call)
        assert invoked <= applied <= returned
    generator.shuffle(calls)
    return History(calls, listed, cancelled=frozenset(cancelled))


@pytest.mark.parametrize("seed", range(50))
def test_a_right_history_passes(seed: int) -> None:
    history = simulate(seed)
    assert judge(history) == []
    # Nor does it need to be complete: clients died, nothing was listed.
    kept = [one for one in history.calls if random.Random(one.request_id).random() < 0.7]
    assert judge(History(kept)) == []
    unanswered = [
        one if one in kept else replace(one, outcome="unknown", returned=float("inf"))
        for one in history.calls
    ]
    assert judge(replace(history, calls=unanswered)) == []


def commands(history: History, method: str = STEP) -> list[Call]:
    """Those that were run, in their order."""
    found = (one for one in history.calls if one.method == method and one.outcome == COMMITTED)
    return sorted(found, key=lambda one: one.commit_seq)


def without(history: History, call: Call) -> list[Call]:
    return [one for one in history.calls if one is not call]


def lost_update(history: History) -> History:
    gone = commands(history)[3].request_id
    return replace(history, listed=[one for one in history.listed if one.request_id != gone])


def applied_twice(history: History) -> History:
    twice = commands(history)[2]
    end = len(history.listed) + 1
    steps = len([one for one in history.listed if one.method == STEP]) + 1
    again = replace(twice, commit_seq=end, step=steps, digest="other")
    return History([*history.calls, again], [*history.listed, replace(again, digest="")])


def answered_in_two_ways(history: History) -> History:
    call = commands(history)[2]
    return replace(history, calls=[*history.calls, replace(call, digest="other")])


def two_at_one_place(history: History) -> History:
    first, second, *_ = commands(history, "ForwardBackward")
    moved = replace(second, commit_seq=first.commit_seq)
    return History([*without(history, second), moved])


def step_left_out(history: History) -> History:
    last = commands(history)[-1]
    higher = replace(last, step=last.step + 1)
    listed = [
        replace(one, step=higher.step) if one.request_id == last.request_id else one
        for one in history.listed
    ]
    return History([*without(history, last), higher], listed)


def place_left_out(history: History) -> History:
    listed = [
        replace(one, commit_seq=one.commit_seq + 1) if one is history.listed[-1] else one
        for one in history.listed
    ]
    return History([], listed)


def lane_turned(history: History) -> History:
    lane = [one for one in history.listed if one.client == "c0"]
    first, second = lane[0], lane[1]
    turned = {first.request_id: second.seq, second.request_id: first.seq}
    return History(
        [], [replace(one, seq=turned.get(one.request_id, one.seq)) for one in history.listed]
    )


def answered_before_sent_yet_behind(history: History) -> History:
    first = Call("a", "ForwardBackward", "ra", 0.0, 1.0, COMMITTED, 1, 2, 0, "da")
    second = Call("b", "ForwardBackward", "rb", 2.0, 3.0, COMMITTED, 1, 1, 0, "db")
    return History([first, second])


def invented(history: History) -> History:
    return replace(history, calls=without(history, commands(history)[0]))


def stale_read(history: History) -> History:
    last = commands(history)[-1]
    read = Call(
        "r", READ, "rr", last.returned + 1, last.returned + 2, COMMITTED, step=last.step - 1
    )
    return replace(history, calls=[*history.calls, read])


def early_read(history: History) -> History:
    last = commands(history)[-1]
    read = Call("r", READ, "rr", -2.0, -1.0, COMMITTED, step=last.step)
    return replace(history, calls=[*history.calls, read])


def read_back(history: History) -> History:
    """Two reads, one after the other, of which the second sees less; each alone would do."""
    step = Call("a", STEP, "ra", 0.0, 10.0, COMMITTED, 1, 1, 1, "da")
    reads = [
        Call("b", READ, "r1", 1.0, 2.0, COMMITTED, step=1),
        Call("c", READ, "r2", 3.0, 4.0, COMMITTED, step=0),
    ]
    assert [judge(History([step, read])) for read in reads] == [[], []]
    return History([step, *reads])


def read_of_nothing(history: History) -> History:
    read = Call("r", READ, "rr", 0.0, 1e9, COMMITTED, step=10_000)
    return replace(history, calls=[*history.calls, read])


def loss_unnamed(history: History) -> History:
    call = commands(history)[-1]
    return History([replace(call, outcome=LOST)])


def loss_of_what_was_done(history: History) -> History:
    return replace(history, lost=frozenset({commands(history)[0].operation}))


def cancelled_and_run(history: History) -> History:
    """What CancelOperation answered to be cancelled ran, and says so."""
    return replace(history, cancelled=frozenset({commands(history)[1].operation}))


def cancelled_and_run_in_silence(history: History) -> History:
    """It is listed as cancelled; the step it took shows in those behind it."""
    told = cancelled_step(history)
    return replace(history, listed=told, calls=[call_of_listed(history, one) for one in told])


def cancelled_step(history: History) -> list[Call]:
    gone = commands(history)[2]
    return [
        replace(one, outcome=CANCELLED, step=0) if one.request_id == gone.request_id else one
        for one in history.listed
    ]


def call_of_listed(history: History, listed: Call) -> Call:
    (call,) = [one for one in history.calls if one.request_id == listed.request_id]
    return replace(call, outcome=listed.outcome, step=listed.step)


def cancelled_and_gone(history: History) -> History:
    """Nor had anybody seen how it ended, other than by that answer."""
    name = sorted(history.cancelled)[0]
    return replace(
        history,
        calls=[one for one in history.calls if one.operation != name],
        listed=[one for one in history.listed if one.operation != name],
    )


def failed_for_a_cancelled_one(history: History) -> History:
    cancelled = Call("a", STEP, "r1", 0.0, 1.0, CANCELLED, 1, 1, operation="operations/1")
    behind = Call("a", STEP, "r2", 1.0, 2.0, FAILED, 2, 2, reason=CASCADE)
    calls = [cancelled, behind]
    return History(calls, calls, cancelled=frozenset({"operations/1"}))


def failed_for_one_that_was_seen(history: History) -> History:
    seen = Call("a", STEP, "r1", 0.0, 1.0, FAILED, 1, 1, reason="NO_GRADIENTS")
    behind = Call("a", STEP, "r2", 1.0, 2.0, FAILED, 2, 2, reason=CASCADE, seen_failure=1)
    return History([seen, behind], [seen, behind])


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (lost_update, "is gone"),
        (applied_twice, "was applied 2 times"),
        (answered_in_two_ways, "answered in two ways"),
        (two_at_one_place, "both have place"),
        (step_left_out, "steps are not 1..n"),
        (place_left_out, "not 1..n"),
        (lane_turned, "another order than it was run"),
        (answered_before_sent_yet_behind, "yet it is behind it"),
        (invented, "sent by nobody"),
        (stale_read, "before a read that saw less began"),
        (early_read, "before it can have been taken"),
        (read_back, "before a read that saw less began|before it can have been taken"),
        (read_of_nothing, "which was never taken"),
        (loss_unnamed, "no loss names it"),
        (loss_of_what_was_done, "a loss names it"),
        (cancelled_and_run, "cancelled, yet it ended committed"),
        (cancelled_and_run_in_silence, "steps are not 1..n"),
        (cancelled_and_gone, "cancelled and is gone"),
        (failed_for_a_cancelled_one, "none before it that failed"),
        (failed_for_one_that_was_seen, "none before it that failed"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_a_wrong_history_is_found(broken: Callable[[History], History], told: str) -> None:
    problems = judge(broken(simulate(7)))
    assert any(re.search(told, problem) for problem in problems), problems


def test_a_failed_command_has_a_place_and_no_step() -> None:
    done = Call("a", STEP, "r1", 0.0, 1.0, COMMITTED, 1, 1, 1, "d1")
    failed = Call("a", STEP, "r2", 1.0, 2.0, FAILED, 2, 2, 0, "d2")
    after = Call("a", STEP, "r3", 2.0, 3.0, COMMITTED, 3, 3, 2, "d3")
    calls = [done, failed, after]
    assert judge(History(calls, calls)) == []


def test_what_stands_behind_an_unseen_failure_fails_with_it() -> None:
    failed = Call("a", STEP, "r1", 0.0, 3.0, FAILED, 1, 1, reason="NO_GRADIENTS")
    cancelled = Call("a", STEP, "r2", 0.1, 3.0, CANCELLED, 2, 2, operation="operations/2")
    behind = Call("a", STEP, "r3", 0.2, 3.0, FAILED, 3, 3, reason=CASCADE)
    calls = [failed, cancelled, behind]
    assert judge(History(calls, calls, cancelled=frozenset({"operations/2"}))) == []


def test_what_was_recorded_is_judged_again_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    recorder = Recorder(path)
    first = recorder.invoked("a", STEP, "r1", 1)
    recorder.invoked("a", STEP, "r2", 2)
    recorder.returned(first, COMMITTED, commit_seq=1, step=1, digest="d")
    recorder.cancelled("operations/2")
    recorder.close()
    with path.open("a") as file:
        file.write('{"event": "returned", "key": "cut')  # as a death in the middle leaves it
    history = load(path)
    assert [(one.request_id, one.outcome) for one in history.calls] == [
        ("r1", COMMITTED),
        ("r2", "unknown"),
    ]
    assert history.cancelled == {"operations/2"} and not history.lost
    command = [sys.executable, module.__file__, str(path)]
    right = subprocess.run(command, capture_output=True, text=True)
    assert right.returncode == 0 and "0 problems" in right.stdout
    broken = Recorder(tmp_path / "second.jsonl")
    broken.returned(broken.invoked("b", READ, "r3"), COMMITTED, step=0)
    broken.close()
    wrong = subprocess.run([*command, str(broken.path)], capture_output=True, text=True)
    assert wrong.returncode == 1 and "saw less" in wrong.stdout
