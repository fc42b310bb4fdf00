"""Which state may follow which, for every record that has one.

Knows: states. Must not know: who changes them, or why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from typing import Any, TypeVar

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.records import (
    Deployment,
    Operation,
    OperationState,
    ResourceState,
    Session,
    SessionState,
    Trainer,
)

_R = ResourceState
_S = SessionState
_O = OperationState

RESOURCE: Mapping[StrEnum, frozenset[StrEnum]] = {
    _R.CREATING: frozenset({_R.ACTIVE, _R.RECOVERING, _R.FAILED, _R.DELETING}),
    _R.ACTIVE: frozenset({_R.RECOVERING, _R.STOPPED, _R.FAILED, _R.DELETING}),
    _R.RECOVERING: frozenset({_R.ACTIVE, _R.STOPPED, _R.FAILED, _R.DELETING}),
    _R.STOPPED: frozenset({_R.RECOVERING, _R.FAILED, _R.DELETING}),
    _R.FAILED: frozenset({_R.RECOVERING, _R.DELETING}),
    _R.DELETING: frozenset(),
}
"""Trainers and deployments; what is DELETING only ever goes away."""

SESSION: Mapping[StrEnum, frozenset[StrEnum]] = {
    _S.ACTIVE: frozenset({_S.RECOVERING, _S.LOST, _S.CLOSED}),
    _S.RECOVERING: frozenset({_S.ACTIVE, _S.LOST, _S.CLOSED}),
    _S.LOST: frozenset({_S.RECOVERING, _S.ACTIVE, _S.CLOSED}),
    _S.CLOSED: frozenset(),
}
"""Sessions; a lost one may begin a new epoch."""

OPERATION: Mapping[StrEnum, frozenset[StrEnum]] = {
    _O.ACCEPTED: frozenset({_O.DISPATCHED, _O.DONE, _O.FAILED, _O.CANCELLED, _O.LOST}),
    _O.DISPATCHED: frozenset({_O.DISPATCHED, _O.DONE, _O.FAILED, _O.LOST}),
    _O.DONE: frozenset(),
    _O.FAILED: frozenset(),
    _O.CANCELLED: frozenset(),
    _O.LOST: frozenset(),
}
"""Operations; one may be sent again after a restart, and cancelled only before it is sent."""

Record = TypeVar("Record", Trainer, Session, Deployment, Operation)


def allowed(current: StrEnum, to: StrEnum) -> bool:
    """Whether a state may follow another of the same kind."""
    for table in (RESOURCE, SESSION, OPERATION):
        # Members of different enums with equal text are equal, so the type has to be compared.
        if any(type(state) is type(current) for state in table):
            return to in table[current] and type(to) is type(current)
    return False


def advance(record: Record, to: StrEnum, **changes: Any) -> Record:
    """The record in its next state.

    Args:
        record: A trainer, session, deployment or operation.
        to: Its next state, of the record's own kind.
        changes: Other fields that change with it.

    Raises:
        FiretitanError: CLOSED where the record is in a final state; INTERNAL for any other step
            that is not in the tables.
    """
    if not allowed(record.state, to):
        final = not any(allowed(record.state, state) for state in type(record.state))
        raise FiretitanError(
            Reason.CLOSED if final else Reason.INTERNAL,
            f"{record.name} is {record.state}, which "
            + ("is final" if final else f"cannot become {to}"),
            resource=record.name,
            state=str(record.state),
        )
    changes["state"] = to
    return replace(record, **changes)
