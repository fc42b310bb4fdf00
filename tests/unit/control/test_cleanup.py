"""Idle stops and clean-ups of what is used, made or replaced in the very moment of its turn."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
from support.managers import Managers, until

from firetitan_daemon.core.records import Cleanup, ResourceState
from firetitan_daemon.core.worker_ports import Worker

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
