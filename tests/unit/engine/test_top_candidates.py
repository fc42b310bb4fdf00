"""How many likeliest tokens a forward may be asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine import batch
from firetitan_daemon.engine.api import Datum, LoraSpec, ModelSpec, SessionSpec
from firetitan_daemon.engine.hf_train import HfTrainEngine
from firetitan_daemon.engine.top_candidates import take_top_k

FIELD = 'loss_fn_config["top_k"]'


@pytest.mark.parametrize("value", [0, -1, 1.5, 13, float("nan"), float("inf"), "3"])
def test_what_is_no_number_of_tokens_is_refused(value: float | str) -> None:
    assert take_top_k("cross_entropy", {"top_k": 12}, 12) == (12, {})
    with pytest.raises(FiretitanError, match="1 to 12") as caught:
        take_top_k("cross_entropy", {"top_k": value}, 12)
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_ARGUMENT, FIELD)


def test_more_than_one_answer_can_hold_is_refused_before_it_is_computed(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = HfTrainEngine(ModelSpec(str(tiny_llama)))
    engine.open_session(SessionSpec(7, LoraSpec(2, 8.0)))
    targets = {"target_tokens": np.arange(5)}
    data = [Datum(np.arange(5, dtype=np.int32), dict(targets)) for _ in range(2)]
    monkeypatch.setattr(batch, "MOST_CELLS", 40)
    output = engine.forward(data, "cross_entropy", {"top_k": 4}).outputs[1]
    assert output["top_k_indices"].shape == (5, 4)
    with pytest.raises(FiretitanError, match=r"5.*10 positions.*at most 4") as caught:
        engine.forward(data, "cross_entropy", {"top_k": 5})
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_ARGUMENT, FIELD)
    assert engine.progress.forward_passes == 1
