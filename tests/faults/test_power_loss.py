"""R7: what was acknowledged is on the disk after a loss of power, whole, and nothing half is left.

A daemon in this process does what clients ask; each request is recorded, files and ledger together.
Every state that a loss of power may then leave (`support.power_loss`) takes the home's place, is
opened as a daemon opens it at its start, and judged.
"""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from firetitan.v1 import (
    checkpoint_pb2,
    checkpoint_service_pb2,
    model_service_pb2,
    operation_pb2,
    system_service_pb2,
    trainer_service_pb2,
)
from firetitan.worker.v1 import worker_pb2
from google.protobuf import json_format
from support.adapters import write_toy
from support.power_loss import Recording, Sync
from support.sizes import figure, seed, size
from support.sqlite_files import ledger_on_vfs
from support.stubs import LaneClient, Stubs

from firetitan_client import address
from firetitan_daemon import durable, handshake
from firetitan_daemon.app import Daemon
from firetitan_daemon.config import load_config
from firetitan_daemon.core.errors import FiretitanError
from firetitan_daemon.core.ports import Change
from firetitan_daemon.core.records import Operation, OperationState, ResourceState, Trainer
from firetitan_daemon.engine.exporter import Export, export
from firetitan_daemon.launch.bundle import Bundle, BundleError
from firetitan_daemon.launch.in_process import InProcessLauncher
from firetitan_daemon.places import Places
from firetitan_daemon.store import schema
from firetitan_daemon.store.codec import encode
from firetitan_daemon.store.folders import KINDS, STAGING, FileFolders
from firetitan_daemon.store.spool import FileSpool
from firetitan_daemon.store.sqlite import SqliteStore
from firetitan_daemon.worker.__main__ import write_exit

pytestmark = pytest.mark.timeout(size(150, 7200))
STATES = size(60, 3000)
"""Of each request."""
SETTINGS = {
    "FIRETITAN_SERVER_FSYNC_OPERATIONS": "true",
    "FIRETITAN_RECOVERY_INTERVAL_S": "0",
    "FIRETITAN_RECOVERY_COST_SHARE": "1000",
}


Facts = dict[str, str | None]
"""What is to be found, by name; None: nothing."""


@dataclass
class Request:
    """What a client asked for, and what happened on the disk meanwhile."""

    what: str
    recording: Recording
    promised: Facts = field(default_factory=dict)
    before: Facts = field(default_factory=dict)


_ON_THE_WAY: dict[str | None, set[str | None]] = {
    "done": {"accepted", "dispatched"},
    "active": {"creating"},
}
_GONE = "gone"
_LOOKS_GONE = {"deleting", "deleted", "closed", None}


class World:
    """A daemon whose writes are recorded request by request."""

    def __init__(self, root: Path, run: Path) -> None:
        self.root = root
        root.mkdir()
        self.home = root / "home"
        self._run = run
        self.requests: list[Request] = []
        self._facts: Facts = {}

    async def start(self) -> None:
        config, _ = load_config(home=self.home, environment=SETTINGS)
        self._launcher = InProcessLauncher(self._run)
        self.daemon = Daemon(config, self._launcher)
        self.stubs = Stubs(await self.daemon.start())

    async def begin(self) -> None:
        """Start on a home that is not there yet, and open a session."""
        recording = self._record("begin")
        with recording.watching():
            await self.start()
            await asyncio.to_thread(self.stubs.create_trainer)
            session = await asyncio.to_thread(self.stubs.session)
            self._promise({"trainers/t": "active", session: "active"})
        self.lane = await asyncio.to_thread(LaneClient, self.stubs, session, "script")

    async def ask(self, what: str, request: Callable[[], Facts]) -> None:
        """Make a request; what it returns is promised once it was answered."""
        with self._record(what).watching():
            self._promise(await asyncio.to_thread(request))

    def _record(self, what: str) -> Recording:
        recording = Recording(self.root, ignored=["state.db.ballast"])
        self.requests.append(Request(what, recording))
        return recording

    def _promise(self, promised: Facts) -> None:
        request = self.requests[-1]
        request.recording.note(request.what)
        request.promised = promised
        request.before = {name: self._facts.get(name) for name in promised}
        self._facts |= promised

    async def stop(self) -> None:
        self.stubs.channel.close()
        await self.daemon.stop()
        for _, process, _ in self._launcher._live.values():
            process.kill()
            await process.wait()

    # -- requests ------------------------------------------------------------------------------

    def done(self, operation: operation_pb2.Operation) -> Facts:
        self.stubs.done(operation)
        return {operation.name: "done"}

    def save_state(self) -> Facts:
        saved = self.stubs.done(self.lane.save_state("c")).checkpoint
        return {saved.name: saved.digest}

    def save_snapshot(self) -> Facts:
        saved = self.stubs.done(self.lane.save_snapshot("s")).snapshot
        self.snapshot = saved
        return {saved.name: saved.digest}

    def step_with_a_point(self) -> Facts:
        before = self._points()
        facts = self.done(self.lane.forward_backward()) | self.done(self.lane.optim_step())
        deadline = time.monotonic() + 20
        while self._points() == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return facts

    def _points(self) -> int:
        request = system_service_pb2.GetSystemInfoRequest()
        return int(self.stubs.system.GetSystemInfo(request).recoveries[0].points)

    def promote(self) -> Facts:
        request = model_service_pb2.PromoteCheckpointRequest(
            checkpoint=self.snapshot.name, model_id="m"
        )
        model = self.stubs.models.PromoteCheckpoint(request).model
        return {model.name: self.snapshot.digest}

    def delete_checkpoint(self) -> Facts:
        name = f"{self.lane.session}/checkpoints/c"
        self.stubs.checkpoints.DeleteCheckpoint(
            checkpoint_service_pb2.DeleteCheckpointRequest(name=name)
        )
        return {name: None}

    def delete_trainer(self) -> Facts:
        request = trainer_service_pb2.DeleteTrainerRequest(name="trainers/t")
        self.stubs.trainers.DeleteTrainer(request)
        points = self.home / "store" / "points"
        deadline = time.monotonic() + 20
        while list(points.iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return {"trainers/t": _GONE, self.lane.session: _GONE}


def _temporaries(home: Path) -> list[Path]:
    return list(home.rglob(f"{durable.TEMPORARY_PREFIX}*"))


async def recover(home: Path) -> Facts:
    """Open a home as a daemon does at its start; check that all of it is whole; what is there."""
    places = Places(home)
    places.make()
    durable.sweep_temporaries(home)
    store = SqliteStore(places.database)
    spool, folders = FileSpool(places.spool), FileFolders(places.store)
    try:
        ledger = await store.load()
        await spool.sweep(ledger.spool)
        await folders.sweep(ledger.folders)
        for ref in ledger.spool:
            await spool.read(ref)
        saved = [*await store.checkpoints(None), *await store.snapshots(None)]
        facts: Facts = {row.name: row.digest for row in saved}
        for session in ledger.sessions:
            facts[session.name] = str(session.state)
            operations = await store.operations(
                session.name, pending_only=False, after_id="", limit=1000
            )
            facts |= {one.name: str(one.state) for one in operations}
    finally:
        for part in (store, spool, folders):
            await part.close()
    for row in [*saved, *ledger.recovery_points, *ledger.models]:
        durable.verify_folder(Path(row.folder), row.digest)
    named = {Path(folder) for folder in ledger.folders}
    open_saves = [one for one in named if one.parent.name == STAGING]
    there = {one for kind in (STAGING, *KINDS) for one in (places.store / kind).iterdir()}
    for stray in there - named:
        assert any(stray.name.endswith(f"-{one.name}") for one in open_saves), f"left: {stray}"
    assert {one.name for one in places.spool.iterdir()} == {Path(r.path).name for r in ledger.spool}
    half = [one for one in _temporaries(home) if one.parent not in open_saves]
    assert not half, f"left: {half}"
    db = sqlite3.connect(places.database)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()
    facts |= {trainer.name: str(trainer.state) for trainer in ledger.trainers}
    return facts | {model.full_name: model.digest for model in ledger.models}


async def judge(requests: list[Request], root: Path, states: int) -> int:
    """Open every state that a loss of power may leave; returns how many there were."""
    count, draw = 0, seed()
    for request in requests:
        for crash in request.recording.crashes(root, most=64, sample=states, seed=draw):
            count += 1
            try:
                found = await recover(root / "home")
                for name, new in request.promised.items():
                    allowed = set(_LOOKS_GONE) if new == _GONE else {new}
                    if not crash.promised:
                        allowed |= {request.before[name]} | _ON_THE_WAY.get(new, set())
                    assert found.get(name) in allowed, f"{name}: {found.get(name)}, not {allowed}"
            except Exception as error:
                raise AssertionError(f"{request.what}: {crash.how}: {error}") from error
    return count


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be: what is lost is decided here, not by the file system."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def world(scratch: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(scratch / "root", tmp_path_factory.mktemp("r"))


async def test_what_was_acknowledged_is_there(world: World) -> None:
    with ledger_on_vfs():
        await world.begin()
        try:
            lane = world.lane
            await world.ask("a command", lambda: world.done(lane.forward_backward()))
            await world.ask("a recovery point", world.step_with_a_point)
            await world.ask("the next recovery point", world.step_with_a_point)
            await world.ask("a checkpoint", world.save_state)
            await asyncio.to_thread(lane.step)
            await world.ask("a checkpoint of a used name", world.save_state)
            await world.ask("a base", world.save_snapshot)
            await world.ask("promotion", world.promote)
            await asyncio.to_thread(lane.step)
            await world.ask("a delta", world.save_snapshot)
            assert world.snapshot.kind == checkpoint_pb2.Snapshot.KIND_DELTA
            await world.ask("deleting a checkpoint", world.delete_checkpoint)
            await world.ask("deleting the trainer", world.delete_trainer)
        finally:
            await world.stop()
    count = await judge(world.requests, world.root, STATES)
    figure("R7", states=count, requests=len(world.requests))
    assert count > 5 * len(world.requests)


@pytest.mark.parametrize("left_out", ["file", "folder"])
async def test_a_missing_fsync_of_a_save_is_found(
    world: World, monkeypatch: pytest.MonkeyPatch, left_out: str
) -> None:
    """The judge can say no: without one kind of fsync what was promised is damaged or gone."""
    with ledger_on_vfs():
        await world.begin()
        try:
            real = durable.fsync_path
            monkeypatch.setattr(
                durable,
                "fsync_path",
                lambda path: real(path) if path.is_dir() != (left_out == "folder") else None,
            )
            await world.ask("a checkpoint", world.save_state)
            monkeypatch.undo()
        finally:
            await world.stop()
    with pytest.raises(AssertionError, match="a checkpoint: power lost"):
        await judge(world.requests[-1:], world.root, 400)


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
