"""Every row of docs/compatibility.md that says UNIMPLEMENTED, called on a real daemon.

What is implemented leaves this table and gets a test of its own; until then it must say so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from support import compatibility
from support.daemon import DaemonProcess

from firetitan_client import (
    DeploymentManager,
    FiretitanSamplingParams,
    FiretitanServiceClient,
)

pytestmark = pytest.mark.timeout(180)
TOY = "firetitan/toy"


def absent(*names: str) -> Callable[[SimpleNamespace], Any]:
    """Not even there, on the kind of client it would belong to."""

    def call(place: SimpleNamespace) -> None:
        kinds = (place.service, place.policy, place.client, place.native)
        assert [name for name in names if all(hasattr(kind, name) for kind in kinds)] == []
        raise NotImplementedError

    return call


def config(**settings: Any) -> Callable[[SimpleNamespace], Any]:
    return lambda _: FiretitanServiceClient.from_firetitan_config(base_model=TOY, **settings)


def sample(**options: Any) -> Callable[[SimpleNamespace], Any]:
    return lambda place: place.client.sample([1, 2], 1, **options)


def native(**options: Any) -> Callable[[SimpleNamespace], Any]:
    return lambda place: place.native.sample_with_prompt_tokens([1, 2], **options)


def manager(place: SimpleNamespace) -> DeploymentManager:
    return DeploymentManager(address=place.address)


SERVICE = "FiretitanServiceClient"
TRAINING = "FiretitanTrainingClient"
SAMPLING = "FiretitanSamplingClient"
CASES: dict[str, list[Callable[[SimpleNamespace], Any]]] = {
    f"{SERVICE}: projection_head_dim, lora_init_method of the call": [
        lambda on: on.service.create_training_client(projection_head_dim=8),
        lambda on: on.service.create_training_client(lora_init_method="pissa"),
    ],
    "FiretitanProvisioningConfig: several ranks of one trainer": [config(trainer_replica_count=2)],
    "DeploymentManager: path, cmek_resource of a hotload; update of other fields than trainer and "
    "replicas": [
        lambda on: manager(on).hotload("serving", TOY, "s", path="gs://bucket"),
        lambda on: manager(on).hotload("serving", TOY, "s", cmek_resource="key"),
        lambda on: manager(on).update("serving", {"displayName": "n"}, "displayName"),
    ],
    "FiretitanProvisioningConfig: projection_head_dim": [config(projection_head_dim=8)],
    f"{TRAINING}: save_weights_external, save_weights_external_async": [
        lambda on: on.policy.save_weights_external("s"),
        lambda on: on.policy.save_weights_external_async("s"),
    ],
    f"{SERVICE}: copy_weights": [lambda on: on.service.copy_weights("tinker://run/weights/s")],
    f"{SAMPLING}: images": [sample(images=["a"])],
    "FiretitanSamplingParams: sampling_mask": [
        sample(sampling_params=FiretitanSamplingParams(sampling_mask=[1]))
    ],
    "DeploymentSampler: images": [native(images=["a"])],
}


def test_the_table_is_the_pages() -> None:
    rows = compatibility.rows()
    assert sorted(CASES) == sorted(
        row.key for row in rows if row.status == compatibility.UNIMPLEMENTED
    )


@pytest.fixture
def place(toy_daemon: DaemonProcess, service: FiretitanServiceClient, data: Any) -> SimpleNamespace:
    return SimpleNamespace(
        service=service,
        policy=FiretitanServiceClient(base_url=service.base_url).create_training_client(),
        client=service.create_sampling_client(),
        native=service.create_deployment_sampler(),
        address=toy_daemon.address,
        data=data,
    )


@pytest.mark.parametrize("name", CASES)
async def test_says_so(place: SimpleNamespace, name: str) -> None:
    for call in CASES[name]:
        with pytest.raises(NotImplementedError):
            answer = call(place)
            if inspect.isawaitable(answer):
                await answer
