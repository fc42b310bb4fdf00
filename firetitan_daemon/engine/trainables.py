"""What a session trains: a LoRA adapter, every parameter or nothing, as float32 masters.

Knows: the model's parameters and adapters, which tensors autograd differentiates. Must not know:
losses, Adam, files.

Masters, gradients and moments are float32 whatever the base's dtype. A bfloat16 model computes with
rounded copies that `refresh` renews after each write to the masters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch

from firetitan_daemon.engine.api import LoraSpec
from firetitan_daemon.engine.head import Head, HeadGradients
from firetitan_daemon.engine.lora import (
    LoraLinear,
    LoraPair,
    adapter_slot,
    attach_lora,
    init_adapter,
    unwrap_modules,
)
from firetitan_daemon.engine.models import LoadedModel
from firetitan_daemon.engine.peft import PeftAdapter, fit_adapter

LORA_A = ".lora_A.weight"
LORA_B = ".lora_B.weight"


class Trainables(Protocol):
    """The trained tensors of one session."""

    masters: dict[str, torch.Tensor]
    """float32 by name; written in place, then `refresh`."""
    leaves: dict[str, torch.Tensor]
    """What autograd differentiates, by the same names; may be the masters themselves."""

    def head(self) -> Head:
        """The output layer as trained now."""

    def head_gradients(self, grads: HeadGradients) -> dict[str, torch.Tensor]:
        """The head's own gradients by master name, float32."""

    def refresh(self) -> None:
        """Make the model compute with what the masters now hold."""

    def activate(self) -> None:
        """Make the model compute with this; another session of it may have computed since."""

    def left_out(self) -> AbstractContextManager[None]:
        """Within it the model computes without what is trained, where that can be left out."""

    def detach(self) -> None:
        """Leave the model to others, full-parameter updates aside."""


class LoraTrainables:
    """A fresh adapter on a frozen base.

    Args:
        loaded: The model; its layers get wrapped.
        spec: Rank, alpha and which layers.
        seed: Of A's generator.
    """

    def __init__(self, loaded: LoadedModel, spec: LoraSpec, seed: int) -> None:
        self._loaded = loaded
        self._spec = spec
        self.adapter: Mapping[str, LoraPair] = attach_lora(loaded.model, spec, seed)
        slot = adapter_slot(loaded.model)
        assert slot is not None, "an adapter covers at least one layer"
        self._slot = slot
        self.masters = {}
        for name, pair in self.adapter.items():
            self.masters[name + LORA_A] = pair.a.requires_grad_()
            self.masters[name + LORA_B] = pair.b.requires_grad_()
        self.leaves = self.masters

    def head(self) -> Head:
        """The output layer with its pair, where it is adapted."""
        return Head(self._loaded)

    def head_gradients(self, grads: HeadGradients) -> dict[str, torch.Tensor]:
        """Gradients of the head's pair."""
        head = self._loaded.head
        if not isinstance(head, LoraLinear) or grads.lora_a is None or grads.lora_b is None:
            return {}
        return {head.name + LORA_A: grads.lora_a, head.name + LORA_B: grads.lora_b}

    def refresh(self) -> None:
        """Round A and scaling * B into the base's dtype again."""
        for pair in self.adapter.values():
            pair.refresh()

    def activate(self) -> None:
        """Put the adapter into the slot that the model's sessions share."""
        self._slot.active = self.adapter

    def fit(self, adapter: PeftAdapter, seed: int) -> dict[str, torch.Tensor]:
        """The masters with which this session computes what a stored adapter does.

        Args:
            adapter: What was stored.
            seed: Of the session: what the adapter leaves out is as it was at the start.

        Raises:
            FiretitanError: Naming what of the adapter does not fit.
        """
        names = list(self.adapter)
        fresh = init_adapter(self._loaded.model, names, self._spec.rank, self._spec.alpha, seed)
        fitted = fit_adapter(
            adapter,
            {name: (pair.a.cpu().numpy(), pair.b.cpu().numpy()) for name, pair in fresh.items()},
            self._spec.alpha / self._spec.rank,
        )
        masters = {}
        for name, (a, b) in fitted.items():
            masters[name + LORA_A], masters[name + LORA_B] = (
                torch.from_numpy(a),
                torch.from_numpy(b),
            )
        return masters

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Within it the model is the base model: no layer applies the adapter."""
        active, self._slot.active = self._slot.active, None
        try:
            yield
        finally:
            self._slot.active = active

    def detach(self) -> None:
        """Take the adapter out; the layers stay wrapped, other sessions may have theirs."""
        if self._slot.active is self.adapter:
            self._slot.active = None


class FullTrainables:
    """Every parameter; on a bfloat16 model the masters are copies, on a float32 one they are it.

    Args:
        loaded: The model, which no other session has; its parameters start to require gradients.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        unwrap_modules(loaded.model)
        self.leaves = dict(loaded.model.named_parameters())
        for parameter in self.leaves.values():
            parameter.requires_grad_()
        if all(parameter.dtype == torch.float32 for parameter in self.leaves.values()):
            self.masters = self.leaves
        else:
            self.masters = {
                name: parameter.detach().to(torch.float32, copy=True)
                for name, parameter in self.leaves.items()
            }
        head = loaded.head
        names = {id(parameter): name for name, parameter in self.leaves.items()}
        self._weight_name = names[id(head.weight)]
        bias = getattr(head, "bias", None)
        self._bias_name = None if bias is None else names[id(bias)]

    def head(self) -> Head:
        """The output layer, its weight trained."""
        return Head(self._loaded, train_weight=True)

    def head_gradients(self, grads: HeadGradients) -> dict[str, torch.Tensor]:
        """Gradients of weight and bias; a tied weight adds to the embedding's."""
        result = {}
        if grads.weight is not None:
            result[self._weight_name] = grads.weight
        if grads.bias is not None and self._bias_name is not None:
            result[self._bias_name] = grads.bias
        return result

    def refresh(self) -> None:
        """Round the masters into the model."""
        if self.masters is self.leaves:
            return
        with torch.no_grad():
            for name, parameter in self.leaves.items():
                parameter.copy_(self.masters[name])

    def activate(self) -> None:
        """The model is what is trained, and no other session has it."""

    def left_out(self) -> AbstractContextManager[None]:
        """There is nothing to leave out: the model is what is trained."""
        return nullcontext()

    def detach(self) -> None:
        """Freeze the parameters again."""
        for parameter in self.leaves.values():
            parameter.requires_grad_(False)


class NoTrainables:
    """A frozen model, as it was loaded: no masters, nothing beside its weights.

    Args:
        loaded: The model.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self.masters: dict[str, torch.Tensor] = {}
        self.leaves = self.masters

    def head(self) -> Head:
        """The output layer as loaded."""
        return Head(self._loaded)

    def head_gradients(self, grads: HeadGradients) -> dict[str, torch.Tensor]:
        """None."""
        return {}

    def refresh(self) -> None:
        """Nothing to renew."""

    def activate(self) -> None:
        """Take out what another session put into the model's slot."""
        slot = adapter_slot(self._loaded.model)
        if slot is not None:
            slot.active = None

    def left_out(self) -> AbstractContextManager[None]:
        """There is nothing to leave out."""
        return nullcontext()

    def detach(self) -> None:
        """Nothing to undo."""
