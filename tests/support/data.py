"""Small training data in tinker's types."""

from __future__ import annotations

from typing import Any

import numpy as np


def ragged_data(
    *, seed: int, count: int, vocab_size: int = 256, weight: float | None = None
) -> list[Any]:
    """`count` datums of 3 to 24 tokens for cross_entropy; weights of both signs, some 0."""
    import tinker

    generator = np.random.default_rng(seed)
    data = []
    for _ in range(count):
        length = int(generator.integers(3, 25))
        tokens = generator.integers(0, vocab_size, length + 1)
        weights = generator.choice([0.0, 0.5, 1.0, -0.25], length, p=[0.3, 0.2, 0.4, 0.1])
        weights[-1] = 1.0
        if weight is not None:
            weights[:] = weight
        data.append(
            tinker.Datum(
                model_input=tinker.ModelInput.from_ints(tokens[:-1].tolist()),
                loss_fn_inputs={
                    "target_tokens": tokens[1:].astype(np.int64),
                    "weights": weights.astype(np.float32),
                },
            )
        )
    return data
