"""The other side of the training comparisons: transformers with PEFT, padded, as most run it.

It starts from the very adapter the engine starts from, so losses can be compared, not only times.
"""

from __future__ import annotations

from typing import Any

import peft
import torch
import transformers
import workload
from peft import PeftModel
from transformers import AutoModelForCausalLM

_NO_TARGET = -100


class PeftSide:
    """A model and its adapter in one dtype, AdamW on the adapter.

    Args:
        model: Folder of the base model.
        adapter: Folder of the adapter to start from.
        dtype: Of everything: `bfloat16` or `float32`.
    """

    def __init__(self, model: str, adapter: str, dtype: str) -> None:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self._model = PeftModel.from_pretrained(
            base, adapter, is_trainable=True, autocast_adapter_dtype=False
        ).to(getattr(torch, dtype))
        self._model.train()
        trained = [each for each in self._model.parameters() if each.requires_grad]
        self._optimizer = torch.optim.AdamW(
            trained,
            lr=workload.LEARNING_RATE,
            betas=(0.9, 0.95),
            eps=1e-12,
            weight_decay=0.0,
            fused=True,
        )
        self._inputs: dict[str, torch.Tensor] = {}

    def describe(self) -> dict[str, Any]:
        """Versions and threads."""
        return {
            "threads": torch.get_num_threads(),
            "peft": peft.__version__,
            "transformers": transformers.__version__,
        }

    def batch(self, lengths: list[int], vocab: int, half: bool) -> None:
        """Choose what the next calls compute with: padded to the longest sequence."""
        sequences = workload.make_batch(lengths, vocab, half=half)
        shape = (len(lengths), max(lengths))
        tokens, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        targets = torch.full(shape, _NO_TARGET)
        for row, one in enumerate(sequences):
            length = len(one.tokens)
            tokens[row, :length] = torch.from_numpy(one.tokens)
            mask[row, :length] = 1
            chosen = torch.from_numpy(one.targets)
            targets[row, :length] = chosen.where(torch.from_numpy(one.weights) > 0, _NO_TARGET)
        self._inputs = {
            "input_ids": tokens,
            "attention_mask": mask,
            "labels": targets,
            "shift_labels": targets,
        }

    def step(self) -> float:
        """Forward, backward and AdamW; the mean loss before the step."""
        loss = self._model(**self._inputs, use_cache=False).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())
