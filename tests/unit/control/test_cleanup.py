"""Idle stops and clean-ups of what is used, made or replaced in the very moment of its turn."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
from support.managers import Managers, forward_backward, until

from firetitan_daemon.control import cleanup
from firetitan_daemon.control.session_settings import Wanted
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.records import Cleanup, ResourceState
from firetitan_daemon.core.worker_ports import SILENT, Worker

pytestmark = pytest.mark.timeout(30)
TRAINER, DEPLOYMENT = "trainers/t", "deployments/d"


@pytest.mark.parametrize("name", [TRAINER, DEPLOYMENT])
@pytest.mark.parametrize("used", [True, False])
async def test_what_is_used_while_its_idle_stop_waits_goes_on(
    managers: Managers, name: str, used: bool
) -> None:
    trainers, deployments = managers.trainers, managers.deployments
    cleaner = managers.supervisor._cleaner
    if name == TRAINER:
        trainer, _ = await managers.trainer()
        trainers._trainers["t"] = replace(trainer, inactivity_s=1e-9)
        lock = trainers._lock("t")
    else:
        deployment = await managers.deployment()
        deployments._deployments["d"] = replace(deployment, inactivity_s=1e-9)
        lock = deployments._lock("d")
    with ExitStack() as uses:
        async with lock:
            await cleaner.expire()
            await asyncio.sleep(0.02)
            assert name in cleaner._stopping
            if used:
                uses.enter_context(managers.services.activity.using(name))
        await cleaner.close(10)
        found = trainers.get("t") if name == TRAINER else deployments.get("d")
        assert found.state is (ResourceState.ACTIVE if used else ResourceState.STOPPED)
        assert len(managers.pool.specs()) == used


async def test_a_trainer_whose_worker_is_being_replaced_is_stopped_behind_that(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, worker = await managers.trainer()
    launch, may_launch = managers.services.launcher.launch, asyncio.Event()

    async def held(spec: Any) -> Worker:
        await may_launch.wait()
        return await launch(spec)

    monkeypatch.setattr(managers.services.launcher, "launch", held)
    await managers.leases.hold("a", "a", {TRAINER: Cleanup.STOP}, None)
    worker._process.kill()
    await until(lambda: managers.trainers.get("t").state is ResourceState.RECOVERING)
    asked = managers.leases.release("a", {TRAINER: Cleanup.STOP}, everything=True)
    leaving = asyncio.create_task(asked)
    await asyncio.sleep(0.1)
    may_launch.set()
    (outcome,) = await leaving
    assert (outcome.cleanup, outcome.error) == (Cleanup.STOP, None)
    assert managers.trainers.get("t").state is ResourceState.STOPPED


@pytest.mark.parametrize("what", [Cleanup.STOP, Cleanup.DELETE])
async def test_who_leaves_a_sampler_that_hangs_does_not_wait_for_what_it_was_to_do(
    managers: Managers, monkeypatch: pytest.MonkeyPatch, what: Cleanup
) -> None:
    monkeypatch.setattr(cleanup, "_LOOK_S", 0.05)
    monkeypatch.setattr("firetitan_daemon.control.deployments._STUCK_S", 0.5)
    deployment = await managers.deployment()
    await managers.snapshots("new-01234567")

    async def hangs(*_: object, **__: object) -> Any:
        raise FiretitanError(Reason.WORKER_UNAVAILABLE, "silent", **{SILENT: "true"})

    monkeypatch.setattr(managers.syncer._switcher, "switch", hangs)
    operation = await managers.hotload("new-01234567")
    with managers.services.activity.using(DEPLOYMENT):
        leaving = asyncio.create_task(
            managers.leases.release("a", {DEPLOYMENT: what}, everything=True)
        )
        await asyncio.sleep(0.2)
        # As far as is known it only takes its time.
        assert not leaving.done()
        managers.pool.hangs(deployment.worker_ids[0])
        await asyncio.sleep(0.2)
        assert not leaving.done(), "one that misses a question may be busy"
        async with asyncio.timeout(10):
            (outcome,) = await leaving
    if what is Cleanup.STOP:
        # It would be started again for the hotload: stopped behind that.
        assert outcome.error is not None and outcome.error.reason is Reason.RECOVERING
        assert [one.name for one in managers.leases.cleanups()] == [DEPLOYMENT]
        await managers.deployments.delete("d")
    else:
        assert outcome.error is None
    ended = (await managers.done(operation)).error
    assert ended is not None and ended.reason == Reason.CLOSED


async def test_a_trainer_that_is_not_back_for_long_is_told_of_and_stopped_later(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleanup, "_COMES_BACK_S", 0.3)
    trainer, _ = await managers.trainer()
    managers.trainers._trainers["t"] = replace(trainer, state=ResourceState.RECOVERING)
    async with asyncio.timeout(5):
        (outcome,) = await managers.leases.release("a", {TRAINER: Cleanup.STOP}, everything=True)
    assert outcome.error is not None and outcome.error.reason is Reason.RECOVERING
    assert [one.name for one in managers.leases.cleanups()] == [TRAINER]


@pytest.mark.parametrize("what", [Cleanup.STOP, Cleanup.DELETE])
async def test_who_leaves_a_session_that_runs_no_more_does_not_wait_for_its_commands(
    managers: Managers, monkeypatch: pytest.MonkeyPatch, what: Cleanup
) -> None:
    monkeypatch.setattr(cleanup, "_LOOK_S", 0.05)
    trainer, worker = await managers.trainer()
    session, _ = await managers.sessions.create(trainer, worker, Wanted(), "s")
    going = asyncio.Event()

    async def settle(*_: object, **__: object) -> None:
        await going.wait()
        raise RuntimeError("unforeseen")

    rows = managers.sessions._pipelines[session.name]._rows
    monkeypatch.setattr(rows, "settle", settle)
    operation = await managers.sessions.submit(*forward_backward(session, seq=1))
    leaving = asyncio.create_task(managers.leases.release("a", {TRAINER: what}, everything=True))
    await asyncio.sleep(0.2)
    assert not leaving.done()
    going.set()
    async with asyncio.timeout(10):
        (outcome,) = await leaving
    assert outcome.error is None
    if what is Cleanup.DELETE:
        ended = (await managers.done(operation)).error
        assert ended is not None and ended.reason == Reason.CLOSED
