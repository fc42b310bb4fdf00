"""What every ledger does, whether on disk or in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.model_records import ModelInfo
from firetitan_daemon.core.ports import Change, Store
from firetitan_daemon.core.records import (
    Checkpoint,
    Deployment,
    ErrorRecord,
    Lane,
    LoadedFrom,
    LoraSettings,
    Moment,
    Operation,
    OperationState,
    ResourceState,
    Session,
    SessionState,
    Snapshot,
    SpoolRef,
    Trainer,
    WorkerKind,
    WorkerSpec,
)
from firetitan_daemon.store.memory import MemoryStore
from firetitan_daemon.store.sqlite import SqliteStore

S = "trainers/t/sessions/s"
MODEL = ModelInfo(
    "/m", "folder", "ff", "LlamaForCausalLM", "float32", "cpu", 64, 128, 999, True, 1,
    notes=("one", "two"), versions={"torch": "2"},
)  # fmt: skip
TRAINER = Trainer(
    "t", "base", 8, 128, "float32", ResourceState.ACTIVE, 1.5, model=MODEL,
    error=ErrorRecord("INTERNAL", "bad \N{SNOWMAN}", {"pid": "7"}), worker_id="w",
)  # fmt: skip
SESSION = Session(
    S, "t", "base", LoraSettings(8, train_mlp=False), 7, "0badcafe", SessionState.ACTIVE, 2.0,
    step=3, commit_seq=9, user_metadata={"k": "v"}, chain_head="p-0badcafe",
)  # fmt: skip
SPEC = WorkerSpec("w", WorkerKind.TRAINER, "trainers/t", "base", "float32", 128)
DEPLOYMENT = Deployment("d", "base", 128, "float32", ResourceState.CREATING, 3.0, etag="e")


@pytest.fixture(params=["sqlite", "memory"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    store = SqliteStore(tmp_path / "state.db") if request.param == "sqlite" else MemoryStore()
    yield store
    await store.close()


def operation(number: int, **changes: object) -> Operation:
    made = Operation(
        id=f"op{number}", method="Forward", target=S, request_id=f"r{number}",
        payload_digest=f"d{number}", state=OperationState.ACCEPTED, create_time=float(number),
        client_id="c", seq=number, commit_seq=number, epoch=1,
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def checkpoint(name: str, session: str = S, time: float = 0.0) -> Checkpoint:
    return Checkpoint(f"{session}/checkpoints/{name}", session, "base", 8, 1, 1, f"/f/{name}", "d",
                      10, time, {"a": "b"})  # fmt: skip


def snapshot(name: str, session: str = S, parent: str | None = None) -> Snapshot:
    kind = "delta" if parent else "base"
    return Snapshot(name, session, "base", 0, kind, "hf_full", parent, 1, 1, f"/s/{name}", "d",
                    "r", 10, 0.0, ("note",))  # fmt: skip


async def refused(store: Store, change: Change) -> Reason:
    with pytest.raises(FiretitanError) as caught:
        await store.write(change)
    return caught.value.reason


async def test_records_come_back_equal(store: Store) -> None:
    lane = Lane(S, "c", 4, 2, True, 1)
    change = Change(
        trainers=[TRAINER], sessions=[SESSION], lanes=[lane], operations=[operation(1)],
        checkpoints=[checkpoint("c")], snapshots=[snapshot("x", parent="y")],
        deployments=[DEPLOYMENT], workers=[SPEC], pins=[("d", "x", "h")], durable=True,
    )  # fmt: skip
    await store.write(change)
    ledger = await store.load()
    assert ledger.trainers == [TRAINER]
    assert ledger.sessions == [SESSION]
    assert ledger.lanes == [lane]
    assert ledger.open_operations == [operation(1)]
    assert ledger.deployments == [DEPLOYMENT]
    assert ledger.workers == [SPEC]
    assert ledger.pins == [("d", "x", "h")]
    assert sorted(ledger.folders) == ["/f/c", "/s/x"]
    assert await store.checkpoint(f"{S}/checkpoints/c") == checkpoint("c")
    assert await store.snapshot("x") == snapshot("x", parent="y")
    assert isinstance(ledger.trainers[0].state, ResourceState)
    assert isinstance(ledger.open_operations[0].state, OperationState)
    assert isinstance(ledger.trainers[0].model, ModelInfo)
    assert ledger.trainers[0].model.notes == ("one", "two")


async def test_a_row_replaces_the_one_of_its_key(store: Store) -> None:
    await store.write(Change(trainers=[TRAINER], operations=[operation(1, commit_seq=0)]))
    stopped = replace(TRAINER, state=ResourceState.STOPPED, error=None, model=None)
    settled = operation(1, state=OperationState.DONE, finish_time=9.0)
    await store.write(Change(trainers=[stopped], operations=[settled]))
    assert (await store.load()).trainers == [stopped]
    assert await store.operation("op1") == settled
    assert (await store.load()).open_operations == []


async def test_open_operations_are_in_commit_order(store: Store) -> None:
    rows = [
        operation(1, client_id="b", seq=5, commit_seq=0),
        operation(2, client_id="b", seq=4, commit_seq=0),
        operation(3, client_id="a", seq=2, commit_seq=12),
        operation(4, client_id="a", seq=1, commit_seq=3, state=OperationState.DISPATCHED),
        operation(5, client_id="a", seq=3, commit_seq=2, state=OperationState.LOST),
        operation(6, target="trainers/a", client_id="", seq=0, commit_seq=0),
    ]
    await store.write(Change(operations=rows))
    opened = (await store.load()).open_operations
    assert [one.id for one in opened] == ["op6", "op2", "op1", "op4", "op3"]


@pytest.mark.parametrize(
    ("clash", "reason"),
    [
        ({"seq": 1, "request_id": "x", "commit_seq": 8}, Reason.SEQ_REUSED),
        ({"seq": 8, "request_id": "x", "commit_seq": 1}, Reason.SEQ_REUSED),
        ({"seq": 8, "request_id": "r1", "commit_seq": 8}, Reason.REQUEST_ID_REUSED),
    ],
)
async def test_a_clash_is_refused_and_nothing_of_it_stays(
    store: Store, clash: dict[str, object], reason: Reason
) -> None:
    await store.write(Change(operations=[operation(1)]))
    change = Change(
        trainers=[TRAINER],
        operations=[operation(2), operation(9, **clash)],
        lanes=[Lane(S, "c", 3)],
    )
    assert await refused(store, change) == reason
    ledger = await store.load()
    assert ledger.trainers == []
    assert ledger.lanes == []
    assert ledger.open_operations == [operation(1)]
    await store.write(Change(operations=[operation(2)]))


async def test_places_are_unique_within_their_target_only(store: Store) -> None:
    other = operation(2, target="trainers/t/sessions/u", request_id="r1", seq=1, commit_seq=1)
    laneless = [
        operation(number, target="trainers/t", client_id="", seq=0, commit_seq=0, request_id="")
        for number in (3, 4)
    ]
    held = [operation(number, commit_seq=0) for number in (5, 6)]
    await store.write(Change(operations=[operation(1), other, *laneless, *held]))
    assert len((await store.load()).open_operations) == 6


async def test_an_operation_is_found_by_each_of_its_keys(store: Store) -> None:
    laneless = operation(2, target="trainers/t", client_id="", seq=0, commit_seq=0)
    await store.write(Change(operations=[operation(1), laneless]))
    assert await store.operation("op1") == operation(1)
    assert await store.operation("op7") is None
    assert await store.operation_by_request(S, "r1") == operation(1)
    assert await store.operation_by_request("trainers/t", "r2") == laneless
    assert await store.operation_by_request("trainers/t", "r1") is None
    assert await store.operation_by_seq(S, "c", 1) == operation(1)
    assert await store.operation_by_seq(S, "c", 2) is None
    assert await store.operation_by_seq("trainers/t", "", 0) is None


async def test_done_operations_of_a_lane_come_by_seq(store: Store) -> None:
    done = OperationState.DONE
    await store.write(
        Change(
            operations=[
                operation(3, state=done),
                operation(2, state=OperationState.FAILED),
                operation(1, state=done),
                operation(4),
                operation(5, client_id="other", state=done),
            ]
        )
    )
    assert [one.seq for one in await store.lane_operations(S, "c", 1)] == [2, 3]
    assert [one.seq for one in await store.lane_operations(S, "c", 0, 2)] == [1, 2]
    assert await store.lane_operations(S, "c", 2**64 - 1) == []
    assert await store.lane_operations(S, "", 0) == []


async def test_operations_are_paged_by_commit_seq(store: Store) -> None:
    for number in (7, 3, 1, 2, 5, 4):
        held = number in (5, 7)  # no commit_seq: behind the others, as they were accepted
        await store.write(
            Change(operations=[operation(number, **({"commit_seq": 0} if held else {}))])
        )
    await store.write(Change(operations=[operation(1, state=OperationState.DONE)]))
    await store.write(Change(operations=[operation(6, target="trainers/t")]))

    async def page(after: str, *, pending: bool = False, limit: int = 2) -> list[str]:
        rows = await store.operations(S, pending_only=pending, after_id=after, limit=limit)
        return [one.id for one in rows]

    assert await page("") == ["op1", "op2"]
    assert await page("op2") == ["op3", "op4"]
    assert await page("op4") == ["op7", "op5"]
    assert await page("op5") == []
    assert await page("", pending=True, limit=9) == ["op2", "op3", "op4", "op7", "op5"]
    with pytest.raises(FiretitanError) as caught:
        await page("nonsense")
    assert caught.value.reason == Reason.INVALID_ARGUMENT


async def test_acknowledging_forgets_results_and_never_goes_back(store: Store) -> None:
    refs = [SpoolRef(f"/spool/{number}", number, "d") for number in range(6)]
    rows = [operation(number, state=OperationState.DONE, result=refs[number]) for number in (1, 2)]
    rows.append(operation(3, payload=refs[3]))
    rows.append(operation(4, state=OperationState.DONE, result=refs[4]))
    rows.append(operation(5, client_id="z", state=OperationState.DONE, result=refs[5]))
    await store.write(Change(operations=rows, lanes=[Lane(S, "c", 5), Lane(S, "z", 2)]))
    assert sorted(ref.path for ref in (await store.load()).spool) == [
        f"/spool/{number}" for number in (1, 2, 3, 4, 5)
    ]
    assert await store.acknowledge(S, "c", 3) == refs[1:3]
    assert await store.acknowledge(S, "c", 2) == []
    first = await store.operation("op1")
    assert first is not None
    assert first.result is None
    assert sorted(ref.path for ref in (await store.load()).spool) == [
        "/spool/3", "/spool/4", "/spool/5",
    ]  # fmt: skip
    assert await store.acknowledge(S, "nobody", 9) == []
    # A lane's row from before the acknowledgement does not undo it.
    await store.write(Change(lanes=[Lane(S, "c", 6, failed_seq=5)]))
    assert (await store.load()).lanes[0] == Lane(S, "c", 6, acked_through=3, failed_seq=5)
    assert await store.acknowledge(S, "c", 2**64 - 1) == [refs[4]]


async def test_a_trainer_goes_with_its_sessions_and_leaves_what_was_saved(store: Store) -> None:
    other = replace(SESSION, name="trainers/u/sessions/s", trainer_id="u")
    await store.write(
        Change(
            trainers=[TRAINER, replace(TRAINER, id="u")],
            sessions=[SESSION, other],
            lanes=[Lane(S, "c"), Lane(other.name, "c")],
            operations=[
                operation(1),
                operation(2, target=other.name),
                operation(3, target="trainers/t", client_id="", seq=0, commit_seq=0),
            ],
            checkpoints=[checkpoint("k")],
            snapshots=[snapshot("x")],
        )
    )
    await store.write(Change(deleted_trainers=["t"], durable=True))
    ledger = await store.load()
    assert [one.id for one in ledger.trainers] == ["u"]
    assert ledger.sessions == [other]
    assert ledger.lanes == [Lane(other.name, "c")]
    assert {one.id for one in ledger.open_operations} == {"op2", "op3"}
    assert await store.checkpoints("t") == [checkpoint("k")]
    assert await store.snapshots("t") == [snapshot("x")]
    # The name may be used again, from the first place on.
    await store.write(
        Change(
            trainers=[TRAINER],
            sessions=[SESSION],
            operations=[operation(4, seq=1, request_id="r1", commit_seq=1)],
        )
    )


async def test_saved_rows_are_listed_by_trainer_oldest_first(store: Store) -> None:
    elsewhere = "trainers/u/sessions/s"
    for name, session in (("b", S), ("a", S), ("c", elsewhere)):
        change = Change(
            checkpoints=[checkpoint(name, session)], snapshots=[snapshot(name, session)]
        )
        await store.write(change)
    await store.write(Change(snapshots=[snapshot("b")], checkpoints=[checkpoint("b", time=5.0)]))
    assert [one.id for one in await store.snapshots("t")] == ["b", "a"]
    assert [one.id for one in await store.snapshots(None)] == ["b", "a", "c"]
    assert [one.create_time for one in await store.checkpoints("t")] == [5.0, 0.0]
    assert len(await store.checkpoints("u")) == 1


async def test_a_deleted_checkpoint_is_gone_unless_it_was_saved_anew(store: Store) -> None:
    await store.write(Change(checkpoints=[checkpoint("a"), checkpoint("b")]))
    anew = replace(checkpoint("a"), folder="/f/anew")
    await store.write(Change(checkpoints=[anew]))
    gone = [(checkpoint(name).name, checkpoint(name).folder) for name in ("a", "b", "never")]
    await store.write(Change(deleted_checkpoints=gone))
    assert await store.checkpoints("t") == [anew]
    assert (await store.load()).folders == ["/f/anew"]


async def test_a_deleted_snapshot_is_gone_and_its_id_stays_taken(store: Store) -> None:
    await store.write(Change(snapshots=[snapshot("x"), snapshot("y", parent="x"), snapshot("z")]))
    with pytest.raises(FiretitanError, match="snapshots/y stands on it") as stood_on:
        await store.write(Change(deleted_snapshots=["x"], trainers=[TRAINER]))
    assert stood_on.value.reason is Reason.SNAPSHOT_IN_USE
    assert (await store.load()).trainers == []
    assert [one.id for one in await store.snapshots("t")] == ["x", "y", "z"]
    await store.write(Change(deleted_snapshots=["y"]))
    await store.write(Change(deleted_snapshots=["x", "y", "never"]))
    assert await store.snapshot("x") is None
    assert [one.id for one in await store.snapshots(None)] == ["z"]
    assert (await store.load()).folders == ["/s/z"]
    assert sorted(await store.snapshot_ids("t")) == ["x", "y", "z"]
    assert list(await store.snapshot_ids("u")) == []


async def test_a_chain_is_deleted_as_a_whole(store: Store) -> None:
    await store.write(Change(snapshots=[snapshot("x"), snapshot("y", parent="x")]))
    await store.write(Change(deleted_snapshots=["x", "y"]))
    assert list(await store.snapshots(None)) == []


async def test_pins_workers_and_deployments_are_removed(store: Store) -> None:
    pins = [("d", "x", "h"), ("d", "x", "i"), ("e", "x", "h")]
    await store.write(Change(deployments=[DEPLOYMENT], workers=[SPEC], pins=[*pins, pins[0]]))
    await store.write(Change(deleted_pins=[pins[0], ("no", "no", "no")], deleted_workers=["w"]))
    ledger = await store.load()
    assert sorted(ledger.pins) == pins[1:]
    assert ledger.workers == []
    await store.write(Change(deleted_deployments=["d"]))
    ledger = await store.load()
    assert ledger.deployments == []
    assert ledger.pins == [pins[2]]


async def test_the_folder_of_an_open_save_is_in_use(store: Store) -> None:
    saving = operation(1, staging="/staging/1")
    await store.write(Change(operations=[saving]))
    assert (await store.load()).folders == ["/staging/1"]
    await store.write(Change(operations=[replace(saving, state=OperationState.DONE)]))
    assert (await store.load()).folders == []


async def test_the_folder_that_a_load_reads_is_in_use(store: Store) -> None:
    loading = operation(1, method="LoadState", loaded=LoadedFrom("/f/old", "d"))
    kept = operation(
        2,
        method="LoadState",
        state=OperationState.DONE,
        payload=SpoolRef("/p", 1, "d"),
        loaded=LoadedFrom("/f/kept", "d"),
    )
    done = replace(kept, id="op3", seq=3, commit_seq=3, request_id="r3", payload=None)
    await store.write(Change(operations=[loading, kept, done]))
    ledger = await store.load()
    assert sorted(ledger.folders) == ["/f/kept", "/f/old"]
    assert ledger.open_operations[0].loaded == LoadedFrom("/f/old", "d")


async def test_concurrent_writes_all_land(store: Store) -> None:
    writes = [store.write(Change(operations=[operation(number)])) for number in range(1, 101)]
    await asyncio.gather(*writes)
    assert [one.seq for one in (await store.load()).open_operations] == list(range(1, 101))


async def test_what_nobody_asks_for_can_be_forgotten(store: Store) -> None:
    ended = {"state": OperationState.DONE, "finish_time": 10.0}
    refs = [SpoolRef(f"/spool/{number}", number, "d") for number in range(4)]
    made = {"target": "trainers/t", "client_id": "", "seq": 0, "commit_seq": 0}
    rows = [
        operation(1, result=refs[1], **ended),
        operation(2, result=refs[2], state=OperationState.DONE, finish_time=30.0),
        operation(3, **made, **ended),
        operation(4, **made, state=OperationState.DONE, finish_time=30.0),
        operation(5, **made),
    ]
    await store.write(Change(operations=rows))
    before = Moment(20.0, "boot", 500.0)
    assert [one.id for one in await store.untaken_results(before)] == ["op1"]
    assert await store.forget_results(["op1", "nowhere"]) == [refs[1]]
    assert await store.untaken_results(before) == []
    forgotten, other = await store.operation("op1"), await store.operation("op2")
    assert forgotten is not None and forgotten.forgotten and forgotten.result is None
    assert other is not None and not other.forgotten
    assert refs[1] not in (await store.load()).spool
    assert await store.delete_operations(before) == 1
    left = [await store.operation(f"op{number}") for number in range(1, 6)]
    # Those of sessions stay: they are what a repeat is known by.
    assert [one is not None for one in left] == [True, True, False, True, True]


async def test_within_a_boot_age_is_told_by_the_clock_that_never_jumps(store: Store) -> None:
    made = {"target": "trainers/t", "client_id": "", "seq": 0, "commit_seq": 0}
    # (by the wall clock, boot, by the other one): whether it ended before (20, "boot", 500).
    moments = {
        (10.0, "boot", 499.0): True,
        (30.0, "boot", 499.0): True,
        (10.0, "boot", 501.0): False,
        (10.0, "former boot", 501.0): True,
        (30.0, "former boot", 499.0): False,
    }
    for offset, more in ((0, {}), (100, made)):
        rows = [
            operation(
                offset + number,
                state=OperationState.DONE,
                finish_time=moment[0],
                finished=Moment(*moment),
                result=SpoolRef(f"/spool/{number}", 1, "d"),
                **more,
            )
            for number, moment in enumerate(moments)
        ]
        await store.write(Change(operations=rows))
    before = Moment(20.0, "boot", 500.0)
    old = [number for number, is_old in enumerate(moments.values()) if is_old]
    found = {one.id for one in await store.untaken_results(before)}
    assert found == {f"op{offset + number}" for offset in (0, 100) for number in old}
    assert await store.delete_operations(before) == len(old)
    left = [await store.operation(f"op{100 + number}") for number in range(len(moments))]
    assert [one is None for one in left] == list(moments.values())
