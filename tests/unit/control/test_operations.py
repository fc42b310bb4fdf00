"""The registry of operations: who waits, who watches, how much is let in."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from support.services import TurnedClock

from firetitan_daemon.control.operations import OperationRegistry
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.ports import Change, Limits
from firetitan_daemon.core.records import Lane, Operation, OperationState
from firetitan_daemon.store.memory import MemoryStore
from firetitan_daemon.store.spool import FileSpool

SESSION = "trainers/t/sessions/s"


def operation(seq: int, *, client_id: str = "a") -> Operation:
    return Operation(
        id=f"{client_id}{seq}",
        method="Forward",
        target=SESSION,
        request_id=f"{client_id}-{seq}",
        payload_digest="",
        state=OperationState.ACCEPTED,
        create_time=0.0,
        client_id=client_id,
        seq=seq,
    )


def done(one: Operation) -> Operation:
    return replace(one, state=OperationState.DONE)


@pytest.fixture
def spool(tmp_path: Path) -> FileSpool:
    return FileSpool(tmp_path)


@pytest.fixture
def registry(spool: FileSpool) -> OperationRegistry:
    limits = Limits(max_session_operations=2, max_operations=3, max_queued_bytes=100)
    return OperationRegistry(MemoryStore(), spool, limits, TurnedClock())


async def test_once_it_is_closed_nobody_waits_for_what_it_will_not_see_end(
    registry: OperationRegistry,
) -> None:
    first, second = operation(1), operation(2)
    await registry.write(Change(operations=[first, second]))
    await registry.write(Change(operations=[done(second)]))
    waiting = asyncio.ensure_future(registry.wait(first.id, 10))
    await asyncio.sleep(0.01)
    await registry.close()
    assert await waiting == first
    assert (await registry.wait(second.id, 10)).done
    with pytest.raises(FiretitanError) as caught:
        await registry.wait(first.id, 10)
    assert caught.value.reason is Reason.DAEMON_DRAINING


async def test_a_watch_keeps_the_order_of_seq(registry: OperationRegistry) -> None:
    first, second, third = operation(1), operation(2), operation(3)
    await registry.write(Change(operations=[first, second, third]))
    watch = registry.watch(SESSION, "a", 0)
    following = asyncio.ensure_future(anext(watch))
    # The third is cancelled before the first is done: it has to wait for its turn.
    await registry.write(Change(operations=[replace(third, state=OperationState.CANCELLED)]))
    await asyncio.sleep(0.01)
    assert not following.done()
    await registry.write(Change(operations=[done(first)]))
    assert (await following).seq == 1
    await registry.write(Change(operations=[done(second)]))
    assert [(await anext(watch)).seq, (await anext(watch)).seq] == [2, 3]
    await watch.aclose()


class SlowReads(MemoryStore):
    """Counts reads of lanes, and holds back what they have read until told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.most = 0
        """Rows of the longest read."""
        self.going = asyncio.Event()
        self.going.set()

    async def lane_operations(
        self, session: str, client_id: str, after_seq: int, limit: int | None = None
    ) -> Sequence[Operation]:
        self.reads += 1
        rows = await super().lane_operations(session, client_id, after_seq, limit)
        self.most = max(self.most, len(rows))
        await self.going.wait()
        return rows


async def test_who_watches_the_same_lane_shares_what_is_read(spool: FileSpool) -> None:
    store = SlowReads()
    registry = OperationRegistry(store, spool, Limits(), TurnedClock())
    one = operation(1)
    await registry.write(Change(operations=[one]))
    watches = [registry.watch(SESSION, "a", 0) for _ in range(8)]
    following = [asyncio.ensure_future(anext(watch)) for watch in watches]
    await asyncio.sleep(0.01)
    assert store.reads == 1
    store.going.clear()
    await registry.write(Change(operations=[done(one)]))
    await asyncio.sleep(0.01)
    # Who leaves takes nothing from the others.
    following.pop().cancel()
    store.going.set()
    assert [operation.seq for operation in await asyncio.gather(*following)] == [1] * 7
    assert store.reads == 2
    for watch in watches:
        await watch.aclose()


async def test_a_long_lane_is_read_bit_by_bit(spool: FileSpool) -> None:
    # Who does not read must not hold a whole run's rows.
    store = SlowReads()
    registry = OperationRegistry(store, spool, Limits(), TurnedClock())
    await registry.write(Change(operations=[done(operation(seq)) for seq in range(1, 201)]))
    watch = registry.watch(SESSION, "a", 0)
    assert [(await anext(watch)).seq for _ in range(200)] == list(range(1, 201))
    assert store.most <= 64 and store.reads <= 5
    following = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0.01)
    assert store.reads <= 5, "it waits, and does not look again and again"
    await registry.write(Change(operations=[done(operation(201))]))
    assert (await following).seq == 201
    await watch.aclose()


async def test_what_ends_while_a_lane_is_read_is_read_again(spool: FileSpool) -> None:
    store = SlowReads()
    registry = OperationRegistry(store, spool, Limits(), TurnedClock())
    one = operation(1)
    await registry.write(Change(operations=[one]))
    store.going.clear()
    watches = [registry.watch(SESSION, "a", 0)]
    following = [asyncio.ensure_future(anext(watches[0]))]
    await asyncio.sleep(0.01)
    # What was read has not arrived, and is out of date now: whoever comes later needs another.
    await registry.write(Change(operations=[done(one)]))
    watches.append(registry.watch(SESSION, "a", 0))
    following.append(asyncio.ensure_future(anext(watches[1])))
    await asyncio.sleep(0.01)
    store.going.set()
    found = await asyncio.wait_for(asyncio.gather(*following), 5)
    assert [operation.seq for operation in found] == [1, 1] and store.reads == 3
    for watch in watches:
        await watch.aclose()


async def test_a_watch_of_a_broken_lane_passes_over_the_gap(registry: OperationRegistry) -> None:
    held = operation(3)
    await registry.write(Change(operations=[held]))
    watch = registry.watch(SESSION, "a", 0)
    following = asyncio.ensure_future(anext(watch))
    await asyncio.sleep(0.01)
    failed = replace(held, state=OperationState.FAILED)
    await registry.write(
        Change(operations=[failed], lanes=[Lane(SESSION, "a", next_seq=1, broken=True)])
    )
    assert (await asyncio.wait_for(following, 5)).seq == 3
    await watch.aclose()


async def test_a_wait_ends_with_the_operation_or_the_time(registry: OperationRegistry) -> None:
    one = operation(1)
    await registry.write(Change(operations=[one]))
    assert not (await registry.wait("a1", 0.01)).done
    waiting = [asyncio.ensure_future(registry.wait("a1", 30)) for _ in range(3)]
    await asyncio.sleep(0.01)
    await registry.write(Change(operations=[done(one)]))
    assert [one.done for one in await asyncio.gather(*waiting)] == [True] * 3
    with pytest.raises(FiretitanError) as caught:
        await registry.wait("none", 30)
    assert caught.value.reason is Reason.OPERATION_NOT_FOUND


@pytest.mark.parametrize(
    ("open_before", "size_bytes", "limit"),
    [
        ([("t", 10), ("t", 10)], 10, "max_session_operations"),
        ([("u", 10), ("v", 10), ("w", 10)], 10, "max_operations"),
        ([("u", 60)], 50, "max_queued_bytes"),
    ],
)
async def test_quotas_count_what_is_open_and_what_is_coming(
    registry: OperationRegistry,
    spool: FileSpool,
    open_before: list[tuple[str, int]],
    size_bytes: int,
    limit: str,
) -> None:
    for number, (target, size) in enumerate(open_before):
        registry.reserve(target, size)
        ref = await spool.write(b"x" * size)
        one = replace(operation(number + 1), target=target, payload=ref)
        await registry.write(Change(operations=[one]))
        registry.release(target, size)
    with pytest.raises(FiretitanError) as caught:
        registry.reserve("t", size_bytes)
    assert caught.value.reason is Reason.QUEUE_FULL
    assert caught.value.metadata["limit"] == limit
    assert float(caught.value.metadata["retry_after_s"]) > 0


async def test_a_place_that_is_given_back_can_be_taken(registry: OperationRegistry) -> None:
    for _ in range(5):
        registry.reserve("t", 60)
        with pytest.raises(FiretitanError):
            registry.reserve("t", 60)
        registry.release("t", 60)


async def test_payloads_go_when_their_operation_ends(
    registry: OperationRegistry, spool: FileSpool
) -> None:
    ref = await spool.write(b"payload")
    one = replace(operation(1), payload=ref)
    await registry.write(Change(operations=[one]))
    assert await spool.read(ref) == b"payload"
    await registry.write(Change(operations=[replace(done(one), payload=None)]))
    await registry.close()
    with pytest.raises(FiretitanError) as caught:
        await spool.read(ref)
    assert caught.value.reason is Reason.CHECKSUM_MISMATCH
