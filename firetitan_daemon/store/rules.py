"""What every implementation of the ledger has in common.

Knows: records, the texts of its refusals. Must not know: how rows are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.records import Operation

_LARGEST = 2**63 - 1


def clamp(seq: int) -> int:
    """A seq off the wire as the largest integer a row can hold, at most."""
    return min(seq, _LARGEST)


def reused(operation: Operation, *, by_request: bool) -> FiretitanError:
    """What breaking a uniqueness rule is called."""
    if by_request:
        return FiretitanError(
            Reason.REQUEST_ID_REUSED,
            f"request_id: {operation.request_id!r} was used before on {operation.target}; give "
            "each call its own",
            field="request_id",
        )
    return FiretitanError(
        Reason.SEQ_REUSED,
        f"seq {operation.seq} of lane {operation.client_id!r} (commit_seq {operation.commit_seq}) "
        f"is taken on {operation.target}; attach again for the lane's next seq",
        field="header.seq",
    )


def unknown_page(after_id: str) -> FiretitanError:
    """What a page token of no operation is called."""
    return FiretitanError(
        Reason.INVALID_ARGUMENT,
        f"page_token: {after_id!r} is not from an answer before; leave it empty to start over",
        field="page_token",
    )


def stood_on(snapshot_id: str, by: str) -> FiretitanError:
    """What deleting a snapshot that a delta stands on is called."""
    return FiretitanError(
        Reason.SNAPSHOT_IN_USE,
        f"snapshots/{snapshot_id} stays: the delta snapshots/{by} stands on it; delete that first",
        snapshot=f"snapshots/{snapshot_id}",
        used_by=f"snapshots/{by}",
    )


def in_use(operations: Iterable[Operation]) -> Iterator[str]:
    """Folders that saves write to and loads read."""
    for one in operations:
        if one.staging:
            yield one.staging
        if one.loaded is not None:
            yield one.loaded.folder


def trainer_of(session: str) -> str:
    """The id in `trainers/{trainer}/sessions/{session}`."""
    return session.split("/")[1]
