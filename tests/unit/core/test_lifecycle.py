from __future__ import annotations

import pytest

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.lifecycle import OPERATION, RESOURCE, SESSION, advance, allowed
from firetitan_daemon.core.records import (
    Operation,
    OperationState,
    ResourceState,
    SessionState,
    Trainer,
)

OP = Operation("o", "Forward", "t", "r", "d", OperationState.ACCEPTED, 0.0)
TRAINER = Trainer("t", "b", 8, 128, "float32", ResourceState.CREATING, 0.0)


def test_every_state_is_in_its_table_and_leads_to_states_of_its_kind() -> None:
    for table, kind in ((RESOURCE, ResourceState), (SESSION, SessionState),
                        (OPERATION, OperationState)):  # fmt: skip
        assert set(table) == set(kind)
        assert all(type(to) is kind for follow in table.values() for to in follow)


def test_a_record_advances_with_its_fields() -> None:
    sent = advance(OP, OperationState.DISPATCHED)
    done = advance(advance(sent, OperationState.DISPATCHED), OperationState.DONE, finish_time=5.0)
    assert done.state is OperationState.DONE
    assert done.finish_time == 5.0
    assert OP.state is OperationState.ACCEPTED


def test_what_was_sent_cannot_be_cancelled() -> None:
    assert allowed(OperationState.ACCEPTED, OperationState.CANCELLED)
    with pytest.raises(FiretitanError, match="operations/o is dispatched") as caught:
        advance(advance(OP, OperationState.DISPATCHED), OperationState.CANCELLED)
    assert caught.value.reason == Reason.INTERNAL


@pytest.mark.parametrize("state", [s for s, follow in OPERATION.items() if not follow])
def test_final_is_final(state: OperationState) -> None:
    ended = advance(OP, state) if state is not OperationState.ACCEPTED else OP
    for to in OperationState:
        with pytest.raises(FiretitanError, match="is final") as caught:
            advance(ended, to)
        assert caught.value.reason == Reason.CLOSED


def test_what_is_being_deleted_never_comes_back() -> None:
    going = advance(TRAINER, ResourceState.DELETING)
    for to in ResourceState:
        assert not allowed(going.state, to)


def test_equal_texts_of_other_kinds_are_no_states() -> None:
    # ResourceState.ACTIVE == SessionState.ACTIVE, both being "active".
    assert not allowed(ResourceState.CREATING, SessionState.ACTIVE)
    assert allowed(SessionState.RECOVERING, SessionState.ACTIVE)
    assert not allowed(SessionState.ACTIVE, ResourceState.STOPPED)
    with pytest.raises(FiretitanError):
        advance(TRAINER, SessionState.ACTIVE)
