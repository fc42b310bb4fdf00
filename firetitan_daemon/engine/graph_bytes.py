"""What a kept forward pass takes: a guess before the first one, a measurement afterwards.

Knows: what autograd saves, the model's configuration. Must not know: who keeps graphs, budgets.
"""

from __future__ import annotations

from typing import Any

import torch


class SavedBytes:
    """Counts what autograd keeps while it is open, weights aside; nothing where no graph is made.

    Args:
        model: Its parameters are not counted.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._sizes: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)

    @property
    def num_bytes(self) -> int:
        """Bytes of distinct storages kept."""
        return sum(self._sizes.values())

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


def estimate_bytes_per_token(model: Any) -> int:
    """A first guess of what a kept graph takes per token, until one has been measured."""
    config = model.config.get_text_config()
    width = 24 * config.hidden_size + 6 * (getattr(config, "intermediate_size", None) or 0)
    return int(config.num_hidden_layers * width * next(model.parameters()).element_size())
