from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.records import (
    Lane,
    LoraSettings,
    Operation,
    OperationState,
    Session,
    SessionState,
)
from firetitan_daemon.core.sequencer import Admit, Incoming, Replay, SessionSequencer

S = "trainers/t/sessions/s"
GAP_S = 60.0


def incoming(seq: int, client: str = "a", epoch: int = 1, **changes: object) -> Incoming:
    made = Incoming(f"op-{client}-{seq}", client, seq, f"r-{client}-{seq}", f"d{seq}", epoch)
    return replace(made, **changes)  # type: ignore[arg-type]


def row(command: Incoming, commit_seq: int = 0) -> Operation:
    return Operation(command.operation_id, "Forward", S, command.request_id,
                     command.payload_digest, OperationState.ACCEPTED, 0.0, command.client_id,
                     command.seq, commit_seq, command.epoch)  # fmt: skip


def take(sequencer: SessionSequencer, command: Incoming, now: float = 0.0) -> Admit:
    decision = sequencer.decide(command)
    assert isinstance(decision, Admit)
    sequencer.admit(decision, now)
    return decision


def refused(sequencer: SessionSequencer, command: Incoming, existing: Operation | None = None
            ) -> FiretitanError:  # fmt: skip
    with pytest.raises(FiretitanError) as caught:
        sequencer.decide(command, existing)
    return caught.value


def test_lanes_are_merged_in_order_of_arrival() -> None:
    sequencer = SessionSequencer(S)
    given = [take(sequencer, incoming(*place)).commit_seq
             for place in ((1, "a"), (1, "b"), (2, "b"), (2, "a"))]  # fmt: skip
    assert given == [1, 2, 3, 4]
    assert sequencer.last_commit_seq == 4


def test_a_gap_holds_its_own_lane_only_and_is_released_in_order() -> None:
    sequencer = SessionSequencer(S)
    assert take(sequencer, incoming(3)).held
    assert take(sequencer, incoming(2)).held
    assert take(sequencer, incoming(1, "b")).commit_seq == 1
    released = take(sequencer, incoming(1))
    assert [(one.operation_id, one.commit_seq) for one in released.commits] == [
        ("op-a-1", 2), ("op-a-2", 3), ("op-a-3", 4),
    ]  # fmt: skip
    assert released.lane.next_seq == 4
    assert released.last_commit_seq == 4


def test_deciding_changes_nothing() -> None:
    sequencer = SessionSequencer(S)
    first = sequencer.decide(incoming(1))
    assert sequencer.decide(incoming(1)) == first
    assert not sequencer.taken("a", 1)
    assert isinstance(first, Admit)
    sequencer.admit(first, 0.0)
    with pytest.raises(AssertionError):
        sequencer.admit(first, 0.0)


def test_what_was_accepted_is_answered_again() -> None:
    sequencer = SessionSequencer(S)
    command = incoming(1)
    take(sequencer, command)
    assert sequencer.taken("a", 1)
    again = replace(command, operation_id="new")
    assert sequencer.decide(again, row(command)) == Replay("op-a-1")
    # Also after the session has moved on: the operation tells what became of it.
    sequencer.restart()
    assert sequencer.decide(again, row(command)) == Replay("op-a-1")


def test_another_command_at_a_place_or_under_a_request_id_is_refused() -> None:
    sequencer = SessionSequencer(S)
    first = incoming(1)
    take(sequencer, first)
    error = refused(sequencer, incoming(1, request_id="other"), row(first))
    assert error.reason == Reason.SEQ_REUSED
    assert "operations/op-a-1" in error.message
    error = refused(sequencer, replace(first, payload_digest="other"), row(first))
    assert error.reason == Reason.REQUEST_ID_REUSED
    error = refused(sequencer, incoming(2, request_id="r-a-1"), row(first))
    assert error.reason == Reason.REQUEST_ID_REUSED
    error = refused(sequencer, incoming(1))
    assert error.reason == Reason.SEQ_REUSED
    assert error.metadata["next_seq"] == "2"


@pytest.mark.parametrize(
    "changes",
    [{"seq": 0}, {"seq": -1}, {"seq": 2**63}, {"client_id": ""}, {"request_id": ""},
     {"request_id": "x" * 129}],
)  # fmt: skip
def test_bad_headers_name_the_field(changes: dict[str, object]) -> None:
    error = refused(SessionSequencer(S), replace(incoming(1), **changes))  # type: ignore[arg-type]
    assert error.reason == Reason.INVALID_ARGUMENT
    assert error.field == f"header.{next(iter(changes))}"


def test_a_stale_epoch_is_told_the_new_one() -> None:
    sequencer = SessionSequencer(S, epoch=3)
    error = refused(sequencer, incoming(1, epoch=2))
    assert error.reason == Reason.SESSION_RESTARTED
    assert error.metadata["epoch"] == "3"


def test_a_lane_that_misses_a_command_is_closed_for_good() -> None:
    sequencer = SessionSequencer(S)
    take(sequencer, incoming(1), 0.0)
    take(sequencer, incoming(4), 10.0)
    take(sequencer, incoming(3), 20.0)
    take(sequencer, incoming(1, "b"), 20.0)
    assert sequencer.next_expiry(GAP_S) == 70.0
    assert sequencer.expired(69.9, GAP_S) == []
    (expired,) = sequencer.expired(70.0, GAP_S)
    assert expired.missing_seq == 2
    assert expired.operation_ids == ("op-a-3", "op-a-4")
    assert expired.lane.broken
    assert expired.error.reason == Reason.LANE_BROKEN
    assert "seq 2 never came" in expired.error.message
    sequencer.break_lane("a")
    assert sequencer.expired(999.0, GAP_S) == []
    assert sequencer.next_expiry(GAP_S) is None
    assert refused(sequencer, incoming(2)).reason == Reason.LANE_BROKEN
    with pytest.raises(FiretitanError, match="new client_id"):
        sequencer.attach("a")
    assert sequencer.lane("a") == expired.lane
    assert take(sequencer, incoming(2, "b")).commit_seq == 3


def test_a_lane_that_moves_is_given_time() -> None:
    sequencer = SessionSequencer(S)
    take(sequencer, incoming(5), 0.0)
    take(sequencer, incoming(1), 50.0)
    assert sequencer.expired(100.0, GAP_S) == []
    assert len(sequencer.expired(110.0, GAP_S)) == 1


def test_a_cancelled_command_is_passed_over() -> None:
    sequencer = SessionSequencer(S)
    take(sequencer, incoming(2))
    take(sequencer, incoming(3))
    sequencer.cancel("a", 2)
    released = take(sequencer, incoming(1))
    assert [(one.seq, one.commit_seq) for one in released.commits] == [(1, 1), (3, 2)]
    assert released.lane.next_seq == 4


def test_attaching_tells_the_next_seq() -> None:
    sequencer = SessionSequencer(S)
    assert sequencer.attach("a") == Lane(S, "a")
    assert sequencer.lanes() == []
    take(sequencer, incoming(1))
    take(sequencer, incoming(3))
    assert sequencer.attach("a").next_seq == 2
    with pytest.raises(FiretitanError, match="client_id"):
        sequencer.attach("")


def test_a_new_epoch_goes_on_behind_what_was_held() -> None:
    sequencer = SessionSequencer(S)
    take(sequencer, incoming(1))
    take(sequencer, incoming(4))
    epoch, lanes = sequencer.restarted()
    assert sequencer.epoch == 1  # until that is written
    sequencer.restart()
    assert sequencer.epoch == epoch == 2
    assert lanes == [Lane(S, "a", next_seq=5)]
    assert take(sequencer, incoming(5, epoch=2)).commit_seq == 2
    assert sequencer.next_expiry(GAP_S) is None


def test_failures_stop_what_was_sent_behind_them_unseen() -> None:
    sequencer = SessionSequencer(S)
    for seq in (1, 2, 3):
        take(sequencer, incoming(seq))
    assert not sequencer.fails_with_preceding("a", 3, 0)
    assert sequencer.record_failure("a", 2).failed_seq == 2
    assert sequencer.fails_with_preceding("a", 3, 0)
    assert sequencer.fails_with_preceding("a", 3, 1)
    assert not sequencer.fails_with_preceding("a", 3, 2)
    assert not sequencer.fails_with_preceding("a", 2, 0)
    assert not sequencer.fails_with_preceding("b", 3, 0)
    assert take(sequencer, incoming(4)).lane.failed_seq == 2
    assert sequencer.record_failure("a", 1).failed_seq == 2


def test_acknowledgements_never_go_back() -> None:
    sequencer = SessionSequencer(S)
    take(sequencer, incoming(1))
    assert sequencer.record_acknowledged("a", 1).acked_through == 1
    assert sequencer.record_acknowledged("a", 0).acked_through == 1
    assert take(sequencer, incoming(2)).lane.acked_through == 1


def test_restoring_goes_on_behind_the_highest_place_given() -> None:
    session = Session(S, "t", "b", LoraSettings(8), 0, "0badcafe", SessionState.ACTIVE, 0.0,
                      commit_seq=3)  # fmt: skip
    sequencer = SessionSequencer.restore(session, [Lane(S, "a", 6)], [row(incoming(5), 5)], 0.0)
    assert take(sequencer, incoming(6)).commit_seq == 6


class Sequencing(RuleBasedStateMachine):
    """The sequencer beside a model that keeps sets of numbers and recomputes everything.

    After every step the sequencer may also be thrown away and restored from what was written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sequencer = SessionSequencer(S)
        self.now = 0.0
        self.epoch = 1
        self.sent: dict[tuple[str, int], Incoming] = {}
        self.order: list[tuple[str, int]] = []
        self.cancelled: set[tuple[str, int]] = set()
        self.lost: set[tuple[str, int]] = set()
        self.broken: set[str] = set()
        self.lanes: dict[str, Lane] = {}
        self.floor: dict[str, int] = {}
        self.commit_seqs: dict[str, int] = {}

    def filled(self, client: str) -> int:
        """Highest seq up to which the lane has no gap."""
        seq = self.floor.get(client, 0)
        while (client, seq + 1) in self.sent:
            seq += 1
        return seq

    def waiting(self, client: str) -> list[int]:
        return sorted(seq for one, seq in self.sent if one == client and seq > self.filled(client))

    @rule(client=st.sampled_from("abc"), seq=st.integers(1, 8))
    def send(self, client: str, seq: int) -> None:
        command = incoming(seq, client, self.epoch)
        place = (client, seq)
        if place in self.sent:
            assert self.sequencer.taken(*place)
            old = row(self.sent[place])
            again = replace(self.sent[place], operation_id="x", epoch=self.epoch)
            assert self.sequencer.decide(again, old) == Replay(old.id)
            other = replace(command, request_id="other")
            assert refused(self.sequencer, other, old).reason == Reason.SEQ_REUSED
            return
        if client in self.broken:
            assert refused(self.sequencer, command).reason == Reason.LANE_BROKEN
            return
        if seq <= self.floor.get(client, 0):
            assert refused(self.sequencer, command).reason == Reason.SEQ_REUSED
            return
        assert not self.sequencer.taken(*place)
        decision = self.sequencer.decide(command)
        assert isinstance(decision, Admit)
        self.sent[place] = command
        fresh = [
            (client, number)
            for number in range(1, self.filled(client) + 1)
            if (client, number) in self.sent
            and (client, number) not in self.order
            and (client, number) not in self.cancelled | self.lost
        ]
        assert [(one.client_id, one.seq) for one in decision.commits] == fresh
        self.order += fresh
        first = len(self.order) - len(fresh) + 1
        assert [one.commit_seq for one in decision.commits] == list(
            range(first, first + len(fresh))
        )
        for one in decision.commits:
            self.commit_seqs[one.operation_id] = one.commit_seq
        self.sequencer.admit(decision, self.now)
        self.lanes[client] = decision.lane

    @rule(client=st.sampled_from("abc"))
    def cancel_one_that_is_held(self, client: str) -> None:
        held = [seq for seq in self.waiting(client) if (client, seq) not in self.cancelled]
        if held and client not in self.broken:
            self.sequencer.cancel(client, held[0])
            self.cancelled.add((client, held[0]))

    @rule(seconds=st.sampled_from([1.0, 61.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for expired in self.sequencer.expired(self.now, GAP_S):
            client = expired.lane.client_id
            assert expired.missing_seq == self.filled(client) + 1
            held = [seq for seq in self.waiting(client) if (client, seq) not in self.cancelled]
            assert list(expired.operation_ids) == [f"op-{client}-{seq}" for seq in held]
            self.sequencer.break_lane(client)
            self.lanes[client] = expired.lane
            self.broken.add(client)
        if seconds > GAP_S:
            assert all(not self.waiting(client) or client in self.broken for client in "abc")

    @rule()
    def lose(self) -> None:
        self.epoch, lanes = self.sequencer.restarted()
        self.sequencer.restart()
        for place in self.sent:
            if place not in self.order:
                self.lost.add(place)
        for client in "abc":
            seqs = [seq for one, seq in self.sent if one == client]
            if seqs and client not in self.broken:
                self.floor[client] = max(seqs)
        self.lanes = {lane.client_id: lane for lane in lanes}

    @rule()
    def restart_the_daemon(self) -> None:
        session = Session(S, "t", "b", LoraSettings(8), 0, "0badcafe", SessionState.ACTIVE, 0.0,
                          epoch=self.epoch, commit_seq=len(self.order))  # fmt: skip
        rows = []
        for place, command in self.sent.items():
            state = OperationState.ACCEPTED
            if place in self.cancelled:
                state = OperationState.CANCELLED
            elif place in self.lost:
                state = OperationState.LOST
            elif place[0] in self.broken and place not in self.order:
                state = OperationState.FAILED
            written = row(command, self.commit_seqs.get(command.operation_id, 0))
            rows.append(replace(written, state=state))
        self.sequencer = SessionSequencer.restore(session, self.lanes.values(), rows, self.now)

    @invariant()
    def lanes_agree(self) -> None:
        assert self.sequencer.last_commit_seq == len(self.order)
        assert self.sequencer.epoch == self.epoch
        for client in "abc":
            if client not in self.broken:
                assert self.sequencer.attach(client).next_seq == self.filled(client) + 1

    @precondition(lambda self: self.epoch > 1)
    @rule(client=st.sampled_from("abc"))
    def send_for_an_old_epoch(self, client: str) -> None:
        error = refused(self.sequencer, incoming(99, client, self.epoch - 1))
        assert error.reason == Reason.SESSION_RESTARTED


TestSequencing = Sequencing.TestCase
TestSequencing.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
