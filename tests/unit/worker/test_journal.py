"""The journal: exactly once, in order, failures by lane."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.worker.journal import Journal, Verdict


def run(journal: Journal[str], commit_seq: int, outcome: str = "done") -> None:
    assert journal.admit(commit_seq, f"r{commit_seq}") is Verdict.RUN
    journal.finish(commit_seq, outcome)


def test_a_command_runs_once_and_is_stored() -> None:
    journal: Journal[str] = Journal()
    assert journal.admit(1, "r1") is Verdict.RUN
    assert journal.applied == 0
    assert journal.admit(1, "r1") is Verdict.JOIN
    journal.finish(1, "first")
    assert journal.applied == 1
    assert journal.admit(1, "r1") is Verdict.STORED
    assert journal.stored(1) == "first"


def test_gaps_are_fine_and_are_never_filled_later() -> None:
    journal: Journal[str] = Journal()
    run(journal, 2)
    run(journal, 7)
    with pytest.raises(FiretitanError, match="behind 7") as caught:
        journal.admit(5, "r5")
    assert caught.value.reason is Reason.OPERATION_NOT_FOUND


def test_a_number_belongs_to_one_request() -> None:
    journal: Journal[str] = Journal()
    assert journal.admit(1, "mine") is Verdict.RUN
    for _ in ("in flight", "stored"):
        with pytest.raises(FiretitanError, match="belongs to request mine") as caught:
            journal.admit(1, "yours")
        assert caught.value.reason is Reason.REQUEST_ID_REUSED
        if journal.applied == 0:
            journal.finish(1, "done")


def test_commit_seq_starts_at_one() -> None:
    with pytest.raises(FiretitanError, match="1 or more"):
        Journal[str]().admit(0, "r0")


def test_settled_outcomes_are_dropped_and_never_run_again() -> None:
    journal: Journal[str] = Journal()
    for commit_seq in (1, 2, 3):
        run(journal, commit_seq)
    journal.settle(2)
    assert [journal.stored(number) for number in (1, 2, 3)] == [None, None, "done"]
    with pytest.raises(FiretitanError, match="settled"):
        journal.admit(2, "r2")
    assert journal.applied == 3


def test_the_cascade_names_what_failed_first() -> None:
    journal: Journal[str] = Journal()
    journal.fail("a", 3, "ForwardBackward", Reason.INVALID_DATUM)
    first = journal.preceding_failure("a", 4, seen_failure=0)
    assert first is not None
    assert first.reason is Reason.PRECEDING_FAILED
    assert first.metadata["failed_seq"] == "3"
    assert "ForwardBackward (seq 3)" in first.message and "INVALID_DATUM" in first.message
    journal.fail("a", 4, "OptimStep", first.reason)
    second = journal.preceding_failure("a", 5, seen_failure=2)
    assert second is not None and second.metadata["failed_seq"] == "3"
    assert journal.preceding_failure("a", 6, seen_failure=3) is None
    assert journal.preceding_failure("b", 1, seen_failure=0) is None


@dataclass(frozen=True)
class Sent:
    """One command of a random history."""

    lane: str
    seen_failure: int
    breaks: bool
    skip: int
    repeat: bool


SENT = st.builds(
    Sent,
    lane=st.sampled_from("abc"),
    seen_failure=st.integers(0, 12),
    breaks=st.booleans(),
    skip=st.integers(0, 2),
    repeat=st.booleans(),
)


@given(st.lists(SENT, max_size=40))
def test_any_history_runs_each_command_once_and_cascades_by_lane(history: list[Sent]) -> None:
    journal: Journal[str] = Journal()
    commit_seq = 0
    next_seq: dict[str, int] = {}
    own_failures: dict[str, set[int]] = {}
    outcomes: dict[int, str] = {}
    for sent in history:
        commit_seq += 1 + sent.skip
        seq = next_seq[sent.lane] = next_seq.get(sent.lane, 0) + 1
        assert journal.admit(commit_seq, f"r{commit_seq}") is Verdict.RUN
        unseen = [s for s in own_failures.get(sent.lane, ()) if s > sent.seen_failure]
        error = journal.preceding_failure(sent.lane, seq, sent.seen_failure)
        assert (error is not None) == bool(unseen)
        if error is not None:
            assert int(error.metadata["failed_seq"]) == max(own_failures[sent.lane])
            journal.fail(sent.lane, seq, "OptimStep", error.reason)
            outcome = "cascade"
        elif sent.breaks:
            own_failures.setdefault(sent.lane, set()).add(seq)
            journal.fail(sent.lane, seq, "Forward", Reason.INVALID_DATUM)
            outcome = "failed"
        else:
            outcome = "done"
        outcomes[commit_seq] = outcome
        journal.finish(commit_seq, outcome)
        assert journal.applied == commit_seq
        if sent.repeat:
            for number, expected in outcomes.items():
                assert journal.admit(number, f"r{number}") is Verdict.STORED
                assert journal.stored(number) == expected
