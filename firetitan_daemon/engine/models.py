"""Load a causal language model once, for the trainer and for the sampler.

Knows: transformers, devices, the packed attention. Must not know: losses, LoRA, sampling.

Safetensors only, never code from the model's folder. At load two short sequences go through the
model's own attention and through the packed one; a model on which they disagree takes the padded
path: slower, and right.

Shapes: B sequences, T tokens in all, L tokens of the longest, H hidden size, V vocabulary.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import ModelInfo, ModelSpec
from firetitan_daemon.engine.attention import Segments, segments
from firetitan_daemon.engine.lengths import active_window, context_length
from firetitan_daemon.engine.lora import (
    FUSED_EXPERTS,
    LoraLinear,
    LoraPair,
    has_fused_experts,
    lora_linear,
)
from firetitan_daemon.engine.pretrained import load_config, load_tokenizer, load_weights
from firetitan_daemon.engine.probe import probe
from firetitan_daemon.engine.resolve import resolve_model
from firetitan_daemon.engine.routing import OWN_CHOICE, Routers

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class HeadSpec:
    """What follows the last matrix product: logits = softcap * tanh(z * factor / softcap)."""

    factor: float = 1.0
    softcap: float | None = None

    def apply_(self, logits: torch.Tensor) -> torch.Tensor:
        """The final logits, in place."""
        if self.factor != 1.0:
            logits.mul_(self.factor)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


class LoadedModel:
    """A model ready to run: hidden states of packed sequences, and the head's logits.

    Attributes:
        model: The transformers model, in eval mode, every parameter frozen.
        info: What was loaded.
        device: Where it is.
        dtype: Of its weights.
        head_spec: What follows the head's matrix product.
        routers: Of a mixture of experts; empty for a dense model.
    """

    def __init__(self, model: Any, info: ModelInfo, head_spec: HeadSpec) -> None:
        self.model = model
        self.info = info
        self.head_spec = head_spec
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.dtype: torch.dtype = model.get_input_embeddings().weight.dtype
        self.routers = Routers(model, model.config.get_text_config().hidden_size)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer stored with the weights; None where there is none."""
        return load_tokenizer(Path(self.info.path))

    @property
    def head(self) -> nn.Module:
        """The output layer: `weight` [V, H], `bias` or None; a `LoraLinear` where it is adapted."""
        module: nn.Module = self.model.get_output_embeddings()
        return module

    @property
    def head_parts(self) -> tuple[torch.Tensor, torch.Tensor | None, LoraPair | None]:
        """Weight [V, H], bias [V] or None, and the current adapter's pair or None of the head."""
        head = self.head
        bias: torch.Tensor | None = getattr(head, "bias", None)
        pair = head.pair if isinstance(head, LoraLinear) else None
        return head.weight, bias, pair

    def hidden_states(
        self,
        sequences: Sequence[torch.Tensor],
        experts: Sequence[torch.Tensor | None] | None = None,
    ) -> torch.Tensor:
        """Last hidden states of whole sequences, one after the other.

        Args:
            sequences: Token ids, int64 [length] each, none empty, on any device.
            experts: Per sequence the experts to force, int64 [length, layers, experts a token]
                (see `Routers.forcing`), or None.

        Returns:
            [T, H] in the model's dtype; differentiable where parameters are.
        """
        run = self._packed if self.info.packed else self._padded
        forced = None
        if experts is not None and any(each is not None for each in experts):
            width = None if self.info.packed else max(len(tokens) for tokens in sequences)
            forced = self._forced(sequences, experts, width)
        with self.routers.forcing(forced):
            return run(sequences)

    def _forced(
        self,
        sequences: Sequence[torch.Tensor],
        experts: Sequence[torch.Tensor | None],
        width: int | None,
    ) -> torch.Tensor:
        """The experts of all tokens in the order they reach the routers; `width` pads each."""
        shape = self.routers.shape
        assert shape is not None, "experts are forced in a model that has routers"
        rows = []
        for tokens, own in zip(sequences, experts, strict=True):
            row = torch.full(
                (width or len(tokens), shape.layers, shape.experts_per_token), OWN_CHOICE
            )
            if own is not None:
                row[: len(tokens)] = own
            rows.append(row)
        return torch.cat(rows).to(self.device)

    def run_packed(
        self, tokens: torch.Tensor, positions: torch.Tensor, layout: Segments
    ) -> torch.Tensor:
        """One packed row under a layout with or without caches (packed models only).

        Args:
            tokens: int64 [T], padding behind the layout's parts included.
            positions: int64 [T], of each token in its own sequence.
            layout: How the row splits.

        Returns:
            Last hidden states [T, H].
        """
        with segments(layout):
            hidden: torch.Tensor = self.model.base_model(
                input_ids=tokens[None], position_ids=positions[None], use_cache=False
            ).last_hidden_state
        return hidden[0].to(self.dtype)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final logits [N, V] float32 of hidden states [N, H]; for a bounded number of rows."""
        return self.head_spec.apply_(lora_linear(hidden, *self.head_parts).float())

    def _packed(self, sequences: Sequence[torch.Tensor]) -> torch.Tensor:
        tokens = torch.cat(tuple(sequences)).to(self.device)
        positions = torch.cat([torch.arange(len(tokens_)) for tokens_ in sequences])
        lengths = tuple(len(tokens_) for tokens_ in sequences)
        return self.run_packed(tokens, positions.to(self.device), Segments(lengths))

    def _padded(self, sequences: Sequence[torch.Tensor]) -> torch.Tensor:
        longest = max(len(tokens) for tokens in sequences)
        batch = torch.zeros(len(sequences), longest, dtype=torch.long)
        mask = torch.zeros(len(sequences), longest, dtype=torch.long)
        for row, tokens in enumerate(sequences):
            batch[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        mask = mask.to(self.device)
        hidden: torch.Tensor = self.model.base_model(
            input_ids=batch.to(self.device), attention_mask=mask, use_cache=False
        ).last_hidden_state
        return hidden[mask.bool()].to(self.dtype)


def load_model(spec: ModelSpec) -> LoadedModel:
    """Load weights and find out how to run them.

    Raises:
        FiretitanError: MODEL_NOT_FOUND, UNSUPPORTED (architecture, head or context length this
            engine cannot run), INVALID_ARGUMENT (dtype, device, context length), each naming the
            value.
    """
    device = _device(spec.device)
    resolved = resolve_model(spec.base_model)
    text_config = load_config(resolved.path, spec.base_model).get_text_config()
    context = context_length(text_config, spec.max_context_length, spec.base_model)
    model = _load_weights(resolved.path, spec, device)
    embeddings = model.get_input_embeddings().weight
    head_spec = _head_spec(text_config)
    loaded = LoadedModel(
        model,
        ModelInfo(
            path=str(resolved.path),
            source=resolved.source,
            fingerprint=resolved.fingerprint,
            architecture=type(model).__name__,
            dtype=str(embeddings.dtype).removeprefix("torch."),
            device=str(embeddings.device),
            vocab_size=embeddings.shape[0],
            max_context_length=context,
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            packed=False,
            num_threads=torch.get_num_threads(),
            notes=(FUSED_EXPERTS,) if has_fused_experts(model) else (),
            versions={
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
                "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            },
            revision=resolved.revision or "",
        ),
        head_spec,
    )
    loaded.info = replace(loaded.info, routing=loaded.routers.shape)
    probe(loaded, _foreign_layers(text_config), active_window(text_config, context))
    return loaded


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise FiretitanError(
            Reason.INVALID_ARGUMENT, f"device is {name!r}; auto, cpu or cuda", field="device"
        )
    if name == "cuda" and not torch.cuda.is_available():
        raise FiretitanError(
            Reason.OUT_OF_DEVICES, "device is 'cuda', but torch sees no GPU here", field="device"
        )
    return torch.device(name)


def _load_weights(path: Path, spec: ModelSpec, device: torch.device) -> Any:
    if spec.dtype != "auto" and spec.dtype not in _DTYPES:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"dtype is {spec.dtype!r}; auto, float32 or bfloat16",
            field="dtype",
        )
    model = load_weights(path, spec.base_model, _DTYPES.get(spec.dtype, "auto"))
    if model.get_input_embeddings().weight.dtype == torch.float16:
        model = model.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    return model.to(device).eval().requires_grad_(False)


def _head_spec(config: Any) -> HeadSpec:
    """Read the head's extras from the configuration; the probe checks that this is all of them."""
    factor = float(getattr(config, "logit_scale", None) or 1.0)
    factor /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return HeadSpec(factor, None if softcap is None else float(softcap))


def _foreign_layers(config: Any) -> str | None:
    """What in the configuration rules packed attention out, in words."""
    if getattr(config, "attention_chunk_size", None) is not None:
        return "it attends in chunks"
    kinds = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    return f"it has {', '.join(sorted(kinds))} layers" if kinds else None
