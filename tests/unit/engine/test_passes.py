"""Counting, checking and the memory guard around a pass."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine import passes
from firetitan_daemon.engine.api import AdamParams, Datum
from firetitan_daemon.engine.batch import Limits, make_batch, make_sequences
from firetitan_daemon.engine.losses import LOSSES
from firetitan_daemon.engine.optim import AdamW
from firetitan_daemon.engine.passes import (
    Pass,
    add_gradient,
    check_gradients,
    check_terms,
    count_loss,
    hidden_gradients,
    memory_errors,
    run_passes,
)

DATA = [
    Datum(np.zeros(length, np.int32), {"target_tokens": np.zeros((length, 2), np.int64)})
    for length in (3, 1, 2)
]
BATCH = make_batch(DATA, LOSSES["cross_entropy"], Limits(4, 4, 8), strict=True)


def test_candidates_of_one_position_count_once() -> None:
    slopes = torch.tensor([[0, 0], [1, 0], [-1, 2], [0, 0], [0, 1e-30], [0, 0]])
    assert count_loss(BATCH, slopes) == (3, 2)


def test_a_term_that_is_not_finite_is_found_in_its_datum() -> None:
    terms = torch.zeros(3, 2)
    check_terms(BATCH, slice(3, 6), terms)
    terms[2, 1] = float("inf")
    with pytest.raises(FiretitanError, match=r"data\[2\]: the loss at position 1") as caught:
        check_terms(BATCH, slice(3, 6), terms)
    assert (caught.value.reason, caught.value.field) == (Reason.NON_FINITE, "data[2]")


def test_gradients_add_up_in_float32_and_are_checked() -> None:
    total: dict[str, torch.Tensor] = {}
    for _ in range(3):
        add_gradient(total, "w", torch.tensor([1.0, 2.0**-9], dtype=torch.bfloat16))
    assert total["w"].dtype == torch.float32
    assert total["w"].tolist() == [3.0, 3 * 2.0**-9]
    check_gradients({})
    check_gradients(total)
    with pytest.raises(FiretitanError, match="gradient of w is not finite"):
        check_gradients({"v": torch.zeros(2), "w": torch.tensor([0.0, float("nan")])})


def gradients_of(hidden: torch.Tensor, **leaves: torch.Tensor) -> dict[str, torch.Tensor]:
    """As one pass adds them up, of the loss sum(hidden * row number)."""
    below = torch.arange(hidden.numel(), dtype=torch.float32).view(hidden.shape)
    total: dict[str, torch.Tensor] = {}
    part = Pass(slice(0, len(hidden)), (len(hidden),), hidden)
    for name, grad in hidden_gradients(SimpleNamespace(leaves=leaves), part, below).items():
        add_gradient(total, name, grad)
    return total


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.einsum("tl,hl->th", x, weight)


def batched_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x.view(2, 3, 4), weight.view(2, 5, 4).transpose(1, 2)).view(6, 5)


@pytest.mark.parametrize(
    ("layer", "shape"), [(product, (5, 4)), (batched_product, (2, 5, 4))], ids=["einsum", "bmm"]
)
def test_a_gradient_in_another_order_of_memory_is_stepped_right(
    layer: object, shape: tuple[int, ...]
) -> None:
    """The fused step reads memory from front to back, whatever the strides say."""
    assert callable(layer)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, generator=generator)
    weight = torch.randn(shape, generator=generator).requires_grad_()
    plain = weight.detach().clone().requires_grad_()
    total = gradients_of(layer(x, weight), weight=weight)
    plain.grad = gradients_of(layer(x, plain), plain=plain)["plain"]
    torch.optim.AdamW([plain], lr=0.1, eps=1.0, weight_decay=0.0, foreach=False).step()
    optimizer = AdamW({"weight": weight})
    optimizer.prepare()
    optimizer.update(total, AdamParams(0.1, 0.9, 0.999, 1.0), optimizer.norm(total, 1), 1)
    torch.testing.assert_close(weight.detach(), plain.detach())


@pytest.mark.parametrize(
    ("packed", "wanted"), [(True, [(6, 1, 1), (1, 1, 1)]), (False, [(6,), (1, 1, 1, 1, 1)])]
)
def test_a_pass_is_bounded_as_the_model_runs_it(
    monkeypatch: pytest.MonkeyPatch, packed: bool, wanted: list[tuple[int, ...]]
) -> None:
    """Padded, every sequence takes as much memory as the longest one beside it."""
    monkeypatch.setattr(passes, "MAX_PASS_TOKENS", 8)
    data = [Datum(np.zeros(length, np.int32), {}) for length in (6, 1, 1, 1, 1, 1)]
    loaded = SimpleNamespace(
        info=SimpleNamespace(packed=packed),
        hidden_states=lambda sequences, experts: torch.zeros(sum(map(len, sequences)), 2),
    )
    parts = list(run_passes(loaded, make_sequences(data, Limits(4, 4, 8)), graph=False))
    assert [part.lengths for part in parts] == wanted
    assert [part.rows.start for part in parts] == [0, sum(wanted[0])]


def test_two_parameters_that_share_a_gradient_have_sums_of_their_own() -> None:
    a, b = (torch.zeros(3, 2, requires_grad=True) for _ in range(2))
    total = gradients_of((a + b) * 2, a=a, b=b)
    wanted = 2 * torch.arange(6.0).view(3, 2)
    for _ in range(2):
        add_gradient(total, "a", wanted)
    assert torch.equal(total["a"], 3 * wanted)
    assert torch.equal(total["b"], wanted)


def test_a_failed_allocation_is_said_in_our_terms() -> None:
    with pytest.raises(FiretitanError, match="fewer or shorter") as caught, memory_errors():
        torch.empty(1 << 60, dtype=torch.uint8)
    assert caught.value.reason is Reason.DEVICE_OUT_OF_MEMORY
    with pytest.raises(RuntimeError, match="else"), memory_errors():
        raise RuntimeError("something else")
