"""forward_backward_custom through a real daemon: one forward, the right gradient or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.daemon import DaemonProcess
from support.data import ragged_data

pytestmark = pytest.mark.timeout(180)


def squared(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
    """A loss no built-in one equals: the sum of squared logprobs, weighted by position."""
    import torch

    loss = sum(
        ((row.exp() - 0.5) ** 2 * torch.linspace(0.5, 1.5, len(row))).sum() for row in logprobs
    )
    return loss, {"squared": float(loss.detach())}


@pytest.fixture
def policy(daemon: DaemonProcess, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from firetitan_client import FiretitanServiceClient

    monkeypatch.setenv("FIRETITAN_ADDRESS", daemon.address)
    with FiretitanServiceClient.from_firetitan_config(
        base_model=str(tiny_llama), lora_rank=4, seed=3, create_deployment=False
    ) as service:
        yield service.create_training_client(base_model=str(tiny_llama), lora_rank=4)


def step(policy: Any, learning_rate: float = 1e-2) -> dict[str, float]:
    import tinker

    metrics: dict[str, float] = (
        policy.optim_step(tinker.AdamParams(learning_rate=learning_rate)).result().metrics
    )
    return metrics


def test_raising_loss_leaves_nothing_behind(policy: Any) -> None:
    data = ragged_data(seed=1, count=3)

    def broken(data: list[Any], logprobs: list[Any]) -> Any:
        raise LookupError("the user's own bug")

    with pytest.raises(LookupError, match="the user's own bug"):
        policy.forward_backward_custom(data, broken)
    with pytest.raises(RuntimeError, match="no gradients accumulated"):
        step(policy)
    policy.forward_backward(data, "cross_entropy").result()
    assert step(policy)["step"] == 1


def test_weights_changed_in_between_runs_again(policy: Any) -> None:
    """Another client steps while the user's loss runs: the gradient is that of the new weights."""
    data = ragged_data(seed=1, count=3)
    calls = 0

    def stepping(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        nonlocal calls
        calls += 1
        if calls == 1:
            other.forward_backward(data, "cross_entropy").result()
            step(other)
        return squared(data, logprobs)

    service = policy.service
    other = type(service)(trainer_job_id=service.trainer_job_id).create_training_client()
    policy.forward_backward_custom(data, stepping).result()
    assert calls == 2
    found = step(policy, learning_rate=0.0)["grad_norm"]
    policy.forward_backward_custom(data, squared).result()
    assert found == pytest.approx(step(policy, learning_rate=0.0)["grad_norm"], rel=1e-6)


def test_weights_that_never_rest_raise(policy: Any) -> None:
    from firetitan_client import WeightsChanged

    data = ragged_data(seed=1, count=2)
    service = policy.service
    other = type(service)(trainer_job_id=service.trainer_job_id).create_training_client()

    def always_stepping(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        other.forward_backward(data, "cross_entropy").result()
        step(other)
        return squared(data, logprobs)

    with pytest.raises(WeightsChanged):
        policy.forward_backward_custom(data, always_stepping).result()
    with pytest.raises(RuntimeError, match="no gradients accumulated"):
        step(policy)
