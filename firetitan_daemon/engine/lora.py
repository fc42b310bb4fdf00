"""LoRA on linear layers: one base, several adapters, the current one chosen in one assignment.

Knows: `torch.nn.Linear` modules and their names. Must not know: losses, optimizers, files.

On a bfloat16 base the LoRA product is computed first and the base's matrix product accumulates onto
it, so one rounding covers the sum. Adding the product to a rounded base output loses most of a
small adapter: below half a unit in the last place it vanishes.

Shapes: T rows, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import LoraSpec

_NOT_ADAPTED = frozenset({"gate", "router", "shared_expert_gate"})
_ATTENTION_PARTS = ("attn", "attention")
_MLP_PARTS = ("mlp", "feed_forward", "ffn", "experts")
FUSED_EXPERTS = "LoRA leaves fused experts and routers as they are; lora_rank=0 trains them too"


class LoraPair:
    """The adapter of one linear layer: float32 A [R, I] and B [O, R], and copies to compute with.

    Whoever writes A or B calls `refresh` afterwards; forward passes use the copies only.
    """

    def __init__(
        self, a: torch.Tensor, b: torch.Tensor, scaling: float, compute_dtype: torch.dtype
    ) -> None:
        self.a = a
        self.b = b
        self.scaling = scaling
        self.compute_dtype = compute_dtype
        self.compute_a = a.detach().to(compute_dtype)
        self.compute_b = torch.empty_like(b, dtype=compute_dtype, requires_grad=False)
        self.refresh()

    def refresh(self) -> None:
        """Take A and scaling * B into the dtype of the base, in place: nothing here may fail."""
        with torch.no_grad():
            if self.compute_dtype != self.a.dtype:  # else it is A itself
                self.compute_a.copy_(self.a)
            torch.mul(self.b, self.scaling, out=self.compute_b)


Adapter = Mapping[str, LoraPair]
"""One adapter: the pairs by module name."""


class LoraSlot:
    """Which adapter the wrapped layers of one model apply; None is the base alone."""

    def __init__(self) -> None:
        self.active: Adapter | None = None


class LoraLinear(nn.Module):
    """A frozen linear layer that adds the slot's adapter where that has a pair for it."""

    def __init__(self, base: nn.Linear, name: str, slot: LoraSlot) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.name = name
        self.slot = slot

    @property
    def pair(self) -> LoraPair | None:
        """The current adapter's pair for this layer."""
        active = self.slot.active
        return None if active is None else active.get(self.name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] to [..., O]."""
        return lora_linear(x, self.weight, self.bias, self.pair)


def lora_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pair: LoraPair | None
) -> torch.Tensor:
    """Apply x W' + bias, plus scaling * (x A') B' where there is a pair; has all gradients."""
    if pair is None:
        return nn.functional.linear(x, weight, bias)
    result: torch.Tensor = _LoraLinear.apply(x, pair.a, pair.b, weight, bias, pair)
    return result


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        pair: LoraPair,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ pair.compute_a.T
        output = low @ pair.compute_b.T
        output.addmm_(rows, weight.T)
        if bias is not None:
            output.add_(bias)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(rows, low, pair.compute_a, pair.compute_b, weight)
            ctx.scaling = pair.scaling
            ctx.shape = x.shape
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        rows, low, compute_a, compute_b, weight = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_low = grad @ compute_b
        grad_a = grad_b = grad_x = None
        if ctx.needs_input_grad[1]:
            grad_a = (grad_low.T @ rows).float()
        if ctx.needs_input_grad[2]:
            grad_b = (grad.T @ low).float().mul_(ctx.scaling)
        if ctx.needs_input_grad[0]:
            grad_x = grad_low @ compute_a
            grad_x.addmm_(grad, weight)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, grad_a, grad_b, None, None, None


def has_fused_experts(model: nn.Module) -> bool:
    """Whether the weights of a layer's experts are one tensor [E, O, I] and no linear layers."""
    return any(
        parameter.dim() == 3 and "experts" in name.split(".")
        for name, parameter in model.named_parameters()
    )


def select_modules(model: nn.Module, spec: LoraSpec) -> list[str]:
    """Names of the linear layers an adapter covers, in the model's order.

    Attention and feed-forward layers are told apart by their path. Routers are left out, and so
    are experts whose weights are fused: they are no linear layers.

    Raises:
        FiretitanError: UNSUPPORTED where nothing can be adapted, INVALID_ARGUMENT where nothing
            is asked for.
    """
    if not (spec.train_attn or spec.train_mlp or spec.train_unembed):
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            "train_attn, train_mlp and train_unembed are all false: nothing to train",
            field="lora",
        )
    head = model.get_output_embeddings()
    names = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | LoraLinear):
            if type(module).__name__ == "Conv1D":
                raise FiretitanError(
                    Reason.UNSUPPORTED,
                    f"{name} is a Conv1D (GPT-2 family); LoRA covers linear layers only: train "
                    "with lora_rank=0",
                )
            continue
        if module is head:
            wanted = spec.train_unembed
        else:
            parts = name.split(".")
            if parts[-1] in _NOT_ADAPTED:
                continue
            path = [part for part in parts if not part.isdigit()]
            in_attention = any(word in part for part in path for word in _ATTENTION_PARTS)
            in_mlp = any(word in part for part in path for word in _MLP_PARTS)
            wanted = (spec.train_attn and in_attention) or (
                spec.train_mlp and in_mlp and not in_attention
            )
        if wanted:
            names.append(name)
    if not names:
        hint = f" ({FUSED_EXPERTS})" if has_fused_experts(model) else ""
        raise FiretitanError(
            Reason.UNSUPPORTED,
            f"{type(model).__name__} has no linear layer that this choice of train_attn, "
            f"train_mlp and train_unembed covers{hint}",
            field="lora",
        )
    return names


def wrap_modules(model: nn.Module, names: Sequence[str]) -> LoraSlot:
    """Put a `LoraLinear` in the place of each named linear layer; all share the returned slot.

    Layers wrapped before join the same slot, so a sampler may wrap more layers for a later adapter.
    """
    slot = adapter_slot(model) or LoraSlot()
    for name in names:
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name) if parent_name else model
        module = getattr(parent, leaf)
        if not isinstance(module, LoraLinear):
            setattr(parent, leaf, LoraLinear(module, name, slot))
    return slot


def adapter_slot(model: nn.Module) -> LoraSlot | None:
    """The slot that all wrapped layers of a model share; None where none is wrapped."""
    slots = (module.slot for module in model.modules() if isinstance(module, LoraLinear))
    return next(slots, None)


def unwrap_modules(model: nn.Module) -> None:
    """Put plain linear layers back; their weights are the same tensors."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            parent_name, _, leaf = name.rpartition(".")
            parent = model.get_submodule(parent_name) if parent_name else model
            with torch.device("meta"):
                plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            plain.weight, plain.bias = module.weight, module.bias
            setattr(parent, leaf, plain)


def init_adapter(
    model: nn.Module, names: Sequence[str], rank: int, alpha: float, seed: int
) -> dict[str, LoraPair]:
    """A fresh adapter: A kaiming uniform (a = sqrt 5) from one seeded generator, B zero.

    Args:
        model: Holds a linear layer under each name.
        names: The layers, in the order A is drawn.
        rank: R, at least 1.
        alpha: The product is scaled by alpha / rank.
        seed: Of the generator; equal seeds give equal bits.

    Raises:
        FiretitanError: INVALID_ARGUMENT for a rank or an alpha out of range.
    """
    if rank < 1:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT, f"lora_rank is {rank}; at least 1", field="lora.rank"
        )
    if not math.isfinite(alpha) or alpha <= 0:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT, f"lora_alpha is {alpha}; above 0", field="lora.alpha"
        )
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for name in names:
        module = model.get_submodule(name)
        weight: torch.Tensor = module.weight
        outputs, inputs = weight.shape
        a = torch.empty(rank, inputs, dtype=torch.float32)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        b = torch.zeros(outputs, rank, dtype=torch.float32, device=weight.device)
        adapter[name] = LoraPair(a.to(weight.device), b, alpha / rank, weight.dtype)
    return adapter


def attach_lora(model: nn.Module, spec: LoraSpec, seed: int) -> dict[str, LoraPair]:
    """Choose the layers, wrap them, and make a fresh adapter the active one; returns its pairs."""
    names = select_modules(model, spec)
    adapter = init_adapter(model, names, spec.rank, spec.alpha, seed)
    wrap_modules(model, names).active = adapter
    return adapter
