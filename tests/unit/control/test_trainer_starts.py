"""Trainers that have to be started, or cannot be: what a daemon's death leaves, what is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.managers import TOY, Managers, forward_backward

from firetitan_daemon.control.provisioning import new_operation
from firetitan_daemon.control.session_settings import Wanted
from firetitan_daemon.control.trainer_workers import METHOD
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.model_records import ModelInfo
from firetitan_daemon.core.ports import Change
from firetitan_daemon.core.records import (
    Operation,
    OperationState,
    ResourceState,
    Session,
    Trainer,
    WorkerSpec,
)
from firetitan_daemon.core.worker_ports import Worker

pytestmark = pytest.mark.timeout(30)


async def left_behind(managers: Managers, state: ResourceState, worker_id: str | None) -> Operation:
    """Rows of a trainer without a worker, and of a request for it that is not answered yet."""
    trainer = Trainer(
        id="t",
        base_model=TOY,
        lora_rank=0,
        max_context_length=0,
        dtype="float32",
        state=state,
        create_time=0.0,
        worker_id=worker_id,
    )
    operation = new_operation(METHOD, trainer.name, "make-t", "digest", 0.0)
    await managers.store.write(Change(trainers=[trainer], operations=[operation]))
    return operation


async def restart(managers: Managers) -> None:
    """As the next daemon: take over what the ledger says."""
    managers.supervisor.begin(await managers.supervisor.restore())


async def test_a_creation_whose_failure_was_not_written_down_is_told(managers: Managers) -> None:
    operation = await left_behind(managers, ResourceState.CREATING, "trainer-forgotten")
    await restart(managers)
    error = (await managers.done(operation)).error
    assert error is not None and "could not be started" in error.message
    assert managers.trainers.get("t").state is ResourceState.FAILED
    assert (await managers.trainer("again"))[0].state is ResourceState.ACTIVE


async def test_a_stopped_trainer_that_was_asked_for_is_started(managers: Managers) -> None:
    operation = await left_behind(managers, ResourceState.STOPPED, None)
    await restart(managers)
    assert (await managers.done(operation)).error is None
    assert managers.trainers.get("t").state is ResourceState.ACTIVE


async def test_a_stopped_trainer_that_has_commands_is_started(managers: Managers) -> None:
    command = await command_of_a_stopped_trainer(managers)
    await restart(managers)
    assert (await managers.done(command)).state is OperationState.DONE


async def command_of_a_stopped_trainer(managers: Managers) -> Operation:
    """Rows of a trainer that is stopped although a command was accepted for it."""
    session, worker = await session_of(managers)
    await managers.sessions.pause(1.0)
    command = await managers.sessions.submit(*forward_backward(session, seq=1))
    await managers.pool.stop(worker.spec.worker_id)
    stopped = replace(managers.trainers.get("t"), state=ResourceState.STOPPED, worker_id=None)
    await managers.store.write(Change(trainers=[stopped]))
    return command


async def session_of(managers: Managers) -> tuple[Session, Worker]:
    trainer, worker = await managers.trainer()
    session, _ = await managers.sessions.create(trainer, worker, Wanted(), "s")
    return session, worker


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (Reason.MODEL_NOT_FOUND, Reason.MODEL_NOT_FOUND),
        (Reason.DEVICE_OUT_OF_MEMORY, Reason.DEVICE_OUT_OF_MEMORY),
        (Reason.WORKER_UNAVAILABLE, Reason.RECOVERING),
    ],
)
async def test_who_uses_a_stopped_trainer_that_does_not_start_is_told_why(
    managers: Managers, monkeypatch: pytest.MonkeyPatch, failure: Reason, told: Reason
) -> None:
    session, _ = await session_of(managers)
    assert await managers.trainers.stop("t")

    async def refused(spec: WorkerSpec) -> tuple[Worker, ModelInfo]:
        raise FiretitanError(failure, "this is why")

    with monkeypatch.context() as patch:
        patch.setattr(managers.pool, "start", refused)
        with pytest.raises(FiretitanError, match="this is why") as opening:
            await managers.trainers.ready("t")
        with pytest.raises(FiretitanError, match="this is why") as sending:
            await managers.sessions.submit(*forward_backward(session, seq=1))
        with pytest.raises(FiretitanError, match="this is why") as joining:
            managers.sessions.attach(session.name, "b", Wanted())
    assert {one.value.reason for one in (opening, sending, joining)} == {told}
    # Somebody has seen to it.
    managers.trainers._wake_after.clear()
    await managers.trainers.ready("t")
    sent = await managers.sessions.submit(*forward_backward(session, seq=1))
    assert (await managers.done(sent)).state is OperationState.DONE


async def test_a_trainer_whose_worker_has_just_ended_is_not_called_active(
    managers: Managers,
) -> None:
    trainer, _ = await managers.trainer()
    managers.pool._live.pop(trainer.worker_id or "")
    with pytest.raises(FiretitanError, match="trainers/t is recovering; try again"):
        await managers.trainers.ready("t")


async def test_a_start_is_tried_again_for_as_long_as_commands_wait_for_it(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pause in ("_WAKE_PAUSE_S", "_BUSY_PAUSE_S"):
        monkeypatch.setattr(f"firetitan_daemon.control.trainer_workers.{pause}", 0.05)
    command = await command_of_a_stopped_trainer(managers)
    start, refusals = managers.pool.start, [1, 2]

    async def late(spec: WorkerSpec) -> tuple[Worker, ModelInfo]:
        if refusals:
            refusals.pop()
            raise FiretitanError(Reason.DEVICE_OUT_OF_MEMORY, "another process has it")
        return await start(spec)

    monkeypatch.setattr(managers.pool, "start", late)
    await restart(managers)
    assert (await managers.done(command)).state is OperationState.DONE
    assert not refusals
