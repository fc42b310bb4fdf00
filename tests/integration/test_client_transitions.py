"""SYNC and ASYNC hotloads of a real daemon, as users choose them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker
from support.daemon import DaemonProcess

from firetitan_client import (
    DeploymentConfig,
    DeploymentManager,
    FiretitanServiceClient,
    FiretitanTrainingClient,
)

pytestmark = pytest.mark.timeout(180)

TOY = "firetitan/toy"
LONG = tinker.SamplingParams(max_tokens=1500, seed=5, stop=[])
LONGEST = tinker.SamplingParams(max_tokens=8000, seed=5, stop=[])
SHORT = tinker.SamplingParams(max_tokens=4, seed=5, stop=[])


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    daemon = DaemonProcess(Path(tmp_path_factory.mktemp("transitions")) / "home")
    daemon.start()
    yield daemon.address
    daemon.stop()


def service_of(address: str, deployment: str, transition: str | None) -> FiretitanServiceClient:
    return FiretitanServiceClient.from_firetitan_config(
        base_model=TOY,
        lora_rank=2,
        deployment_id=deployment,
        address=address,
        hot_load_transition_type=transition,
    )


def step(policy: FiretitanTrainingClient, name: str) -> str:
    data = [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints([1, 2, 3, 4]),
            loss_fn_inputs={"target_tokens": [9, 9, 9, 9], "weights": [1.0] * 4},
        )
    ]
    policy.forward_backward(data, "cross_entropy")
    policy.optim_step(tinker.AdamParams(learning_rate=0.1)).result()
    return policy.save_weights_for_sampler(name).result().path


def test_async_answers_name_the_weights_of_each_part(address: str) -> None:
    with service_of(address, "async", "async") as service:
        policy = service.create_training_client()
        first, second = step(policy, "first"), step(policy, "second")
        service.hotload_sampler_snapshot(first)
        sampler = service.create_sampling_client()
        # Many sequences beside it: all of it takes far longer than a hotload.
        running = sampler.sample([1, 2], 4, LONGEST)
        with sampler.sample_stream([1, 2], 64, LONGEST) as stream:
            assert next(stream).snapshot == first
            service.hotload_sampler_snapshot(second)
            seen = next(chunk.snapshot for chunk in stream if chunk.snapshot != first)
        assert seen == second
        for sequence in running.result().sequences:
            assert [name for name, _ in sequence.snapshots] == [first, second]
            assert sequence.snapshots[0][1] == 0 < sequence.snapshots[1][1] < 8000
        answer = sampler.sample([1, 2], 1, SHORT).result()
        assert (answer.snapshot, answer.sequences[0].snapshots) == (second, ((second, 0),))
        info = DeploymentManager(address=address).get("async")
        assert info is not None and info.hot_load_transition_type == "ASYNC"


def test_sync_waits_and_begins_nothing(address: str) -> None:
    with service_of(address, "sync", "SYNC") as service:
        policy = service.create_training_client()
        first, second = step(policy, "first"), step(policy, "second")
        service.hotload_sampler_snapshot(first)
        sampler = service.create_sampling_client()
        stream = sampler.sample_stream([1, 2], 8, LONG)
        next(stream)
        hotload = threading.Thread(target=service.hotload_sampler_snapshot, args=(second,))
        hotload.start()
        asked = [sampler.sample([1, 2], 1, SHORT) for _ in range(4)]
        assert {chunk.snapshot for chunk in stream} == {first}
        hotload.join()
        # Some may have begun before the hotload came to the worker, none on anything else.
        assert {future.result().snapshot for future in asked} <= {first, second}
        assert sampler.sample([1, 2], 1, SHORT).result().snapshot == second


def test_a_deployment_keeps_its_transition_until_another_is_named(address: str) -> None:
    manager = DeploymentManager(address=address)
    config = DeploymentConfig("kept", TOY, hot_load_transition_type="sync")
    assert manager.create_or_get(config).hot_load_transition_type == "SYNC"
    manager.wait_for_ready("kept")
    again = manager.create_or_get(DeploymentConfig("kept", TOY))
    assert again.hot_load_transition_type == "SYNC"
    other = manager.create_or_get(DeploymentConfig("kept", TOY, hot_load_transition_type="ASYNC"))
    assert other.hot_load_transition_type == "ASYNC"
    plain = manager.create_or_get(DeploymentConfig("plain", TOY))
    assert plain.hot_load_transition_type is None
    with pytest.raises(ValueError, match="hot_load_transition_type: is 'SOON'"):
        DeploymentConfig("x", TOY, hot_load_transition_type="SOON").validate()
    with pytest.raises(ValueError, match="hot_load_transition_type: is 'SOON'"):
        service_of(address, "x", "SOON")
