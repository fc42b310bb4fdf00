"""What makes the next snapshot a base or a delta, and what a deployment serves of the chain."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import tinker
from firetitan.v1 import checkpoint_pb2, checkpoint_service_pb2

from firetitan_client import FiretitanServiceClient, FiretitanTrainingClient

pytestmark = pytest.mark.timeout(180)
MakeService = Callable[..., FiretitanServiceClient]
BASE, DELTA = checkpoint_pb2.Snapshot.KIND_BASE, checkpoint_pb2.Snapshot.KIND_DELTA
PROMPT = tinker.ModelInput.from_ints([1, 2, 3])


def save(client: FiretitanTrainingClient, name: str, kind: str | None = None) -> tuple[str, int]:
    """Path and kind of a new snapshot."""
    path = client.save_weights_for_sampler(name, checkpoint_type=kind).result().path
    request = checkpoint_service_pb2.GetSnapshotRequest(name=path)
    return path, client.service.stubs.checkpoints.GetSnapshot(request).snapshot.kind


def train(client: FiretitanTrainingClient, data: list[Any]) -> None:
    client.forward_backward(data, "cross_entropy")
    client.optim_step(tinker.AdamParams(learning_rate=0.1)).result()


def logprobs(service: FiretitanServiceClient, path: str | None = None) -> list[float | None]:
    found: list[float | None] = (
        service.create_sampling_client(path).compute_logprobs(PROMPT).result()
    )
    return found


def test_full_parameter_chain(make_service: MakeService, data: list[Any]) -> None:
    service = make_service(lora_rank=0)
    policy = service.create_training_client()
    with pytest.raises(ValueError, match="base"):
        save(policy, "too-soon", "delta")
    first, kind = save(policy, "first")
    assert kind == BASE
    untrained = logprobs(service, first)
    train(policy, data)
    assert save(policy, "never-loaded")[1] == DELTA
    train(policy, data)
    last, kind = save(policy, "last")
    assert kind == DELTA
    # The delta stands on one that was never loaded; what is served is the whole of it.
    trained = logprobs(service, last)
    whole, kind = save(policy, "whole", "base")
    assert kind == BASE
    assert logprobs(service, whole) == trained != untrained
    # Backwards too.
    assert logprobs(service, first) == untrained
    assert save(policy, "after-the-base")[1] == DELTA


@pytest.mark.parametrize("load", ["load_state", "load_state_with_optimizer"])
def test_loading_makes_the_next_a_base(
    make_service: MakeService, data: list[Any], load: str
) -> None:
    policy = make_service(lora_rank=0, create_deployment=False).create_training_client()
    policy.save_state("s").result()
    assert [save(policy, name)[1] for name in "ab"] == [BASE, DELTA]
    getattr(policy, load)("s").result()
    assert [save(policy, name)[1] for name in "cd"] == [BASE, DELTA]


def test_adapters_are_always_whole(
    make_service: MakeService, data: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    service = make_service()
    policy = service.create_training_client()
    assert [save(policy, name)[1] for name in "ab"] == [BASE, BASE]
    train(policy, data)
    with caplog.at_level(logging.WARNING, "firetitan"):
        path, kind = save(policy, "c", "delta")
    assert kind == BASE and "base" in caplog.text
    assert service.create_sampling_client(path).sample(PROMPT, 1).result().snapshot == path


def test_another_trainer_on_the_deployment(make_service: MakeService, data: list[Any]) -> None:
    """A deployment that follows another trainer asks for a first sync, which is whole."""
    one = make_service(lora_rank=0, deployment_id="shared", cleanup_deployment_on_close=None)
    policy = one.create_training_client()
    one.hotload_sampler_snapshot(save(policy, "ones")[0])
    train(policy, data)
    other = make_service(lora_rank=0, deployment_id="shared")
    guest = other.create_training_client()
    assert other.requires_initial_sampler_sync()
    path, kind = save(guest, "others")
    assert kind == BASE
    other.hotload_sampler_snapshot(path)
    assert not other.requires_initial_sampler_sync()
    # The first trainer's chain goes on from what it saved, and is served whole.
    delta, kind = save(policy, "later")
    assert kind == DELTA
    whole, _ = save(policy, "whole", "base")
    assert logprobs(one, delta) == logprobs(one, whole)
