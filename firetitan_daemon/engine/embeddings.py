"""Sequences as vectors: pooled last hidden states, and the gradients that flow back from them.

Knows: passes of a batch, pooling. Must not know: the loss over the vectors, accumulation.

Shapes: T rows of a pass, S sequences, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from firetitan_daemon.engine.api import Pooling
from firetitan_daemon.engine.batch import Sequences
from firetitan_daemon.engine.passes import Gradients, Pass, add_gradient, hidden_gradients
from firetitan_daemon.engine.trainables import Trainables


@dataclass(frozen=True)
class KeptEmbeddings:
    """Passes whose hidden states carry their graph, and how they are pooled."""

    sequences: Sequences
    pooling: Pooling
    passes: list[Pass]


def pool(hidden_TH: torch.Tensor, lengths: Iterable[int], pooling: Pooling) -> torch.Tensor:
    """Pool each sequence's hidden states.

    Args:
        hidden_TH: Of whole sequences, one after the other.
        lengths: Positions of each.
        pooling: How.

    Returns:
        float32 [S, H], detached.
    """
    parts = hidden_TH.detach().float().split(tuple(lengths))
    if pooling is Pooling.LAST:
        return torch.stack([part[-1] for part in parts])
    return torch.stack([part.mean(0) for part in parts])


def spread(grads_SH: torch.Tensor, lengths: Iterable[int], pooling: Pooling) -> torch.Tensor:
    """The gradient by the hidden states [T, H] of one by the pooled vectors: `pool`, transposed."""
    rows = []
    for grad, length in zip(grads_SH, lengths, strict=True):
        if pooling is Pooling.LAST:
            row = grad.new_zeros(length, len(grad))
            row[-1] = grad
        else:
            row = (grad / length).expand(length, -1)
        rows.append(row)
    return torch.cat(rows)


def pooled_gradients(
    trainables: Trainables, passes: Iterable[Pass], pooling: Pooling, grads_SH: torch.Tensor
) -> tuple[torch.Tensor, Gradients]:
    """Run back from the gradients of pooled vectors to the parameters; frees each pass's graph.

    Args:
        trainables: What is trained.
        passes: In order, each with its graph; may be computed one at a time.
        pooling: How they are pooled.
        grads_SH: dC/dembedding, float32.

    Returns:
        The embeddings [S, H], and dC/dparameter by master name (absent: zero).
    """
    vectors: list[torch.Tensor] = []
    total: Gradients = {}
    first = 0
    for part in passes:
        count = len(part.lengths)
        vectors.append(pool(part.hidden, part.lengths, pooling))
        grads = spread(grads_SH[first : first + count], part.lengths, pooling)
        first += count
        for name, grad in hidden_gradients(trainables, part, grads.to(part.hidden.dtype)).items():
            add_gradient(total, name, grad)
    return torch.cat(vectors), total
