"""Workers that die while the disk or the system refuses, or while their trainer is stopped."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
from firetitan.v1 import checkpoint_service_pb2
from support.managers import TOY, Managers, command, forward_backward
from support.stubs import optim_request

from firetitan_daemon import durable
from firetitan_daemon.control.deployment_requests import DeploymentRequest
from firetitan_daemon.control.recovery import SessionRecovery
from firetitan_daemon.control.session_settings import Wanted
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.ports import Change
from firetitan_daemon.core.records import (
    OperationState,
    ResourceState,
    Session,
    SessionState,
    WorkerSpec,
)
from firetitan_daemon.core.worker_ports import Worker

pytestmark = pytest.mark.timeout(60)
_WORKERS = "firetitan_daemon.control"


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for where in ("services.DISK_RETRY_S", "deployment_workers.DISK_RETRY_S"):
        monkeypatch.setattr(f"{_WORKERS}.{where}", 0.02)


class Refusals:
    """Calls of a function that fail for a few times, once it is told to."""

    def __init__(self, patch: pytest.MonkeyPatch, place: Any, name: str, number: int) -> None:
        self.left = 0
        real = getattr(place, name)

        def refused(*arguments: Any, **options: Any) -> Any:
            if self.left:
                self.left -= 1
                raise OSError(number, os.strerror(number))
            return real(*arguments, **options)

        patch.setattr(place, name, refused)


def refuse_writes(
    managers: Managers, patch: pytest.MonkeyPatch, refused: Callable[[Change], bool], times: int
) -> list[Change]:
    """The ledger refuses some writes for so many times; returns those it has refused."""
    write, found = managers.store.write, list[Change]()

    async def full(change: Change) -> None:
        if refused(change) and len(found) < times:
            found.append(change)
            raise FiretitanError(Reason.STATE_DISK_FULL, "the disk is full")
        await write(change)

    patch.setattr(managers.store, "write", full)
    return found


async def session_of(managers: Managers) -> tuple[Session, Worker]:
    trainer, worker = await managers.trainer()
    session, _ = await managers.sessions.create(trainer, worker, Wanted(), "s")
    await done(managers, session, seq=1)
    return session, worker


async def done(managers: Managers, session: Session, *, seq: int) -> None:
    operation = await managers.sessions.submit(*forward_backward(session, seq=seq))
    assert (await managers.done(operation)).state is OperationState.DONE


def sampler_of(managers: Managers) -> Worker:
    (worker_id,) = managers.deployments.get("d").worker_ids
    worker = managers.pool.live(worker_id)
    assert worker is not None
    return worker


async def until(holds: Callable[[], bool]) -> None:
    """Wait for what happens by itself: processes take long on a busy machine."""
    for _ in range(2000):
        if holds():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it never came to that")


def kill(worker: Worker) -> None:
    worker._process.kill()


def gone_on(managers: Managers, session: Session, former: Worker) -> bool:
    """Whether a session goes on in another worker."""
    active = managers.sessions.get(session.name).state is SessionState.ACTIVE
    return active and managers.trainers.get("t").worker_id != former.spec.worker_id


async def test_a_ledger_that_cannot_be_read_for_a_while_delays_a_replay(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, worker = await session_of(managers)
    read, refused = managers.store.done_operations, 0

    async def broken(name: str, after: int) -> Any:
        nonlocal refused
        refused += 1
        if refused < 3:
            raise FiretitanError(Reason.STATE_NOT_WRITABLE, "disk I/O error")
        return await read(name, after)

    monkeypatch.setattr(managers.store, "done_operations", broken)
    kill(worker)
    await until(lambda: gone_on(managers, session, worker))
    assert refused == 3
    await done(managers, session, seq=2)


async def test_recovery_points_that_are_away_for_a_while_are_not_called_damaged(
    managers: Managers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(f"{_WORKERS}.recovery.DISK_RETRY_S", 0.02)
    session, worker = await session_of(managers)
    recovery = managers.sessions._pipelines[session.name].recovery
    for seq in (2, 4):  # behind two of them there is no way from the origin any more
        recovery._policy.want()
        step = await managers.sessions.submit(*command(session, optim_request(), seq=seq))
        assert (await managers.done(step)).state is OperationState.DONE
        await done(managers, session, seq=seq + 1)
        await until(lambda points=seq // 2: recovery.stats.points == points)
    await die_while_away(managers, worker, "points", caplog)
    await until(lambda: gone_on(managers, session, worker))
    assert recovery.stats.replayed == 1
    await done(managers, session, seq=6)


async def test_a_checkpoint_that_is_away_for_a_while_delays_the_replay_of_its_load(
    managers: Managers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(f"{_WORKERS}.recovery.DISK_RETRY_S", 0.02)
    monkeypatch.setattr(SessionRecovery, "make_point", AsyncMock())
    session, worker = await session_of(managers)
    save = checkpoint_service_pb2.SaveStateRequest(checkpoint_id="c")
    load = checkpoint_service_pb2.LoadStateRequest(checkpoint="c", with_optimizer=True)
    for seq, message in ((2, save), (3, load)):
        sent = await managers.sessions.submit(*command(session, message, seq=seq))
        assert (await managers.done(sent)).state is OperationState.DONE
    await die_while_away(managers, worker, "checkpoints", caplog)
    await until(lambda: gone_on(managers, session, worker))
    await done(managers, session, seq=4)


async def die_while_away(
    managers: Managers, worker: Worker, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """End a worker, and bring what its replay reads back once that is waited for."""
    folder = managers.services.folders._root / kind
    folder.rename(folder.with_name("away"))
    kill(worker)
    await until(lambda: f"{kind} is gone, waiting for it" in caplog.text)
    folder.with_name("away").rename(folder)


def served_by_another(managers: Managers, former: Worker) -> bool:
    replicas = managers.deployments.replica_set("d").workers
    active = managers.deployments.get("d").state is ResourceState.ACTIVE
    return active and bool(replicas) and former not in replicas


REFUSED = [
    pytest.param(durable, "make_folder", errno.ENOSPC, 6, id="no space"),
    pytest.param(durable, "publish_file", errno.EROFS, 6, id="read-only"),
    pytest.param(subprocess, "Popen", errno.EAGAIN, 2, id="no process"),
]


@pytest.mark.parametrize(("place", "name", "number", "times"), REFUSED)
async def test_a_trainer_outlives_starts_that_are_refused(
    processes: Managers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: Any,
    name: str,
    number: int,
    times: int,
) -> None:
    monkeypatch.setattr(f"{_WORKERS}.trainer_workers._REPLACE_PAUSES_S", (0.0, 0.02, 0.02, 0.02))
    refusals = Refusals(monkeypatch, place, name, number)
    session, worker = await session_of(processes)
    refusals.left = times
    kill(worker)
    await until(
        lambda: (
            processes.trainers.get("t").worker_id != worker.spec.worker_id
            and processes.sessions.get(session.name).state is SessionState.ACTIVE
        )
    )
    assert refusals.left == 0
    await done(processes, session, seq=2)
    assert only_live_and_logged(processes, tmp_path, worker)


@pytest.mark.parametrize(("place", "name", "number", "times"), REFUSED)
async def test_a_sampler_outlives_starts_that_are_refused(
    processes: Managers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: Any,
    name: str,
    number: int,
    times: int,
) -> None:
    monkeypatch.setattr(f"{_WORKERS}.deployment_workers._START_PAUSES_S", (0.02, 0.02, 0.02, 0.0))
    refusals = Refusals(monkeypatch, place, name, number)
    await processes.deployment()
    worker = sampler_of(processes)
    refusals.left = times
    kill(worker)
    await until(lambda: served_by_another(processes, worker))
    assert refusals.left == 0
    assert only_live_and_logged(processes, tmp_path, worker)


def only_live_and_logged(managers: Managers, root: Path, dead: Worker) -> bool:
    """Whether nothing but the live worker and the log of the dead one is there."""
    live = {spec.worker_id for spec in managers.pool.specs()}
    folders = {folder.name for folder in (root / "workers").iterdir()}
    return len(live) == 1 and folders == live | {dead.spec.worker_id}


async def test_starts_of_a_sampler_that_fail_are_paced_and_counted(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await managers.deployment()
    pauses = (0.0111, 0.0222, 0.0333, 0.0)
    monkeypatch.setattr(f"{_WORKERS}.deployment_workers._START_PAUSES_S", pauses)
    slept, sleep = list[float](), asyncio.sleep

    async def launch(spec: object) -> Worker:
        raise FiretitanError(Reason.WORKER_UNAVAILABLE, "no process can be had")

    async def noted(seconds: float) -> None:
        if seconds in pauses[:3]:
            slept.append(seconds)
        await sleep(seconds)

    monkeypatch.setattr(managers.services.launcher, "launch", launch)
    monkeypatch.setattr(asyncio, "sleep", noted)
    kill(sampler_of(managers))
    await until(lambda: managers.deployments.get("d").state is ResourceState.FAILED)
    assert slept == [0.0222, 0.0333]  # its death was the first time


def forgets(change: Change) -> bool:
    return bool(change.deleted_workers)


def recovers(change: Change) -> bool:
    return any(one.state is ResourceState.RECOVERING for one in change.deployments)


@pytest.mark.parametrize("refused", [forgets, recovers])
@pytest.mark.parametrize("at_start", [False, True])
async def test_a_sampler_that_dies_while_nothing_can_be_written_is_replaced(
    managers: Managers,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[[Change], bool],
    at_start: bool,
) -> None:
    await managers.deployment()
    worker = sampler_of(managers)
    if at_start:
        await managers.pool.close()  # as a daemon that ends
        managers.pool._live.clear()
        managers.deployments.replica_set("d").remove(worker.spec.worker_id)
        await managers.deployments.update("d", state=ResourceState.RECOVERING)
    found = refuse_writes(managers, monkeypatch, refused, 5)
    kill(worker)
    if at_start:
        await worker.exited()
        await managers.deployments.recover("d")
    await until(lambda: served_by_another(managers, worker))
    assert len(found) == 5
    (spec,) = managers.pool.specs()
    assert (spec.worker_id,) == managers.deployments.get("d").worker_ids
    assert [one.worker_id for one in (await managers.store.load()).workers] == [spec.worker_id]


async def test_a_deployment_whose_sampler_waits_for_space_can_be_deleted(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await managers.deployment()
    found = refuse_writes(managers, monkeypatch, recovers, 10**9)
    kill(sampler_of(managers))
    await until(lambda: len(found) > 2)
    await managers.deployments.delete("d")
    assert not managers.deployments.all() and not managers.pool.specs()


async def test_a_deployment_that_cannot_be_written_stopped_serves_on(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await managers.deployment()
    worker = sampler_of(managers)

    def stops(change: Change) -> bool:
        return any(one.state is ResourceState.STOPPED for one in change.deployments)

    refuse_writes(managers, monkeypatch, stops, 1)
    with pytest.raises(FiretitanError) as caught:
        await managers.deployments.scale("d", 0)
    assert caught.value.reason is Reason.STATE_DISK_FULL
    assert managers.deployments.serving("d")[1] == [worker] and worker._process.alive
    assert (await managers.deployments.scale("d", 0)).state is ResourceState.STOPPED
    assert not worker._process.alive and not managers.pool.specs()


async def test_a_trainer_stops_though_its_worker_cannot_be_forgotten_at_once(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, _ = await session_of(managers)
    found = refuse_writes(managers, monkeypatch, forgets, 3)
    assert await managers.trainers.stop("t")
    assert len(found) == 3 and managers.trainers.get("t").state is ResourceState.STOPPED
    await managers.trainers.ready("t")
    await done(managers, session, seq=2)


async def test_a_daemon_ends_though_a_worker_that_ended_cannot_be_forgotten(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle stop is in the middle of it; the next start sees to what is left."""
    await session_of(managers)
    trainer = managers.trainers.get("t")
    managers.trainers._trainers["t"] = replace(trainer, inactivity_s=1e-9)
    with monkeypatch.context() as patch:
        found = refuse_writes(managers, patch, forgets, 10**9)
        await managers.supervisor._cleaner.expire()
        await until(lambda: len(found) > 2)
        async with asyncio.timeout(20):
            await managers.supervisor.stop(0.1)


async def test_a_sampler_that_does_not_answer_holds_up_no_other_deployment(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind a restart: it lives, and was not reached again."""
    await managers.deployment()
    worker = sampler_of(managers)
    adopt = managers.services.launcher.adopt

    async def silent(spec: WorkerSpec) -> Worker | None:
        if spec.worker_id != worker.spec.worker_id:
            return await adopt(spec)
        raise FiretitanError(Reason.WORKER_UNAVAILABLE, f"{spec.worker_id} does not answer")

    monkeypatch.setattr(managers.services.launcher, "adopt", silent)
    live = managers.pool._live.pop(worker.spec.worker_id)
    with pytest.raises(FiretitanError) as caught:
        await managers.deployments.delete("d")
    assert caught.value.reason is Reason.WORKER_UNAVAILABLE
    other = DeploymentRequest("e", TOY, 0, "", "auto", None, "make-e", "digest")
    assert (await managers.done(await managers.deployments.create(other))).error is None
    # Once it answers, the deployment can be deleted.
    monkeypatch.setattr(managers.services.launcher, "adopt", adopt)
    managers.pool._live[worker.spec.worker_id] = live
    await managers.deployments.delete("d")
    assert [one.id for one in managers.deployments.all()] == ["e"]


async def test_a_deployment_whose_weights_are_being_changed_holds_up_no_other(
    managers: Managers,
) -> None:
    await managers.deployment()
    async with managers.deployments.weights_lock("d"):
        scaling = asyncio.create_task(managers.deployments.scale("d", 0))
        await asyncio.sleep(0.05)
        other = DeploymentRequest("e", TOY, 0, "", "auto", None, "make-e", "digest")
        async with asyncio.timeout(20):
            assert (await managers.done(await managers.deployments.create(other))).error is None
            await managers.deployments.scale("e", 0)
            await managers.deployments.delete("e")
        assert not scaling.done()
    assert (await scaling).state is ResourceState.STOPPED


async def test_a_scaled_deployment_gets_no_sampler_it_was_short_of(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await managers.deployment()
    short = replace(managers.deployments.get("d"), replicas=2, state=ResourceState.RECOVERING)
    managers.deployments._deployments["d"] = short
    found = refuse_writes(managers, monkeypatch, recovers, 10**9)
    making_up = asyncio.create_task(managers.deployments.recover("d"))
    await until(lambda: len(found) > 0)
    managers.deployments._deployments["d"] = replace(short, replicas=1)
    async with asyncio.timeout(20):
        await making_up
    assert len(managers.deployments.get("d").worker_ids) == 1


class SlowRest:
    """A trainer that is being stopped, held where it is seen whether it could be rebuilt."""

    def __init__(self, managers: Managers, patch: pytest.MonkeyPatch, session: Session) -> None:
        self.begun, self.going = asyncio.Event(), asyncio.Event()
        recovery = managers.sessions._pipelines[session.name].recovery
        can_rebuild = recovery.can_rebuild

        async def slow(current: Session) -> bool:
            answer = await can_rebuild(current)
            self.begun.set()
            await self.going.wait()
            return answer

        patch.setattr(recovery, "can_rebuild", slow)


@pytest.mark.parametrize("replaced", ["already", "not yet"])
async def test_a_worker_that_dies_while_its_trainer_is_stopped_is_replaced(
    managers: Managers, monkeypatch: pytest.MonkeyPatch, replaced: str
) -> None:
    session, worker = await session_of(managers)
    rest = SlowRest(managers, monkeypatch, session)
    launch, may_launch = managers.services.launcher.launch, asyncio.Event()

    async def held(spec: Any) -> Worker:
        await may_launch.wait()
        return await launch(spec)

    monkeypatch.setattr(managers.services.launcher, "launch", held)
    stopping = asyncio.create_task(managers.trainers.stop("t"))
    await rest.begun.wait()
    kill(worker)
    if replaced == "already":
        may_launch.set()
    await until(
        lambda: (
            managers.trainers.get("t").worker_id != worker.spec.worker_id
            and managers.trainers.busy("t") is (replaced == "not yet")
        )
    )
    rest.going.set()
    assert not await stopping
    may_launch.set()
    trainer, other = await managers.trainers.ready("t")
    assert trainer.worker_id == other.spec.worker_id != worker.spec.worker_id
    await done(managers, session, seq=2)
    await managers.trainers.delete("t")
    assert not other._process.alive and not managers.pool.specs()
