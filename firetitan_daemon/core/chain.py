"""Base and delta snapshots: which comes next, and how to get from what is loaded to a target.

Knows: sessions' and snapshots' records. Must not know: files, workers, how a delta is encoded.

A full-parameter session saves a base first and then deltas, each against the snapshot before it. A
LoRA snapshot is a whole adapter, or a whole model with the adapter merged: always a base.
`Session.chain_head` is the snapshot a delta may build on; it is None before the first save and
after anything that moves the weights without a record of it or leaves in doubt what the worker
holds: a load, a loss, a save that failed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.records import Session, Snapshot

BASE = "base"
DELTA = "delta"
MERGED_BASE = "merged_base"
MAX_DELTAS = 20
"""Deltas in a row before a base is saved again: bounds what a restart has to apply."""

Lookup = Callable[[str], Snapshot | None]
"""A snapshot by id, None where there is none."""


@dataclass(frozen=True)
class NextSnapshot:
    """What a save is to write."""

    kind: str
    """`base`, `delta` or `merged_base`."""
    parent: str | None = None
    """Id of the snapshot a delta builds on."""
    note: str | None = None
    """What the user should know, e.g. why it is not the kind asked for."""


def next_kind(
    session: Session, requested: str | None, lookup: Lookup, *, max_deltas: int = MAX_DELTAS
) -> NextSnapshot:
    """What the session's next snapshot is.

    Args:
        session: Its row.
        requested: `base`, `delta`, `merged_base` of a LoRA session, or None or empty to leave it
            to the daemon; case does not matter.
        lookup: Snapshots by id; only the chain behind `session.chain_head` is asked for.
        max_deltas: Longest run of deltas.

    Raises:
        FiretitanError: INVALID_ARGUMENT for another kind, where there is nothing to merge, or
            where a delta is asked for and there is nothing to build on.
    """
    kind = (requested or "").strip().lower()
    if kind not in ("", BASE, DELTA, MERGED_BASE):
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"kind: {requested!r} is not a snapshot kind; use 'base', 'delta' or 'merged_base', or "
            "leave it out",
            field="kind",
        )
    if kind == MERGED_BASE and session.lora.rank == 0:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"kind: {session.name} trains every parameter and has no adapter to merge; use 'base'",
            field="kind",
        )
    if kind == MERGED_BASE:
        return NextSnapshot(MERGED_BASE)
    if session.lora.rank > 0:
        note = "a LoRA snapshot is always the whole adapter: saved as base" if kind == DELTA else ""
        return NextSnapshot(BASE, note=note or None)
    if kind == BASE:
        return NextSnapshot(BASE)
    length = _chain_length(session.chain_head, lookup, max_deltas)
    if session.chain_head is None or length is None:
        if kind == DELTA and session.chain_note:
            return NextSnapshot(BASE, note=session.chain_note)
        if kind == DELTA:
            raise FiretitanError(
                Reason.INVALID_ARGUMENT,
                f"kind: {session.name} has no snapshot a delta could build on (none saved yet, or "
                "a load, a loss or a failed save since); save one with kind 'base' first, or leave "
                "the kind out",
                field="kind",
                session=session.name,
            )
        return NextSnapshot(BASE)
    if length >= max_deltas:
        return NextSnapshot(BASE, note=f"saved as base: {max_deltas} deltas in a row before it")
    return NextSnapshot(DELTA, parent=session.chain_head)


def commit(session: Session, snapshot: Snapshot) -> Session:
    """The session once a snapshot of it is published.

    Raises:
        FiretitanError: CHAIN_BROKEN where a delta does not build on the head.
    """
    if snapshot.kind == DELTA and snapshot.parent != session.chain_head:
        raise FiretitanError(
            Reason.CHAIN_BROKEN,
            f"{snapshot.name} builds on {snapshot.parent}, but the last snapshot of "
            f"{session.name} is {session.chain_head}; save again, it will be a base",
            session=session.name,
        )
    head = None if session.lora.rank > 0 else snapshot.id
    return replace(session, chain_head=head, chain_note="")


def reset(session: Session) -> Session:
    """The session after a load, a loss or a failed save: its next full-parameter save is a base."""
    return replace(session, chain_head=None, chain_note="")


def cut(session: Session) -> Session:
    """The session once its worker was replaced: its next full-parameter save is a base.

    The new worker does not hold the tensors of the last snapshot. Nobody asked for that, so even a
    delta that is asked for becomes a base.
    """
    if session.chain_head is None:
        return session
    note = "saved as base: the trainer's process was replaced after the snapshot before"
    return replace(session, chain_head=None, chain_note=note)


def plan(target: str, loaded: Collection[str], lookup: Lookup) -> list[Snapshot]:
    """Snapshots to apply, in order, to get from what a worker holds to a target.

    Args:
        target: Id of the snapshot to serve.
        loaded: Ids of the snapshots whose weights the worker holds.
        lookup: Snapshots by id; only the target's ancestors are asked for.

    Returns:
        The shortest way: empty where the target is loaded, deltas from the nearest loaded
        ancestor, or the base and the deltas after it. The target comes last.

    Raises:
        FiretitanError: SNAPSHOT_NOT_FOUND for an unknown target; CHAIN_BROKEN where an ancestor is
            missing or the chain goes in a circle.
    """
    snapshot = lookup(target)
    if snapshot is None:
        raise FiretitanError(
            Reason.SNAPSHOT_NOT_FOUND,
            f"snapshots/{target} was not found; list the snapshots to see which there are",
            snapshot=f"snapshots/{target}",
        )
    layers: list[Snapshot] = []
    seen: set[str] = set()
    while snapshot.id not in loaded:
        if snapshot.id in seen:
            raise _broken(target, f"{snapshot.name} is its own ancestor")
        seen.add(snapshot.id)
        layers.append(snapshot)
        if snapshot.kind != DELTA:
            break
        if snapshot.parent is None:
            raise _broken(target, f"{snapshot.name} is a delta without a parent")
        parent = lookup(snapshot.parent)
        if parent is None and snapshot.parent not in loaded:
            raise _broken(target, f"snapshots/{snapshot.parent}, which it builds on, is missing")
        if parent is None:
            break
        snapshot = parent
    layers.reverse()
    return layers


def _chain_length(head: str | None, lookup: Lookup, limit: int) -> int | None:
    """Deltas in a row up to the head, at most `limit`; None where the chain has a hole."""
    length = 0
    while head is not None and length < limit:
        snapshot = lookup(head)
        if snapshot is None:
            return None
        if snapshot.kind != DELTA:
            return length
        length += 1
        head = snapshot.parent
    return length if head is not None else None


def _broken(target: str, why: str) -> FiretitanError:
    return FiretitanError(
        Reason.CHAIN_BROKEN,
        f"snapshots/{target} cannot be put together: {why}; save a new snapshot with kind 'base' "
        "and serve that",
        snapshot=f"snapshots/{target}",
    )
