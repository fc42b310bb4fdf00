"""R7, part by part: the ledger alone, its migration, and every other file that is published."""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
from pathlib import Path

import pytest
from firetitan.worker.v1 import worker_pb2
from google.protobuf import json_format
from support.adapters import write_toy
from support.power_loss import Recording, Sync
from support.sizes import figure, seed, size
from support.sqlite_files import ledger_on_vfs

from firetitan_client import address
from firetitan_daemon import durable, handshake
from firetitan_daemon.core.errors import FiretitanError
from firetitan_daemon.core.ports import Change
from firetitan_daemon.core.records import Operation, OperationState, ResourceState, Trainer
from firetitan_daemon.engine.exporter import Export, export
from firetitan_daemon.launch.bundle import Bundle, BundleError
from firetitan_daemon.store import schema
from firetitan_daemon.store.codec import encode
from firetitan_daemon.store.folders import FileFolders
from firetitan_daemon.store.sqlite import SqliteStore
from firetitan_daemon.worker.__main__ import write_exit

pytestmark = pytest.mark.timeout(size(150, 7200))


# -- the ledger alone --------------------------------------------------------------------------


def command(number: int) -> Operation:
    return Operation(
        id=f"op{number}", method="Forward", target="trainers/t/sessions/s", request_id=f"r{number}",
        payload_digest="d" * 64, state=OperationState.ACCEPTED, create_time=0.0, client_id="c",
        seq=number, commit_seq=number,
    )  # fmt: skip


async def ledger_states(root: Path, *, syncs: bool = True) -> list[tuple[int, int]]:
    """After each loss: the last change that must be there, and how many are, all before it too."""
    draw, last = random.Random(seed()), 0
    recording = Recording(root, ignored=["state.db.ballast"])
    with ledger_on_vfs(), recording.watching():
        store = SqliteStore(root / "state.db")
        # Small, so that the log is copied into the file and begun anew several times.
        store._thread.submit(store._db.execute, "PRAGMA wal_autocheckpoint = 6").result()
        for number in range(1, size(13, 60)):
            is_durable = draw.random() < 0.4
            await store.write(Change(operations=[command(number)], durable=is_durable))
            if is_durable:
                last = number
                recording.note(str(number))
        if not syncs:
            recording.events = [one for one in recording.events if not isinstance(one, Sync)]
        await store.close()
    assert last > 3
    states = []
    for crash in recording.crashes(
        root, most=64, sample=size(500, 20_000), seed=draw.randrange(99)
    ):
        must = int(crash.promised[-1]) if crash.promised else 0
        try:
            store = SqliteStore(root / "state.db")
            found = [one.commit_seq for one in (await store.load()).open_operations]
            await store.close()
        except (FiretitanError, ValueError):
            states.append((must, -1))
            continue
        whole = found == list(range(1, len(found) + 1))
        states.append((must, len(found) if whole else -1))
    return states


async def test_the_ledger_keeps_what_was_durable_and_all_before_it(scratch: Path) -> None:
    """Also where other changes were not: they may be gone, from some change on."""
    states = await ledger_states(scratch)
    wrong = [(must, found) for must, found in states if found < must]
    assert not wrong
    assert len({found for _, found in states}) > 5
    figure("R7", ledger_states=len(states))


async def test_a_ledger_that_is_never_synced_is_found(scratch: Path) -> None:
    states = await ledger_states(scratch, syncs=False)
    assert [1 for must, found in states if found < must]


async def test_an_older_ledger_and_its_copy(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A migration that power cuts short: the old rows or the new ones, and they can be opened."""
    root = scratch / "root"
    root.mkdir()
    older, newer = schema.MIGRATIONS[:-1], schema.MIGRATIONS
    row = Trainer("t", "base", 8, 128, "float32", ResourceState.ACTIVE, 1.5)
    with ledger_on_vfs():
        db = sqlite3.connect(root / "state.db")
        schema.migrate(db, root / "state.db", older)
        db.execute("REPLACE INTO trainers VALUES (?, ?)", (row.id, encode(row)))
        db.close()
        recording = Recording(root, ignored=["state.db.ballast"])
        with recording.watching():
            await SqliteStore(root / "state.db").close()
            recording.note("opened")
    count = 0
    for crash in recording.crashes(root, most=64, sample=size(150, 5000), seed=seed()):
        count += 1
        copy = root / f"state.db.v{len(older)}.bak"
        if crash.promised or copy.exists():
            db = sqlite3.connect(copy)
            assert db.execute("SELECT count(*) FROM trainers").fetchone() == (1,), crash.how
            assert db.execute("PRAGMA user_version").fetchone() == (len(older),), crash.how
            db.close()
        durable.sweep_temporaries(root)
        store = SqliteStore(root / "state.db")
        assert (await store.load()).trainers == [row], crash.how
        await store.close()
        assert not list(root.glob(f"{durable.TEMPORARY_PREFIX}*"))
    assert count > 50
    assert len(newer) > len(older)


# -- other files -------------------------------------------------------------------------------


def test_a_workers_folder(scratch: Path) -> None:
    """The specification is durable. What a worker says of itself holds for one boot: what power
    leaves of it is either whole or refused."""
    root = scratch / "root"
    root.mkdir()
    spec = worker_pb2.WorkerSpec(worker_id="w", kind="trainer")
    ready = worker_pb2.BootstrapResult(address="unix:/here", pid=7)
    recording = Recording(root)
    with recording.watching():
        bundle = Bundle(root / "workers", "w")
        lock = bundle.lock()
        assert lock is not None
        bundle.prepare(spec)
        recording.note("prepared")
        durable.publish_file(
            bundle.folder / handshake.BOOTSTRAP,
            json_format.MessageToJson(ready).encode(),
            fsync=False,
        )
        write_exit(bundle.folder, 3, "test")
        os.close(lock)
    for crash in recording.crashes(root):
        bundle = Bundle(root / "workers", "w")
        if crash.promised:
            assert bundle.read_spec() == spec, crash.how
        try:
            assert bundle.read_bootstrap() == ready, crash.how
        except BundleError:
            assert bundle.read_exit() in ("", "exited with code 3: test"), crash.how
        lock = bundle.lock()
        assert lock is not None
        bundle.prepare(spec)
        os.close(lock)
        names = {one.name for one in bundle.folder.iterdir()}
        assert names <= {handshake.SPEC, handshake.LOCK}, crash.how


def test_the_announcement(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`daemon.json` is of one boot too: whole, or a client goes to the usual address."""
    root = scratch / "root"
    root.mkdir()
    monkeypatch.setenv("FIRETITAN_HOME", str(root))
    usual = address.resolve().address
    recording = Recording(root)
    with recording.watching():
        durable.publish_file(root / "daemon.json", b'{"address": "unix:/there"}', fsync=False)
    for crash in recording.crashes(root):
        assert address.resolve().address in (usual, "unix:/there"), crash.how


def test_an_export(scratch: Path) -> None:
    """In a folder of the user's that is made with it."""
    root = scratch / "root"
    root.mkdir()
    saved = scratch / "saved"
    saved.mkdir()
    (saved / "model.safetensors").write_bytes(b"weights" * 100)
    (saved / "config.json").write_bytes(b"{}")
    digest, _ = durable.seal_folder(saved, {})
    target = root / "models" / "mine"
    job = Export("snapshots/s", "base", ((str(saved), digest),), False, str(target))
    recording = Recording(root)
    with recording.watching():
        export(job)
        recording.note("exported")
    for crash in recording.crashes(root, most=512):
        if crash.promised or target.exists():
            assert durable.verify_folder(target, digest), crash.how
        export(job) if not target.exists() else None
        assert [one.name for one in target.parent.iterdir()] == ["mine"], crash.how


def test_a_copied_adapter(scratch: Path) -> None:
    root = scratch / "root"
    root.mkdir()
    source = write_toy(scratch / "adapter")

    async def load() -> None:
        with recording.watching():
            folders = FileFolders(root / "store")
            copy = await folders.import_adapter(str(source))
            recording.note(copy.digest)
        await folders.close()

    recording = Recording(root)
    asyncio.run(load())
    for crash in recording.crashes(root, most=256):
        found = list((root / "store" / "adapters").glob("*"))
        assert found or not crash.promised, crash.how
        for folder in found:
            durable.verify_folder(folder, crash.promised[0] if crash.promised else None)
