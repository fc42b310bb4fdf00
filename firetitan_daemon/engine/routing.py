"""Which experts each token goes to: recorded while sampling, forced while training.

Knows: the routers of transformers' mixtures of experts, the bytes of a routing matrix. Must not
know: protobuf, requests, losses.

A router is the `gate` or `router` beside a module `experts`; it gives logits, weights and indices
of the chosen experts. A forward hook on each sees them all and, where experts are forced, puts
their indices and weights in the place of the router's own. The weights of forced experts come from
the same logits by the same formula, so they carry gradients to the router as its own choice would.

Shapes: T tokens, L routed layers, K experts a token, E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.model_records import RoutingShape

OWN_CHOICE = -1
"""In the place of an expert's index: the router chooses."""

_ROUTER_NAMES = frozenset({"gate", "router"})
_PROBE_ROWS = 16


class Routers:
    """The routers of one model; nothing to record or force where it has none.

    Calls come from one thread, as those of the model.

    Args:
        model: Gets a hook on each router.
        hidden_size: What routers read, H.

    Attributes:
        shape: What they choose; None where there is nothing to record or to force.
        note: Why not, where the model routes tokens all the same, in words.
    """

    def __init__(self, model: nn.Module, hidden_size: int) -> None:
        self.shape: RoutingShape | None = None
        self.note: str | None = None
        self._forced: torch.Tensor | None = None
        self._seen: list[torch.Tensor] | None = None
        self._normalised: list[bool] = []
        found = _find(model)
        if not found:
            if routes_tokens(model):
                self.note = "expert choices are neither recorded nor replayed: no known router"
            return
        shapes = set()
        for name, router in found:
            probed = _probe(router, hidden_size)
            if probed is None:
                self.note = (
                    "expert choices are neither recorded nor replayed: "
                    f"{type(router).__name__} at {name} is no plain softmax router"
                )
                return
            shapes.add(probed[:2])
            self._normalised.append(probed[2])
        if len(shapes) > 1:
            self.note = "expert choices are neither recorded nor replayed: layers choose unequally"
            return
        ((chosen, experts),) = shapes
        self.shape = RoutingShape(len(found), chosen, experts)
        for layer, (_, router) in enumerate(found):
            router.register_forward_hook(partial(self._route, layer))

    @contextmanager
    def forcing(self, experts_TLK: torch.Tensor | None) -> Iterator[None]:
        """Send the tokens of the model calls inside to these experts.

        Args:
            experts_TLK: int64 [T, L, K] for the T tokens that reach the routers in each call, in
                their order, `OWN_CHOICE` where the router is to choose; None forces nothing.
        """
        self._forced = experts_TLK
        try:
            yield
        finally:
            self._forced = None

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        """Note the experts that the tokens of one model call go to."""
        self._seen = []
        try:
            yield Recording(self._seen, self.shape)
        finally:
            self._seen = None

    def _route(self, layer: int, router: nn.Module, inputs: Any, output: Any) -> Any:
        logits, weights, experts = output
        if self._forced is not None:
            wanted = self._forced[:, layer].to(experts.device, experts.dtype)
            own = wanted == OWN_CHOICE
            experts = torch.where(own, experts, wanted)
            forced = _weights(logits, experts, self._normalised[layer]).to(weights.dtype)
            weights = torch.where(own, weights, forced)
        if self._seen is not None:
            self._seen.append(experts)
        return logits, weights, experts


class Recording:
    """What the routers of one call chose; filled when the call returns."""

    def __init__(self, layers_TK: list[torch.Tensor], shape: RoutingShape | None) -> None:
        self._layers = layers_TK
        self._shape = shape

    @property
    def experts(self) -> torch.Tensor | None:
        """int64 [T, L, K]; None where there are no routers."""
        return torch.stack(self._layers, 1) if self._layers else None

    @property
    def matrices(self) -> list[bytes]:
        """One routing matrix a token: L x K indices, row-major; none where there are no routers."""
        experts = self.experts
        if experts is None or self._shape is None:
            return []
        indices = experts.cpu().numpy().astype(f"<u{self._shape.index_bytes}")
        return [row.tobytes() for row in indices]


def experts_of(
    matrices: Sequence[bytes], length: int, shape: RoutingShape, field: str
) -> torch.Tensor | None:
    """The experts that routing matrices name.

    Args:
        matrices: One a token; empty ones leave the choice to the routers.
        length: Tokens there are.
        shape: What the model chooses.
        field: Of the matrices, for errors.

    Returns:
        int64 tensor [T, L, K], `OWN_CHOICE` where the router is to choose; None where it is
        everywhere.

    Raises:
        FiretitanError: INVALID_DATUM naming `field[i]`.
    """
    if len(matrices) not in (0, length):
        raise _bad(field, f"has {len(matrices)} matrices for {length} tokens; give one per token")
    given = [index for index, matrix in enumerate(matrices) if matrix]
    if not given:
        return None
    for index in given:
        if len(matrices[index]) != shape.matrix_bytes:
            raise _bad(
                f"{field}[{index}]",
                f"has {len(matrices[index])} bytes; {shape.layers} layers x "
                f"{shape.experts_per_token} experts of {shape.index_bytes} bytes make "
                f"{shape.matrix_bytes}",
            )
    packed = np.frombuffer(b"".join(matrices[index] for index in given), f"<u{shape.index_bytes}")
    named = packed.astype(np.int64).reshape(len(given), shape.layers, shape.experts_per_token)
    ordered = np.sort(named, -1)
    twice = (ordered[..., 1:] == ordered[..., :-1]).any(-1)
    wrong = twice | (ordered[..., -1] >= shape.num_experts)
    if wrong.any():
        row, layer = np.argwhere(wrong)[0].tolist()
        raise _bad(
            f"{field}[{given[row]}]",
            f"names experts {named[row, layer].tolist()} at layer {layer}; give different ones of "
            f"0 to {shape.num_experts - 1}",
        )
    experts = np.full((length, shape.layers, shape.experts_per_token), OWN_CHOICE, np.int64)
    experts[given] = named
    return torch.from_numpy(experts)


def routes_tokens(model: nn.Module) -> bool:
    """Whether tokens share matrix products with whoever is routed like them (experts)."""
    return any(
        name.rpartition(".")[2] == "experts" or "moe" in type(module).__name__.lower()
        for name, module in model.named_modules()
    )


def _find(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Routers by name, in the model's order."""
    modules = dict(model.named_modules())
    return [
        (name, module)
        for name, module in modules.items()
        if name.rpartition(".")[2] in _ROUTER_NAMES
        and f"{name.rpartition('.')[0]}.experts" in modules
    ]


@torch.no_grad()
def _probe(router: nn.Module, hidden_size: int) -> tuple[int, int, bool] | None:
    """K, E and whether weights add up to 1; None for a router of another kind."""
    like = next(router.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_PROBE_ROWS, hidden_size, generator=generator).to(like.device, like.dtype)
    try:
        logits, weights, experts = router(rows)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return None
    if not all(isinstance(each, torch.Tensor) for each in (logits, weights, experts)):
        return None
    if experts.dtype != torch.int64 or weights.shape != experts.shape or logits.dim() != 2:
        return None
    for normalised in (False, True):
        ours = _weights(logits, experts, normalised).to(weights.dtype)
        if torch.allclose(ours, weights, rtol=1e-2, atol=1e-5):
            return experts.shape[1], logits.shape[1], normalised
    return None


def _weights(logits: torch.Tensor, experts: torch.Tensor, normalised: bool) -> torch.Tensor:
    """Softmax over all experts, taken at the chosen ones [T, K]; float32."""
    weights = torch.softmax(logits, -1, dtype=torch.float32).gather(1, experts)
    return weights / weights.sum(-1, keepdim=True) if normalised else weights


def _bad(where: str, what: str) -> FiretitanError:
    return FiretitanError(Reason.INVALID_DATUM, f"{where}: {what}", field=where)
