"""Managers without a daemon: settings, names, models' configs, what a syncer accepts."""

from __future__ import annotations

import datetime
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from firetitan.v1 import shape_pb2

from firetitan_client import (
    DeploymentConfig,
    DeploymentManager,
    FireworksClient,
    InvalidArgument,
    NotFound,
    TrainerJobConfig,
    TrainerJobManager,
    TrainingAPIError,
    WeightSyncer,
)
from firetitan_client.control_client import deployment_id_of, job_id_of
from firetitan_client.training_profile import context_length, is_moe, profile_of


@pytest.fixture
def client(tmp_path: Path) -> FireworksClient:
    return FireworksClient(address=str(tmp_path / "nobody.sock"), autostart=False)


@pytest.mark.parametrize("name", ["x", "trainers/x", "accounts/a/rlorTrainerJobs/x"])
def test_a_trainer_by_any_of_its_names(name: str) -> None:
    assert job_id_of(name) == "x"


@pytest.mark.parametrize("name", ["x", "deployments/x", "accounts/a/deployments/x", "m/n#x"])
def test_a_deployment_by_any_of_its_names(name: str) -> None:
    assert deployment_id_of(name) == "x"


@pytest.mark.parametrize("name", ["", "trainers/", "deployments/x", "../x", None, 3])
def test_what_names_no_trainer(name: Any) -> None:
    with pytest.raises(InvalidArgument, match="job_id"):
        job_id_of(name)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"base_model": ""}, "base_model"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"display_name": "x" * 64}, "display_name"),
        ({"inactivity_timeout": "10801s"}, "3 hours"),
        ({"inactivity_timeout": "2h"}, "inactivity_timeout"),
        ({"inactivity_timeout": datetime.timedelta(seconds=-1)}, "non-negative"),
        ({"training_shape_ref": "s", "auto_select_training_shape": True}, "both"),
        ({"training_shape_ref": "s", "node_count": 2}, "node_count"),
    ],
)
def test_a_trainers_contradicting_settings(settings: dict[str, Any], said: str) -> None:
    config = TrainerJobConfig(**{"base_model": "m", **settings})
    with pytest.raises(ValueError, match=said):
        config.validate()


def test_a_trainers_plain_settings_pass() -> None:
    config = TrainerJobConfig(
        "m",
        gradient_accumulation_steps=1,
        display_name="x" * 63,
        inactivity_timeout=datetime.timedelta(hours=3),
        accelerator_type="a",
    )
    config.validate()
    config.refuse_unsupported()


def test_what_no_daemon_does_is_refused(client: FireworksClient) -> None:
    manager = TrainerJobManager(address=client.base_url)
    with pytest.raises(NotImplementedError, match="trainer_replica_count"):
        manager.create(TrainerJobConfig("m", trainer_replica_count=2))
    with pytest.raises(ValueError, match="lora_rank"):
        manager.create(TrainerJobConfig("m", lora_rank=4, forward_only=True))


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"base_model": ""}, ValueError),
        ({"deployment_shape": "a", "expected_deployment_shape": "b"}, ValueError),
        ({"deployment_shape": "a", "accept_shapeless_risk": True}, ValueError),
        ({"max_replica_count": 0}, ValueError),
        ({"min_replica_count": 2}, ValueError),
        ({"hot_load_transition_type": "fast"}, ValueError),
    ],
)
def test_a_deployments_bad_settings(
    client: FireworksClient, settings: dict[str, Any], kind: type[Exception]
) -> None:
    config = DeploymentConfig(**{"deployment_id": "d", "base_model": "m", **settings})
    with pytest.raises(kind):
        DeploymentManager(address=client.base_url).create_or_get(config)


def test_a_deployment_of_a_profile(client: FireworksClient) -> None:
    shape = shape_pb2.Shape(
        name="accounts/a/trainingShapes/s/versions/7",
        deployment_shape="accounts/a/deploymentShapes/d/versions/2",
        dtype="auto",
    )
    profile = profile_of(shape)
    assert profile.training_shape == "accounts/a/trainingShapes/s"
    assert profile.supports_lora
    assert profile.max_supported_context_length == 0
    assert profile.deployment_shape == "accounts/a/deploymentShapes/d"
    config = DeploymentConfig.from_training_profile(
        deployment_id="d", base_model="m", profile=profile
    )
    config.validate()
    assert config.deployment_shape == config.expected_deployment_shape == profile.deployment_shape
    with pytest.raises(ValueError, match="profile"):
        DeploymentConfig.from_training_profile(
            deployment_id="d", base_model="m", profile=SimpleNamespace(deployment_shape="")
        )
    with pytest.raises(ValueError, match="training_shape_id"):
        client.resolve_training_profile(" ")


@pytest.mark.parametrize(
    ("body", "mask", "kind"),
    [
        ({}, "maxReplicaCount", ValueError),
        ({"maxReplicaCount": 1}, "", ValueError),
        ({"maxReplicaCount": True}, "maxReplicaCount", ValueError),
        ({"max_replica_count": -1}, "max_replica_count", ValueError),
        (
            {"minReplicaCount": 3, "maxReplicaCount": 2},
            "minReplicaCount,maxReplicaCount",
            ValueError,
        ),
        ({"description": "d"}, "description", NotImplementedError),
    ],
)
def test_updates_that_are_refused(
    client: FireworksClient, body: dict[str, Any], mask: str, kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        DeploymentManager(address=client.base_url).update("d", body, mask)


@pytest.mark.parametrize(
    ("config", "moe", "length"),
    [
        ({"num_experts": 8, "max_position_embeddings": 64}, True, 64),
        ({"num_local_experts": 1, "n_positions": 32}, False, 32),
        ({"text_config": {"n_routed_experts": 4, "max_position_embeddings": 16}}, True, 16),
        ({"num_experts": None}, False, 0),
    ],
)
def test_what_a_config_says(
    client: FireworksClient, tmp_path: Path, config: dict[str, Any], moe: bool, length: int
) -> None:
    assert (is_moe(config), context_length(config)) == (moe, length)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert client.model_is_moe(str(tmp_path)) is moe


def test_a_model_of_the_hugging_face_cache(
    client: FireworksClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--org--name" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"num_experts": 2}')
    assert client.model_is_moe("org/name")
    assert not client.model_is_moe("firetitan/toy")


def test_what_is_promoted_to_what_is_checked_in_the_call(client: FireworksClient) -> None:
    name = "accounts/a/rlorTrainerJobs/j/checkpoints/c"
    with pytest.raises(ValueError, match="Must be lowercase"):
        client.promote_checkpoint(name=name, output_model_id="A", base_model="m")
    with pytest.raises(ValueError, match="name"):
        client.promote_checkpoint(output_model_id="a", base_model="m")
    with pytest.raises(ValueError, match="not both"):
        client.promote_checkpoint("j", "c", "a", "m", name=name)
    with pytest.raises(ValueError, match="list_checkpoints row"):
        client.promote_checkpoint(name="c", output_model_id="a", base_model="m")
    with (
        pytest.warns(DeprecationWarning, match="name="),
        pytest.raises(ValueError, match="output_model_id is required"),
    ):
        client.promote_checkpoint("j", "c")


def test_an_api_error_carries_its_numbers() -> None:
    error = TrainingAPIError("no", status_code=418, reason="TEAPOT", metadata={"a": "b"})
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert isinstance(one, RuntimeError)
        assert (str(one), one.status_code, one.reason, one.metadata) == (
            "no",
            418,
            "TEAPOT",
            {"a": "b"},
        )
    assert NotFound("gone").status_code == 404
    assert isinstance(NotFound("gone"), KeyError)


class FakeManager:
    """Records nothing: a syncer refuses before it asks."""


@pytest.mark.parametrize(
    "settings",
    [
        {"compression_format": "arc_v3"},
        {"first_checkpoint_type": "merged_base"},
        {"deployment_id": "d"},
        {"deploy_mgr": FakeManager()},
    ],
)
def test_what_a_syncer_refuses(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        WeightSyncer(SimpleNamespace(), **settings)  # type: ignore[arg-type]


class Policy:
    """A training client that only saves."""

    def __init__(self) -> None:
        self.kinds: list[str | None] = []

    def save_weights_for_sampler_ext(self, name: str, checkpoint_type: str | None) -> Any:
        self.kinds.append(checkpoint_type)
        return SimpleNamespace(path=name, snapshot_name=name)


def test_a_syncer_leaves_the_kind_to_the_daemon() -> None:
    policy = Policy()
    syncer = WeightSyncer(policy)  # type: ignore[arg-type]
    syncer.save_only("a")
    syncer.save_only("b", "delta")
    syncer.reset_delta_chain()
    syncer.save_only("c")
    syncer.save_only("d")
    WeightSyncer(policy, first_checkpoint_type="delta").save_only("e")  # type: ignore[arg-type]
    assert policy.kinds == [None, "delta", "base", None, "delta"]
    with pytest.raises(RuntimeError, match="only saves"):
        syncer.save_and_hotload("f")
    assert len(policy.kinds) == 5
