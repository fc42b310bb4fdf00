"""What a kept forward pass takes: a guess before the first one, a measurement afterwards.

Knows: what autograd saves, the model's configuration, the device's memory. Must not know: who keeps
graphs.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from firetitan_daemon.engine.graphs import GraphLimits

_MEMORY_SHARE = 4


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
        # Handed back itself, an output would hold the node that holds it: a graph that is dropped
        # without a backward would never be freed.
        return tensor.detach()


def estimate_bytes_per_token(model: Any) -> int:
    """A first guess of what a kept graph takes per token, until one has been measured."""
    config = model.config.get_text_config()
    width = 24 * config.hidden_size + 6 * (getattr(config, "intermediate_size", None) or 0)
    return int(config.num_hidden_layers * width * next(model.parameters()).element_size())


def default_limits(device: torch.device) -> GraphLimits:
    """Let kept graphs take a quarter of the device's memory."""
    if device.type == "cuda":
        memory = int(torch.cuda.get_device_properties(device).total_memory)
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return GraphLimits(max_bytes=memory // _MEMORY_SHARE)
