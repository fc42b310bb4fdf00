"""InfoNCE against autograd of its plain formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from firetitan_daemon.engine.embedding_loss import contrastive, count_sequences


def plain(embeddings: torch.Tensor, queries: int, temperature: float) -> torch.Tensor:
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    asking, documents, negatives = unit.split([queries, queries, len(unit) - 2 * queries])
    labels = torch.arange(queries)
    forth = asking @ torch.cat([documents, negatives]).T / temperature
    back = documents @ asking.T / temperature
    return (
        torch.nn.functional.cross_entropy(forth, labels)
        + torch.nn.functional.cross_entropy(back, labels)
    ) / 2


@pytest.mark.parametrize(("queries", "negatives"), [(1, 0), (4, 0), (4, 3), (1, 5)])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_value_and_gradient(queries: int, negatives: int, temperature: float) -> None:
    draw = np.random.default_rng(queries + negatives)
    embeddings = draw.normal(size=(2 * queries + negatives, 7)).astype(np.float32) * 3
    leaf = torch.tensor(embeddings, dtype=torch.float64, requires_grad=True)
    expected = plain(leaf, queries, temperature)
    expected.backward()
    value, gradient = contrastive(embeddings, queries, temperature)
    assert gradient.dtype == np.float32
    assert value == pytest.approx(float(expected.detach()), rel=1e-6, abs=1e-9)
    assert leaf.grad is not None
    np.testing.assert_allclose(gradient, leaf.grad.numpy(), rtol=1e-5, atol=1e-7)


def test_tiny_temperatures_and_zero_vectors_stay_finite() -> None:
    embeddings = np.zeros((4, 3), np.float32)
    embeddings[0] = 1e-30
    embeddings[1] = 1e30
    value, gradient = contrastive(embeddings, 2, 1e-6)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_sequences_count_by_their_gradient() -> None:
    assert count_sequences(np.array([[0, 0], [0, 1], [-1, 1]], np.float32)) == 2
