"""The other side of the sampling comparison: `generate` of transformers on a padded batch."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig


class GenerateSide:
    """A bfloat16 model that draws from its whole distribution, ends nowhere, counts no logprobs.

    Args:
        model: Folder of the base model.
    """

    def __init__(self, model: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        # Its settings would end sequences early and cut the distribution.
        self._model.generation_config = GenerationConfig(pad_token_id=0)

    def describe(self) -> dict[str, Any]:
        """Versions and threads."""
        return {
            "threads": torch.get_num_threads(),
            "transformers": transformers.__version__,
        }

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], num_samples: int, max_tokens: int) -> int:
        """Sample; returns the number of new tokens."""
        shape = (len(prompts), max(len(prompt) for prompt in prompts))
        tokens, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            tokens[row, -len(prompt) :] = torch.tensor(prompt)
            mask[row, -len(prompt) :] = 1
        made = self._model.generate(
            input_ids=tokens,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=num_samples,
            max_new_tokens=max_tokens,
        )
        return int(made[:, shape[1] :].numel())
