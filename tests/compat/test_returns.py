"""Whether a call returns a future or a value, call by call, on a real daemon."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tinker
from support import compatibility, surface
from support.adapters import write_toy
from support.daemon import DaemonProcess

from firetitan_client import (
    APIFuture,
    DeploymentConfig,
    DeploymentSampler,
    FiretitanSamplingClient,
    FiretitanServiceClient,
    FiretitanTrainingClient,
    SampleStream,
    SaveSamplerResult,
)
from firetitan_client.rest_client import RestClient

pytestmark = pytest.mark.timeout(180)
MakeService = Callable[..., FiretitanServiceClient]
TOY = "firetitan/toy"
ADAM = tinker.AdamParams(learning_rate=1e-3)


def loss(_: Any, values: list[Any]) -> Any:
    return sum(value.sum() for value in values), {}


# Call to what it is called with and what it returns.
TRAINING: dict[str, tuple[Callable[[Any, Any], Any], type[Any]]] = {
    "forward": (lambda on, data: on.forward(data, "cross_entropy"), APIFuture),
    "forward_backward": (lambda on, data: on.forward_backward(data, "cross_entropy"), APIFuture),
    "forward_backward_custom": (
        lambda on, data: on.forward_backward_custom(data, loss),
        APIFuture,
    ),
    "forward_backward_contrastive": (
        lambda on, data: on.forward_backward_contrastive(data[:2], num_queries=1, temperature=0.1),
        APIFuture,
    ),
    "optim_step": (lambda on, _: on.optim_step(ADAM), APIFuture),
    "save_weights_for_sampler": (lambda on, _: on.save_weights_for_sampler("a"), APIFuture),
    "save_weights_for_sampler_ext": (
        lambda on, _: on.save_weights_for_sampler_ext("b"),
        SaveSamplerResult,
    ),
    "save_weights_and_get_sampling_client": (
        lambda on, _: on.save_weights_and_get_sampling_client(),
        FiretitanSamplingClient,
    ),
    "save_state": (lambda on, _: on.save_state("s"), APIFuture),
    "load_state": (lambda on, _: on.load_state("s"), APIFuture),
    "load_state_with_optimizer": (lambda on, _: on.load_state_with_optimizer("s"), APIFuture),
    "load_adapter": (lambda on, _: on.load_adapter("adapter"), APIFuture),
    "list_checkpoints": (lambda on, _: on.list_checkpoints(), list),
    "resolve_checkpoint_path": (lambda on, _: on.resolve_checkpoint_path("s", "job"), str),
    "create_sampling_client": (
        lambda on, _: on.create_sampling_client(on.save_weights_for_sampler("c").result().path),
        FiretitanSamplingClient,
    ),
    "create_base_training_client": (
        lambda on, _: on.create_base_training_client(),
        FiretitanTrainingClient,
    ),
    "get_tokenizer": (lambda on, _: on.get_tokenizer(), object),
    "get_info": (lambda on, _: on.get_info(), tinker.types.GetInfoResponse),
    "save_weights_and_get_sampling_client_submit": (
        lambda on, _: on.save_weights_and_get_sampling_client_submit(),
        APIFuture,
    ),
    "weight_sync": (lambda on, _: on.weight_sync(), APIFuture),
    "get_telemetry": (lambda on, _: on.get_telemetry(), type(None)),
    "get_console_url": (lambda on, _: on.get_console_url(), str),
    "result": (lambda on, _: on.result(60), FiretitanTrainingClient),
    "future": (lambda on, _: on.future(), APIFuture),
    "coroutine": (lambda on, _: asyncio.run(on.coroutine()), FiretitanTrainingClient),
    "unload_model": (lambda on, _: on.unload_model(), APIFuture),
}
SAMPLING: dict[str, tuple[Callable[[Any, Any], Any], type[Any]]] = {
    "create": (
        lambda on, place: FiretitanSamplingClient.create(place.address, place.deployment),
        FiretitanSamplingClient,
    ),
    "sample": (lambda on, _: on.sample([1, 2], 1), APIFuture),
    "sample_stream": (lambda on, _: on.sample_stream([1, 2]), SampleStream),
    "compute_logprobs": (lambda on, _: on.compute_logprobs([1, 2]), APIFuture),
    "get_sampler_handle": (lambda on, _: on.get_sampler_handle(), str),
    "from_sampler_handle": (
        lambda on, _: on.from_sampler_handle(on.get_sampler_handle()),
        FiretitanSamplingClient,
    ),
    "get_tokenizer": (lambda on, _: on.get_tokenizer(), object),
    "get_base_model": (lambda on, _: on.get_base_model(), str),
    "get_telemetry": (lambda on, _: on.get_telemetry(), type(None)),
    "result": (lambda on, _: on.result(60), FiretitanSamplingClient),
    "future": (lambda on, _: on.future(), APIFuture),
    "coroutine": (lambda on, _: asyncio.run(on.coroutine()), FiretitanSamplingClient),
    "close": (lambda on, _: on.close(), type(None)),
}
SERVICE: dict[str, tuple[Callable[[Any, Any], Any], type[Any]]] = {
    "from_firetitan_config": (
        lambda on, place: FiretitanServiceClient.from_firetitan_config(base_model=TOY),
        FiretitanServiceClient,
    ),
    "create_training_client": (
        lambda on, make: make().create_training_client(),
        FiretitanTrainingClient,
    ),
    "create_lora_training_client": (
        lambda on, make: make().create_lora_training_client(TOY, 4),
        FiretitanTrainingClient,
    ),
    "create_training_client_from_state": (
        lambda on, make: make().create_training_client_from_state("cross_job://returns/kept"),
        FiretitanTrainingClient,
    ),
    "create_training_client_from_state_with_optimizer": (
        lambda on, make: make().create_training_client_from_state_with_optimizer(
            "cross_job://returns/kept"
        ),
        FiretitanTrainingClient,
    ),
    "create_base_training_client": (
        lambda on, _: on.create_base_training_client(),
        FiretitanTrainingClient,
    ),
    "create_reference_client": (
        lambda on, _: on.create_reference_client(),
        FiretitanTrainingClient,
    ),
    "release_references": (lambda on, _: on.release_references(), type(None)),
    "create_sampling_client": (lambda on, _: on.create_sampling_client(), FiretitanSamplingClient),
    "create_deployment_sampler": (lambda on, _: on.create_deployment_sampler(), DeploymentSampler),
    "create_deployment_sampler_for_model": (
        lambda on, place: on.create_deployment_sampler_for_model(place.deployment),
        DeploymentSampler,
    ),
    "create_inference_deployment_sampler": (
        lambda on, _: on.create_inference_deployment_sampler(
            DeploymentConfig("returned", TOY), cleanup_on_close="delete"
        ),
        DeploymentSampler,
    ),
    "hotload_sampler_snapshot": (
        lambda on, place: on.hotload_sampler_snapshot(place.snapshot),
        type(None),
    ),
    "requires_initial_sampler_sync": (lambda on, _: on.requires_initial_sampler_sync(), bool),
    "list_checkpoints": (lambda on, _: on.list_checkpoints("returns"), list),
    "promote_checkpoint": (
        lambda on, place: on.promote_checkpoint(
            name=f"accounts/local/rlorTrainerJobs/returns/checkpoints/{place.snapshot}",
            output_model_id="returned",
            base_model=TOY,
        ),
        dict,
    ),
    "create_rest_client": (lambda on, _: on.create_rest_client(), RestClient),
    "get_server_capabilities": (
        lambda on, _: on.get_server_capabilities(),
        tinker.types.GetServerCapabilitiesResponse,
    ),
    "get_telemetry": (lambda on, _: on.get_telemetry(), type(None)),
    "get_console_url": (lambda on, _: on.get_console_url(), str),
    "create_custom_loss": (
        lambda on, _: on.create_custom_loss(lambda logprobs: (logprobs.sum(), {}), {"logprobs": 1}),
        APIFuture,
    ),
    "close": (lambda on, _: on.close(), APIFuture),
}


@pytest.fixture
def place(
    make_service: MakeService,
    toy_daemon: DaemonProcess,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> SimpleNamespace:
    write_toy(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    service = make_service(
        trainer_job_id="returns", deployment_id="returns", tokenizer_model=str(tiny_llama)
    )
    policy = service.create_training_client()
    policy.save_state("kept").result()
    snapshot = policy.save_weights_for_sampler("kept").result().path
    return SimpleNamespace(
        service=service,
        policy=policy,
        snapshot=snapshot,
        address=toy_daemon.address,
        deployment="returns",
    )


TOO_NEW = {"create_custom_loss"} - set(dir(tinker.ServiceClient))
"""What an older tinker cannot make."""
REFUSED = ("save_weights_external_async",)
"""Twins that only raise."""


def calls_of(kind: str) -> set[str]:
    """Calls of a class that are there, twins apart."""
    done = {
        name
        for row in compatibility.rows()
        if row.section == kind and row.status != compatibility.UNIMPLEMENTED
        for name in row.names
    }
    calls = surface.calls(surface.CLASSES[kind])
    return {name for name in calls if name in done and not name.endswith("_async")} - {kind}


class Renamed:
    """A client that answers one call by its twin."""

    def __init__(self, client: Any, name: str) -> None:
        self._client, self._name = client, name

    def __getattr__(self, asked: str) -> Any:
        return getattr(self._client, f"{asked}_async" if asked == self._name else asked)


def test_what_each_call_returns(
    place: SimpleNamespace, make_service: MakeService, data: list[Any]
) -> None:
    client = place.service.create_sampling_client()
    for owner, on, table, with_ in (
        ("FiretitanTrainingClient", place.policy, TRAINING, data),
        ("FiretitanSamplingClient", client, SAMPLING, place),
        ("FiretitanServiceClient", place.service, SERVICE, place),
    ):
        there = calls_of(owner)
        assert sorted(there - set(table)) == []
        for name, (call, kind) in table.items():
            if name not in there or name in TOO_NEW:
                continue
            making = "make" in call.__code__.co_varnames
            answer = call(on, make_service if making else with_)
            assert isinstance(answer, kind), (name, answer)
            assert isinstance(answer, APIFuture) == (kind is APIFuture), (name, answer)
            if kind is APIFuture:
                answer.result(60)


async def test_what_each_twin_gives(
    place: SimpleNamespace, make_service: MakeService, data: list[Any]
) -> None:
    """A training twin gives the future, a creating or sampling one what that would."""
    policy = await place.policy
    policy.forward_backward(data, "cross_entropy")
    sampler = await place.service.create_sampling_client_async()
    for owner, on, table, with_ in (
        ("FiretitanTrainingClient", policy, TRAINING, data),
        ("FiretitanSamplingClient", sampler, SAMPLING, place),
        ("FiretitanServiceClient", place.service, SERVICE, place),
    ):
        left = {name for name in surface.calls(surface.CLASSES[owner]) if name.endswith("_async")}
        left -= set(REFUSED)
        for name, (call, kind) in table.items():
            if f"{name}_async" not in left:
                continue
            left.remove(f"{name}_async")
            making = "make" in call.__code__.co_varnames
            answer = call(
                Renamed(on, name), (lambda n=name: Renamed(make_service(), n)) if making else with_
            )
            assert inspect.isawaitable(answer), name
            answer = await answer
            if kind is APIFuture and on is sampler:
                assert not inspect.isawaitable(answer), (name, answer)
            else:
                assert isinstance(answer, kind), (name, answer)
            if kind is APIFuture and on is policy:
                await answer
        assert left == set(), owner
