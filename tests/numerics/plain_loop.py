"""The same training written plainly: padded batch, all logits, PEFT or the bare model, torch AdamW.

Independent of the engine: shares with it the saved model and the adapter's first values only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from firetitan_daemon.engine.api import AdamParams, Datum

ReferenceLoss = Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]
"""(logprobs [N] or [N, K] of one datum, its inputs) to its summed loss."""


def cross_entropy(logprobs: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return -(inputs["weights"] * logprobs).sum()


def importance_sampling(logprobs: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return -(torch.exp(logprobs - inputs["logprobs"]) * inputs["advantages"]).sum()


def ppo(
    logprobs: torch.Tensor, inputs: dict[str, torch.Tensor], low: float = 0.8, high: float = 1.2
) -> torch.Tensor:
    ratio = torch.exp(logprobs - inputs["logprobs"])
    advantages = inputs["advantages"]
    return -torch.min(ratio * advantages, ratio.clamp(low, high) * advantages).sum()


def ppo_per_token(logprobs: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    ratio = torch.exp(logprobs - inputs["logprobs"])
    low, high = inputs["clip_low_threshold"], inputs["clip_high_threshold"]
    advantages = inputs["advantages"]
    return -torch.min(ratio * advantages, torch.clamp(ratio, low, high) * advantages).sum()


def cispo(logprobs: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    weights = torch.exp(logprobs - inputs["logprobs"]).clamp(0.0, 4.0).detach()
    return -(weights * logprobs * inputs["advantages"]).sum()


def dro(logprobs: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    advantages = inputs["advantages"]
    pull = 0.5 * 0.05 * (logprobs - inputs["logprobs"]) ** 2
    return -(logprobs * advantages - pull * (advantages != 0)).sum()


def dapo(logprobs: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """With eps_clip_c=3 and ratio_log_cap=20."""
    ratio = torch.exp((logprobs - inputs["logprobs"]).clamp(-20, 20))
    advantages = inputs["advantages"]
    loss = torch.max(-ratio * advantages, -ratio.clamp(0.8, 1.28) * advantages)
    return torch.where(advantages < 0, torch.min(loss, -3.0 * advantages), loss).sum()


def gspo(logprobs: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """With thresholds 0.9 and 1.1, so that some sequences are clipped and some are not."""
    advantages = inputs["advantages"]
    mask = (advantages != 0).float()
    mean = ((logprobs - inputs["logprobs"]) * mask).sum() / mask.sum().clamp_min(1)
    ratio = torch.exp(mean.detach() + logprobs - logprobs.detach())
    return -torch.min(ratio * advantages, ratio.clamp(0.9, 1.1) * advantages).sum()


class Reference:
    """A plain training loop on one saved model.

    Args:
        folder: The model's.
        adapter: A PEFT folder to start the adapter from; None trains every parameter.
        dtype: To load the model in; the adapter stays float32.
    """

    def __init__(
        self, folder: Path, adapter: Path | None, dtype: torch.dtype = torch.float32
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        )
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
        self.model = model.eval()
        self.parameters = {
            name.removeprefix("base_model.model.").replace(".default.", "."): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        self.start = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer: torch.optim.AdamW | None = None

    def logprobs(self, data: Sequence[Datum]) -> list[torch.Tensor]:
        """Logprobs of the targets, differentiable, one tensor a datum."""
        longest = max(len(datum.token_ids) for datum in data)
        tokens = torch.zeros(len(data), longest, dtype=torch.long)
        mask = torch.zeros(len(data), longest, dtype=torch.long)
        for row, datum in enumerate(data):
            tokens[row, : len(datum.token_ids)] = torch.from_numpy(datum.token_ids.astype(np.int64))
            mask[row, : len(datum.token_ids)] = 1
        logits = self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        result = []
        for row, datum in enumerate(data):
            targets = torch.from_numpy(np.asarray(datum.loss_inputs["target_tokens"]))
            every = torch.log_softmax(logits[row, : len(datum.token_ids)].float(), -1)
            columns = targets[:, None] if targets.ndim == 1 else targets
            result.append(every.gather(1, columns).reshape(targets.shape))
        return result

    def backward(self, data: Sequence[Datum], loss: ReferenceLoss) -> float:
        """Accumulate gradients; returns the summed loss."""
        total = torch.zeros(())
        for logprobs, datum in zip(self.logprobs(data), data, strict=True):
            inputs = {k: torch.from_numpy(np.asarray(v)) for k, v in datum.loss_inputs.items()}
            total = total + loss(logprobs, inputs)
        total.backward()
        return float(total.detach())

    def gradients(self) -> dict[str, torch.Tensor]:
        """What has accumulated."""
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in self.parameters.items()
        }

    def step(self, params: AdamParams, denominator: float = 1.0) -> float:
        """Divide, clip, AdamW, zero; returns the norm before clipping."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.parameters.values(), foreach=False)
        self.optimizer.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad /= denominator
        limit = params.grad_clip_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def updates(self) -> dict[str, torch.Tensor]:
        """How far each parameter has moved."""
        return {name: p.detach() - self.start[name] for name, p in self.parameters.items()}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|; 0 where both are zero."""
    size = float(expected.norm())
    return float((found - expected).norm()) / size if size else float(found.norm())
