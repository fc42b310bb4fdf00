"""Clipped surrogate of a ratio per sequence (GSPO, token form)."""

from __future__ import annotations

import torch

from firetitan_daemon.engine.losses.base import (
    POLICY,
    Inputs,
    Loss,
    Settings,
    bounds,
    clipped_surrogate,
)


def _formula(
    logprobs: torch.Tensor, inputs: Inputs, settings: Settings, lengths: tuple[int, ...]
) -> torch.Tensor:
    counted = inputs.get("sequence_ratio_mask", inputs["advantages"]) != 0
    apart = (logprobs.detach() - inputs["logprobs"]) * counted
    means = [
        part.sum() / mask.sum().clamp_min(1)
        for part, mask in zip(apart.split(lengths), counted.split(lengths), strict=True)
    ]
    per_token = torch.cat(
        [mean.expand(length, 1) for mean, length in zip(means, lengths, strict=True)]
    )
    log_ratio = logprobs - logprobs.detach() + per_token
    cap = settings["seq_ratio_log_cap"]
    if cap is not None:
        log_ratio = log_ratio.clamp(max=cap)
    advantages = inputs["advantages"]
    log_ratio = torch.where(advantages != 0, log_ratio, torch.zeros_like(log_ratio))
    return -clipped_surrogate(torch.exp(log_ratio), advantages, *bounds(inputs, settings))


GSPO = Loss(
    "gspo",
    POLICY,
    frozenset({"sequence_ratio_mask"}),
    {
        "clip_low_threshold": 1 - 3e-4,
        "clip_high_threshold": 1 + 4e-4,
        "seq_ratio_log_cap": None,
    },
    _formula,
    positionwise=False,
    candidates=False,
    least={"clip_low_threshold": 0.0, "clip_high_threshold": 0.0},
)
"""-sum min(s A, clip(s) A), log s = mean over the sequence of log r, gradient through each token.

The mean is over positions where `sequence_ratio_mask` is not 0; absent, where A is not 0.

Source: Zheng et al. 2025, Group Sequence Policy Optimization, equation 12.
"""
