"""Clip-higher PPO with an optional dual clip for negative advantages (DAPO)."""

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
    advantages = inputs["advantages"]
    ratio = torch.exp(log_ratio(logprobs, inputs, settings["ratio_log_cap"]))
    loss = -clipped_surrogate(ratio, advantages, *bounds(inputs, settings))
    dual = settings["eps_clip_c"]
    if dual is not None:
        limit = -dual * advantages
        loss = torch.where((advantages < 0) & (loss > limit), limit, loss)
    return loss


DAPO = Loss(
    "dapo",
    POLICY,
    frozenset(),
    {
        "clip_low_threshold": 0.8,
        "clip_high_threshold": 1.28,
        "ratio_log_cap": None,
        "eps_clip_c": None,
    },
    _formula,
    least={
        "clip_low_threshold": 0.0,
        "clip_high_threshold": 0.0,
        "ratio_log_cap": 0.0,
        "eps_clip_c": 1.0,
    },
)
"""PPO's loss; where A < 0 at most -eps_clip_c A.

Source: Yu et al. 2025, DAPO; Ye et al. 2020 for the dual clip.
"""
