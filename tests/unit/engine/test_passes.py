"""Counting, checking and the memory guard around a pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import Datum
from firetitan_daemon.engine.batch import Limits, make_batch
from firetitan_daemon.engine.losses import LOSSES
from firetitan_daemon.engine.passes import (
    add_gradient,
    check_gradients,
    check_terms,
    count_loss,
    memory_errors,
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


def test_a_failed_allocation_is_said_in_our_terms() -> None:
    with pytest.raises(FiretitanError, match="fewer or shorter") as caught, memory_errors():
        torch.empty(1 << 60, dtype=torch.uint8)
    assert caught.value.reason is Reason.DEVICE_OUT_OF_MEMORY
    with pytest.raises(RuntimeError, match="else"), memory_errors():
        raise RuntimeError("something else")
