"""The ledger on disk: what survives, what is refused, what a full disk does."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.ports import Change
from firetitan_daemon.core.records import (
    Lane,
    Moment,
    Operation,
    OperationState,
    ResourceState,
    SpoolRef,
    Trainer,
)
from firetitan_daemon.store import schema, sqlite
from firetitan_daemon.store.sqlite import SqliteStore

S = "trainers/t/sessions/s"
TRAINER = Trainer("t", "base", 8, 128, "float32", ResourceState.ACTIVE, 1.5)


def operation(number: int) -> Operation:
    return Operation(
        id=f"op{number}", method="Forward", target=S, request_id=f"r{number}",
        payload_digest="d" * 64, state=OperationState.ACCEPTED, create_time=0.0, client_id="c",
        seq=number, commit_seq=number,
    )  # fmt: skip


async def test_reopening_finds_everything(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state.db")
    await store.write(Change(trainers=[TRAINER], operations=[operation(1)]))
    await store.close()
    await store.close()
    store = SqliteStore(tmp_path / "state.db")
    ledger = await store.load()
    await store.close()
    assert ledger.trainers == [TRAINER]
    assert ledger.open_operations == [operation(1)]
    assert (tmp_path / "state.db").stat().st_mode & 0o777 == 0o600


KILLED = """
import asyncio, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_sqlite_store import SqliteStore, Change, operation
async def main():
    store = SqliteStore(Path(sys.argv[1]))
    number = 0
    while True:
        number += 1
        await store.write(Change(operations=[operation(number)]))
        print(number, flush=True)
asyncio.run(main())
"""


@pytest.mark.timeout(30)
def test_what_was_answered_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    command = [sys.executable, "-c", KILLED, str(path), str(Path(__file__).parent)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for _ in range(200):
        assert writer.stdout.readline()
    os.kill(writer.pid, signal.SIGKILL)
    answered = 200 + len(writer.stdout.read().split())
    writer.wait()
    writer.stdout.close()
    seqs = asyncio.run(_open_seqs(path))
    assert seqs == list(range(1, len(seqs) + 1))
    assert len(seqs) in (answered, answered + 1)


async def _open_seqs(path: Path) -> list[int]:
    store = SqliteStore(path)
    seqs = [one.seq for one in (await store.load()).open_operations]
    await store.close()
    return seqs


async def test_a_second_connection_is_refused(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state.db")
    with pytest.raises(FiretitanError, match="another process has it open"):
        SqliteStore(tmp_path / "state.db")
    await store.write(Change(trainers=[TRAINER]))
    await store.close()


async def test_a_newer_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    before = path.read_bytes()
    with pytest.raises(
        FiretitanError, match=rf"schema 99.*up to {len(schema.MIGRATIONS)}"
    ) as caught:
        SqliteStore(path)
    assert caught.value.reason == Reason.UNSUPPORTED
    assert path.read_bytes() == before


async def test_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"not a database, and long enough to have a header" * 100)
    with pytest.raises(FiretitanError, match="not a database") as caught:
        SqliteStore(path)
    assert caught.value.reason == Reason.INTERNAL
    with pytest.raises(FiretitanError, match=r"cannot write to .*nowhere") as caught:
        SqliteStore(tmp_path / "nowhere" / "state.db")
    assert caught.value.reason == Reason.STATE_NOT_WRITABLE


@pytest.mark.parametrize("body", ['{"id": "t', "[1]", "{}", '{"id": 1, "state": "flying"}'])
async def test_a_damaged_row_is_named(tmp_path: Path, body: str) -> None:
    path = tmp_path / "state.db"
    await SqliteStore(path).close()
    db = sqlite3.connect(path)
    db.execute("INSERT INTO trainers (id, body) VALUES ('t', ?)", (body,))
    db.commit()
    db.close()
    store = SqliteStore(path)
    with pytest.raises(FiretitanError, match=r"state\.db cannot be used.*is no Trainer") as caught:
        await store.load()
    assert caught.value.reason == Reason.INTERNAL and body[:20] in str(caught.value)
    await store.close()


async def test_an_older_file_is_copied_then_brought_up(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = SqliteStore(path)
    await store.write(Change(trainers=[TRAINER]))
    await store.close()

    def second(db: sqlite3.Connection) -> None:
        db.execute("ALTER TABLE workers ADD COLUMN extra TEXT")

    def broken(db: sqlite3.Connection) -> None:
        db.execute("DROP TABLE trainers")
        raise ValueError("broken")

    now = len(schema.MIGRATIONS)
    db = sqlite3.connect(path, isolation_level=None)
    with pytest.raises(ValueError, match="broken"):
        schema.migrate(db, path, (*schema.MIGRATIONS, second, broken))
    assert db.execute("PRAGMA user_version").fetchone() == (now,)
    assert db.execute("SELECT count(*) FROM trainers").fetchone() == (1,)
    schema.migrate(db, path, (*schema.MIGRATIONS, second))
    assert db.execute("PRAGMA user_version").fetchone() == (now + 1,)
    db.execute("SELECT extra FROM workers")
    db.close()
    copy = sqlite3.connect(tmp_path / f"state.db.v{now}.bak")
    assert copy.execute("PRAGMA user_version").fetchone() == (now,)
    assert copy.execute("SELECT count(*) FROM trainers").fetchone() == (1,)
    copy.close()


async def test_a_deployments_worker_becomes_the_first_of_its_samplers(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    db = sqlite3.connect(path, isolation_level=None)
    schema.migrate(db, path, schema.MIGRATIONS[:5])
    for key, worker in (("served", '"sampler-1"'), ("stopped", "null")):
        body = (
            f'{{"id":"{key}","base_model":"m \N{SNOWMAN}","max_context_length":8,"dtype":"auto",'
            f'"state":"active","create_time":1.5,"active_snapshot":"s","worker_id":{worker}}}'
        )
        db.execute("INSERT INTO deployments VALUES (?, ?)", (key, body))
    db.close()
    store = SqliteStore(path)
    served, stopped = (await store.load()).deployments
    await store.close()
    assert (served.worker_ids, served.replicas) == (("sampler-1",), 1)
    assert (served.base_model, served.active_snapshot) == ("m \N{SNOWMAN}", "s")
    assert (stopped.worker_ids, stopped.replicas) == ((), 1)
    assert (tmp_path / "state.db.v5.bak").exists()


def fill(store: SqliteStore) -> None:
    """As full as a disk without one more page."""
    (pages,) = store._thread.submit(
        lambda: store._db.execute("PRAGMA page_count").fetchone()
    ).result()
    store._thread.submit(lambda: store._db.execute(f"PRAGMA max_page_count = {pages}")).result()


async def test_a_full_disk_is_told_and_changes_nothing(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state.db")
    await store.write(Change(operations=[operation(1)]))
    fill(store)
    with pytest.raises(FiretitanError, match="is full") as caught:
        for number in range(2, 1000):
            await store.write(Change(operations=[operation(number)]))
    assert caught.value.reason == Reason.STATE_DISK_FULL
    rows = len((await store.load()).open_operations)
    assert 1 <= rows == number - 1
    store._thread.submit(lambda: store._db.execute("PRAGMA max_page_count = 10000")).result()
    await store.write(Change(operations=[operation(number)]))
    await store.close()


FULL = """
import asyncio, errno, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_sqlite_store import *
from firetitan_daemon.store.spool import FileSpool

async def main():
    home = Path(sys.argv[1])
    store = SqliteStore(home / "state.db")
    spool = FileSpool(home / "spool")
    ref = await spool.write(b"x" * 1_000_000)
    done = replace(operation(1), state=OperationState.DONE, result=ref)
    await store.write(Change(operations=[done], lanes=[Lane(S, "c", 2)]))
    reasons = []
    try:
        while True:
            await spool.write(b"y" * 100_000)
    except FiretitanError as error:
        reasons.append(error.reason)
        assert error.metadata["needed_bytes"] == "100000"
    left = list((home / "spool").glob(".tmp-*"))
    filler = (home / "filler").open("wb", buffering=0)
    try:
        while True:
            filler.write(b"z" * 4096)
    except OSError as error:
        assert error.errno == errno.ENOSPC
    try:
        for number in range(2, 10_000):
            await store.write(Change(operations=[operation(number)]))
    except FiretitanError as error:
        reasons.append(error.reason)
    accepted = number - 1
    assert (home / "state.db.ballast").exists()
    taken = []
    while not taken:
        taken = await store.acknowledge(S, "c", 1)
    await spool.remove(taken)
    (home / "filler").unlink()
    await store.write(Change(operations=[operation(number)], durable=True))
    assert (home / "state.db.ballast").exists()
    rows = (await store.load()).open_operations
    assert len(rows) == accepted, (len(rows), accepted)
    await store.close()
    print(left, *reasons)

asyncio.run(main())
"""


@pytest.mark.timeout(60)
def test_on_a_really_full_disk_freeing_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "full.py"
    script.write_text(FULL)
    home = tmp_path / "home"
    home.mkdir()
    mounted = (
        f"mount -t tmpfs -o size=12m none {home} &&"
        f" exec {sys.executable} {script} {home} {Path(__file__).parent}"
    )
    try:
        run = subprocess.run(
            ["unshare", "-rm", "sh", "-c", mounted], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if "mount" in run.stderr or "unshare" in run.stderr:
        pytest.skip(f"cannot mount a small disk: {run.stderr.strip()}")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["[]", "STATE_DISK_FULL", "STATE_DISK_FULL"]


async def test_a_write_whose_caller_gave_up_still_happens(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state.db")
    tasks = [
        asyncio.create_task(store.write(Change(operations=[operation(number)])))
        for number in range(1, 21)
    ]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert len((await store.load()).open_operations) == 20
    await store.close()


async def test_a_lane_row_keeps_what_was_acknowledged_over_a_restart(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "state.db")
    ref = SpoolRef("/spool/1", 1, "d")
    done = replace(operation(1), state=OperationState.DONE, result=ref)
    await store.write(Change(operations=[done], lanes=[Lane(S, "c", 2)]))
    assert await store.acknowledge(S, "c", 1) == [ref]
    await store.close()
    store = SqliteStore(tmp_path / "state.db")
    assert (await store.load()).lanes == [Lane(S, "c", 2, acked_through=1)]
    await store.close()


async def test_looking_for_old_results_reads_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SqliteStore(tmp_path / "state.db")
    ended = [
        replace(
            operation(number),
            state=OperationState.DONE,
            finish_time=float(number),
            result=SpoolRef(f"/spool/{number}", 1, "d"),
        )
        for number in range(1, 101)
    ]
    await store.write(Change(operations=ended))
    read = 0
    decode = sqlite.decode

    def counted(kind: type[Any], text: str) -> Any:
        nonlocal read
        read += 1
        return decode(kind, text)

    monkeypatch.setattr(sqlite, "decode", counted)
    assert [one.id for one in await store.untaken_results(Moment(3.0, "boot", 0.0))] == [
        "op1",
        "op2",
    ]
    assert read == 2
    await store.close()


async def test_changes_go_between_the_tables_that_are_looked_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large ledger is looked over for seconds: no command waits for all of it."""
    look, looked, begun = schema.problems, [], threading.Event()

    def slow(*arguments: Any) -> list[str]:
        looked.append(arguments[1:])
        begun.set()
        time.sleep(0.05)
        return look(*arguments)

    monkeypatch.setattr(schema, "problems", slow)
    store = SqliteStore(tmp_path / "state.db")
    check = asyncio.create_task(store.check())
    await asyncio.to_thread(begun.wait)
    await store.write(Change(trainers=[TRAINER]))
    assert not check.done()
    assert await check == []
    tables = {name for (name,) in looked}
    assert {"sqlite_schema", "operations", "trainers", "sqlite_sequence"} <= tables
    await store.close()


async def test_a_ledger_whose_list_of_tables_is_damaged_is_told(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    await SqliteStore(path).close()
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 3996)
    connection = sqlite3.connect(path)
    assert schema.tables(connection) == ["sqlite_schema"]
    assert schema.problems(connection, "sqlite_schema")
    connection.close()
