"""Samplers that live and do not answer: waited for, and of no use to what was stopped since."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence

import pytest
from support.managers import TOY, Managers, until
from support.stopping import stopped

from firetitan_daemon.control.deployment_requests import DeploymentRequest
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.model_records import ModelInfo
from firetitan_daemon.core.records import ResourceState, WorkerSpec
from firetitan_daemon.core.worker_ports import SnapshotLayer, Worker
from firetitan_daemon.launch import remote

pytestmark = pytest.mark.timeout(60)
NEW = "new-01234567"


def sampler_of(managers: Managers) -> Worker:
    (worker,) = managers.deployments.replica_set("d").workers
    return worker


async def test_a_hotload_waits_for_one_that_hangs(
    processes: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await processes.deployment()
    await processes.snapshots(NEW)
    worker, applied = sampler_of(processes), list[str]()
    monkeypatch.setattr(remote, "DESCRIBE_TIMEOUT_S", 0.1)

    async def apply(layers: Sequence[SnapshotLayer], *_: object, **__: object) -> Sequence[str]:
        applied.append(layers[-1].name)
        return ()

    monkeypatch.setattr(worker, "apply", apply)
    with stopped(worker.pid):
        operation = await processes.hotload(NEW)
        # It is asked again and again; a dead one would have been given up long ago.
        await asyncio.sleep(1.5)
        assert processes.services.operations.current(operation.id) is not None
    assert (await processes.done(operation)).error is None
    assert applied == [f"snapshots/{NEW}"] and sampler_of(processes) is worker


async def left_behind(managers: Managers) -> Worker:
    """The sampler of a deployment, to be reached as by the next daemon."""
    await managers.deployment()
    worker = sampler_of(managers)
    await managers.pool.close()
    managers.pool._live.clear()
    managers.deployments.replica_set("d").remove(worker.spec.worker_id)
    await managers.deployments.update("d", state=ResourceState.RECOVERING)
    return worker


def hanging(managers: Managers, patch: pytest.MonkeyPatch, limit_s: float) -> list[Worker]:
    """The next sampler hangs as soon as it has its model; those that were begun, in order."""
    patch.setattr(remote, "DESCRIBE_TIMEOUT_S", limit_s)
    start, begun = managers.pool.start, list[Worker]()

    async def hangs(spec: WorkerSpec) -> tuple[Worker, ModelInfo]:
        worker, model = await start(spec)
        if not begun:
            os.kill(worker.pid, signal.SIGSTOP)
        begun.append(worker)
        return worker, model

    patch.setattr(managers.pool, "start", hangs)
    return begun


@pytest.mark.parametrize("end", ["answers", "stopped"])
async def test_an_adopted_one_that_hangs_before_it_serves_is_shown_and_waited_for(
    processes: Managers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    await left_behind(processes)
    begun = hanging(processes, monkeypatch, 0.1)
    await processes.deployments.recover("d")
    await until(lambda: bool(begun))
    using = asyncio.create_task(processes.deployments.ready("d"))
    await asyncio.sleep(0.8)
    assert not using.done()
    (shown,) = processes.deployments.replicas(processes.deployments.get("d"))
    assert shown.unresponsive and shown.state is ResourceState.RECOVERING
    assert caplog.text.count("worker does not answer") == 1
    # Others have their turn with the weights meanwhile.
    async with asyncio.timeout(5), processes.deployments.weights_lock("d"):
        pass
    if end == "stopped":
        async with asyncio.timeout(30):
            stopped = await processes.deployments.scale("d", 0)
        assert stopped.state is ResourceState.STOPPED and not processes.pool.specs()
        with pytest.raises(FiretitanError):
            await using
        return
    os.kill(begun[0].pid, signal.SIGCONT)
    await using
    assert begun == [sampler_of(processes)], "it was not to be ended"
    await until(lambda: processes.pool.answers(begun[0].spec.worker_id))


async def test_a_fresh_one_that_hangs_before_it_serves_is_replaced(
    processes: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await processes.deployment()
    begun = hanging(processes, monkeypatch, 1.0)
    os.kill(sampler_of(processes).pid, signal.SIGKILL)
    await until(lambda: not processes.deployments.replica_set("d").workers)
    async with asyncio.timeout(40):
        await processes.deployments.ready("d")
    assert sampler_of(processes) is begun[1] and not begun[0].alive


async def test_one_that_hangs_as_its_deployment_is_made_is_replaced(
    processes: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = hanging(processes, monkeypatch, 1.0)
    request = DeploymentRequest("d", TOY, 0, "", "auto", None, "make-d", "digest")
    making = await processes.deployments.create(request)
    made = await processes.services.operations.wait(making.id, 40)
    assert made.done and made.error is None
    assert sampler_of(processes) is begun[1] and not begun[0].alive


@pytest.mark.parametrize("end", ["stopped", "deleted"])
async def test_one_that_answers_again_brings_back_nothing_that_was_ended(
    managers: Managers, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr("firetitan_daemon.control.workers._ADOPT_RETRY_S", 0.02)
    worker = await left_behind(managers)

    async def silent(spec: WorkerSpec) -> Worker | None:
        raise FiretitanError(Reason.WORKER_UNAVAILABLE, f"{spec.worker_id} does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(managers.services.launcher, "adopt", silent)
        reaching = asyncio.create_task(managers.deployments.recover("d"))
        await asyncio.sleep(0.05)
        with pytest.raises(FiretitanError) as caught:
            if end == "stopped":
                await managers.deployments.scale("d", 0)
            else:
                await managers.deployments.delete("d")
        assert caught.value.reason is Reason.WORKER_UNAVAILABLE
    async with asyncio.timeout(20):
        await reaching
        await worker.exited()
    await until(lambda: not managers.pool.specs())
    state = ResourceState.STOPPED if end == "stopped" else ResourceState.DELETING
    assert managers.deployments.get("d").state is state
    assert not managers.deployments.replica_set("d").workers and not managers.pool._live


async def test_one_that_is_stopped_as_it_is_reached_is_forgotten(
    managers: Managers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await left_behind(managers)
    adopt, found, going = managers.services.launcher.adopt, asyncio.Event(), asyncio.Event()

    async def slow(spec: WorkerSpec) -> Worker | None:
        worker = await adopt(spec)
        if not found.is_set():
            found.set()
            await going.wait()
        return worker

    monkeypatch.setattr(managers.services.launcher, "adopt", slow)
    reaching = asyncio.create_task(managers.deployments.recover("d"))
    await found.wait()
    await managers.deployments.scale("d", 0)
    going.set()
    await reaching
    await asyncio.sleep(0.1)
    assert managers.deployments.get("d").state is ResourceState.STOPPED
    assert not managers.pool._live and not managers.pool.specs()
    assert "internal error" not in caplog.text


async def test_where_one_cannot_be_stopped_the_others_are(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await managers.deployment()
    await managers.deployments.scale("d", 3)
    await until(lambda: len(managers.deployments.replica_set("d").workers) == 3)
    silent, *others = managers.deployments.get("d").worker_ids
    stop = managers.pool.stop

    async def refuses(worker_id: str | None) -> None:
        if worker_id == silent:
            raise FiretitanError(Reason.WORKER_UNAVAILABLE, f"{worker_id} does not answer")
        await stop(worker_id)

    with monkeypatch.context() as patch:
        patch.setattr(managers.pool, "stop", refuses)
        with pytest.raises(FiretitanError, match="does not answer"):
            await managers.deployments.scale("d", 0)
    assert [one.worker_id for one in managers.pool.specs()] == [silent] and len(others) == 2


async def test_who_lets_snapshots_go_does_not_keep_others_from_a_sampler_that_hangs(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firetitan_daemon.control.weight_sync._RETAIN_S", 0.05)
    await managers.deployment()

    async def hanging(_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(sampler_of(managers), "retain", hanging)
    async with asyncio.timeout(5):
        await managers.syncer._retain("d")
    assert not managers.deployments.weights_lock("d").locked()
