"""What a step may tell of its gradients beside their norm: root mean square, both by part of model.

Knows: names and sizes of parameters. Must not know: tensors, optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from enum import StrEnum

_PARTS = {
    "attn": ("attn", "attention"),
    "mlp": ("mlp", "feed_forward", "ffn", "experts"),
    "unembed": ("unembed", "lm_head"),
    "embed": ("embed", "wte", "wpe"),
    "norm": ("norm", "ln_"),
}
"""Words in a parameter's path; the first part that has one is its own."""


class GradNormMetrics(StrEnum):
    """What `optim_step` tells of the gradients; `grad_norm` itself is always told."""

    OFF = "off"
    BASIC = "basic"
    """`grad_rms`: the root mean square of all their elements."""
    DETAILED = "detailed"
    """And both for each part of the model, e.g. `grad_norm/attn`."""


def grad_norm_metrics(
    mode: GradNormMetrics, norms: Mapping[str, float], sizes: Mapping[str, int]
) -> dict[str, float]:
    """The metrics a mode asks for, without `grad_norm`.

    Args:
        mode: How much.
        norms: L2 norm of each parameter's gradient, normalised, before clipping.
        sizes: Elements of each, by the same names.
    """
    if mode is GradNormMetrics.OFF:
        return {}
    metrics = {"grad_rms": _root_mean_square(norms.values(), sizes.values())}
    if mode is GradNormMetrics.BASIC:
        return metrics
    parts: dict[str, list[str]] = {}
    for name in norms:
        parts.setdefault(part_of(name), []).append(name)
    for part, names in sorted(parts.items()):
        own = [norms[name] for name in names]
        metrics[f"grad_norm/{part}"] = math.hypot(*own)
        metrics[f"grad_rms/{part}"] = _root_mean_square(own, [sizes[name] for name in names])
    return metrics


def part_of(name: str) -> str:
    """The part of a model a parameter belongs to: attn, mlp, embed, unembed, norm or other."""
    path = name.lower().split(".")
    for part, words in _PARTS.items():
        if any(word in step for step in path for word in words):
            return part
    return "other"


def _root_mean_square(norms: Iterable[float], sizes: Iterable[int]) -> float:
    return math.hypot(*norms) / math.sqrt(max(1, sum(sizes)))
