"""Laying datums out in rows, and naming what is wrong with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine import batch as batch_module
from firetitan_daemon.engine.api import Datum
from firetitan_daemon.engine.batch import Batch, Limits, make_batch
from firetitan_daemon.engine.losses import LOSSES

LIMITS = Limits(vocab_size=10, target_size=12, max_context_length=6)


def datum(length: int, candidates: int | None = None, **inputs: object) -> Datum:
    shape = (length,) if candidates is None else (length, candidates)
    targets = np.arange(int(np.prod(shape))).reshape(shape) % 10
    arrays = {name: np.asarray(value) for name, value in inputs.items()}
    return Datum(np.arange(length, dtype=np.int32), {"target_tokens": targets, **arrays})


def batch_of(*data: Datum, loss: str = "cross_entropy", strict: bool = True) -> Batch:
    return make_batch(data, LOSSES[loss], LIMITS, strict=strict)


def test_absent_weights_are_one_and_candidate_padding_weighs_nothing() -> None:
    given = np.array([[0.5, 2.0], [1.0, 0.0]], np.float32)
    batch = batch_of(datum(3), datum(2, 2, weights=given))
    assert batch.lengths == (3, 2)
    assert batch.inputs["weights"].tolist() == [[1, 0], [1, 0], [1, 0], [0.5, 2], [1, 0]]
    assert batch.targets.dtype == torch.int64
    outputs = batch.outputs(torch.arange(10.0).reshape(5, 2))
    assert [array.shape for array in outputs] == [(3,), (2, 2)]
    assert outputs[0].tolist() == [0, 2, 4]
    back = batch.rows(outputs, "grads")
    assert back.tolist() == [[0, 0], [2, 0], [4, 0], [6, 7], [8, 9]]


def test_passes_hold_whole_datums_within_the_budget() -> None:
    batch = batch_of(*(datum(length) for length in (2, 2, 1, 6, 1, 1)))
    passes = list(batch.passes(4))
    assert passes == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 6)]
    rows = [batch.row_range(part) for part in passes]
    assert rows == [slice(0, 4), slice(4, 5), slice(5, 11), slice(11, 13)]


FLOATS = np.zeros(3, np.float32)
BAD = [
    (datum(7), Reason.INVALID_DATUM, "data[1].model_input", "7 tokens"),
    (
        Datum(np.array([1, 10, 2], np.int32), {"target_tokens": np.zeros(3, np.int64)}),
        Reason.INVALID_DATUM,
        "data[1].model_input[1]",
        "token 10; 0 to 9",
    ),
    (
        datum(3, target_tokens=[0, 1, 12]),
        Reason.INVALID_DATUM,
        'data[1].loss_fn_inputs["target_tokens"][2]',
        "token 12; 0 to 11",
    ),
    (
        datum(3, target_tokens=[0, -100, 1]),
        Reason.INVALID_DATUM,
        'data[1].loss_fn_inputs["target_tokens"][1]',
        "token -100",
    ),
    (
        datum(3, target_tokens=[0.0, 1.0, 2.0]),
        Reason.INVALID_DATUM,
        'data[1].loss_fn_inputs["target_tokens"]',
        "integers",
    ),
    (
        datum(3, target_tokens=[0, 1]),
        Reason.INVALID_DATUM,
        'data[1].loss_fn_inputs["target_tokens"]',
        "3 tokens",
    ),
    (
        datum(3, weights=FLOATS[:2]),
        Reason.INVALID_DATUM,
        'data[1].loss_fn_inputs["weights"]',
        "has 2 values, target_tokens has 3; give one per target",
    ),
    (
        datum(3, weights=[1.0, np.nan, 0.0]),
        Reason.NON_FINITE,
        'data[1].loss_fn_inputs["weights"][1]',
        "is nan",
    ),
    (
        datum(3, advantages=FLOATS),
        Reason.INVALID_DATUM,
        'data[1].loss_fn_inputs["advantages"]',
        "not read by cross_entropy",
    ),
]


@pytest.mark.parametrize(("bad", "reason", "field", "text"), BAD)
def test_what_is_wrong_is_named(bad: Datum, reason: Reason, field: str, text: str) -> None:
    with pytest.raises(FiretitanError) as caught:
        batch_of(datum(2), bad)
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert text in caught.value.message and field in caught.value.message


def test_missing_inputs_are_named() -> None:
    with pytest.raises(FiretitanError, match="missing required field 'advantages'") as caught:
        batch_of(datum(3, logprobs=FLOATS), loss="ppo")
    assert caught.value.reason is Reason.LOSS_INPUT_MISSING
    half = {"logprobs": FLOATS, "advantages": FLOATS}
    with pytest.raises(FiretitanError, match="give it to all or to none") as caught:
        batch_of(datum(3, **half, clip_low_threshold=FLOATS), datum(3, **half), loss="ppo")
    assert caught.value.field == 'data[1].loss_fn_inputs["clip_low_threshold"]'


def test_gspo_takes_one_target_a_position() -> None:
    wide = np.zeros((3, 2), np.float32)
    with pytest.raises(FiretitanError, match="one per position"):
        batch_of(datum(3, 2, logprobs=wide, advantages=wide), loss="gspo")


def test_targets_that_would_fill_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of all datums get as wide as the widest one."""
    monkeypatch.setattr(batch_module, "MOST_CELLS", 40)
    assert batch_of(datum(3), datum(3), datum(2, 5)).targets.shape == (8, 5)
    with pytest.raises(FiretitanError, match=r"5.*9 positions.*at most 4") as caught:
        batch_of(datum(6), datum(3, 5))
    field = 'data[1].loss_fn_inputs["target_tokens"]'
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_ARGUMENT, field)
    assert batch_of(*[datum(6)] * 7).targets.shape == (42, 1)


def test_unknown_inputs_are_ignored_where_asked() -> None:
    batch = batch_of(datum(3, loss_mask=np.full(9, np.nan)), strict=False)
    assert set(batch.inputs) == {"weights"}


def test_gradients_of_another_shape_are_refused() -> None:
    batch = batch_of(datum(3), datum(2))
    for arrays in ([FLOATS], [FLOATS, FLOATS], [FLOATS[:, None], FLOATS[:2]]):
        with pytest.raises(FiretitanError) as caught:
            batch.rows(arrays, "output_grads")
        assert caught.value.reason is Reason.INVALID_ARGUMENT
