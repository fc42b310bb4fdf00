"""Direct reward optimisation: policy gradient with a quadratic pull towards the sampler."""

from __future__ import annotations

import torch

from firetitan_daemon.engine.losses.base import POLICY, Inputs, Loss, Settings, log_ratio


def _formula(
    logprobs: torch.Tensor, inputs: Inputs, settings: Settings, lengths: tuple[int, ...]
) -> torch.Tensor:
    beta = settings["beta"]
    assert beta is not None
    apart = log_ratio(logprobs, inputs)
    return -(logprobs * inputs["advantages"] - 0.5 * beta * apart * apart)


DRO = Loss("dro", POLICY, frozenset(), {"beta": 0.05}, _formula, least={"beta": 0.0})
"""-sum (logp A - beta / 2 (logp - q)^2), the quadratic only where A is not 0.

Source: Richemond et al. 2024, Offline Regularised Reinforcement Learning.
"""
