"""The whole path with the toy engine: a real daemon, real workers, the stubs alone."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

import grpc
import pytest
from firetitan.v1 import (
    checkpoint_pb2,
    checkpoint_service_pb2,
    deployment_pb2,
    deployment_service_pb2,
    operation_service_pb2,
    trainer_pb2,
    trainer_service_pb2,
    training_service_pb2,
)
from support.commands import BAD
from support.daemon import DaemonProcess
from support.stubs import LaneClient, Stubs, reason, status_reason

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def stubs(daemon: DaemonProcess) -> Iterator[Stubs]:
    stubs = Stubs(daemon.address)
    yield stubs
    stubs.channel.close()


@pytest.fixture
def lane(stubs: Stubs) -> LaneClient:
    assert stubs.create_trainer().trainer.state == trainer_pb2.Trainer.STATE_ACTIVE
    return LaneClient(stubs, stubs.session())


def test_train_save_hotload_sample(stubs: Stubs, lane: LaneClient) -> None:
    first = stubs.done(lane.forward_backward())
    assert first.forward.metrics["loss:sum"] > 0
    assert stubs.done(lane.optim_step()).optim_step.metrics["step"] == 1
    base = stubs.done(lane.save_snapshot("one")).snapshot
    assert base.kind == checkpoint_pb2.Snapshot.KIND_BASE and base.step == 1
    for _ in range(5):
        lane.step()
    delta = stubs.done(lane.save_snapshot("two")).snapshot
    assert delta.kind == checkpoint_pb2.Snapshot.KIND_DELTA and delta.parent == base.name

    created = stubs.create_deployment(trainer="trainers/t").deployment
    assert created.state == deployment_pb2.Deployment.STATE_ACTIVE
    untrained = stubs.sample()
    assert untrained.snapshot == ""
    served = stubs.hotload(created.name, delta.name).deployment
    assert served.active_snapshot == delta.name and served.etag != created.etag
    trained = stubs.sample()
    assert trained.snapshot == delta.name
    assert trained.sequences[0].sampling_logprobs != untrained.sequences[0].sampling_logprobs
    back = stubs.hotload(created.name, base.name).deployment
    assert back.active_snapshot == base.name
    assert stubs.sample().snapshot == base.name


def test_state_resumes_where_it_was_saved(stubs: Stubs, lane: LaneClient) -> None:
    lane.step()
    saved = stubs.done(lane.save_state("here")).checkpoint
    assert saved.step == 1 and saved.name.endswith("/checkpoints/here")
    lane.step()
    stubs.done(lane.save_snapshot("straight"))
    loaded = stubs.done(lane.load_state("here")).load
    assert loaded.step == 1 and loaded.checkpoint.name == saved.name
    lane.step()
    resumed = stubs.done(lane.save_snapshot("resumed")).snapshot
    # A load breaks the chain: the next one stands alone, and ends with the same weights.
    assert resumed.kind == checkpoint_pb2.Snapshot.KIND_BASE
    listed = stubs.checkpoints.ListSnapshots(checkpoint_service_pb2.ListSnapshotsRequest())
    digests = {one.name: one.result_digest for one in listed.snapshots}
    assert len(digests) == 2 and len(set(digests.values())) == 1


def test_save_state_replaces_its_name(
    stubs: Stubs, lane: LaneClient, daemon: DaemonProcess
) -> None:
    lane.step()
    first = stubs.done(lane.save_state("latest")).checkpoint
    lane.step()
    second = stubs.done(lane.save_state("latest")).checkpoint
    assert (first.step, second.step) == (1, 2)
    request = checkpoint_service_pb2.ListCheckpointsRequest(parent="trainers/t")
    assert [one.step for one in stubs.checkpoints.ListCheckpoints(request).checkpoints] == [2]
    kept = stubs.wait(lane.save_state("latest", keep_existing=True).name)
    assert status_reason(kept.error) == "ALREADY_EXISTS"
    assert len(list((daemon.home / "store" / "checkpoints").iterdir())) == 1


def test_a_snapshot_name_is_never_reused(stubs: Stubs, lane: LaneClient) -> None:
    first = stubs.done(lane.save_snapshot("s")).snapshot
    second = stubs.done(lane.save_snapshot("s")).snapshot
    assert second.name.startswith("snapshots/s.2-") and first.name != second.name
    assert any("never changes" in note for note in second.notes)


def test_commands_behind_a_failure_wait_until_it_was_seen(stubs: Stubs, lane: LaneClient) -> None:
    bad = lane.forward_backward(BAD)
    behind = lane.optim_step()
    assert status_reason(stubs.wait(bad.name).error) == "INVALID_DATUM"
    assert status_reason(stubs.wait(behind.name).error) == "PRECEDING_FAILED"
    lane.seen_failure = bad.seq
    assert lane.step().optim_step.metrics["step"] == 1


def test_a_failure_in_the_daemon_counts_too(stubs: Stubs, lane: LaneClient) -> None:
    stubs.done(lane.forward_backward())
    missing = lane.load_state("nowhere")
    behind = lane.optim_step()
    ended = stubs.wait(missing.name)
    assert status_reason(ended.error) == "CHECKPOINT_NOT_FOUND"
    assert "nowhere" in ended.error.message
    assert status_reason(stubs.wait(behind.name).error) == "PRECEDING_FAILED"
    other = LaneClient(stubs, lane.session)
    stubs.done(other.optim_step())


def test_commands_run_in_the_order_of_their_seq(stubs: Stubs, lane: LaneClient) -> None:
    step = lane.optim_step(seq=2)
    assert step.commit_seq == 0
    other = LaneClient(stubs, lane.session)
    assert stubs.done(other.forward_backward()).commit_seq == 1
    first = lane.forward_backward(seq=1)
    assert first.commit_seq == 2
    assert stubs.done(step).commit_seq == 3


def test_a_repeat_is_answered_by_the_first(stubs: Stubs, lane: LaneClient) -> None:
    first = lane.forward_backward(seq=1)
    assert lane.forward_backward(seq=1).name == first.name
    stubs.done(first)
    assert lane.forward_backward(seq=1).name == first.name
    with pytest.raises(grpc.RpcError) as caught:
        lane.forward_backward(BAD, seq=1)
    assert reason(caught.value) == "REQUEST_ID_REUSED"
    stolen = LaneClient(stubs, lane.session, lane.client_id)
    stolen.client_id = lane.client_id
    message = stolen.header(training_service_pb2.OptimStepRequest(), seq=1)
    message.header.request_id = "another"
    with pytest.raises(grpc.RpcError) as caught:
        stubs.training.OptimStep(message)
    assert reason(caught.value) == "SEQ_REUSED"


def test_a_watch_brings_every_operation_in_order_and_resumes(
    stubs: Stubs, lane: LaneClient
) -> None:
    with lane.watch() as watch:
        lane.forward_backward()
        lane.optim_step()
        assert [watch.next().seq, watch.next().seq] == [1, 2]
        watch.acknowledge(1)
    lane.forward_backward()
    with lane.watch(after_seq=1) as watch:
        second, third = watch.next(), watch.next()
    assert (second.seq, third.seq) == (2, 3)
    assert second.optim_step.metrics["step"] == 1
    assert third.forward.metrics["loss:sum"] > 0


def test_acknowledged_results_are_dropped(
    stubs: Stubs, lane: LaneClient, daemon: DaemonProcess
) -> None:
    def until_spooled(count: int) -> None:
        deadline = time.monotonic() + 30
        while len(found := list((daemon.home / "spool").iterdir())) != count:
            assert time.monotonic() < deadline, found
            time.sleep(0.02)

    with lane.watch() as watch:
        stubs.done(lane.forward_backward())
        watch.next()
        until_spooled(2)  # its result, and its payload for a replay
        watch.acknowledge(1)
        stubs.done(lane.optim_step())
        watch.next()
        watch.acknowledge(2)
        until_spooled(2)  # both payloads
    stubs.trainers.DeleteTrainer(trainer_service_pb2.DeleteTrainerRequest(name="trainers/t"))
    until_spooled(0)


def test_cancel_takes_back_what_has_not_started(stubs: Stubs, lane: LaneClient) -> None:
    held = lane.optim_step(seq=2)
    request = operation_service_pb2.CancelOperationRequest(name=held.name)
    cancelled = stubs.operations.CancelOperation(request).operation
    assert cancelled.done and status_reason(cancelled.error) == "CANCELLED"
    stubs.done(lane.forward_backward(seq=1))
    stubs.done(lane.optim_step(seq=3))


def test_create_is_idempotent_and_names_what_differs(stubs: Stubs, lane: LaneClient) -> None:
    pid = stubs.trainers.GetTrainer(
        trainer_service_pb2.GetTrainerRequest(name="trainers/t")
    ).trainer.worker_pid
    assert stubs.create_trainer().trainer.worker_pid == pid
    with pytest.raises(grpc.RpcError) as caught:
        stubs.create_trainer(rank=8)
    assert reason(caught.value) == "ALREADY_EXISTS" and "lora_rank" in caught.value.details()
    assert stubs.session(seed=7) == lane.session
    with pytest.raises(grpc.RpcError) as caught:
        stubs.session(seed=8)
    assert reason(caught.value) == "ALREADY_EXISTS" and "seed" in caught.value.details()
    attach = training_service_pb2.AttachSessionRequest(name="trainers/t", client_id="x", seed=8)
    with pytest.raises(grpc.RpcError) as caught:
        stubs.training.AttachSession(attach)
    assert reason(caught.value) == "INVALID_ARGUMENT" and "seed" in caught.value.details()


def test_delete_trainer_finishes_what_was_accepted(
    stubs: Stubs, lane: LaneClient, daemon: DaemonProcess
) -> None:
    operations = [lane.forward_backward(), lane.optim_step(), lane.save_state("last")]
    request = trainer_service_pb2.DeleteTrainerRequest(name="trainers/t")
    stubs.trainers.DeleteTrainer(request)
    for operation in operations:
        stubs.done(operation)
    assert not daemon.worker_pids()
    stubs.trainers.DeleteTrainer(request)
    listed = stubs.checkpoints.ListCheckpoints(
        checkpoint_service_pb2.ListCheckpointsRequest(parent="trainers/t")
    )
    assert len(listed.checkpoints) == 1
    with pytest.raises(grpc.RpcError) as caught:
        lane.optim_step()
    assert reason(caught.value) == "CLOSED"
    stubs.create_trainer("t2")
    again = LaneClient(stubs, stubs.session("trainers/t2"))
    loaded = stubs.done(again.load_state("cross_job://t/last")).load
    assert loaded.step == 1


def test_hotload_refuses_by_name_and_keeps_serving(stubs: Stubs, lane: LaneClient) -> None:
    snapshot = stubs.done(lane.save_snapshot("s")).snapshot
    deployment = stubs.create_deployment().deployment
    with pytest.raises(grpc.RpcError) as caught:
        stubs.hotload(deployment.name, "nothing-01234567")
    assert reason(caught.value) == "SNAPSHOT_NOT_FOUND"
    with pytest.raises(grpc.RpcError) as caught:
        stubs.hotload(deployment.name, snapshot.name, etag="stale")
    assert reason(caught.value) == "ETAG_MISMATCH"
    with pytest.raises(grpc.RpcError) as caught:
        stubs.hotload("deployments/none", snapshot.name)
    assert reason(caught.value) == "DEPLOYMENT_NOT_FOUND"
    pin = deployment_service_pb2.PinSnapshotRequest(
        deployment=deployment.name, snapshot=snapshot.name, holder="me"
    )
    with pytest.raises(grpc.RpcError) as caught:
        stubs.deployments.PinSnapshot(pin)
    assert reason(caught.value) == "SNAPSHOT_NOT_ACTIVE"
    assert not stubs.hotload(deployment.name, snapshot.name).HasField("error")
    stubs.deployments.PinSnapshot(pin)
    lane.step()
    newer = stubs.done(lane.save_snapshot("s")).snapshot
    assert not stubs.hotload(deployment.name, newer.name).HasField("error")
    assert stubs.sample(snapshot=snapshot.name).snapshot == snapshot.name
    pin.release = True
    stubs.deployments.PinSnapshot(pin)


def test_scale_to_zero_and_back_by_use(
    stubs: Stubs, lane: LaneClient, daemon: DaemonProcess
) -> None:
    snapshot = stubs.done(lane.save_snapshot("s")).snapshot
    name = stubs.create_deployment().deployment.name
    stubs.hotload(name, snapshot.name)
    before = stubs.sample()
    stopped = stubs.deployments.ScaleDeployment(
        deployment_service_pb2.ScaleDeploymentRequest(name=name, replicas=0)
    ).deployment
    assert stopped.state == deployment_pb2.Deployment.STATE_STOPPED and not stopped.worker_pid
    assert len(daemon.worker_pids()) == 1
    again = stubs.sample()
    assert again.snapshot == snapshot.name
    assert again.sequences[0].token_ids == before.sequences[0].token_ids


def test_a_model_that_cannot_be_loaded_fails_the_trainer(
    stubs: Stubs, daemon: DaemonProcess
) -> None:
    ended = stubs.create_trainer("t", base_model="/nowhere/at/all")
    assert status_reason(ended.error) == "MODEL_NOT_FOUND"
    shown = stubs.trainers.GetTrainer(
        trainer_service_pb2.GetTrainerRequest(name="trainers/t")
    ).trainer
    assert shown.state == trainer_pb2.Trainer.STATE_FAILED
    assert "/nowhere/at/all" in shown.error.message
    assert not daemon.worker_pids()


@pytest.mark.parametrize("method", ["ForwardBackward", "SaveState"])
def test_malformed_bytes_are_refused(stubs: Stubs, lane: LaneClient, method: str) -> None:
    service = "Training" if method == "ForwardBackward" else "Checkpoint"
    call = stubs.channel.unary_unary(f"/firetitan.v1.{service}Service/{method}")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"\xff\xff\xff")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    lane.step()


def test_unknown_names_are_refused(stubs: Stubs) -> None:
    for call, request, wanted in (
        (
            stubs.trainers.GetTrainer,
            trainer_service_pb2.GetTrainerRequest(name="trainers/none"),
            "TRAINER_NOT_FOUND",
        ),
        (
            stubs.trainers.GetTrainer,
            trainer_service_pb2.GetTrainerRequest(name="../x"),
            "NAME_INVALID",
        ),
        (
            stubs.training.GetSession,
            training_service_pb2.GetSessionRequest(name="trainers/a/sessions/b"),
            "SESSION_NOT_FOUND",
        ),
        (
            stubs.operations.GetOperation,
            operation_service_pb2.GetOperationRequest(name="operations/none"),
            "OPERATION_NOT_FOUND",
        ),
        (
            stubs.checkpoints.GetSnapshot,
            checkpoint_service_pb2.GetSnapshotRequest(name="none"),
            "SNAPSHOT_NOT_FOUND",
        ),
        (
            stubs.trainers.CreateTrainer,
            trainer_service_pb2.CreateTrainerRequest(
                base_model="m", dtype="int3", request_id=uuid.uuid4().hex
            ),
            "INVALID_ARGUMENT",
        ),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call(request)
        assert reason(caught.value) == wanted, caught.value.details()
