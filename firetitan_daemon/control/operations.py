"""Operations: the open ones in memory, all of them in the store; who waits and who watches.

Knows: the store, the spool, lanes as keys. Must not know: what an operation does.
Every change of an operation's row goes through `OperationRegistry.write`.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial

from firetitan_daemon.control.holds import Holds
from firetitan_daemon.control.shared_reads import SharedReads
from firetitan_daemon.core.errors import CODES, FiretitanError, Reason
from firetitan_daemon.core.expiry import ago
from firetitan_daemon.core.ports import Change, Clock, Ledger, Limits, Spool, Store
from firetitan_daemon.core.records import Operation
from firetitan_daemon.core.texts import check_text

_RETRY_AFTER_S = "0.2"
_FAILURES_KEPT = 20
_READ_AHEAD = 64
"""Operations read at once for who watches a lane; a reader that is stuck holds no more of them."""
_NOT_THE_SENDERS = frozenset({"INTERNAL", "DATA_LOSS", "RESOURCE_EXHAUSTED", "UNAVAILABLE"})
"""Codes of failures that whoever looks after the daemon should hear of."""


class OperationRegistry:
    """What was accepted and is not done, and everyone who wants to hear of its end.

    Owns the map of open operations and the quotas counted over it.
    """

    def __init__(self, store: Store, spool: Spool, limits: Limits, clock: Clock) -> None:
        self._clock = clock
        self._store = store
        self._spool = spool
        self._limits = limits
        self._open: dict[str, Operation] = {}
        self._reserved_bytes = 0
        self._reserved: dict[str, int] = {}
        self._ended: dict[str, asyncio.Event] = {}
        self._lane_moved: dict[tuple[str, str], asyncio.Event] = {}
        self._lane_reads: SharedReads[Sequence[Operation]] = SharedReads()
        self._broken_lanes: set[tuple[str, str]] = set()
        self._next_seqs: dict[tuple[str, str], int] = {}
        self._closed = False
        self._removals: set[asyncio.Task[None]] = set()
        self.failures: deque[Operation] = deque(maxlen=_FAILURES_KEPT)
        """The last that failed for no fault of their sender's, since the daemon started."""
        self.holds = Holds()
        """What open operations, and those a replay needs, keep in use."""

    def restore(self, ledger: Ledger) -> None:
        """Take over what a former daemon left open."""
        self._open = {operation.id: operation for operation in ledger.open_operations}
        self._broken_lanes = {
            (lane.session, lane.client_id) for lane in ledger.lanes if lane.broken
        }
        self._next_seqs = {(lane.session, lane.client_id): lane.next_seq for lane in ledger.lanes}

    @property
    def num_open(self) -> int:
        """Operations that are not done."""
        return len(self._open)

    def open_work(self) -> dict[str, list[Operation]]:
        """Every open operation by target, in order of acceptance."""
        found: dict[str, list[Operation]] = {}
        for operation in self._open.values():
            found.setdefault(operation.target, []).append(operation)
        return found

    def open_of(self, target: str, method: str | None = None) -> list[Operation]:
        """Open operations of a target, in order of acceptance."""
        return [
            operation
            for operation in self._open.values()
            if operation.target == target and method in (None, operation.method)
        ]

    def current(self, operation_id: str) -> Operation | None:
        """An open operation; None once it is done."""
        return self._open.get(operation_id)

    def reserve(self, target: str, size_bytes: int, *, needed: bool = False) -> None:
        """Take a place in the quotas; `release` gives it back.

        Args:
            target: Whose command it is.
            size_bytes: Of its payload.
            needed: Accepted ones wait for it: let in even where the quotas are used up, as they
                could not be given back otherwise.

        Raises:
            FiretitanError: QUEUE_FULL naming the limit, with `retry_after_s`.
        """
        limits = self._limits
        waiting = [operation for operation in self._open.values() if operation.payload is not None]
        of_target = sum(1 for operation in waiting if operation.target == target)
        queued_bytes = sum(one.payload.size_bytes for one in waiting if one.payload is not None)
        for name, found, allowed in (
            (
                "max_session_operations",
                of_target + self._reserved.get(target, 0) + 1,
                limits.max_session_operations,
            ),
            (
                "max_operations",
                len(self._open) + sum(self._reserved.values()) + 1,
                limits.max_operations,
            ),
            (
                "max_queued_bytes",
                queued_bytes + self._reserved_bytes + size_bytes,
                limits.max_queued_bytes,
            ),
        ):
            if found > allowed and not needed:
                raise FiretitanError(
                    Reason.QUEUE_FULL,
                    f"{target}: {name} is {allowed} and this command would make it {found}; "
                    "send it again when earlier ones are done",
                    limit=name,
                    retry_after_s=_RETRY_AFTER_S,
                )
        self._reserved[target] = self._reserved.get(target, 0) + 1
        self._reserved_bytes += size_bytes

    def release(self, target: str, size_bytes: int) -> None:
        """Give a reserved place back; what was accepted meanwhile counts as an open operation."""
        self._reserved[target] -= 1
        if not self._reserved[target]:
            del self._reserved[target]
        self._reserved_bytes -= size_bytes

    async def write(self, change: Change) -> None:
        """Write a change, then tell whoever waits for an operation in it.

        Payloads of operations that end with it are removed from the spool, if no row keeps them.
        """
        change = replace(change, operations=[self._dated(one) for one in change.operations])
        await self._store.write(change)
        ended = [one for one in change.operations if one.done and one.payload is None]
        open_before = [self._open.get(one.id) for one in ended]
        payloads = [one.payload for one in open_before if one is not None and one.payload]
        if payloads:
            # Nobody waits for that; what a death leaves is swept at the next start.
            removal = asyncio.create_task(self._spool.remove(payloads))
            self._removals.add(removal)
            removal.add_done_callback(self._removals.discard)
        # No await from here on: whoever is woken finds what the caller sets after this returns.
        for lane in change.lanes:
            self._next_seqs[lane.session, lane.client_id] = lane.next_seq
            if lane.broken:
                self._broken_lanes.add((lane.session, lane.client_id))
                self._signal_lane(lane.session, lane.client_id)
        for operation in change.operations:
            self._open.pop(operation.id, None)
            if not operation.done:
                self._open[operation.id] = operation
                continue
            if operation.payload is None:
                self.holds.release(operation.id)
            if (
                operation.error is not None
                and CODES[Reason(operation.error.reason)] in _NOT_THE_SENDERS
            ):
                self.failures.append(operation)
            waited_for = self._ended.pop(operation.id, None)
            if waited_for is not None:
                waited_for.set()
            self._signal_lane(operation.target, operation.client_id)

    def _dated(self, operation: Operation) -> Operation:
        """The operation; one that ends now, with what its age is measured from."""
        if not operation.done or operation.finished is not None:
            return operation
        return replace(operation, finished=ago(0.0, self._clock))

    async def get(self, operation_id: str) -> Operation:
        """One operation.

        Raises:
            FiretitanError: OPERATION_NOT_FOUND.
        """
        operation = self._open.get(operation_id) or await self._store.operation(operation_id)
        if operation is None:
            raise FiretitanError(
                Reason.OPERATION_NOT_FOUND, f"operations/{operation_id}: no such operation"
            )
        return operation

    async def by_request(
        self, target: str, request_id: str, payload_digest: str
    ) -> Operation | None:
        """The operation this request made before.

        Raises:
            FiretitanError: REQUEST_ID_REUSED where it came with another payload.
        """
        operation = await self._store.operation_by_request(target, request_id)
        if operation is not None and operation.payload_digest != payload_digest:
            raise FiretitanError(
                Reason.REQUEST_ID_REUSED,
                f"request_id: {request_id!r} was used on {target} for {operation.name} with "
                "another payload; use a fresh id for each request",
                operation=operation.name,
            )
        return operation

    async def wait(self, operation_id: str, timeout_s: float) -> Operation:
        """The operation once it is done, or as it stands when the time is over.

        Raises:
            FiretitanError: OPERATION_NOT_FOUND; DAEMON_DRAINING where this daemon will not see its
                end. To answer at once would let whoever waits for it in a loop hold up the rest.
        """
        operation = await self.get(operation_id)
        if operation_id not in self._open:
            return operation
        if self._closed:
            raise draining()
        ended = self._ended.setdefault(operation_id, asyncio.Event())
        try:
            async with asyncio.timeout(timeout_s):
                await ended.wait()
        except TimeoutError:
            pass
        return await self.get(operation_id)

    async def watch(self, session: str, client_id: str, after_seq: int) -> AsyncIterator[Operation]:
        """Operations of a lane as they end, in the order of their seq, without gaps.

        Gaps are passed over only where a seq will never come: in a broken lane, and below the
        lane's next seq, where the end of its session has left some.
        """
        check_text(client_id, "client_id")
        cursor, key = after_seq, (session, client_id)
        while not self._closed:
            moved = self._lane_moved.setdefault(key, asyncio.Event())
            # Taken before the rows are read: what comes later is not among them.
            to_come = self._lowest_to_come(key)
            # Who watches a lane wakes with all others. Until it moves again, one reads for all.
            read = partial(self._store.lane_operations, session, client_id, cursor, _READ_AHEAD)
            page = await self._lane_reads.read((moved, cursor), read)
            for operation in page:
                if operation.seq != cursor + 1 and operation.seq > to_come:
                    await moved.wait()
                    break
                cursor = operation.seq
                yield operation
            else:
                if len(page) < _READ_AHEAD:
                    await moved.wait()

    async def acknowledge(self, session: str, client_id: str, through_seq: int) -> None:
        """The lane has taken its results up to a seq: forget them."""
        refs = await self._store.acknowledge(session, client_id, through_seq)
        if refs:
            await self._spool.remove(refs)

    async def page(
        self, target: str, *, pending_only: bool, after_id: str, limit: int
    ) -> Sequence[Operation]:
        """Operations of a session by commit_seq; those without one last."""
        return await self._store.operations(
            target, pending_only=pending_only, after_id=after_id, limit=limit
        )

    async def close(self) -> None:
        """End every watch and every wait."""
        if self._removals:
            await asyncio.wait(list(self._removals))
        await self.holds.close()
        self._closed = True
        for event in (*self._lane_moved.values(), *self._ended.values()):
            event.set()

    def _lowest_to_come(self, key: tuple[str, str]) -> float:
        """The lowest seq of a lane that may still end."""
        unused = math.inf if key in self._broken_lanes else self._next_seqs.get(key, 1)
        open_seqs = (one.seq for one in self._open.values() if (one.target, one.client_id) == key)
        return min((unused, *open_seqs))

    def _signal_lane(self, session: str, client_id: str) -> None:
        moved = self._lane_moved.pop((session, client_id), None)
        if moved is not None:
            moved.set()


def draining() -> FiretitanError:
    """The answer to new work while the daemon ends."""
    return FiretitanError(
        Reason.DAEMON_DRAINING,
        "the daemon takes no new work: it is about to end; what was accepted is kept, send the "
        "request again when a daemon runs",
        retry_after_s="0.5",
    )
