"""Routing matrices and forced experts, written plainly, to compare the engine with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from support.models import save_tiny


def near_ties(folder: Path, architecture: str) -> Path:
    """Save a tiny model of strong experts whose routers hardly tell the four of a group apart."""
    save_tiny(folder, architecture)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            groups = layer.mlp.gate.weight.view(-1, 4, layer.mlp.gate.weight.shape[1])
            noise = torch.randn(groups.shape, generator=generator)
            groups.copy_(groups[:, :1] + 1e-4 * noise)
            layer.mlp.experts.down_proj.mul_(4.0)
    model.save_pretrained(folder)
    return folder


def chosen(matrices: Sequence[bytes], layers: int = 2, experts_per_token: int = 2) -> torch.Tensor:
    """What routing matrices name in a model of at most 256 experts: int64 [T, L, K].

    An empty matrix, where the router is to choose, is all -1.
    """
    own = np.full(layers * experts_per_token, -1)
    rows = [np.frombuffer(matrix, np.uint8) if matrix else own for matrix in matrices]
    indices = np.stack(rows).astype(np.int64)
    return torch.from_numpy(indices.reshape(len(matrices), layers, experts_per_token))


def own_choice(model: torch.nn.Module, tokens: np.ndarray) -> torch.Tensor:
    """The experts a plain transformers model sends each token to: int64 [T, L, K]."""
    with torch.no_grad():
        output = model(
            input_ids=torch.from_numpy(tokens.astype(np.int64))[None], output_router_logits=True
        )
    top_k = model.config.num_experts_per_tok
    return torch.stack([logits.topk(top_k).indices for logits in output.router_logits], 1)


@contextmanager
def forced(model: torch.nn.Module, experts: torch.Tensor) -> Iterator[None]:
    """Make a plain model send its T tokens to these experts [T, L, K], weighed by its routers.

    Where an entry is negative the router chooses.
    """
    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    for layer, router in enumerate(routers):
        router.forward = _forced_forward(router, experts[:, layer])
    try:
        yield
    finally:
        for router in routers:
            del router.forward


def _forced_forward(
    router: torch.nn.Module, wanted: torch.Tensor
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = hidden.reshape(-1, hidden.shape[-1]) @ router.weight.T
        probabilities = torch.softmax(logits.float(), -1)
        own = probabilities.topk(wanted.shape[1]).indices
        experts = torch.where(wanted < 0, own, wanted)
        weights = probabilities[torch.arange(len(experts))[:, None], experts]
        if getattr(router, "norm_topk_prob", True):
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(hidden.dtype), experts

    return forward
