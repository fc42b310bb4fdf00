"""R7: what was acknowledged is on the disk after a loss of power, whole, and nothing half is left.

A daemon in this process does what clients ask; each request is recorded, files and ledger together.
Every state that a loss of power may then leave (`support.power_loss`) takes the home's place, is
opened as a daemon opens it at its start, and judged.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
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
from support.power_loss import Recording
from support.sizes import figure, seed, size
from support.sqlite_files import ledger_on_vfs
from support.stubs import LaneClient, Stubs

from firetitan_daemon import durable
from firetitan_daemon.app import Daemon
from firetitan_daemon.config import load_config
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.launch.in_process import InProcessLauncher
from firetitan_daemon.places import Places
from firetitan_daemon.store.folders import KINDS, STAGING, FileFolders
from firetitan_daemon.store.spool import FileSpool
from firetitan_daemon.store.sqlite import SqliteStore

pytestmark = pytest.mark.timeout(size(150, 7200))
STATES = size(60, 3000)
"""Of each request."""
SETTINGS = {
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
    """A daemon whose writes are recorded request by request.

    Args:
        root: Where its home is.
        run: For sockets.
        keeps_operations: Whether what a command did is to survive without a save.
    """

    def __init__(self, root: Path, run: Path, keeps_operations: bool) -> None:
        self.keeps_operations = keeps_operations
        self.root = root
        root.mkdir()
        self.home = root / "home"
        self._run = run
        self.requests: list[Request] = []
        self._facts: Facts = {}

    async def start(self) -> None:
        fsync = {"FIRETITAN_SERVER_FSYNC_OPERATIONS": str(self.keeps_operations).lower()}
        config, _ = load_config(home=self.home, environment=SETTINGS | fsync)
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
        return {operation.name: "done"} if self.keeps_operations else {}

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


async def recover(home: Path, keeps_operations: bool) -> Facts:
    """Open a home as a daemon does at its start; check that all of it is whole; what is there.

    Where operations are not kept, what they asked for may be damaged; reading it says so.
    """
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
            try:
                await spool.read(ref)
            except FiretitanError as error:
                if keeps_operations or error.reason is not Reason.CHECKSUM_MISMATCH:
                    raise
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
    spooled = {one.name for one in places.spool.iterdir()}
    wanted = {Path(ref.path).name for ref in ledger.spool}
    assert spooled == wanted or (not keeps_operations and spooled < wanted)
    half = [one for one in _temporaries(home) if one.parent not in open_saves]
    assert not half, f"left: {half}"
    db = sqlite3.connect(places.database)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()
    facts |= {trainer.name: str(trainer.state) for trainer in ledger.trainers}
    return facts | {model.full_name: model.digest for model in ledger.models}


async def judge(world: World, requests: list[Request], states: int) -> int:
    """Open every state that a loss of power may leave; returns how many there were."""
    count, draw = 0, seed()
    for request in requests:
        for crash in request.recording.crashes(world.root, most=64, sample=states, seed=draw):
            count += 1
            try:
                found = await recover(world.home, world.keeps_operations)
                for name, new in request.promised.items():
                    allowed = set(_LOOKS_GONE) if new == _GONE else {new}
                    if not crash.promised:
                        allowed |= {request.before[name]} | _ON_THE_WAY.get(new, set())
                    assert found.get(name) in allowed, f"{name}: {found.get(name)}, not {allowed}"
            except Exception as error:
                raise AssertionError(f"{request.what}: {crash.how}: {error}") from error
    return count


@pytest.fixture(params=[True, False], ids=["fsync_operations", "default"])
def world(
    scratch: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> World:
    return World(scratch / "root", tmp_path_factory.mktemp("r"), request.param)


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
    count = await judge(world, world.requests, STATES)
    figure(
        "R7",
        states=count,
        requests=len(world.requests),
        fsync_operations=world.keeps_operations,
    )
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
        await judge(world, world.requests[-1:], 400)
