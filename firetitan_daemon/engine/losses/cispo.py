"""Clipped importance weights without gradient (CISPO)."""

from __future__ import annotations

import torch

from firetitan_daemon.engine.losses.base import POLICY, Inputs, Loss, Settings, bounds, log_ratio


def _formula(
    logprobs: torch.Tensor, inputs: Inputs, settings: Settings, lengths: tuple[int, ...]
) -> torch.Tensor:
    ratio = torch.exp(log_ratio(logprobs.detach(), inputs, settings["ratio_log_cap"]))
    low, high = bounds(inputs, settings)
    weights = torch.minimum(torch.maximum(ratio, low), high)
    return -weights * inputs["advantages"] * logprobs


CISPO = Loss(
    "cispo",
    POLICY,
    frozenset({"clip_low_threshold", "clip_high_threshold"}),
    {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0, "ratio_log_cap": None},
    _formula,
    least={"clip_low_threshold": 0.0, "clip_high_threshold": 0.0, "ratio_log_cap": 0.0},
)
"""-sum stop_gradient(clip(r, low, high)) A logp.

Source: MiniMax 2025, MiniMax-M1, section 3.1.
"""
