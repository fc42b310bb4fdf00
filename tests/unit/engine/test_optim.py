"""AdamW against torch.optim, and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import AdamParams
from firetitan_daemon.engine.optim import AdamW, check_params

PARAMS = AdamParams(0.01, 0.8, 0.97, 1e-8, 0.1, 1.0)


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in (("a", 5), ("b", 7))}


@pytest.mark.parametrize("clip", [0.0, 1.0, 100.0])
def test_equals_torch_over_changing_settings(clip: float) -> None:
    masters = tensors(0)
    theirs = [tensor.clone().requires_grad_() for tensor in masters.values()]
    optimizer, plain = AdamW(masters), torch.optim.AdamW(theirs, foreach=False)
    for step in range(6):
        params = replace(PARAMS, learning_rate=0.01 * (step + 1), grad_clip_norm=clip)
        gradients = tensors(step + 1)
        for leaf, gradient in zip(theirs, gradients.values(), strict=True):
            leaf.grad = gradient.clone() / 3
        wanted = torch.nn.utils.clip_grad_norm_(theirs, clip or float("inf"))
        plain.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        plain.step()
        optimizer.prepare()
        norm = optimizer.norm(gradients, 3)
        optimizer.update(gradients, params, norm, 3)
        assert norm == pytest.approx(float(wanted), rel=1e-6)
    assert optimizer.step_count == 6
    for mine, leaf in zip(masters.values(), theirs, strict=True):
        torch.testing.assert_close(mine, leaf.detach(), atol=1e-6, rtol=1e-5)


def test_restored_moments_continue_bitwise() -> None:
    runs = []
    for interrupted in (False, True):
        masters = tensors(0)
        optimizer = AdamW(masters)
        for step in range(4):
            if interrupted and step == 2:
                saved = (optimizer.step_count, dict(optimizer.first), dict(optimizer.second))
                optimizer = AdamW(masters)
                optimizer.restore(*saved)
            gradients = tensors(step)
            optimizer.prepare()
            optimizer.update(gradients, PARAMS, optimizer.norm(gradients, 1), 1)
        runs.append(masters)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_named(value: float) -> None:
    gradients = tensors(1)
    gradients["b"][3] = value
    with pytest.raises(FiretitanError, match="gradient of b is not finite") as caught:
        AdamW(tensors(0)).norm(gradients, 1)
    assert caught.value.reason is Reason.NON_FINITE


@pytest.mark.parametrize(
    "name", ["learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm"]
)
def test_bad_settings_are_named(name: str) -> None:
    check_params(PARAMS)
    for value, reason in (
        (float("nan"), Reason.NON_FINITE),
        (float("inf"), Reason.NON_FINITE),
        (-0.1, Reason.INVALID_ARGUMENT),
    ):
        with pytest.raises(FiretitanError, match=name) as caught:
            check_params(replace(PARAMS, **{name: value}))
        assert (caught.value.reason, caught.value.field) == (reason, f"adam_params.{name}")


def test_edges_of_the_ranges() -> None:
    check_params(replace(PARAMS, learning_rate=0, beta1=0, beta2=0, weight_decay=0))
    for bad in (replace(PARAMS, beta1=1.0), replace(PARAMS, beta2=1.0), replace(PARAMS, eps=0)):
        with pytest.raises(FiretitanError):
            check_params(bad)
