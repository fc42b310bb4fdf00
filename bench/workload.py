"""What is computed in the comparisons: token ids and loss weights, the same for every side.

Knows: numbers drawn from fixed seeds. Must not know: who computes with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

VOCAB, QUICK_VOCAB = 40_000, 250
"""Ids are drawn below this; a model compared must have more."""
RANK, ALPHA = 32, 32.0
LEARNING_RATE = 1e-4

UNIFORM = (256,) * 8
RAGGED = (32, 64, 96, 128, 192, 256, 384, 512)
EARLY = (128,) * 4
CUSTOM = (128,) * 8
QUICK = (16, 8)
PROMPTS = (48, 64, 80, 96, 128, 144, 160, 192)
QUICK_PROMPTS = (8, 12)


@dataclass(frozen=True)
class Sequence:
    """Inputs, targets (the inputs one further) and a weight per target; each [N]."""

    tokens: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float32]


def make_batch(lengths: list[int], vocab: int, *, half: bool) -> list[Sequence]:
    """Random sequences.

    Args:
        lengths: Of each.
        vocab: Ids are below it.
        half: The loss is on the last half of each only.
    """
    generator = np.random.default_rng(0)
    batch = []
    for length in lengths:
        ids = generator.integers(0, vocab, length + 1)
        weights = np.ones(length, np.float32)
        if half:
            weights[: length // 2] = 0.0
        batch.append(Sequence(ids[:-1].astype(np.int32), ids[1:].astype(np.int64), weights))
    return batch


def make_prompts(lengths: list[int], vocab: int, seed: int) -> list[list[int]]:
    """Random prompts; another seed gives others, which no cache can know."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocab, length).tolist() for length in lengths]
