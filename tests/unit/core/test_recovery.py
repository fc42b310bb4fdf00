"""Which commands a replay runs, what must come out of them, when the next point is due."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from firetitan_daemon.core.records import Operation, OperationState, ReplayCheck, SpoolRef
from firetitan_daemon.core.recovery import (
    PointPolicy,
    RecoveryLimits,
    pending_backwards,
    plan_replay,
    same_result,
)

DONE, FAILED, CANCELLED = OperationState.DONE, OperationState.FAILED, OperationState.CANCELLED


def ended(
    commit_seq: int,
    method: str,
    state: OperationState = DONE,
    *,
    graph: str = "",
    kept: bool = True,
) -> Operation:
    payload = SpoolRef(f"p{commit_seq}", "d", 1)
    return Operation(
        id=f"o{commit_seq}",
        target="trainers/t/sessions/s",
        method=method,
        request_id=f"r{commit_seq}",
        payload_digest="d",
        create_time=0.0,
        commit_seq=commit_seq,
        state=state,
        graph=graph,
        payload=payload if kept else None,
    )


def seqs(operations: Sequence[Operation]) -> list[int]:
    return [one.commit_seq for one in operations]


def test_what_moves_weights_is_replayed_in_order_behind_the_point() -> None:
    done = [
        ended(1, "ForwardBackward"),
        ended(2, "OptimStep"),
        ended(3, "Forward"),
        ended(4, "ForwardBackward"),
        ended(5, "ForwardBackward", FAILED),
        ended(6, "ForwardBackward", CANCELLED),
        ended(7, "SaveState"),
        ended(8, "SaveSnapshot"),
        ended(9, "OptimStep"),
        ended(10, "LoadState"),
        ended(11, "LoadAdapter"),
    ]
    assert seqs(plan_replay(done, 2).replay) == [4, 9, 10, 11]
    assert seqs(plan_replay(done, 0).replay) == [1, 2, 4, 9, 10, 11]
    assert plan_replay(done, 0).missing == []
    assert plan_replay(done, 11).replay == []


def test_what_is_gone_is_named() -> None:
    done = [ended(1, "ForwardBackward", kept=False), ended(2, "OptimStep"), ended(3, "Forward")]
    assert seqs(plan_replay(done, 0).missing) == [1]
    assert plan_replay(done, 1).missing == []


def test_a_kept_pass_is_replayed_where_its_graph_was_used_or_may_still_be() -> None:
    used, unused, open_ = "used", "unused", "open"
    done = [
        ended(1, "Forward", graph=used),
        ended(2, "Forward", graph=unused),
        ended(3, "Backward", graph=used),
        ended(4, "OptimStep"),
        ended(5, "Forward", graph=open_),
    ]
    assert seqs(plan_replay(done, 0).replay) == [1, 3, 4, 5]
    # One that no Backward used may have been dropped by the worker: it needs no room now.
    assert plan_replay(done, 0).graphs == {used}
    # Behind the step only the graph that a Backward may still name.
    assert seqs(plan_replay(done, 4).replay) == [5]


def test_a_graph_whose_payload_is_gone_does_not_stand_in_the_way_unless_it_was_used() -> None:
    open_ = [ended(1, "OptimStep"), ended(2, "Forward", graph="g", kept=False)]
    assert seqs(plan_replay(open_, 0).replay) == [1]
    used = [ended(1, "Forward", graph="g", kept=False), ended(2, "Backward", graph="g")]
    assert seqs(plan_replay(used, 0).missing) == [1]


def test_pending_are_the_backwards_behind_the_last_step_or_load() -> None:
    done = [
        ended(1, "ForwardBackward"),
        ended(2, "OptimStep"),
        ended(3, "ForwardBackward"),
        ended(4, "ForwardBackward", FAILED),
        ended(5, "OptimStep", FAILED),
        ended(6, "Forward", graph="g"),
        ended(7, "Backward", graph="g"),
    ]
    assert pending_backwards(done) == 2
    assert pending_backwards([*done, ended(8, "LoadState")]) == 0


@pytest.mark.parametrize(
    ("recorded", "found", "exact", "same"),
    [
        (None, ReplayCheck("b", 2.0), True, True),
        (ReplayCheck("a", 2.0), None, True, False),
        (ReplayCheck("a", 2.0), ReplayCheck("a", 2.0), True, True),
        (ReplayCheck("a", 2.0), ReplayCheck("b", 2.0), True, False),
        (ReplayCheck("a", 2.0), ReplayCheck("b", 2.001), False, True),
        (ReplayCheck("a", 2.0), ReplayCheck("b", 2.01), False, False),
        (ReplayCheck("a", 1e-9), ReplayCheck("b", 5e-4), False, True),
        (ReplayCheck("a", 2.0), ReplayCheck("b", float("nan")), False, False),
    ],
)
def test_a_replay_is_compared_bit_for_bit_or_nearly(
    recorded: ReplayCheck | None, found: ReplayCheck | None, exact: bool, same: bool
) -> None:
    assert same_result(recorded, found, exact=exact) is same


LIMITS = RecoveryLimits(
    interval_s=5.0, cost_share=0.02, replay_s=120.0, spool_bytes=1000, max_cost_share=0.1
)


def made(policy: PointPolicy, cost_s: float) -> None:
    policy.begun()
    policy.made(cost_s)


def test_a_cheap_point_comes_every_interval() -> None:
    policy = PointPolicy(LIMITS)
    for _ in range(3):
        policy.ran(4.9, 0)
        assert not policy.due()
        policy.ran(0.1, 0)
        assert policy.due()
        made(policy, 0.05)


def test_a_dear_point_waits_until_it_is_a_small_share_and_that_is_what_it_costs() -> None:
    policy = PointPolicy(LIMITS)
    policy.ran(5.0, 0)
    made(policy, 1.0)
    seconds = 0
    while not policy.due():
        policy.ran(1.0, 0)
        seconds += 1
    assert seconds == 50
    made(policy, 1.0)
    assert policy.share == pytest.approx(0.02)


def test_the_first_point_is_guessed_by_its_size() -> None:
    policy = PointPolicy(LIMITS)
    policy.expect(500_000_000)  # a second
    policy.ran(49.0, 0)
    assert not policy.due()
    policy.ran(1.0, 0)
    assert policy.due()


@pytest.mark.parametrize(("seconds", "size_bytes"), [(121.0, 0), (10.0, 1001)])
def test_over_the_budget_of_a_replay_a_point_may_take_more(seconds: float, size_bytes: int) -> None:
    for cost_s, due in ((0.1 * seconds, True), (0.11 * seconds, False)):
        policy = PointPolicy(LIMITS)
        policy.ran(5.0, 0)
        made(policy, cost_s)
        policy.ran(seconds, size_bytes)
        assert policy.due() is due


def test_a_point_that_failed_is_not_tried_at_once_again_but_counts_as_wanting() -> None:
    policy = PointPolicy(LIMITS)
    policy.ran(100.0, 0)
    policy.begun()
    policy.ran(1.0, 0)
    assert not policy.due()
    policy.ran(20.0, 0)  # 121 s since the session's beginning: over the budget
    assert policy.due()


def test_what_is_asked_for_comes_once_at_any_cost() -> None:
    policy = PointPolicy(LIMITS)
    policy.ran(5.0, 0)
    made(policy, 1000.0)
    policy.want()
    assert policy.due()
    policy.begun()
    assert not policy.due()


def test_switched_off_there_are_none() -> None:
    policy = PointPolicy(RecoveryLimits(enabled=False))
    policy.ran(1e6, 1 << 40)
    policy.want()
    assert not policy.due()
