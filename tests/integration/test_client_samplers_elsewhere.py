"""Samplers in other processes, of other deployments, and while they are closed."""

from __future__ import annotations

import asyncio
import base64
import multiprocessing
import pickle
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tinker
from support.daemon import DaemonProcess
from support.models import save_tiny

from firetitan_client import (
    DeploymentConfig,
    DeploymentManager,
    FiretitanSamplingClient,
    FiretitanServiceClient,
    FixedConcurrencyController,
    SamplingClientClosedError,
    SnapshotNotActive,
)
from firetitan_client.sampler_handles import SamplerHandle

pytestmark = pytest.mark.timeout(240)

TOY = "firetitan/toy"
PARAMS = tinker.SamplingParams(max_tokens=6, seed=5, stop=[])
LONG = tinker.SamplingParams(max_tokens=8000, seed=5, stop=[])


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    daemon = DaemonProcess(Path(tmp_path_factory.mktemp("elsewhere")) / "home")
    daemon.start()
    yield daemon.address
    daemon.stop()


@pytest.fixture
def service(address: str) -> Iterator[FiretitanServiceClient]:
    with FiretitanServiceClient.from_firetitan_config(
        base_model=TOY,
        lora_rank=0,
        deployment_id="own",
        address=address,
        api_key="secret",
    ) as service:
        yield service


def tokens(answer: Any) -> list[list[int]]:
    return [sequence.tokens for sequence in answer.sequences]


class Plain:
    """Enough of a tokenizer."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def sample_there(pickled: bytes, handle: str, answers: Any) -> None:
    """In a process that knows nothing of the first one."""
    client = pickle.loads(pickled)
    named = FiretitanSamplingClient.from_sampler_handle(handle)
    made = [one.sample([1, 2], 2, PARAMS).result() for one in (client, named)]
    answers.put([(tokens(answer), answer.snapshot) for answer in made])


def test_a_client_travels_to_another_process(service: FiretitanServiceClient) -> None:
    policy = service.create_training_client()
    saved = policy.save_weights_for_sampler("first").result().path
    client = service.create_sampling_client(saved)
    wanted = tokens(client.sample([1, 2], 2, PARAMS).result())
    pickled, handle = pickle.dumps(client), client.get_sampler_handle()
    assert b"secret" not in pickled + base64.urlsafe_b64decode(handle.partition(":")[2])
    spawn = multiprocessing.get_context("spawn")
    answers = spawn.Queue()
    process = spawn.Process(target=sample_there, args=(pickled, handle, answers))
    process.start()
    assert answers.get(timeout=120) == [(wanted, saved)] * 2
    process.join()
    with pytest.raises(ValueError, match="no sampler handle"):
        FiretitanSamplingClient.from_sampler_handle("firetitan-sampler:nonsense")


def test_a_pinned_clients_clone_is_pinned(service: FiretitanServiceClient) -> None:
    policy = service.create_training_client()
    one = policy.save_weights_for_sampler("one").result().path
    two = policy.save_weights_for_sampler("two").result().path
    pinned = service.create_sampling_client(one, pinned=True)
    clone = pickle.loads(pickle.dumps(pinned)).result()
    service.hotload_sampler_snapshot(two)
    assert clone.sample([1, 2], 1, PARAMS).result().snapshot == one
    three = policy.save_weights_for_sampler("three").result().path
    handle = replace(
        SamplerHandle.parse(pinned.get_sampler_handle()), snapshot=f"snapshots/{three}"
    )
    with pytest.raises(SnapshotNotActive, match="three"):
        FiretitanSamplingClient.from_sampler_handle(str(handle)).sample([1], 1, PARAMS).result()


def test_closing_drains_and_then_ends_what_runs(address: str, service: Any) -> None:
    service.create_sampling_client().result()
    patient = FiretitanSamplingClient.create(address, "own")
    running = patient.sample([1, 2], 8, PARAMS)
    patient.close()
    patient.close()
    assert len(running.result(60).sequences) == 8
    with pytest.raises(SamplingClientClosedError):
        patient.sample([1, 2], 1, PARAMS)
    with pytest.raises(SamplingClientClosedError):
        patient.sample_stream([1, 2])
    with FiretitanSamplingClient.create(address, "own") as hasty:
        late = hasty.sample([1, 2], 4096, LONG)
        time.sleep(0.2)
        hasty.close(drain_timeout_s=0.1)
    with pytest.raises(SamplingClientClosedError, match=r"within 0\.1 s"):
        late.result(60)


def test_a_controller_limits_a_sampling_client(address: str, service: Any) -> None:
    service.create_sampling_client().result()
    controller = FixedConcurrencyController(2)
    client = FiretitanSamplingClient.create(address, "own", concurrency_controller=controller)
    futures = [client.sample([1, 2], 1, PARAMS) for _ in range(6)]
    assert len({str(tokens(future.result(60))) for future in futures}) == 1
    assert controller._gate.max_in_flight == 2


async def test_a_sampler_of_any_deployment(address: str, service: Any) -> None:
    client = await service.create_sampling_client()
    wanted = tokens(await client.sample([1, 2], 1, PARAMS))
    for model in ("own", "deployments/own", "accounts/local/deployments/own", TOY):
        sampler = await service.create_deployment_sampler_for_model(model, tokenizer=Plain())
        assert sampler.model == "own"
        (made,) = await sampler.sample_with_prompt_tokens([1, 2], max_tokens=6, seed=5, stop=[])
        assert [made.full_tokens[2:]] == wanted
    with pytest.raises(KeyError, match=r"'nobody' .*deployments/own \(firetitan/toy\)"):
        await service.create_deployment_sampler_for_model("nobody")
    with pytest.raises(ValueError, match="model: give"):
        service.create_deployment_sampler_for_model("")


def test_a_teacher_deployment_is_made_and_cleaned_up(address: str) -> None:
    manager = DeploymentManager(address=address)

    def student() -> FiretitanServiceClient:
        return FiretitanServiceClient.from_firetitan_config(
            base_model=TOY, create_deployment=False, address=address
        )

    config = DeploymentConfig("teacher", TOY)
    with student() as service:
        teacher = service.create_inference_deployment_sampler(config, cleanup_on_close="delete")
        assert teacher.model == "teacher"
        with student() as other:  # what exists is used, and stays
            other.create_inference_deployment_sampler(config, cleanup_on_close="delete")
        assert manager.get("teacher") is not None
        sleeper = DeploymentConfig("sleeper", TOY)
        service.create_inference_deployment_sampler(sleeper, cleanup_on_close="scale_to_zero")
        service.create_inference_deployment_sampler(DeploymentConfig("kept", TOY))
    assert manager.get("teacher") is None
    states = [info.state for info in map(manager.get, ("sleeper", "kept")) if info is not None]
    assert states == ["STOPPED", "READY"]


def test_wrong_inference_deployments(address: str, tmp_path: Path) -> None:
    service = FiretitanServiceClient.from_firetitan_config(
        base_model=TOY, create_deployment=False, address=address
    )
    make = service.create_inference_deployment_sampler
    with pytest.raises(ValueError, match="max_replica_count: is 0"):
        make(DeploymentConfig("x", TOY, max_replica_count=0))
    with pytest.raises(ValueError, match="cleanup_on_close: is 'keep'"):
        make(DeploymentConfig("x", TOY), cleanup_on_close="keep")
    broken = save_tiny(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match="terminal state"):
        make(DeploymentConfig("broken", str(broken)))
    with pytest.raises(RuntimeError, match="terminal state, FAILED"):
        make(DeploymentConfig("broken", str(broken)))


def test_tokens_need_no_tokenizer(
    service: FiretitanServiceClient, caplog: pytest.LogCaptureFixture
) -> None:
    """The toy has none: nothing is fetched, what makes no text says so once."""
    sampler = service.create_deployment_sampler()

    async def use() -> None:
        for _ in range(2):
            (made,) = await sampler.sample_with_prompt_tokens([1, 2], max_tokens=3, stop=[])
            assert len(made.full_tokens) == 5 and made.text == ""
        result = await sampler.sample_with_prompt_tokens_result([1, 2], max_tokens=3)
        assert result.completions[0].text == ""
        shown, _ = await sampler.async_completions_stream([1, 2], max_tokens=3)
        assert shown["choices"][0]["text"] == ""
        with pytest.raises(ValueError, match="no tokenizer in 'firetitan/toy'"):
            await sampler.sample_with_tokens([{"role": "user", "content": "a"}])

    asyncio.run(use())
    assert caplog.text.count("completions have tokens and no text") == 1


def test_a_tokenizer_that_was_named_has_to_be_there(
    service: FiretitanServiceClient, tmp_path: Path
) -> None:
    sampler = service.create_deployment_sampler(tokenizer=str(tmp_path))
    with pytest.raises(ValueError, match="no tokenizer in"):
        asyncio.run(sampler.sample_with_prompt_tokens([1, 2], max_tokens=3, stop=[]))
    assert sampler.drain_metrics() == []  # nothing was sampled for it
