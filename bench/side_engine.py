"""One side of the training comparisons: the project's own engine, as a trainer worker runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import workload

from firetitan_daemon.engine.api import (
    AdamParams,
    Datum,
    LoraSpec,
    ModelSpec,
    Normalization,
    SessionSpec,
    SnapshotKind,
)
from firetitan_daemon.engine.hf_train import HfTrainEngine

_LOSS = "cross_entropy"


class EngineSide:
    """A bfloat16 base with a float32 adapter on every linear layer but the output's.

    Args:
        model: Folder of the base model.
        adapter: Where to leave the fresh adapter for the other side; None: nowhere.
    """

    def __init__(self, model: str, adapter: str | None = None) -> None:
        self._engine = HfTrainEngine(ModelSpec(model, dtype="bfloat16"))
        lora = LoraSpec(workload.RANK, workload.ALPHA, train_unembed=False)
        self._engine.open_session(SessionSpec(seed=0, lora=lora))
        self._data: list[Datum] = []
        if adapter is not None:
            folder = Path(adapter)
            folder.mkdir(parents=True, exist_ok=True)
            self._engine.save_snapshot(folder, "fresh", SnapshotKind.BASE, None)

    def describe(self) -> dict[str, Any]:
        """Versions and threads."""
        info = self._engine.info
        return {"threads": torch.get_num_threads(), "source": info.source, **info.versions}

    def batch(self, lengths: list[int], vocab: int, half: bool) -> None:
        """Choose what the next calls compute with."""
        self._data = [
            Datum(one.tokens, {"target_tokens": one.targets, "weights": one.weights})
            for one in workload.make_batch(lengths, vocab, half=half)
        ]

    def step(self) -> float:
        """forward_backward and optim_step; the loss before the step."""
        loss = self.built_in()
        self._engine.optim_step(AdamParams(workload.LEARNING_RATE), Normalization.NUM_LOSS_TOKENS)
        return loss

    def built_in(self) -> float:
        """A built-in loss in one call; the mean loss."""
        output = self._engine.forward_backward(self._data, _LOSS, {})
        return output.metrics["loss:sum"] / self._num_targets()

    def kept_graph(self) -> float:
        """A custom loss: forward keeps its graph, the loss is the caller's, then backward."""
        output = self._engine.forward(self._data, _LOSS, {}, retain_graph=True)
        if output.graph is None:
            raise RuntimeError("the engine kept no graph: too little free memory for this batch")
        logprobs = [np.asarray(one["logprobs"]) for one in output.outputs]
        weights = [np.asarray(datum.loss_inputs["weights"], np.float32) for datum in self._data]
        self._engine.backward(output.graph, [-each for each in weights])
        pairs = zip(weights, logprobs, strict=True)
        return -sum(float(weight @ logprob) for weight, logprob in pairs) / self._num_targets()

    def two_passes(self) -> float:
        """The same custom loss by a surrogate: forward, then forward_backward."""
        self._engine.forward(self._data, _LOSS, {})
        return self.built_in()

    def _num_targets(self) -> float:
        return float(sum(datum.loss_inputs["weights"].sum() for datum in self._data))
