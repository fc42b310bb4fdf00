"""The pipeline of one session, with a toy worker, where the disk or the worker fails."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from firetitan.v1 import training_service_pb2
from support.commands import GOOD, SESSION
from support.held_writes import HeldWrites
from support.managers import until
from support.pipeline import FULL, Bench
from support.stubs import optim_request

from firetitan_daemon.control.checkpoints import CheckpointManager
from firetitan_daemon.control.commands import CommandPipeline
from firetitan_daemon.control.operations import OperationRegistry
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.ports import Limits
from firetitan_daemon.core.records import Operation, OperationState, SessionState
from firetitan_daemon.core.recovery import RecoveryLimits
from firetitan_daemon.core.sequencer import SessionSequencer
from firetitan_daemon.core.worker_ports import Command, Outcome
from firetitan_daemon.rpc.codec import read_header

pytestmark = pytest.mark.timeout(30)


async def test_a_full_disk_at_settling_is_waited_out(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firetitan_daemon.control.commands._DISK_RETRY_S", 0.02)
    bench.store.failures = 3
    operation = await bench.forward_backward()
    assert (await bench.result(operation)).forward.metrics["loss:sum"] > 0
    assert bench.store.failures == 0
    # None is left behind by the tries that failed.
    named = {Path(ref.path).name for ref in (await bench.store.load()).spool}
    assert {path.name for path in bench.spool_root.iterdir()} == named
    step = await bench.result(await bench.submit(optim_request()))
    assert step.optim_step.metrics["step"] == 1


async def test_a_worker_that_ends_while_its_command_is_settled_is_waited_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firetitan_daemon.control.commands._DISK_RETRY_S", 0.02)
    bench.store.failures = 3
    operation = await bench.forward_backward()
    await bench.store.failed.wait()
    await bench.pipeline.suspend()
    assert (await bench.ended(operation)).error is None
    # What was settled meanwhile must not call the session ACTIVE: then nobody resumes it.
    assert bench.pipeline.session.state is SessionState.RECOVERING
    await bench.pipeline.resume(bench.worker, exact=True)
    assert (await bench.ended(await bench.forward_backward())).error is None


async def test_a_worker_that_ends_while_a_row_is_being_written_is_waited_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        ends = HeldWrites(
            bench.store, patch, lambda change: any(one.done for one in change.operations)
        )
        operation = await bench.forward_backward()
        await ends.begun.wait()
        suspended = asyncio.create_task(bench.pipeline.suspend())
        await asyncio.sleep(0)
        assert bench.pipeline.session.state is SessionState.RECOVERING
        ends.going.set()
        await suspended
    assert (await bench.ended(operation)).error is None
    assert bench.pipeline.session.state is SessionState.RECOVERING
    await bench.pipeline.resume(bench.worker, exact=True)
    assert bench.pipeline.session.state is SessionState.ACTIVE
    assert (await bench.ended(await bench.forward_backward())).error is None


async def test_a_save_that_cannot_be_published_fails_and_the_next_stands_alone(
    bench: Bench,
) -> None:
    first = (await bench.result(await bench.save_snapshot())).snapshot
    second = (await bench.result(await bench.save_snapshot())).snapshot
    assert second.parent == first.name
    bench.folders.failures = 1
    failed = await bench.ended(await bench.save_snapshot())
    assert failed.error is not None and failed.error.reason == Reason.STATE_DISK_FULL
    assert await bench.store.snapshots(None) == [
        await bench.store.snapshot(one.name.rpartition("/")[2]) for one in (first, second)
    ]
    after = (await bench.result(await bench.save_snapshot(seen_failure=failed.seq))).snapshot
    assert after.parent == "" and after.result_digest == second.result_digest
    assert not list((bench.spool_root.parent / "folders" / "staging").iterdir())


async def test_a_full_disk_refuses_before_accepting(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(data: bytes) -> None:
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(bench.spool, "write", full)
        with pytest.raises(FiretitanError) as caught:
            await bench.forward_backward()
        assert caught.value.reason is Reason.STATE_DISK_FULL
    # The seq was not used up.
    assert (await bench.ended(await bench.forward_backward(seq=1))).commit_seq == 1


async def test_a_refused_command_leaves_no_file(bench: Bench) -> None:
    await bench.ended(await bench.forward_backward())
    files = set(bench.spool_root.iterdir())
    message = optim_request()
    message.adam_params.learning_rate = 5
    with pytest.raises(FiretitanError) as caught:
        await bench.submit(message, seq=1)
    assert caught.value.reason is Reason.REQUEST_ID_REUSED
    repeat = await bench.forward_backward(seq=1)
    assert repeat.state is OperationState.DONE
    # The first one's payload may go meanwhile; nothing may come.
    assert set(bench.spool_root.iterdir()) <= files


async def test_a_lost_session_ends_what_is_open_and_begins_anew(bench: Bench) -> None:
    await bench.ended(await bench.forward_backward())
    held = await bench.forward_backward(seq=3)
    await bench.pipeline.lose("signal 9")
    ended = await bench.ended(held)
    assert ended.state is OperationState.LOST
    assert bench.pipeline.session.state is SessionState.LOST
    assert bench.pipeline.session.epoch == 2
    with pytest.raises(FiretitanError) as caught:
        await bench.forward_backward(seq=2)
    assert caught.value.reason is Reason.SESSION_LOSS


async def test_close_finishes_what_was_accepted(bench: Bench) -> None:
    operations = [await bench.forward_backward() for _ in range(3)]
    held = await bench.forward_backward(seq=5)
    await bench.pipeline.close()
    assert [(await bench.ended(one)).state for one in operations] == [OperationState.DONE] * 3
    assert (await bench.ended(held)).error.reason == Reason.CLOSED
    with pytest.raises(FiretitanError) as caught:
        await bench.forward_backward(seq=4)
    assert caught.value.reason is Reason.CLOSED


@pytest.mark.parametrize("end", ["lose", "close"])
async def test_a_watch_passes_a_gap_that_an_end_left_open(bench: Bench, end: str) -> None:
    await bench.ended(await bench.forward_backward())
    watch = bench.services.operations.watch(SESSION.name, "a", 1)
    waiting = asyncio.ensure_future(anext(watch))
    held = await bench.forward_backward(seq=3)
    await asyncio.sleep(0.02)
    assert not waiting.done()
    await (bench.pipeline.lose("signal 9") if end == "lose" else bench.pipeline.close())
    assert (await asyncio.wait_for(waiting, 2)).id == held.id


async def test_a_queued_command_can_be_cancelled_and_its_lane_goes_on(bench: Bench) -> None:
    await bench.pipeline.pause(5)
    operations = [await bench.forward_backward() for _ in range(3)]
    cancelled = await bench.pipeline.cancel(operations[1])
    assert cancelled.state is OperationState.CANCELLED
    bench.pipeline.start(bench.worker)
    assert [(await bench.ended(one)).state for one in operations] == [
        OperationState.DONE,
        OperationState.CANCELLED,
        OperationState.DONE,
    ]


async def test_a_command_that_was_begun_while_its_cancellation_waited_runs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        ends = HeldWrites(
            bench.store, patch, lambda change: any(one.done for one in change.operations)
        )
        first, second = await bench.forward_backward(), await bench.forward_backward()
        await ends.begun.wait()
        # Waits for the row of the first; when that is written, the second is begun at once.
        cancelling = asyncio.create_task(bench.pipeline.cancel(second))
        await asyncio.sleep(0)
        ends.going.set()
        assert (await cancelling).state is OperationState.ACCEPTED
    assert [(await bench.ended(one)).state for one in (first, second)] == [OperationState.DONE] * 2


async def test_a_command_whose_cancellation_is_being_written_is_not_begun(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    recovery = bench.pipeline.recovery
    # Payloads are let go of behind each command: where a pipeline waits with nothing running.
    recovery.services = replace(bench.services, recovery=RecoveryLimits(max_spool_bytes=0))
    with monkeypatch.context() as patch:
        behind = HeldWrites(bench.store, patch, lambda change: bool(change.released_payloads))
        cancels = HeldWrites(
            bench.store,
            patch,
            lambda change: any(one.state is OperationState.CANCELLED for one in change.operations),
        )
        first, second, third = [await bench.forward_backward() for _ in range(3)]
        await behind.begun.wait()
        cancelling = asyncio.create_task(bench.pipeline.cancel(second))
        await cancels.begun.wait()
        behind.going.set()
        # From there it goes without a wait to the second's turn.
        await until(lambda: recovery.stats.kept_bytes == 0)
        cancels.going.set()
        assert (await cancelling).state is OperationState.CANCELLED
        assert [(await bench.ended(one)).state for one in (first, third)] == [
            OperationState.DONE,
            OperationState.DONE,
        ]
    assert (await bench.ended(second)).state is OperationState.CANCELLED
    assert (await bench.worker.describe()).sessions[0].pending_backwards == 2


async def test_a_command_that_runs_on_when_the_daemon_ends_is_not_cancelled(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    executing, execute = asyncio.Event(), bench.worker.execute

    async def stuck(command: Command) -> Outcome:
        executing.set()
        await asyncio.Event().wait()
        return await execute(command)

    with monkeypatch.context() as patch:
        patch.setattr(bench.worker, "execute", stuck)
        operation = await bench.forward_backward()
        await executing.wait()
        await bench.pipeline.pause(0.01)
        assert (await bench.pipeline.cancel(operation)).state is OperationState.ACCEPTED
    bench.pipeline.start(bench.worker)
    assert (await bench.ended(operation)).state is OperationState.DONE


async def test_many_senders_at_once_keep_one_order(bench: Bench) -> None:
    async def send(lane: str) -> list[Operation]:
        sent = []
        for seq in range(1, 6):
            message = training_service_pb2.ForwardBackwardRequest(
                data=[GOOD], loss_fn="cross_entropy"
            )
            header = message.header
            header.session, header.epoch, header.client_id = SESSION.name, 1, lane
            header.seq, header.request_id = seq, f"{lane}{seq}"
            payload = message.SerializeToString()
            sent.append(
                await bench.pipeline.submit(read_header(payload), "ForwardBackward", payload)
            )
        return sent

    lanes = await asyncio.gather(*(send(lane) for lane in "bcdef"))
    ended = [[await bench.ended(one) for one in lane] for lane in lanes]
    orders = [[one.commit_seq for one in lane] for lane in ended]
    assert all(order == sorted(order) for order in orders)
    assert sorted(place for order in orders for place in order) == list(range(1, 26))
    status = await bench.worker.describe()
    assert status.sessions[0].pending_backwards == 25


async def test_a_restored_pipeline_sends_again_what_was_not_settled(bench: Bench) -> None:
    await bench.pipeline.pause(5)
    operations = [await bench.forward_backward() for _ in range(2)]
    ledger = await bench.store.load()
    registry = OperationRegistry(bench.store, bench.spool, Limits(), bench.services.clock)
    registry.restore(ledger)
    services = replace(bench.services, operations=registry)
    sequencer = SessionSequencer.restore(SESSION, ledger.lanes, ledger.open_operations, 0.0)
    bench.services = services
    bench.pipeline = CommandPipeline(
        replace(SESSION, state=SessionState.RECOVERING),
        sequencer,
        services,
        CheckpointManager(services),
    )
    with pytest.raises(FiretitanError) as caught:
        await bench.forward_backward()
    assert caught.value.reason is Reason.RECOVERING
    bench.pipeline.start(bench.worker)
    operations.append(await bench.forward_backward(seq=3))
    assert [(await bench.ended(one)).commit_seq for one in operations] == [1, 2, 3]
    assert (await bench.worker.describe()).sessions[0].pending_backwards == 3
