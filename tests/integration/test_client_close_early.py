"""close() while what calls asked for is still being made."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from support.daemon import DaemonProcess
from support.data import ragged_data
from support.stubs import Stubs

from firetitan_client import DeploymentConfig, FiretitanServiceClient
from firetitan_client.futures import APIFuture, SelfFuture

pytestmark = pytest.mark.timeout(120)

TOY = "firetitan/toy"
DATA = ragged_data(seed=1, count=2, vocab_size=64)
REMOVE_ALL = {"cleanup_trainer_on_close": True, "cleanup_deployment_on_close": "delete"}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    process = DaemonProcess(tmp_path_factory.mktemp("early") / "home")
    process.start()
    yield process
    process.stop()


def make_service(daemon: DaemonProcess, **config: Any) -> FiretitanServiceClient:
    return FiretitanServiceClient.from_firetitan_config(
        **{"address": daemon.address, "base_model": TOY, "lora_rank": 0, **config}
    )


def everything(daemon: DaemonProcess) -> list[str]:
    """Names of all trainers and deployments."""
    stubs = Stubs(daemon.address)
    names = [*stubs.all_trainers(), *stubs.all_deployments()]
    stubs.channel.close()
    return names


async def ended(client: SelfFuture[Any]) -> None:
    """Waits until a client is made or never will be."""
    ready: APIFuture[Any] = client._ready
    with contextlib.suppress(Exception):
        await ready


async def test_what_nobody_waits_for_is_not_made(daemon: DaemonProcess) -> None:
    service = make_service(daemon, **REMOVE_ALL)
    client = service.create_training_client()  # in a loop: returns at once
    await asyncio.to_thread(service.close)
    await ended(client)
    assert everything(daemon) == []


async def test_what_was_called_still_runs(daemon: DaemonProcess) -> None:
    service = make_service(daemon, **REMOVE_ALL)
    client = service.create_training_client()
    output = client.forward_backward(DATA, "cross_entropy")
    await asyncio.to_thread(service.close)
    assert output.result(0).metrics["loss:sum"] > 0
    assert everything(daemon) == []


async def test_a_reference_that_is_being_made_goes(daemon: DaemonProcess) -> None:
    service = make_service(daemon, create_deployment=False, **REMOVE_ALL)
    await service.create_training_client()
    reference = service.create_reference_client()
    service.release_references()
    await ended(reference)
    assert everything(daemon) == [f"trainers/{service.trainer_job_id}"]
    reference = service.create_reference_client()
    await asyncio.to_thread(service.close)
    await ended(reference)
    assert everything(daemon) == []


async def test_an_inference_deployment_that_is_being_made_goes(daemon: DaemonProcess) -> None:
    service = make_service(daemon)
    sampler = service.create_inference_deployment_sampler(
        DeploymentConfig("teacher", TOY), cleanup_on_close="delete"
    )
    await asyncio.to_thread(service.close)
    await ended(sampler)
    assert everything(daemon) == []
