"""What keeps a checkpoint or a snapshot, and when its time is over."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.commands import SESSION
from support.services import TurnedClock, services_in

from firetitan_daemon.control.checkpoints import CheckpointManager, hold_snapshot
from firetitan_daemon.control.deployments import DeploymentManager
from firetitan_daemon.control.removal import SavedRemover
from firetitan_daemon.control.sessions import SessionManager
from firetitan_daemon.control.workers import WorkerPool
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.ports import Change, Ledger
from firetitan_daemon.core.records import (
    Checkpoint,
    Deployment,
    Expiry,
    LoadedFrom,
    Operation,
    OperationState,
    ResourceState,
    Session,
    Snapshot,
    SpoolRef,
)

DAY = 86400.0
OPERATION = Operation("op", "LoadState", "x", "r", "d", OperationState.ACCEPTED, 0.0)


class Bench:
    """The remover and what it looks at, without workers."""

    def __init__(self, root: Path) -> None:
        self.clock = TurnedClock()
        self.services = services_in(root, clock=self.clock)
        self.store, self.folders = self.services.store, self.services.folders
        self.checkpoints = CheckpointManager(self.services)
        self.sessions = SessionManager(self.services, self.checkpoints)
        self.deployments = DeploymentManager(self.services, WorkerPool(self.services))
        self.remover = SavedRemover(
            self.services, self.checkpoints, self.sessions, self.deployments
        )

    @property
    def holds(self) -> object:
        return self.services.operations.holds

    async def folder(self, kind: str, name: str) -> Path:
        staging = self.folders.staging()
        (staging / "file").write_text(name)
        return await self.folders.publish(staging, kind, name)

    async def snapshot(
        self, name: str, parent: str | None = None, ttl_s: float | None = None, seq: int = 1
    ) -> Path:
        folder = await self.folder("snapshots", name)
        row = Snapshot(
            name, SESSION.name, "toy", 0, "delta" if parent else "base", "hf_full", parent, 1, seq,
            str(folder), "d", "r", 1, self.clock.now(), expiry=self.expiry(ttl_s),
        )  # fmt: skip
        await self.store.write(Change(snapshots=[row]))
        self.checkpoints.settled([], [row])
        return folder

    async def checkpoint(self, name: str, ttl_s: float | None = None) -> Checkpoint:
        folder = await self.folder("checkpoints", name)
        row = Checkpoint(
            f"{SESSION.name}/checkpoints/{name}", SESSION.name, "toy", 0, 1, 1, str(folder), "d",
            1, self.clock.now(), expiry=self.expiry(ttl_s),
        )  # fmt: skip
        await self.store.write(Change(checkpoints=[row]))
        self.checkpoints.settled([row], [])
        return row

    def expiry(self, ttl_s: float | None) -> Expiry | None:
        if ttl_s is None:
            return None
        return Expiry(ttl_s, self.clock.boot_id(), self.clock.monotonic())

    def deployment(self, **changes: object) -> None:
        made = Deployment("d", "toy", 0, "auto", ResourceState.STOPPED, 0.0)
        pins = [("d", "pinned", "h")]
        self.deployments.restore(Ledger(deployments=[replace(made, **changes)], pins=pins))

    async def open_session(self, session: Session, *operations: Operation) -> None:
        ledger = Ledger(sessions=[session], open_operations=operations)
        self.services.operations.restore(ledger)
        await self.sessions.restore(ledger)

    async def names(self) -> list[str]:
        return [one.id for one in await self.store.snapshots(None)]


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    await bench.services.operations.close()
    await bench.folders.close()


def there(saved: Checkpoint) -> bool:
    return Path(saved.folder).exists()


async def refused(bench: Bench, name: str) -> str:
    with pytest.raises(FiretitanError) as caught:
        await bench.remover.delete_snapshot(name)
    assert caught.value.reason is Reason.SNAPSHOT_IN_USE
    return caught.value.message


async def test_what_nobody_uses_goes_with_its_files(bench: Bench) -> None:
    folder = await bench.snapshot("a")
    checkpoint = await bench.checkpoint("c")
    await bench.remover.delete_snapshot("snapshots/a")
    await bench.remover.delete_checkpoint(checkpoint.name)
    assert not folder.exists() and not there(checkpoint)
    assert await bench.names() == [] == list(await bench.store.checkpoints(None))
    await bench.remover.delete_snapshot("snapshots/a")
    await bench.remover.delete_checkpoint(checkpoint.name)


async def test_a_snapshot_that_is_served_stays_even_where_the_worker_is_stopped(
    bench: Bench,
) -> None:
    folder = await bench.snapshot("served")
    await bench.snapshot("pinned")
    bench.deployment(active_snapshot="served")
    assert "deployments/d" in await refused(bench, "served")
    assert "deployments/d" in await refused(bench, "pinned")
    assert folder.exists()
    bench.deployment()
    await bench.remover.delete_snapshot("served")
    assert not folder.exists()


async def test_what_an_operation_uses_stays_until_it_ends(bench: Bench) -> None:
    await bench.snapshot("a")
    await hold_snapshot(bench.services, "snapshots/a", "op")
    await refused(bench, "a")
    bench.holds.release("op")
    await bench.remover.delete_snapshot("a")
    with pytest.raises(FiretitanError, match="was not found"):
        await hold_snapshot(bench.services, "snapshots/a", "op")


async def test_operations_of_a_former_daemon_keep_what_they_read(bench: Bench) -> None:
    checkpoint = await bench.checkpoint("c")
    reads = LoadedFrom(checkpoint.folder, "d")
    loading = replace(OPERATION, loaded=reads)
    ledger = Ledger(open_operations=[loading])
    bench.services.operations.restore(ledger)
    await bench.checkpoints.restore(ledger)
    with pytest.raises(FiretitanError) as caught:
        await bench.remover.delete_checkpoint(checkpoint.name)
    assert caught.value.reason is Reason.CHECKPOINT_IN_USE
    # A replay may need to read it once more: it is gone from the list, its files stay.
    kept = replace(loading, state=OperationState.DONE, payload=SpoolRef("/p", 1, "d"))
    await bench.services.operations.write(Change(operations=[kept]))
    await bench.remover.delete_checkpoint(checkpoint.name)
    assert await bench.store.checkpoints(None) == []
    assert there(checkpoint)
    bench.holds.release(kept.id)
    await bench.holds.close()
    assert not there(checkpoint)


async def test_a_replaced_folder_goes_when_its_last_reader_ends(bench: Bench) -> None:
    folder = await bench.folder("checkpoints", "old")
    for reader in ("one", "two"):
        bench.holds.take(str(folder), reader)
    await bench.holds.retire(folder, bench.folders)
    bench.holds.release("one")
    await bench.holds.close()
    assert folder.exists()
    bench.holds.release("two")
    await bench.holds.close()
    assert not folder.exists()


async def test_the_parent_of_a_delta_that_is_being_saved_stays(bench: Bench) -> None:
    await bench.snapshot("head")
    session = replace(SESSION, chain_head="head")
    saving = replace(OPERATION, method="SaveSnapshot", target=session.name)
    await bench.open_session(session, saving)
    assert "being saved" in await refused(bench, "head")
    bench.services.operations.restore(Ledger())
    await bench.remover.delete_snapshot("head")


async def test_a_chain_that_is_due_goes_as_a_whole_and_not_before_its_newest(
    bench: Bench,
) -> None:
    await bench.snapshot("base", ttl_s=10, seq=1)
    await bench.snapshot("middle", "base", ttl_s=20, seq=2)
    await bench.snapshot("last", "middle", ttl_s=30, seq=3)
    await bench.snapshot("other", ttl_s=40, seq=4)
    bench.clock.running += 25
    await bench.remover.expire()
    assert await bench.names() == ["base", "middle", "last", "other"]
    bench.clock.running += 10
    await bench.remover.expire()
    assert await bench.names() == ["other"]


async def test_what_is_due_but_served_goes_once_it_is_not(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    await bench.snapshot("served", ttl_s=10)
    bench.deployment(active_snapshot="served")
    bench.clock.running += 11
    with caplog.at_level("INFO"):
        await bench.remover.expire()
        await bench.remover.expire()
    assert await bench.names() == ["served"]
    assert len([one for one in caplog.records if "expired but kept" in one.message]) == 1
    bench.deployment()
    await bench.remover.expire()
    assert await bench.names() == []


async def test_a_jump_of_the_wall_clock_deletes_nothing_early_or_late(bench: Bench) -> None:
    checkpoint = await bench.checkpoint("c", ttl_s=60)
    for jump in (DAY, -2 * DAY):
        bench.clock.wall += jump
        await bench.remover.expire()
        assert await bench.store.checkpoint(checkpoint.name) == checkpoint
    bench.clock.running += 60
    await bench.remover.expire()
    assert await bench.store.checkpoint(checkpoint.name) is None


async def test_behind_a_reboot_the_wall_clock_counts(bench: Bench) -> None:
    await bench.snapshot("a", ttl_s=60)
    bench.clock.boot, bench.clock.running = "second", 1e6
    bench.clock.wall += 59
    await bench.remover.expire()
    assert await bench.names() == ["a"]
    bench.clock.wall += 1
    await bench.remover.expire()
    assert await bench.names() == []


async def test_a_checkpoint_saved_anew_lives_by_its_own_time(bench: Bench) -> None:
    await bench.checkpoint("c", ttl_s=10)
    anew = await bench.checkpoint("c")
    bench.clock.running += 11
    await bench.remover.expire()
    assert await bench.store.checkpoints(None) == [anew]
    assert there(anew)


async def test_a_new_daemon_knows_what_expires(bench: Bench) -> None:
    await bench.snapshot("a", ttl_s=10)
    bench.checkpoints.expiring.clear()
    await bench.checkpoints.restore(await bench.store.load())
    bench.clock.running += 10
    await bench.remover.expire()
    assert await bench.names() == []
