"""Shapes over a real daemon: named, derived, told to clients, refused before anything is made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from firetitan.v1 import shape_service_pb2, trainer_service_pb2
from support.daemon import DaemonProcess

from firetitan_client import (
    DeploymentConfig,
    DeploymentManager,
    FiretitanServiceClient,
    FireworksClient,
    TrainerJobConfig,
    TrainerJobManager,
)

pytestmark = pytest.mark.timeout(200)
TOY = "firetitan/toy"
CONFIG = """
[training_shapes.small]
version = 3
max_context_length = 64
deployment_shape = "small-serving"

[deployment_shapes.small-serving]
max_context_length = 48
"""
LOCAL = "accounts/local/trainingShapes"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    home: Path = tmp_path_factory.mktemp("shapes") / "home"
    home.mkdir()
    (home / "config.toml").write_text(CONFIG)
    process = DaemonProcess(home)
    process.start()
    yield process
    process.stop()


def service_of(daemon: DaemonProcess, **settings: Any) -> FiretitanServiceClient:
    settings = {"base_model": TOY, "lora_rank": 0, **settings}
    return FiretitanServiceClient.from_firetitan_config(address=daemon.address, **settings)


def test_a_named_shape_is_what_trainer_and_deployment_are(daemon: DaemonProcess) -> None:
    service = service_of(
        daemon, training_shape_id="small", trainer_job_id="small", deployment_id="small"
    )
    service.create_training_client()
    profile = service.training_profile
    assert profile.training_shape_version == f"{LOCAL}/small/versions/3"
    assert (profile.training_shape, profile.trainer_mode) == (f"{LOCAL}/small", "POLICY_TRAINER")
    assert service.max_context_length == profile.max_supported_context_length == 64
    assert service.deployment_shape == "accounts/local/deploymentShapes/small-serving"
    deployments = DeploymentManager(address=daemon.address)
    found = deployments.get("small")
    assert found.deployment_shape_version == (
        "accounts/local/deploymentShapes/small-serving/versions/1"
    )
    # It stays what it is: attached again it keeps its shape, another is refused by name.
    with pytest.raises(ValueError, match=r"deployment_shape: .*local-cpu.* exists with .*small"):
        deployments.create_or_get(DeploymentConfig("small", TOY, deployment_shape="local-cpu"))
    again = service_of(daemon, trainer_job_id="small", deployment_id="small")
    again.create_training_client()
    assert again.training_profile == profile


def test_without_a_shape_one_is_derived_and_told(daemon: DaemonProcess) -> None:
    service = service_of(daemon, trainer_job_id="derived", deployment_id="derived", lora_rank=4)
    assert service.training_profile is None
    with pytest.raises(RuntimeError, match="deployment_shape"):
        assert service.deployment_shape
    service.create_training_client()
    profile = service.training_profile
    assert profile.training_shape == f"{LOCAL}/local"
    assert (profile.trainer_mode, profile.supports_lora) == ("LORA_TRAINER", True)
    assert profile.max_supported_context_length == service.max_context_length == 8192
    assert service.deployment_shape == "accounts/local/deploymentShapes/local"
    assert "shape of trainers/derived" in daemon.log
    request = trainer_service_pb2.GetTrainerRequest(name="trainers/derived")
    shape = service.stubs.trainers.GetTrainer(request).trainer.shape
    assert (shape.device, shape.num_devices, shape.base_model) == ("cpu", 0, TOY)
    assert "no shape was asked for" in shape.notes[0]
    # What was told can be asked for.
    other = service_of(
        daemon, training_shape_id=profile.training_shape_version, create_deployment=False
    )
    other.create_training_client()


def test_a_shape_of_a_data_centre_is_stood_in_for(daemon: DaemonProcess) -> None:
    name = "accounts/fireworks/trainingShapes/qwen3-8b-128k-h200"
    service = service_of(daemon, training_shape_id=name, create_deployment=False)
    service.create_training_client()
    assert service.training_profile.training_shape == name
    assert f"{name} is not configured here" in daemon.log
    assert (
        FireworksClient(address=daemon.address)
        .resolve_training_profile(f"{name}/versions/7")
        .training_shape_version.endswith("/versions/7")
    )


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"training_shape_id": f"{LOCAL}/never"}, "there is no"),
        ({"training_shape_id": "small/versions/2"}, "has version 3 here, not 2"),
        ({"training_shape_id": "small", "max_context_length": 65}, "takes 64 tokens"),
        ({"training_shape_id": "local-lora"}, "is for LORA_TRAINER"),
        ({"training_shape_id": "local-full", "lora_rank": 4}, "is for POLICY_TRAINER"),
        ({"deployment_shape": "accounts/local/deploymentShapes/no"}, "deployment_shape: there"),
    ],
)
def test_a_named_shape_that_cannot_serve_is_refused_in_the_call(
    daemon: DaemonProcess, settings: dict[str, Any], why: str
) -> None:
    service = service_of(daemon, trainer_job_id="refused", deployment_id="refused", **settings)
    with pytest.raises(ValueError, match=why):
        service.create_training_client()
    assert TrainerJobManager(address=daemon.address).try_get("refused") is None
    assert DeploymentManager(address=daemon.address).get("refused") is None


def test_managers_take_shapes(daemon: DaemonProcess) -> None:
    manager = TrainerJobManager(address=daemon.address)
    with pytest.raises(ValueError, match="is for FORWARD_ONLY"):
        manager.create(TrainerJobConfig(TOY, training_shape_ref="local-reference"))
    made = manager.create_and_wait(
        TrainerJobConfig(TOY, requested_job_id="ref", training_shape_ref="small")
    )
    assert made.max_context_length == 64
    profile = manager.resolve_training_profile("small")
    config = DeploymentConfig.from_training_profile(
        deployment_id="of-profile", base_model=TOY, profile=profile
    )
    deployments = DeploymentManager(address=daemon.address)
    deployments.create_or_get(config)
    found = deployments.wait_for_ready("of-profile")
    assert found.deployment_shape_version == profile.deployment_shape_version
    with FiretitanServiceClient(address=daemon.address) as service:
        listed = service.stubs.shapes.ListShapes(shape_service_pb2.ListShapesRequest()).shapes
    assert f"{LOCAL}/small/versions/3" in [one.name for one in listed]
