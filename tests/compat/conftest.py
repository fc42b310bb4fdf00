"""One daemon a module; its tests take trainers and deployments of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.daemon import DaemonProcess
from support.data import ragged_data

from firetitan_client import FiretitanServiceClient

TOY = "firetitan/toy"


@pytest.fixture(scope="module")
def toy_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    process = DaemonProcess(tmp_path_factory.mktemp("compat") / "home")
    process.start()
    yield process
    process.stop()


@pytest.fixture
def make_service(toy_daemon: DaemonProcess) -> Iterator[Callable[..., FiretitanServiceClient]]:
    """Managed services of the toy model, closed afterwards."""
    made = []

    def make(**config: Any) -> FiretitanServiceClient:
        settings: dict[str, Any] = {
            "base_model": TOY,
            "lora_rank": 4,
            "seed": 5,
            "cleanup_trainer_on_close": True,
            "cleanup_deployment_on_close": "delete",
        }
        service = FiretitanServiceClient.from_firetitan_config(
            address=toy_daemon.address, **{**settings, **config}
        )
        made.append(service)
        return service

    yield make
    for service in made:
        service.close()


@pytest.fixture(scope="module")
def service(toy_daemon: DaemonProcess) -> Iterator[FiretitanServiceClient]:
    """One LoRA service with a deployment, for the tests of a module that change nothing of it."""
    with FiretitanServiceClient.from_firetitan_config(
        address=toy_daemon.address, base_model=TOY, lora_rank=4, seed=5, deployment_id="serving"
    ) as service:
        service.create_training_client()
        yield service


@pytest.fixture
def data() -> list[Any]:
    return ragged_data(seed=1, count=3, vocab_size=64)
