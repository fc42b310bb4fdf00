"""Cross entropy with a weight per target; weights of any sign, absent ones are 1."""

from __future__ import annotations

import torch

from firetitan_daemon.engine.losses.base import TARGETS, Inputs, Loss, Settings


def _formula(
    logprobs: torch.Tensor, inputs: Inputs, settings: Settings, lengths: tuple[int, ...]
) -> torch.Tensor:
    return -inputs["weights"] * logprobs


CROSS_ENTROPY = Loss("cross_entropy", frozenset({TARGETS}), frozenset({"weights"}), {}, _formula)
"""-sum w logp."""
