"""Trainers and deployments made by hand, over a real daemon and the toy engine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import tinker
from support.daemon import DaemonProcess

from firetitan_client import (
    AlreadyExists,
    DeploymentConfig,
    DeploymentManager,
    DeploymentSampler,
    FailedPrecondition,
    FiretitanServiceClient,
    FiretitanTrainingClient,
    FireworksClient,
    NotFound,
    TrainerJobConfig,
    TrainerJobManager,
    TrainerServiceEndpoint,
    WeightSyncer,
)

pytestmark = pytest.mark.timeout(120)

TOY = "firetitan/toy"
FULL = TrainerJobConfig(TOY, requested_job_id="full")


@pytest.fixture
def trainers(daemon: DaemonProcess) -> TrainerJobManager:
    return TrainerJobManager(base_url=daemon.address)


@pytest.fixture
def deployments(daemon: DaemonProcess) -> DeploymentManager:
    return DeploymentManager(base_url="https://api.example.com", address=daemon.address)


@pytest.fixture
def endpoint(trainers: TrainerJobManager) -> TrainerServiceEndpoint:
    return trainers.create_and_wait(FULL)


@pytest.fixture
def policy(endpoint: TrainerServiceEndpoint) -> Iterator[FiretitanTrainingClient]:
    with FiretitanServiceClient(base_url=endpoint.base_url) as service:
        yield service.create_training_client(base_model=TOY, lora_rank=0)


def train(policy: FiretitanTrainingClient, token: int) -> None:
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 2, 3, 4]),
        loss_fn_inputs={"target_tokens": [token] * 4, "weights": [1.0] * 4},
    )
    policy.forward_backward([datum], "cross_entropy")
    policy.optim_step(tinker.AdamParams(learning_rate=0.5)).result()


def kill_trainer_worker(daemon: DaemonProcess, trainers: TrainerJobManager) -> None:
    with FiretitanServiceClient(address=daemon.address) as service:
        from firetitan.v1 import trainer_service_pb2

        request = trainer_service_pb2.GetTrainerRequest(name="trainers/full")
        pid = service.stubs.trainers.GetTrainer(request).trainer.worker_pid
    assert pid in daemon.worker_pids()
    subprocess.run(["kill", "-9", str(pid)], check=True)


def test_an_endpoint_serves_another_process(endpoint: TrainerServiceEndpoint) -> None:
    assert endpoint.job_id == "full"
    assert endpoint.job_name == "accounts/local/rlorTrainerJobs/full"
    assert endpoint.max_context_length and endpoint.max_context_length > 0
    program = (
        "import sys; from firetitan_client import FiretitanServiceClient\n"
        "service = FiretitanServiceClient(base_url=sys.argv[1])\n"
        "print(service.create_training_client(base_model='firetitan/toy').trainer_job_id)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, endpoint.base_url],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["full"]


def test_a_trainer_from_creation_to_deletion(
    trainers: TrainerJobManager, policy: FiretitanTrainingClient
) -> None:
    again = trainers.create(FULL)
    assert (again.job_id, again.job_name) == ("full", "accounts/local/rlorTrainerJobs/full")
    assert trainers.wait_for_existing(again.job_name) == trainers.reconnect_and_wait("full")
    job = trainers.get("trainers/full")
    assert job["state"] == "JOB_STATE_RUNNING"
    assert job["trainingConfig"]["baseModel"] == TOY
    assert job["trainingConfig"]["loraRank"] == 0
    with pytest.raises(AlreadyExists, match="lora_rank"):
        trainers.create(TrainerJobConfig(TOY, lora_rank=4, requested_job_id="full"))
    policy.save_state("kept").result()
    trainers.delete("full")
    trainers.delete("full")
    assert trainers.try_get("full") is None
    with pytest.raises(NotFound) as gone:
        trainers.wait_for_existing("full")
    assert gone.value.status_code == 404
    assert [row["name"] for row in trainers.list_checkpoints("full")] == [
        "accounts/local/rlorTrainerJobs/full/checkpoints/kept"
    ]
    with pytest.raises(NotFound):
        trainers.list_checkpoints("never")


def test_a_trainer_that_fails_says_why(trainers: TrainerJobManager) -> None:
    config = TrainerJobConfig("/no/such/folder", requested_job_id="bad")
    with pytest.raises(FailedPrecondition, match="/no/such/folder") as failed:
        trainers.create_and_wait(config)
    assert failed.value.reason == "MODEL_NOT_FOUND"
    job = trainers.get("bad")
    assert job["state"] == "JOB_STATE_FAILED"
    assert "/no/such/folder" in job["status"]["message"]
    with pytest.raises(FailedPrecondition, match="/no/such/folder"):
        trainers.resume_and_wait("bad")


def test_waiting_has_an_end(trainers: TrainerJobManager) -> None:
    created = trainers.create(TrainerJobConfig(TOY))
    with pytest.raises(TimeoutError, match="it goes on"):
        trainers.wait_for_ready(created.job_id, timeout_s=0.001)
    assert trainers.wait_for_ready(created.job_id).job_id == created.job_id


def test_a_trainer_whose_worker_died_is_started_again(
    daemon: DaemonProcess,
    trainers: TrainerJobManager,
    policy: FiretitanTrainingClient,
) -> None:
    train(policy, 9)
    kill_trainer_worker(daemon, trainers)
    train(policy, 10)  # in a worker the daemon has put in its place
    assert trainers.resume_and_wait("full").job_id == "full"
    assert trainers.get("full")["state"] == "JOB_STATE_RUNNING"


def test_rows_of_what_was_saved(
    trainers: TrainerJobManager, policy: FiretitanTrainingClient, daemon: DaemonProcess
) -> None:
    first = policy.save_weights_for_sampler_ext("a")
    train(policy, 9)
    policy.save_state("state").result()
    second = policy.save_weights_for_sampler_ext("b")
    with FiretitanServiceClient.from_firetitan_config(
        base_model=TOY,
        lora_rank=4,
        trainer_job_id="adapter",
        create_deployment=False,
        address=daemon.address,
    ) as service:
        client = service.create_training_client()
        client.save_state("s").result()
        client.save_weights_for_sampler("w").result()
    rows = FireworksClient(base_url=daemon.address).list_checkpoints("full", page_size=1)
    assert [
        (row["name"].rpartition("/")[2], row["checkpointType"], row["promotable"], row["step"])
        for row in rows
    ] == [
        (first.snapshot_name, "CHECKPOINT_TYPE_INFERENCE_BASE", True, 0),
        ("state", "CHECKPOINT_TYPE_TRAINING", False, 1),
        (second.snapshot_name, "CHECKPOINT_TYPE_INFERENCE_ARC_V2", False, 1),
    ]
    assert all(row["createTime"].endswith("Z") for row in rows)
    kinds = [row["checkpointType"] for row in trainers.list_checkpoints("adapter")]
    assert kinds == ["CHECKPOINT_TYPE_TRAINING_LORA", "CHECKPOINT_TYPE_INFERENCE_LORA"]


def test_a_deployment_from_creation_to_deletion(
    deployments: DeploymentManager, endpoint: TrainerServiceEndpoint
) -> None:
    config = DeploymentConfig("serve", TOY, hot_load_trainer_job=endpoint.job_name)
    assert deployments.get("serve") is None
    made = deployments.create_or_get(config)
    assert made.deployment_id == "serve"
    assert made.hot_load_trainer_job == endpoint.job_name
    ready = deployments.wait_for_ready("serve")
    assert ready.state == "READY"
    assert deployments.create_or_get(config) == ready
    assert ready.inference_model is not None
    assert deployments.warmup(ready.inference_model, max_retries=1)
    with pytest.raises(AlreadyExists, match="base_model"):
        deployments.create_or_get(DeploymentConfig("serve", "other"))
    deployments.scale_to_zero("serve")
    stopped = deployments.get("serve")
    assert stopped is not None and stopped.state == "STOPPED"
    assert deployments.hotload_check_status("serve", TOY) == {"replicas": []}
    assert deployments.wait_for_ready("serve").state == "READY"
    assert deployments.update("serve", {"maxReplicaCount": 0}, "max_replica_count").state == (
        "STOPPED"
    )
    recreated = deployments.create_or_get(DeploymentConfig("serve", TOY), force_recreate=True)
    assert recreated.hot_load_trainer_job is None
    deployments.delete("serve")
    deployments.delete("serve")
    assert deployments.get("serve") is None
    with pytest.raises(NotFound):
        deployments.warmup("serve", max_retries=1)


def test_reattaching_checks_before_it_changes(
    trainers: TrainerJobManager, deployments: DeploymentManager, endpoint: TrainerServiceEndpoint
) -> None:
    config = DeploymentConfig("serve", TOY, hot_load_trainer_job="full")
    deployments.create_or_get(config)
    other = trainers.create_and_wait(
        TrainerJobConfig(TOY, requested_job_id="other", hot_load_deployment_id="serve")
    )
    info = deployments.get("serve")
    assert info is not None and info.hot_load_trainer_job == other.job_name
    for job, model, wanted in (("never", TOY, NotFound), ("full", "else", ValueError)):
        with pytest.raises(wanted):
            deployments.reattach_trainer(info, base_model=model, trainer_job_name=job, timeout_s=30)
        assert deployments.get("serve").hot_load_trainer_job == other.job_name  # type: ignore[union-attr]
    info = deployments.reattach_trainer(
        info, base_model=TOY, trainer_job_name=endpoint.job_name, timeout_s=30
    )
    assert (info.state, info.hot_load_trainer_job) == ("READY", endpoint.job_name)
    changed = deployments.update("serve", {"hot_load_trainer_job": "other"}, ["hotLoadTrainerJob"])
    assert changed.hot_load_trainer_job == other.job_name
    with pytest.raises(NotFound):
        trainers.create(TrainerJobConfig(TOY, hot_load_deployment_id="never"))


def test_hotloading_by_hand(
    daemon: DaemonProcess, deployments: DeploymentManager, policy: FiretitanTrainingClient
) -> None:
    deployments.create_or_get(DeploymentConfig("serve", TOY, hot_load_trainer_job="full"))
    saved = policy.save_weights_for_sampler_ext("a")
    begun = deployments.hotload("serve", TOY, saved.path, {"previous_snapshot_identity": "x"})
    assert begun["identity"] == saved.snapshot_name
    assert deployments.wait_for_hotload("serve", TOY, saved.path)
    assert deployments.last_hotload_error_message is None
    # Another process's manager sees the same.
    other = DeploymentManager(base_url=daemon.address)
    assert other.wait_for_hotload("serve", TOY, saved.path, timeout_seconds=5)
    (replica,) = other.hotload_check_status("serve", TOY)["replicas"]
    assert replica["current_snapshot_identity"] == saved.snapshot_name
    assert replica["readiness"] and replica["loading_state"]["stage"] == "done"
    # What never comes: said after the timeout, with both names.
    train(policy, 9)
    later = policy.save_weights_for_sampler_ext("b")
    assert not deployments.wait_for_hotload("serve", TOY, later.path, 0.2, 0.05)
    message = deployments.last_hotload_error_message
    assert message is not None and later.path in message and saved.path in message
    assert deployments.hotload_and_wait("serve", TOY, later.path)
    # What another process replaced is served no more, whoever had brought it.
    assert other.hotload_and_wait("serve", TOY, saved.path)
    assert not deployments.wait_for_hotload("serve", TOY, later.path)
    message = deployments.last_hotload_error_message
    assert message is not None and later.path in message and saved.path in message
    assert deployments.hotload_and_wait("serve", TOY, later.path)
    with pytest.raises(NotFound):
        deployments.hotload("serve", TOY, "never-00000000")
    with pytest.raises(ValueError, match="else"):
        deployments.hotload_and_wait("serve", "else", later.path)


def test_a_hotload_that_fails_is_false_and_says_why(
    daemon: DaemonProcess, deployments: DeploymentManager, policy: FiretitanTrainingClient
) -> None:
    deployments.create_or_get(DeploymentConfig("serve", TOY))
    deployments.wait_for_ready("serve")
    saved = policy.save_weights_for_sampler_ext("a")
    for path in (daemon.home / "store").rglob("*"):
        if path.is_file():
            path.unlink()
    syncer = WeightSyncer(policy, deployments, "serve", TOY)
    assert not syncer.hotload(saved.snapshot_name)
    message = deployments.last_hotload_error_message
    assert message is not None and saved.snapshot_name in message and "failed" in message
    (replica,) = deployments.hotload_check_status("serve", TOY)["replicas"]
    assert replica["loading_state"] == {
        "stage": "error",
        "target_snapshot_identity": saved.snapshot_name,
    }
    assert syncer.base_identity is None


def test_a_syncer_follows_the_daemons_chain(
    daemon: DaemonProcess, deployments: DeploymentManager, policy: FiretitanTrainingClient
) -> None:
    deployments.create_or_get(DeploymentConfig("serve", TOY, hot_load_trainer_job="full"))
    syncer = WeightSyncer(
        policy_client=policy,
        deploy_mgr=deployments,
        deployment_id="serve",
        base_model=TOY,
        hotload_timeout=300,
        first_checkpoint_type="base",
        compression_format="arc_v2",
        reset_prompt_cache=False,
        lora_rank=0,
        warmup_after_hotload=True,
        warmup_max_retries=3,
    )
    syncer.wait_for_hotload_ready(30)
    assert syncer.check_deployment_state() is None
    names = []
    for step in range(3):
        train(policy, 7 + step)
        names.append(syncer.save_and_hotload(f"step-{step}"))
    assert set(syncer.last_timing) == {
        "save_time_s",
        "hotload_time_s",
        "warmup_time_s",
        "total_time_s",
    }
    # A second syncer knows nothing of the first and goes on with its chain.
    second = WeightSyncer(policy, DeploymentManager(base_url=daemon.address), "serve", TOY)
    second.warmup_after_hotload = False
    assert second.check_deployment_state() == names[-1]
    names.append(second.save_only("only"))
    assert second.check_deployment_state() == names[2]
    assert second.hotload(str(names[-1]))
    assert second.base_saved and second.base_identity == names[-1]
    assert "warmup_time_s" not in second.last_timing
    second.reset_delta_chain()
    assert (second.base_saved, second.base_identity) == (False, None)
    names.append(second.save_and_hotload("fresh"))
    kinds = {
        row["name"].rpartition("/")[2]: row["checkpointType"].rpartition("CHECKPOINT_TYPE_")[2]
        for row in TrainerJobManager(base_url=daemon.address).list_checkpoints("full")
    }
    assert [kinds[str(name)] for name in names] == [
        "INFERENCE_BASE",
        "INFERENCE_ARC_V2",
        "INFERENCE_ARC_V2",
        "INFERENCE_ARC_V2",
        "INFERENCE_BASE",
    ]
    params = tinker.SamplingParams(max_tokens=4, seed=1)
    prompt = tinker.ModelInput.from_ints([1, 2])
    sampled = second.get_sampling_client().sample(prompt, 1, params).result()
    assert sampled.snapshot == names[-1]
    sampler = second.get_deployment_sampler()
    assert isinstance(sampler, DeploymentSampler)
    assert (sampler.model, sampler.base_url) == ("serve", deployments.base_url)
