"""A home that was moved, or is reached by another path: its rows name the folders there."""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from firetitan_daemon.core.ports import Change
from firetitan_daemon.core.records import (
    Checkpoint,
    LoadedFrom,
    Operation,
    OperationState,
    RecoveryPoint,
    Snapshot,
    SpoolRef,
)
from firetitan_daemon.store.sqlite import SqliteStore

S = "trainers/t/sessions/s"
OLD = "/old/home/store"


def rows(root: str) -> Change:
    save = Operation(
        "o1", "SaveState", S, "r1", "d", OperationState.DISPATCHED, 0.0, "c", 1, 1,
        staging=f"{root}/staging/ä 1",
    )  # fmt: skip
    load = replace(
        save, id="o2", method="LoadState", request_id="r2", seq=2, commit_seq=2,
        state=OperationState.DONE, staging="", payload=SpoolRef("/spool/2", 1, "d"),
        loaded=LoadedFrom(f"{root}/checkpoints/one-x", "d"),
    )  # fmt: skip
    name = f"{S}/checkpoints/one"
    return Change(
        operations=[save, load],
        checkpoints=[Checkpoint(name, S, "b", 8, 1, 1, f"{root}/checkpoints/one-x", "d", 1, 0.25)],
        snapshots=[
            Snapshot(
                "s1", S, "b", 0, "base", "hf_full", None, 1, 1, f"{root}/snapshots/s1-y", "d", "d",
                1, 0.5,
            )
        ],
        recovery_points=[RecoveryPoint(S, 1, 1, f"{root}/recovery_points/p-z", "d", 1, 0.75)],
    )  # fmt: skip


async def found(store: SqliteStore) -> tuple[object, ...]:
    ledger = await store.load()
    return (
        list(ledger.open_operations),
        list(ledger.kept_operations),
        await store.checkpoints("t"),
        await store.snapshots("t"),
        list(ledger.recovery_points),
        sorted(ledger.folders),
    )


async def test_every_row_names_its_folder_where_it_is(tmp_path: Path) -> None:
    path, new = tmp_path / "state.db", "/new/store"
    store = SqliteStore(path)
    await store.write(rows(OLD))
    await store.close()
    beside = SqliteStore(tmp_path / "other.db")
    await beside.write(rows(new))
    expected = await found(beside)
    await beside.close()
    for _ in range(2):
        store = SqliteStore(path, folders=Path(new))
        assert await found(store) == expected
        await store.close()


async def test_a_row_that_cannot_be_read_keeps_no_other_from_it(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = SqliteStore(path)
    await store.write(rows(OLD))
    await store.close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE operations SET body = 'damaged' WHERE id = 'o2'")
    store = SqliteStore(path, folders=Path("/new/store"))
    (row,) = await store.checkpoints("t")
    await store.close()
    assert row.folder == "/new/store/checkpoints/one-x"


@pytest.mark.parametrize("folders", [None, Path(OLD)])
async def test_rows_stay_as_they_are_where_nothing_moved(
    tmp_path: Path, folders: Path | None
) -> None:
    path = tmp_path / "state.db"
    store = SqliteStore(path)
    await store.write(rows(OLD))
    await store.close()
    store = SqliteStore(path, folders=folders)
    before = await found(store)
    await store.close()
    assert before[-1] == sorted(
        f"{OLD}/{name}"
        for name in ("staging/ä 1", "checkpoints/one-x", "checkpoints/one-x", "snapshots/s1-y",
                     "recovery_points/p-z")
    )  # fmt: skip
