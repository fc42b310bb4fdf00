"""Policy gradient weighted by the importance ratio."""

from __future__ import annotations

import torch

from firetitan_daemon.engine.losses.base import POLICY, Inputs, Loss, Settings, log_ratio


def _formula(
    logprobs: torch.Tensor, inputs: Inputs, settings: Settings, lengths: tuple[int, ...]
) -> torch.Tensor:
    ratio = torch.exp(log_ratio(logprobs, inputs, settings["ratio_log_cap"]))
    return -ratio * inputs["advantages"]


IMPORTANCE_SAMPLING = Loss(
    "importance_sampling",
    POLICY,
    frozenset(),
    {"ratio_log_cap": None},
    _formula,
    least={"ratio_log_cap": 0.0},
)
"""-sum r A."""
