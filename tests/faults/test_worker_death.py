"""`kill -9` of workers: a trainer's loss is told exactly, a sampler comes back by itself."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import grpc
import pytest
from firetitan.v1 import (
    deployment_pb2,
    deployment_service_pb2,
    error_pb2,
    session_pb2,
    trainer_pb2,
    trainer_service_pb2,
    training_service_pb2,
)
from google.rpc import status_pb2
from support.daemon import DaemonProcess
from support.stubs import LaneClient, Stubs, reason, status_reason

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def stubs(daemon: DaemonProcess) -> Iterator[Stubs]:
    stubs = Stubs(daemon.address)
    yield stubs
    stubs.channel.close()


def trainer(stubs: Stubs) -> trainer_pb2.Trainer:
    request = trainer_service_pb2.GetTrainerRequest(name="trainers/t")
    return stubs.retry(stubs.trainers.GetTrainer, request).trainer


def until_failed(stubs: Stubs) -> trainer_pb2.Trainer:
    deadline = time.monotonic() + 20
    while (found := trainer(stubs)).state != trainer_pb2.Trainer.STATE_FAILED:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def loss_of(status: status_pb2.Status) -> error_pb2.SessionLoss:
    loss = error_pb2.SessionLoss()
    assert any(detail.Unpack(loss) for detail in status.details)
    return loss


@pytest.mark.parametrize("daemon_too", [False, True])
def test_a_dead_trainer_says_what_was_lost_and_can_go_on(
    stubs: Stubs, daemon: DaemonProcess, daemon_too: bool
) -> None:
    # Without what a replay needs, a death is a loss.
    daemon.environment["FIRETITAN_RECOVERY_ENABLED"] = "0"
    daemon.kill()
    daemon.start()
    stubs.create_trainer()
    lane = LaneClient(stubs, stubs.session())
    first = stubs.done(lane.forward_backward())
    stubs.done(lane.optim_step())
    saved = stubs.done(lane.save_state("good")).checkpoint
    lane.step()
    # Gradients that no step will take, and a command that waits for one that never comes.
    stubs.done(lane.forward_backward())
    held = lane.optim_step(seq=lane.seq + 1)
    pid = trainer(stubs).worker_pid
    if daemon_too:
        daemon.kill()
    os.kill(pid, signal.SIGKILL)
    if daemon_too:
        daemon.start()
    failed = until_failed(stubs)
    assert "create the trainer again" in failed.error.message and not failed.worker_pid
    ended = stubs.wait(held.name)
    assert status_reason(ended.error) == "SESSION_LOSS"
    loss = loss_of(ended.error)
    how = (
        "it was gone when the daemon started"
        if daemon_too
        else "killed by SIGKILL, by hand or by the system for lack of memory"
    )
    assert loss == error_pb2.SessionLoss(
        session=lane.session,
        cause=f"{how}; no replay: payloads of 5 of 5 commands to replay are gone, the first of "
        f"ForwardBackward {first.name}: over recovery.max_spool_bytes, or recovery.enabled was off",
        restored_step=1,
        restored_from=saved.name,
        lost_steps=1,
        lost_backwards=1,
        lost_operations=[held.name],
        hint="create trainers/t again with the same id and open its session, then "
        "load_state_with_optimizer('good') (step 1), then resubmit from step 2",
    )
    with pytest.raises(grpc.RpcError) as caught:
        lane.optim_step()
    assert reason(caught.value) == "SESSION_LOSS"
    shown = stubs.training.GetSession(
        training_service_pb2.GetSessionRequest(name=lane.session)
    ).session
    assert shown.state == session_pb2.Session.STATE_LOST and shown.epoch == 2

    # The way out that the error names.
    assert stubs.create_trainer().trainer.state == trainer_pb2.Trainer.STATE_ACTIVE
    assert stubs.session() == lane.session
    with pytest.raises(grpc.RpcError) as caught:
        lane.optim_step(seq=held.seq + 1)
    assert reason(caught.value) == "SESSION_RESTARTED"
    again = LaneClient(stubs, lane.session)
    assert again.epoch == 2
    assert stubs.done(again.load_state(saved.name)).load.step == 1
    assert again.step().optim_step.metrics["step"] == 2
    assert len(daemon.worker_pids()) == 1


@pytest.mark.parametrize("daemon_too", [False, True])
def test_a_dead_sampler_comes_back_with_what_it_served(
    stubs: Stubs, daemon: DaemonProcess, daemon_too: bool
) -> None:
    stubs.create_trainer()
    lane = LaneClient(stubs, stubs.session())
    lane.step()
    stubs.done(lane.save_snapshot("one"))
    lane.step()
    delta = stubs.done(lane.save_snapshot("two")).snapshot
    deployment = stubs.create_deployment().deployment
    stubs.hotload(deployment.name, delta.name)
    before = stubs.sample()
    pid = stubs.deployments.GetDeployment(
        deployment_service_pb2.GetDeploymentRequest(name=deployment.name)
    ).deployment.worker_pid
    if daemon_too:
        daemon.kill()
    os.kill(pid, signal.SIGKILL)
    if daemon_too:
        daemon.start()
    after = stubs.sample()
    assert after.snapshot == delta.name
    assert after.sequences == before.sequences
    shown = stubs.deployments.GetDeployment(
        deployment_service_pb2.GetDeploymentRequest(name=deployment.name)
    ).deployment
    assert shown.state == deployment_pb2.Deployment.STATE_ACTIVE
    assert shown.worker_pid not in (0, pid) and shown.etag != deployment.etag


def test_a_pinned_adapter_is_loaded_again(stubs: Stubs, daemon: DaemonProcess) -> None:
    stubs.create_trainer(rank=4)
    lane = LaneClient(stubs, stubs.session())
    lane.step()
    pinned = stubs.done(lane.save_snapshot("pinned")).snapshot
    lane.step()
    active = stubs.done(lane.save_snapshot("active")).snapshot
    deployment = stubs.create_deployment().deployment
    assert not stubs.hotload(deployment.name, pinned.name).HasField("error")
    stubs.deployments.PinSnapshot(
        deployment_service_pb2.PinSnapshotRequest(
            deployment=deployment.name, snapshot=pinned.name, holder="me"
        )
    )
    stubs.hotload(deployment.name, active.name)
    before = stubs.sample(snapshot=pinned.name)
    pid = stubs.deployments.GetDeployment(
        deployment_service_pb2.GetDeploymentRequest(name=deployment.name)
    ).deployment.worker_pid
    os.kill(pid, signal.SIGKILL)
    assert stubs.sample().snapshot == active.name
    after = stubs.sample(snapshot=pinned.name)
    assert after.snapshot == pinned.name and after.sequences == before.sequences


def test_a_trainer_that_dies_while_it_is_deleted_is_gone(
    stubs: Stubs, daemon: DaemonProcess
) -> None:
    stubs.create_trainer()
    lane = LaneClient(stubs, stubs.session())
    os.kill(trainer(stubs).worker_pid, signal.SIGSTOP)
    operation = lane.forward_backward()
    deletion = stubs.trainers.DeleteTrainer.future(
        trainer_service_pb2.DeleteTrainerRequest(name="trainers/t")
    )
    while trainer(stubs).state != trainer_pb2.Trainer.STATE_DELETING:
        time.sleep(0.02)
    assert not deletion.done()
    os.kill(daemon.worker_pids()[0], signal.SIGKILL)
    deletion.result(timeout=20)
    assert status_reason(stubs.wait(operation.name).error) == "SESSION_LOSS"
    listed = stubs.trainers.ListTrainers(trainer_service_pb2.ListTrainersRequest())
    assert not listed.trainers and not daemon.worker_pids()
