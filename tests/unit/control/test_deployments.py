"""Deployments and hotloads where workers die and others come between."""

from __future__ import annotations

import asyncio

import pytest
from support.held_writes import HeldWrites
from support.managers import TOY, Managers, kill

from firetitan_daemon.control.deployment_requests import DeploymentRequest
from firetitan_daemon.control.replica_set import ReplicaSet
from firetitan_daemon.control.switching import Switch
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.records import (
    Deployment,
    ResourceState,
    WorkerKind,
)

pytestmark = pytest.mark.timeout(30)


async def test_of_two_hotloads_with_one_etag_one_is_refused(managers: Managers) -> None:
    deployment = await managers.deployment()
    await managers.snapshots("a-01234567", "b-01234567")
    await managers.hotload("a-01234567", etag=deployment.etag)
    with pytest.raises(FiretitanError) as caught:
        await managers.hotload("b-01234567", etag=deployment.etag)
    assert caught.value.reason is Reason.ETAG_MISMATCH


async def test_an_etag_is_compared_with_the_record_as_it_is_by_then(managers: Managers) -> None:
    deployment = await managers.deployment()
    await managers.snapshots("a-01234567")
    call = asyncio.create_task(managers.hotload("a-01234567", etag=deployment.etag))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await managers.deployments.update("d", trainer_id="other")
    with pytest.raises(FiretitanError) as caught:
        await call
    assert caught.value.reason is Reason.ETAG_MISMATCH


async def test_hotloads_apply_in_the_order_they_were_accepted(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await managers.deployment()
    await managers.snapshots("a-01234567", "b-01234567")
    applied: list[str] = []

    async def switch(deployment: Deployment, replicas: ReplicaSet, switch: Switch) -> None:
        applied.append(switch.snapshot_id)

    monkeypatch.setattr(managers.syncer._switcher, "switch", switch)
    await managers.deployments.update("d", state=ResourceState.RECOVERING)
    first = await managers.hotload("a-01234567")
    await asyncio.sleep(0.05)
    second = await managers.hotload("b-01234567")
    # Just after the second began to wait: its turn would come before the first's.
    await asyncio.sleep(0.07)
    await managers.deployments.update("d", state=ResourceState.ACTIVE)
    await managers.done(second)
    await managers.done(first)
    assert applied == ["a-01234567", "b-01234567"]
    assert managers.deployments.get("d").active_snapshot == "b-01234567"


async def test_hotloads_that_wait_are_limited(managers: Managers) -> None:
    await managers.deployment()
    await managers.snapshots("a-01234567")
    await managers.deployments.update("d", state=ResourceState.RECOVERING)
    allowed = managers.services.limits.max_session_operations
    for number in range(allowed):
        await managers.hotload("a-01234567", request_id=f"request-{number}")
    with pytest.raises(FiretitanError) as caught:
        await managers.hotload("a-01234567", request_id="one too many")
    assert caught.value.reason is Reason.QUEUE_FULL
    assert caught.value.metadata["limit"] == "max_session_operations"


async def test_a_dead_worker_does_not_bring_a_deleted_deployment_back(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = await managers.deployment()
    worker = managers.pool.live(deployment.worker_ids[0])
    assert worker is not None
    await kill(managers, worker, monkeypatch)
    await managers.deployments.delete("d")
    await asyncio.sleep(0.5)
    assert not managers.deployments.all()
    assert not [spec for spec in managers.pool.specs() if spec.kind is WorkerKind.SAMPLER]


async def test_a_dead_worker_does_not_start_a_deployment_that_was_stopped(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = await managers.deployment()
    worker = managers.pool.live(deployment.worker_ids[0])
    assert worker is not None
    await kill(managers, worker, monkeypatch)
    await managers.deployments.scale("d", 0)
    await asyncio.sleep(0.5)
    assert managers.deployments.get("d").state is ResourceState.STOPPED


async def test_who_uses_a_deployment_while_it_is_scaled_changes_no_number(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await managers.deployment()
    await managers.deployments.scale("d", 0)
    starts = HeldWrites(
        managers.store,
        monkeypatch,
        lambda change: any(one.state is ResourceState.RECOVERING for one in change.deployments),
    )
    scaling = asyncio.create_task(managers.deployments.scale("d", 3))
    await starts.begun.wait()
    using = asyncio.create_task(managers.deployments.ready("d"))
    await asyncio.sleep(0.02)
    starts.going.set()
    await asyncio.gather(scaling, using)
    deployment = managers.deployments.get("d")
    assert (deployment.replicas, len(deployment.worker_ids)) == (3, 3)


@pytest.mark.parametrize("inactivity_s", [None, 60.0])
async def test_who_asks_for_a_deployment_while_its_row_is_written_is_answered(
    managers: Managers, monkeypatch: pytest.MonkeyPatch, inactivity_s: float | None
) -> None:
    active = HeldWrites(
        managers.store,
        monkeypatch,
        lambda change: any(one.state is ResourceState.ACTIVE for one in change.deployments),
    )
    first = await managers.deployments.create(
        DeploymentRequest("d", TOY, 0, "", "auto", None, "a", "digest")
    )
    await active.begun.wait()
    request = DeploymentRequest(
        "d", TOY, 0, "", "auto", None, "b", "digest", inactivity_s=inactivity_s
    )
    second = asyncio.create_task(managers.deployments.create(request))
    for _ in range(20):
        await asyncio.sleep(0)
    active.going.set()
    for operation in (first, await second):
        assert (await managers.done(operation)).error is None
    (row,) = (await managers.store.load()).deployments
    assert row == managers.deployments.get("d") and row.state is ResourceState.ACTIVE
