"""What a built-in loss is, and the pieces several of them share.

Knows: logprobs and loss inputs as float32 tensors. Must not know: models, batches, gradients of
parameters.

A loss is a formula per target position; its sum over positions and data is the loss, and autograd
over the formula gives dL/dlogprob. Nothing is averaged: normalisation belongs to the inputs or to
the optimizer step.

Shapes: T positions of all sequences, K candidates a position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Inputs = Mapping[str, torch.Tensor]
"""Loss inputs by name, float32 [T, K]; optional ones may be absent."""
Settings = Mapping[str, float | None]
"""Every setting of the loss; None where it is off."""
Formula = Callable[[torch.Tensor, Inputs, Settings, tuple[int, ...]], torch.Tensor]
"""(logprobs [T, K], inputs, settings, length of each sequence) to the loss terms [T, K]."""

TARGETS = "target_tokens"
POLICY = frozenset({TARGETS, "logprobs", "advantages"})
"""What a policy-gradient loss reads: targets, the sampler's logprobs, advantages."""


@dataclass(frozen=True)
class Loss:
    """A built-in loss."""

    name: str
    required: frozenset[str]
    optional: frozenset[str]
    settings: Settings
    """Known settings and what absence means."""
    formula: Formula
    positionwise: bool = True
    """Whether a term depends on its own position only (so rows may be taken in chunks)."""
    candidates: bool = True
    """Whether targets may be [N, K]."""
    least: Mapping[str, float] | None = None
    """Settings with a smallest permitted value."""


def log_ratio(logprobs: torch.Tensor, inputs: Inputs, cap: float | None = None) -> torch.Tensor:
    """Return logp - q of the sampler, clamped to +-cap; 0 without gradient where A is 0.

    The exception keeps an overflowing ratio of a position that does not count from making NaN.
    """
    ratio = logprobs - inputs["logprobs"]
    ratio = torch.where(inputs["advantages"] != 0, ratio, torch.zeros_like(ratio))
    return ratio if cap is None else ratio.clamp(-cap, cap)


def bounds(inputs: Inputs, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """The ratio's lower and upper bound: per token where given, else the setting, 0-d."""
    low, high = (
        inputs.get(name, torch.tensor(settings[name], dtype=torch.float32))
        for name in ("clip_low_threshold", "clip_high_threshold")
    )
    device = inputs["advantages"].device
    return low.to(device), high.to(device)


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> torch.Tensor:
    """min(r A, clip(r, low, high) A): the objective, to be maximised.

    Source: Schulman et al. 2017, Proximal Policy Optimization Algorithms, equation 7.
    """
    held = torch.minimum(torch.maximum(ratio.detach(), low), high) * advantages
    free = ratio * advantages
    return torch.where(free <= held, free, held)
