"""What a service and the managers say and refuse, on a real daemon."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from firetitan.v1 import deployment_service_pb2, trainer_service_pb2
from support.daemon import DaemonProcess

from firetitan_client import (
    DeploymentConfig,
    DeploymentManager,
    FiretitanServiceClient,
    FireworksClient,
    TrainerJobConfig,
    TrainerJobManager,
)

pytestmark = pytest.mark.timeout(180)
TOY = "firetitan/toy"
MakeService = Callable[..., FiretitanServiceClient]


def test_documented_refusals(toy_daemon: DaemonProcess, make_service: MakeService) -> None:
    bare = FiretitanServiceClient(address=toy_daemon.address)
    with pytest.raises(ValueError, match="base_model is required for a direct training client"):
        bare.create_training_client()
    service = make_service()
    service.create_training_client(TOY, 4)
    with pytest.raises(ValueError) as second:
        service.create_training_client(TOY, 4)
    assert str(second.value) == (
        "A training client for 'firetitan/toy' (lora_rank=4) already exists on this service. "
        "Create a new FiretitanServiceClient for a separate trainer."
    )
    service.close()
    service.close()
    for call in (service.create_training_client, service.create_sampling_client):
        with pytest.raises(RuntimeError, match="FiretitanServiceClient is closed"):
            call()


def test_what_was_resolved(make_service: MakeService) -> None:
    service = make_service(trainer_job_id="resolved", deployment_id="resolved-serving")
    known = ("trainer_job_id", "deployment_id", "max_context_length")
    for name in known:
        with pytest.raises(RuntimeError, match=name):
            getattr(service, name)
        assert getattr(service, f"managed_{name}") is None
    assert service.managed_deployment_shape is None
    service.create_training_client()
    for name in (*known, "deployment_shape"):
        assert getattr(service, name) == getattr(service, f"managed_{name}")
    assert service.managed_trainer_job_id == service.managed_deployment_id[:8] == "resolved"
    assert service.trainer_job_id == service.reference_client_job_id == "resolved"
    assert service.deployment_id == "resolved-serving"
    assert service.managed_max_context_length == service.max_context_length == 8192
    assert service.deployment_shape == "accounts/local/deploymentShapes/local"
    assert service.training_profile.trainer_mode == "LORA_TRAINER"
    assert service.reference_trainer_job_id is None
    for name in (
        "accelerator_type",
        "accelerator_count",
        "training_session_id",
        "training_session_name",
    ):
        assert getattr(service, name) is None
    assert service.base_url.endswith("#resolved")


def test_nothing_is_made_before_it_is_used(
    toy_daemon: DaemonProcess, make_service: MakeService
) -> None:
    service = make_service(trainer_job_id="lazy", deployment_id="lazy-serving")
    with FiretitanServiceClient(address=toy_daemon.address) as other:
        stubs = other.stubs

        def names() -> set[str]:
            trainers = stubs.trainers.ListTrainers(trainer_service_pb2.ListTrainersRequest())
            deployments = stubs.deployments.ListDeployments(
                deployment_service_pb2.ListDeploymentsRequest()
            )
            return {one.name for one in (*trainers.trainers, *deployments.deployments)}

        both = {"trainers/lazy", "deployments/lazy-serving"}
        assert not names() & both
        service.create_training_client()
        assert names() >= both


def test_models_and_shapes(toy_daemon: DaemonProcess, tiny_llama: Path) -> None:
    client = FireworksClient("key", "https://api.fireworks.ai", address=toy_daemon.address)
    assert client.model_is_moe(TOY) is False
    assert client.model_is_moe(str(tiny_llama)) is False
    profile = client.resolve_training_profile("a-shape", base_model=str(tiny_llama))
    assert profile.max_supported_context_length == 256
    assert profile.training_shape == "a-shape"
    assert profile.training_shape_version == "a-shape/versions/1"
    assert profile.deployment_shape_version == f"{profile.deployment_shape}/versions/1"
    assert (profile.trainer_image_tag, profile.deployment_image_tag) == ("", "")
    assert profile.base_model_weight_precision == "auto"
    assert profile.trainer_mode == ""
    assert profile.supports_lora
    assert (profile.accelerator_type, profile.accelerator_count) == ("", 0)
    assert (profile.node_count, profile.pipeline_parallelism) == (1, 1)
    assert client.account_id == "local"
    assert client.base_url == FireworksClient(address=toy_daemon.address).base_url
    assert DeploymentManager(address=toy_daemon.address).inference_url
    client.close()


def test_job_configs(toy_daemon: DaemonProcess) -> None:
    manager = TrainerJobManager(address=toy_daemon.address)
    config = TrainerJobConfig(
        TOY,
        requested_job_id="configured",
        lora_rank=2,
        max_context_length=24,
        display_name="a run",
        gradient_accumulation_steps=1,
        learning_rate=3e-4,
        node_count=2,
        region="US",
        custom_image_tag="1",
        extra_args=["--x"],
        extra_values={"a": "b"},
        accelerator_type="H200",
        accelerator_count=8,
        inactivity_timeout="3600s",
        disable_inactivity_cleanup=True,
        skip_validations=True,
        purpose="p",
        preemptible=True,
        managed_by="me",
        use_reservation=False,
        reservation_target="r",
    )
    config.validate()
    endpoint = manager.create_and_wait(config)
    assert (endpoint.job_id, endpoint.max_context_length) == ("configured", 24)
    assert manager.get("configured")["trainingConfig"]["loraRank"] == 2
    shaped = TrainerJobConfig(TOY, requested_job_id="shaped", training_shape_ref="s")
    assert manager.create_and_wait(shaped).job_id == "shaped"
    for wrong in (
        TrainerJobConfig(TOY, gradient_accumulation_steps=4),
        TrainerJobConfig(TOY, display_name="x" * 64),
        TrainerJobConfig(TOY, training_shape_ref="s", accelerator_count=8),
        TrainerJobConfig(TOY, training_shape_ref="s", auto_select_training_shape=True),
        TrainerJobConfig(TOY, lora_rank="8"),  # type: ignore[arg-type]
        TrainerJobConfig(TOY, max_context_length=-1),
    ):
        with pytest.raises(ValueError):
            manager.create(wrong)
    with pytest.raises(NotImplementedError, match="trainer_replica_count"):
        manager.create(TrainerJobConfig(TOY, trainer_replica_count=2))


def test_deployment_configs(toy_daemon: DaemonProcess) -> None:
    manager = DeploymentManager(address=toy_daemon.address)
    profile = FireworksClient(address=toy_daemon.address).resolve_training_profile("s")
    config = DeploymentConfig.from_training_profile(
        deployment_id="configured-serving",
        base_model=TOY,
        profile=profile,
        description="d",
        region="US",
        annotations={"a": "b"},
        extra_args=["--x"],
        extra_values={"a": "b"},
        for_training=True,
        preemptible=True,
        skip_shape_validation=True,
        disable_speculative_decoding=True,
        accelerator_type="NVIDIA_B200",
        hot_load_bucket_type=None,
        enable_hot_load=False,
    )
    config.validate()
    info = manager.create_or_get(config)
    DeploymentConfig("x", TOY, accept_shapeless_risk=True).validate()
    assert (info.deployment_id, info.base_model) == ("configured-serving", TOY)
    assert info.name.endswith("/deployments/configured-serving")
    assert info.deployment_shape_version == profile.deployment_shape_version
    assert manager.wait_for_ready("configured-serving").state == "READY"
    assert info.hot_load_bucket_url is None and info.hot_load_transition_type is None
    with pytest.raises(ValueError, match="deployment_shape: is 'a', the training profile's is 'b'"):
        DeploymentConfig("x", TOY, deployment_shape="a", expected_deployment_shape="b").validate()
    with pytest.raises(ValueError, match=r"replicas: 99; .* limits\.max_replicas"):
        manager.create_or_get(DeploymentConfig("x", TOY, max_replica_count=99))
    with pytest.raises(ValueError, match="min_replica_count=2, max_replica_count=1"):
        manager.create_or_get(DeploymentConfig("x", TOY, min_replica_count=2))
