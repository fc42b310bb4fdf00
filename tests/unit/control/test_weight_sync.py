"""Hotloads that a former daemon accepted, and what has switched where nothing can be written."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from firetitan.v1 import deployment_service_pb2
from support.managers import TOY, Managers, until

from firetitan_daemon.control.deployment_requests import DeploymentRequest
from firetitan_daemon.control.provisioning import new_operation
from firetitan_daemon.control.replica_set import ReplicaSet
from firetitan_daemon.control.switching import Switch
from firetitan_daemon.control.weight_sync import METHOD
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.ports import Change
from firetitan_daemon.core.records import (
    Deployment,
    ErrorRecord,
    Operation,
    ResourceState,
    SpoolRef,
)

pytestmark = pytest.mark.timeout(30)
OLD, NEW = "old-01234567", "new-01234567"


@pytest.fixture
def switched(managers: Managers, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(deployment id, snapshot id) of each switch; these need no files."""
    done: list[tuple[str, str]] = []

    async def switch(deployment: Deployment, replicas: ReplicaSet, switch: Switch) -> None:
        done.append((deployment.id, switch.snapshot_id))

    monkeypatch.setattr(managers.syncer._switcher, "switch", switch)
    return done


async def accepted(managers: Managers, deployment: str, snapshot: str) -> Operation:
    """A hotload as a daemon that ended has left it."""
    name = f"deployments/{deployment}"
    request = deployment_service_pb2.HotloadSnapshotRequest(
        deployment=name, snapshot=f"snapshots/{snapshot}"
    )
    ref = await managers.services.spool.write(request.SerializeToString())
    now = managers.services.clock.now()
    operation = new_operation(METHOD, name, "", ref.digest, now, ref)
    await managers.services.operations.write(Change(operations=[operation]))
    return operation


def spooled(operation: Operation) -> Path:
    assert operation.payload is not None
    return Path(operation.payload.path)


async def second_deployment(managers: Managers) -> None:
    request = DeploymentRequest("e", TOY, 0, "", "auto", None, "make-e", "digest")
    await managers.done(await managers.deployments.create(request))


async def test_a_hotload_whose_payload_is_damaged_fails_and_the_others_go_on(
    managers: Managers, switched: list[tuple[str, str]]
) -> None:
    await managers.deployment()
    await second_deployment(managers)
    await managers.snapshots(OLD, NEW)
    lost, torn = await accepted(managers, "d", OLD), await accepted(managers, "d", OLD)
    behind, beside = await accepted(managers, "d", NEW), await accepted(managers, "e", NEW)
    spooled(lost).unlink()
    spooled(torn).write_bytes(spooled(torn).read_bytes()[:-1])
    await managers.syncer.resume()
    for operation in (lost, torn):
        error = (await managers.done(operation)).error
        assert error is not None and error.reason == Reason.CHECKSUM_MISMATCH
        assert spooled(operation).name in error.message
    for operation in (behind, beside):
        assert (await managers.done(operation)).error is None
    assert sorted(switched) == [("d", NEW), ("e", NEW)]
    assert managers.deployments.get("d").active_snapshot == NEW


async def test_a_hotload_of_a_deleted_deployment_is_none_of_the_next_of_its_name(
    managers: Managers, switched: list[tuple[str, str]]
) -> None:
    await managers.deployment()
    await managers.snapshots(NEW)
    await managers.deployments.update("d", state=ResourceState.RECOVERING)
    operation = await managers.hotload(NEW)
    await asyncio.sleep(0.05)
    await managers.deployments.delete("d")
    request = DeploymentRequest("d", TOY, 0, "", "auto", None, "make-another", "digest")
    await managers.done(await managers.deployments.create(request))
    await asyncio.sleep(0.3)
    assert switched == [] and managers.deployments.get("d").active_snapshot == ""
    ended = await managers.done(operation)
    assert ended.error is not None and ended.error.reason == Reason.CLOSED


async def test_a_hotload_that_waits_for_the_disk_is_not_written_onto_the_next_of_its_name(
    managers: Managers, switched: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firetitan_daemon.control.services.DISK_RETRY_S", 2.0)
    await managers.deployment()
    await managers.snapshots(NEW)
    write, refused = managers.store.write, asyncio.Event()

    async def refusing(change: Change) -> None:
        if not refused.is_set() and any(one.done for one in change.operations):
            refused.set()
            raise FiretitanError(Reason.STATE_DISK_FULL, "the ledger cannot be written")
        await write(change)

    monkeypatch.setattr(managers.store, "write", refusing)
    operation = await managers.hotload(NEW)
    await refused.wait()
    await managers.deployments.delete("d")
    request = DeploymentRequest("d", TOY, 0, "", "auto", None, "make-another", "digest")
    await managers.deployments.create(request)
    assert managers.syncer._tasks
    await until(lambda: not managers.syncer._tasks)
    assert switched == [("d", NEW)] and managers.deployments.get("d").active_snapshot == ""
    ended = await managers.done(operation)
    assert ended.error is not None and ended.error.reason == Reason.CLOSED


async def test_why_a_hotload_failed_outlives_the_sampler(
    managers: Managers, switched: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    await managers.deployment()
    await managers.snapshots(OLD, NEW)
    (worker,) = managers.deployments.replica_set("d").workers

    async def damaged(*_: object) -> None:
        raise FiretitanError(Reason.CHECKSUM_MISMATCH, "weights: damaged")

    with monkeypatch.context() as patch:
        patch.setattr(managers.syncer._switcher, "switch", damaged)
        operation = await managers.done(await managers.hotload(OLD))
    assert operation.error is not None and operation.error.reason == Reason.CHECKSUM_MISMATCH
    worker._process.kill()
    replicas = managers.deployments.replica_set("d")
    await until(lambda: replicas.workers not in ([], [worker]))
    error = managers.deployments.get("d").error
    assert error is not None and error.reason == Reason.CHECKSUM_MISMATCH
    assert error.metadata["operation"] == operation.name
    await managers.done(await managers.hotload(NEW))
    assert managers.deployments.get("d").error is None


async def test_a_hotload_waits_for_a_spool_that_is_away(
    managers: Managers, switched: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    await managers.deployment()
    await managers.snapshots(OLD, NEW)
    first, second = await accepted(managers, "d", OLD), await accepted(managers, "d", NEW)
    spool, elsewhere = spooled(first).parent, spooled(first).parent.with_name("elsewhere")
    read, refused = managers.services.spool.read, asyncio.Event()

    async def watched(ref: SpoolRef) -> bytes:
        try:
            return await read(ref)
        except FiretitanError:
            refused.set()
            raise

    monkeypatch.setattr(managers.services.spool, "read", watched)
    spool.rename(elsewhere)
    await managers.syncer.resume()
    await refused.wait()
    elsewhere.rename(spool)
    for operation in (first, second):
        assert (await managers.done(operation)).error is None
    assert switched == [("d", OLD), ("d", NEW)], "not in the order they were accepted"


@pytest.mark.parametrize("trouble", [Reason.STATE_NOT_WRITABLE, Reason.STATE_DISK_FULL])
@pytest.mark.parametrize("outcome", ["served", "failed", "down"])
async def test_the_end_of_a_hotload_is_written_once_it_can_be(
    managers: Managers,
    switched: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    outcome: str,
    trouble: Reason,
) -> None:
    monkeypatch.setattr("firetitan_daemon.control.services.DISK_RETRY_S", 0.02)
    await managers.deployment()
    await managers.snapshots(NEW)
    if outcome == "down":
        error = ErrorRecord(str(Reason.WORKER_UNAVAILABLE), "its worker ended")
        await managers.deployments.update("d", state=ResourceState.FAILED, error=error)
    if outcome == "failed":

        async def damaged(*_: object) -> None:
            raise FiretitanError(Reason.CHECKSUM_MISMATCH, "weights: damaged")

        monkeypatch.setattr(managers.syncer._switcher, "switch", damaged)
    write, refused = managers.store.write, 0

    async def refusing(change: Change) -> None:
        nonlocal refused
        if any(one.done for one in change.operations) and refused < 3:
            refused += 1
            raise FiretitanError(trouble, "the ledger cannot be written")
        await write(change)

    monkeypatch.setattr(managers.store, "write", refusing)
    ended = await managers.done(await managers.hotload(NEW))
    assert refused == 3
    deployment = managers.deployments.get("d")
    (row,) = (await managers.store.load()).deployments
    assert row == deployment
    if outcome == "served":
        assert switched == [("d", NEW)], "switched once, told three times"
        assert (ended.error, deployment.active_snapshot) == (None, NEW)
        return
    reason = Reason.CHECKSUM_MISMATCH if outcome == "failed" else Reason.RESOURCE_FAILED
    assert ended.error is not None and ended.error.reason == reason
    assert deployment.error is not None and deployment.active_snapshot == ""
