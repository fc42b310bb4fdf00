"""Clipped surrogate of PPO; bounds are ratios, from the settings or per token."""

from __future__ import annotations

import torch

from firetitan_daemon.engine.losses.base import (
    POLICY,
    Inputs,
    Loss,
    Settings,
    bounds,
    clipped_surrogate,
    log_ratio,
)


def _formula(
    logprobs: torch.Tensor, inputs: Inputs, settings: Settings, lengths: tuple[int, ...]
) -> torch.Tensor:
    ratio = torch.exp(log_ratio(logprobs, inputs, settings["ratio_log_cap"]))
    return -clipped_surrogate(ratio, inputs["advantages"], *bounds(inputs, settings))


PPO = Loss(
    "ppo",
    POLICY,
    frozenset({"clip_low_threshold", "clip_high_threshold"}),
    {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2, "ratio_log_cap": None},
    _formula,
    least={"clip_low_threshold": 0.0, "clip_high_threshold": 0.0, "ratio_log_cap": 0.0},
)
"""-sum min(r A, clip(r, low, high) A)."""
