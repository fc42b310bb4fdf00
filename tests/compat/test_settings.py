"""Every setting of a managed service, on a real daemon."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import pytest
from firetitan.v1 import trainer_service_pb2, training_service_pb2
from support import surface

import firetitan_client
from firetitan_client import FiretitanServiceClient

pytestmark = pytest.mark.timeout(180)
MakeService = Callable[..., FiretitanServiceClient]

WITHOUT_USE: dict[str, Any] = {
    "training_shape_id": "accounts/fireworks/trainingShapes/qwen3-8b-128k-h200",
    "deployment_shape": "accounts/fireworks/deploymentShapes/qwen3-8b",
    "learning_rate": 3e-4,
    "region": "US_VIRGINIA_1",
    "gradient_accumulation_steps": 1,
    "custom_image_tag": "1.2",
    "extra_args": ["--fast"],
    "extra_values": {"a": "b"},
    "deployment_extra_args": ["--fast"],
    "deployment_extra_values": {"a": "b"},
    "trainer_timeout_s": 10.0,
    "trainer_pending_timeout_s": 20.0,
    "deployment_timeout_s": 30.0,
    "hotload_timeout_s": 40.0,
    "reattach_settle_timeout_s": 50.0,
    "reattach_poll_interval_s": 0.5,
    "inactivity_timeout": "3600s",
    "disable_inactivity_cleanup": True,
    "display_name": "a run",
    "purpose": "research",
    "preemptible": True,
    "managed_by": "me",
    "skip_validations": True,
    "disable_speculative_decoding": True,
    "use_reservation": False,
    "reservation_target": "r",
    "wait_for_trainer_before_deployment": True,
    "weight_sync_transport": "RDMA",
}


def test_aliases(make_service: MakeService) -> None:
    service = make_service(
        base_model=None,
        model_name="firetitan/toy",
        training_shape="s",
        trainer_id="by-alias",
        deployment_replica_count=1,
    )
    service.create_training_client()
    assert service.trainer_job_id == "by-alias"
    shown = service.config
    assert (shown.base_model, shown.training_shape_id, shown.replica_count) == (
        "firetitan/toy",
        "s",
        1,
    )
    for alias, name in surface.ALIASES.items():
        with pytest.raises(ValueError, match=f"Pass either '{name}' or alias '{alias}', not both"):
            FiretitanServiceClient.from_firetitan_config(**{name: 1, alias: 1})
    with pytest.raises(ValueError, match="Pass only one alias for 'training_shape_id'"):
        FiretitanServiceClient.from_firetitan_config(training_shape="a", training_shape_ref="b")


def test_unknown_settings(make_service: MakeService) -> None:
    with pytest.raises(TypeError, match="'lora_ranks'"):
        make_service(lora_ranks=4)
    config = firetitan_client.FiretitanProvisioningConfig(base_model="m")
    with pytest.raises(ValueError, match="managed_config or managed config keyword arguments"):
        FiretitanServiceClient.from_firetitan_config(managed_config=config, base_model="m")
    with pytest.raises(TypeError, match="managed_config: is a list"):
        FiretitanServiceClient.from_firetitan_config(managed_config=["m"])
    shown = FiretitanServiceClient.from_firetitan_config(managed_config=config, region=None).config
    assert shown.base_model == "m"  # None asks for nothing
    nothing = dict.fromkeys(surface.fields(surface.CLASSES["FiretitanProvisioningConfig"]))
    asked = {"base_model": "firetitan/toy", "lora_rank": 4, "create_deployment": False}
    service = make_service(**{**nothing, **asked}, not_known_either=None)
    assert service.create_training_client().trainer_job_id == service.trainer_job_id


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("base_model", 5),
        ("base_model", " "),
        ("lora_rank", "8"),
        ("lora_rank", 4.5),
        ("lora_rank", True),
        ("max_lora_rank", -1),
        ("max_context_length", float("nan")),
        ("replica_count", -1),
        ("trainer_replica_count", "2"),
        ("lora_alpha", -3),
        ("lora_alpha", float("nan")),
        ("seed", "a"),
        ("train_mlp", "no"),
        ("create_deployment", "no"),
        ("forward_only", 1),
        ("trainer_job_id", "../x"),
        ("trainer_job_id", 5),
        ("reference_trainer_job_id", "a b"),
        ("deployment_id", "a/b"),
        ("cleanup_deployment_on_close", True),
        ("hot_load_transition_type", 3),
        ("inactivity_timeout", "1h"),
    ],
)
def test_values_that_no_setting_has(name: str, value: Any) -> None:
    """Told in the call, by name; no daemon is asked."""
    with pytest.raises(ValueError, match=name):
        FiretitanServiceClient.from_firetitan_config(**{name: value})
    with pytest.raises(ValueError, match=name):
        FiretitanServiceClient.from_firetitan_config(managed_config={name: value})


def test_notes_are_texts() -> None:
    for notes in ({"a": 1}, ["a"]):
        with pytest.raises(ValueError, match="user_metadata"):
            FiretitanServiceClient.from_firetitan_config(user_metadata=notes)
        with pytest.raises(ValueError, match="user_metadata"):
            FiretitanServiceClient(user_metadata=notes)


def test_settings_of_a_training_client(make_service: MakeService) -> None:
    service = make_service(create_deployment=False, lora_rank=None)
    for settings in (
        {"base_model": 5},
        {"base_model": ""},
        {"lora_rank": "8"},
        {"lora_rank": -1},
        {"lora_alpha": "x"},
        {"lora_alpha": float("inf")},
        {"seed": 0.5},
        {"train_mlp": "no"},
        {"user_metadata": {"a": None}},
    ):
        (name,) = settings
        with pytest.raises(ValueError, match=name):
            service.create_training_client(**settings)
    assert service.managed_trainer_job_id is None
    assert service.create_training_client(lora_rank=4).get_info().lora_rank == 4


def test_settings_reach_the_trainer(make_service: MakeService) -> None:
    service = make_service(
        create_deployment=False,
        lora_rank=6,
        lora_alpha=12,
        seed=77,
        train_mlp=False,
        train_attn=True,
        train_unembed=False,
        max_context_length=32,
    )
    client = service.create_training_client()
    trainer = service.stubs.trainers.GetTrainer(
        trainer_service_pb2.GetTrainerRequest(name=f"trainers/{service.trainer_job_id}")
    ).trainer
    assert (trainer.lora_rank, trainer.max_context_length) == (6, 32)
    session = service.stubs.training.GetSession(
        training_service_pb2.GetSessionRequest(name=client.session_name)
    ).session
    lora = session.lora
    assert (lora.rank, lora.alpha, session.seed) == (6, 12, 77)
    assert (lora.train_mlp, lora.train_attn, lora.train_unembed) == (False, True, False)
    assert service.max_context_length == service.managed_max_context_length == 32


def test_alpha_of_the_call(make_service: MakeService) -> None:
    for number, (config, call, alpha) in enumerate(
        (
            ({}, {}, 32),
            ({"lora_alpha": 12}, {}, 12),
            ({"lora_alpha": 12}, {"lora_alpha": 20}, 20),
            ({}, {"lora_alpha": None}, 8),
        )
    ):
        service = make_service(create_deployment=False, trainer_job_id=f"alpha-{number}", **config)
        client = service.create_training_client(**call)
        session = service.stubs.training.GetSession(
            training_service_pb2.GetSessionRequest(name=client.session_name)
        ).session
        assert session.lora.alpha == alpha


def test_what_has_no_use_here_is_kept_and_shown(make_service: MakeService) -> None:
    service = make_service(
        **WITHOUT_USE,
        api_key="key",
        base_url="https://api.fireworks.ai",
        inference_url="https://inference.fireworks.ai",
        hotload_api_url="https://hotload.fireworks.ai",
        additional_headers={"X-Team": "me"},
        verify_ssl=False,
        project_id="p",
    )
    policy = service.create_training_client()
    assert policy.save_weights_for_sampler_ext("s").path
    shown = dataclasses.asdict(service.config)
    assert {name: shown[name] for name in WITHOUT_USE} == WITHOUT_USE
    service.config.region = "elsewhere"  # a copy
    assert service.config.region == "US_VIRGINIA_1"
    assert make_service(hotload_timeout_s=None).config.hotload_timeout_s == 600


def test_accelerators_warn(make_service: MakeService) -> None:
    for name in ("accelerator_type", "accelerator_count", "node_count"):
        with pytest.warns(DeprecationWarning, match=name):
            make_service(**{name: 1})
    with pytest.warns(DeprecationWarning):
        service = make_service(create_deployment=False, accelerator_count=8)
    assert service.create_training_client().trainer_job_id


def test_replicas(make_service: MakeService, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(NotImplementedError, match="trainer_replica_count=2"):
        make_service(trainer_replica_count=2)
    with pytest.raises(ValueError, match="replica_count: is -1"):
        make_service(replica_count=-1)
    with pytest.raises(ValueError, match=r"replicas: 99; .* limits\.max_replicas"):
        make_service(replica_count=99).create_sampling_client()
    with caplog.at_level(logging.WARNING, "firetitan"):
        service = make_service(replica_count=0)
    assert "replica_count=0: taken as 1" in caplog.text
    assert service.create_sampling_client().sample([1], 1).result().sequences


def test_cleanup_constants(make_service: MakeService) -> None:
    delete = firetitan_client.CLEANUP_DEPLOYMENT_ON_CLOSE_DELETE
    stop = firetitan_client.CLEANUP_DEPLOYMENT_ON_CLOSE_SCALE_TO_ZERO
    assert (delete, stop) == ("delete", "scale_to_zero")
    assert set(firetitan_client.DeploymentCleanupOnClose.__args__) == {delete, stop}
    with pytest.raises(ValueError, match="'scale_to_zero', 'delete' or None"):
        FiretitanServiceClient.from_firetitan_config(cleanup_deployment_on_close="stop")
    service = make_service()
    service.create_sampling_client()
    name = service.deployment_id
    service.close()
    with pytest.raises(KeyError, match=name):
        firetitan_client.FiretitanSamplingClient.create(service.base_url, name).sample(
            [1], 1
        ).result()
