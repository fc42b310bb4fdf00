"""close(), reference trainers and inference deployments: every cleanup by every situation."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from support.daemon import DaemonProcess
from support.data import ragged_data
from support.other_process import OtherProcess, Words

from firetitan_client import (
    DeploymentConfig,
    DeploymentManager,
    FiretitanServiceClient,
    TrainerJobConfig,
    TrainerJobManager,
)

pytestmark = pytest.mark.timeout(240)

TOY = "firetitan/toy"
SITUATIONS = ("created", "reattached", "used")
DATA = ragged_data(seed=1, count=2, vocab_size=64)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    process = DaemonProcess(tmp_path_factory.mktemp("beside") / "home")
    process.start()
    yield process
    process.stop()


@pytest.fixture(scope="module")
def other(daemon: DaemonProcess) -> Iterator[OtherProcess]:
    process = OtherProcess(daemon)
    yield process
    process.end()


def make_service(daemon: DaemonProcess, **config: Any) -> FiretitanServiceClient:
    return FiretitanServiceClient.from_firetitan_config(
        address=daemon.address, base_model=TOY, create_deployment=False, **config
    )


def deferred(caplog: pytest.LogCaptureFixture, name: str, user: str) -> int:
    """How often it was said that a clean-up waits for somebody."""
    text = f"clean-up of {name} deferred: used by"
    told = [one.getMessage() for one in caplog.records if text in one.getMessage()]
    assert all(user in one for one in told), told
    return len(told)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(
    ("how", "cleanup"), [("close", True), ("close", False), ("release_references", True)]
)
def test_what_becomes_of_a_reference_trainer(
    daemon: DaemonProcess,
    other: OtherProcess,
    caplog: pytest.LogCaptureFixture,
    situation: str,
    how: str,
    cleanup: bool,
) -> None:
    manager = TrainerJobManager(address=daemon.address)
    tail = f"{situation}-{cleanup}-{how[:2]}".lower()
    reference = f"reference-{tail}"
    settings = {"lora_rank": 0, "reference_trainer_job_id": reference}
    settings["cleanup_trainer_on_close"] = True  # of the policies, which are not looked at here
    if situation == "reattached":
        manager.create_and_wait(
            TrainerJobConfig(TOY, forward_only=True, requested_job_id=reference)
        )
    service = make_service(
        daemon,
        **settings,
        trainer_job_id=f"policy-{tail}",
        cleanup_reference_trainer_on_close=cleanup,
    )

    def loss() -> float:
        passed = service.create_reference_client().forward(DATA, "cross_entropy")
        value: float = passed.result().metrics["loss:sum"]
        return value

    before = loss()
    if situation == "used":
        other.tell("open", base_model=TOY, create_deployment=False, **settings)
        assert other.tell("reference") == before
    with caplog.at_level(logging.WARNING):
        getattr(service, how)()
    removed = cleanup and situation != "reattached"
    waited = deferred(caplog, f"trainers/{reference}", other.label)
    if situation == "used":
        assert manager.get(reference)["state"] == "JOB_STATE_RUNNING"
        assert other.tell("reference") == before
        assert waited == removed
        other.tell("close")
    else:
        assert waited == 0
    found = manager.try_get(reference)
    assert (found is None) == removed
    if found is not None:
        assert found["state"] == "JOB_STATE_RUNNING"
        manager.delete(reference)
    service.close()
    assert manager.try_get(f"policy-{tail}") is None


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("cleanup", [None, "scale_to_zero", "delete"])
def test_what_close_does_to_an_inference_deployment(
    daemon: DaemonProcess,
    other: OtherProcess,
    caplog: pytest.LogCaptureFixture,
    situation: str,
    cleanup: Any,
) -> None:
    manager = DeploymentManager(address=daemon.address)
    name = f"teacher-{situation}-{cleanup or 'none'}".replace("_", "-")
    config = DeploymentConfig(name, TOY)
    if situation == "reattached":
        manager.create_or_get(config)
        manager.wait_for_ready(name)
    service = make_service(daemon)
    teacher = service.create_inference_deployment_sampler(
        config, cleanup_on_close=cleanup, tokenizer=Words()
    )
    (made,) = asyncio.run(teacher.sample_with_prompt_tokens([1, 2, 3], max_tokens=4, seed=1))
    if situation == "used":
        other.tell("open", base_model=TOY, create_deployment=False)
        assert other.tell("teach", deployment=name, base_model=TOY) == made.full_tokens
    with caplog.at_level(logging.WARNING):
        service.close()
    after = {None: "READY", "scale_to_zero": "STOPPED", "delete": "gone"}[cleanup]
    if situation == "reattached":
        after = "READY"
    waited = deferred(caplog, f"deployments/{name}", other.label)
    if situation == "used":
        found = manager.get(name)
        assert found is not None and found.state == "READY"
        assert other.tell("teach", deployment=name, base_model=TOY) == made.full_tokens
        assert waited == (cleanup is not None)
        other.tell("close")
    else:
        assert waited == 0
    found = manager.get(name)
    assert (found.state if found is not None else "gone") == after
    manager.delete(name)
