"""What a step takes beside what it computes: nothing is made that is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import VOCAB_SIZE
from torch.utils._python_dispatch import TorchDispatchMode

from firetitan_daemon.engine.api import (
    AdamParams,
    Datum,
    LoraSpec,
    ModelSpec,
    Normalization,
    SessionSpec,
)
from firetitan_daemon.engine.hf_train import HfTrainEngine

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
KINDS = pytest.mark.parametrize("lora", [LoraSpec(4, 8.0), None], ids=["lora", "full"])
ADAM = AdamParams(learning_rate=1e-3)


def make(folder: Path, lora: LoraSpec | None) -> HfTrainEngine:
    engine = HfTrainEngine(ModelSpec(str(folder)))
    engine.open_session(SessionSpec(7, lora))
    return engine


def make_data(seed: int) -> list[Datum]:
    draw = np.random.default_rng(seed)
    return [
        Datum(
            draw.integers(0, VOCAB_SIZE, 12).astype(np.int32),
            {"target_tokens": draw.integers(0, VOCAB_SIZE, 12)},
        )
    ]


class Zeros(TorchDispatchMode):
    """Counts tensors of zeros that are made like another."""

    made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made += func is torch.ops.aten.zeros_like.default
        return func(*args, **(kwargs or {}))


@KINDS
def test_zeros_are_made_only_for_what_has_no_gradient(
    tiny_llama: Path, lora: LoraSpec | None
) -> None:
    engine = make(tiny_llama, lora)
    for step in range(2):
        engine.forward_backward(make_data(step), "cross_entropy", {})
        session = engine._session()
        missing = session.trainables.masters.keys() - session.gradients.keys()
        with Zeros() as zeros:
            engine.optim_step(ADAM, Normalization.NONE)
    assert zeros.made == len(missing) == 0
