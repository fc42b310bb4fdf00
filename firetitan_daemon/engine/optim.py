"""AdamW on float32 masters: normalise, clip, decay, step; all or nothing.

Knows: tensors by name, Adam's arithmetic. Must not know: models, which parameters they are.

Source: Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization, algorithm 2, with the
order of operations of torch.optim.AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import AdamParams

_CLIP_EPSILON = 1e-6
_LARGEST = torch.finfo(torch.float32).max


class AdamW:
    """Moments and the step count of one session.

    Args:
        masters: The float32 parameters by name, written in place by `step`.
    """

    def __init__(self, masters: Mapping[str, torch.Tensor]) -> None:
        self._masters = masters
        self.step_count = 0
        self.first: dict[str, torch.Tensor] = {}
        self.second: dict[str, torch.Tensor] = {}

    def reset(self) -> None:
        """Forget moments and steps."""
        self.step_count = 0
        self.first, self.second = {}, {}

    def restore(
        self,
        step_count: int,
        first: dict[str, torch.Tensor],
        second: dict[str, torch.Tensor],
    ) -> None:
        """Continue from saved moments; empty ones are zero."""
        self.step_count, self.first, self.second = step_count, first, second

    @torch.no_grad()
    def prepare(self) -> None:
        """Allocate what an update needs, so that the update itself cannot run out of memory."""
        if not self.first:
            self.first = {name: torch.zeros_like(t) for name, t in self._masters.items()}
            self.second = {name: torch.zeros_like(t) for name, t in self._masters.items()}

    @torch.no_grad()
    def norm(self, gradients: Mapping[str, torch.Tensor], denominator: float) -> float:
        """Global L2 norm of the sums divided by `denominator`.

        Raises:
            FiretitanError: NON_FINITE naming a parameter.
        """
        norms = tensor_norms(gradients)
        total = math.sqrt(sum(value**2 for value in norms.values())) / denominator
        if math.isfinite(total):
            return total
        bad = [name for name, value in norms.items() if value - value != 0]
        raise FiretitanError(
            Reason.NON_FINITE,
            f"the accumulated gradient of {bad[0] if bad else 'the model'} is not finite; nothing "
            "was changed, load a checkpoint to drop the gradients",
            field="gradients",
        )

    @torch.no_grad()
    def update(
        self,
        gradients: Mapping[str, torch.Tensor],
        params: AdamParams,
        norm: float,
        denominator: float,
    ) -> None:
        """Write every master, after `prepare`.

        Args:
            gradients: float32 sums by name, one for every master, contiguous as the masters are;
                written over.
            params: Checked by `check_params`.
            norm: From `norm`.
            denominator: The sums are divided by it, then clipped to `grad_clip_norm`.
        """
        factor = 1.0 / denominator
        if params.grad_clip_norm > 0:
            factor *= min(1.0, params.grad_clip_norm / (norm + _CLIP_EPSILON))
        names = list(self._masters)
        scaled = [gradients[name] for name in names]
        if factor != 1.0:
            torch._foreach_mul_(scaled, factor)
        self.step_count += 1
        count = torch.tensor(float(self.step_count), device=scaled[0].device)
        torch._fused_adamw_(
            [self._masters[name] for name in names],
            scaled,
            [self.first[name] for name in names],
            [self.second[name] for name in names],
            [],
            [count] * len(names),
            lr=params.learning_rate,
            beta1=params.beta1,
            beta2=params.beta2,
            weight_decay=params.weight_decay,
            eps=params.eps,
            amsgrad=False,
            maximize=False,
        )


@torch.no_grad()
def tensor_norms(gradients: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """L2 norm of each gradient."""
    norms = torch._foreach_norm(list(gradients.values()))
    return {name: float(norm) for name, norm in zip(gradients, norms, strict=True)}


def check_params(params: AdamParams) -> None:
    """Refuse what no update can be computed with.

    Raises:
        FiretitanError: INVALID_ARGUMENT or NON_FINITE naming the field and its range.
    """
    ranges = {
        "learning_rate": (params.learning_rate >= 0, "0 or more"),
        "beta1": (0 <= params.beta1 < 1, "from 0 up to, not including, 1"),
        "beta2": (0 <= params.beta2 < 1, "from 0 up to, not including, 1"),
        "eps": (params.eps > 0, "above 0"),
        "weight_decay": (params.weight_decay >= 0, "0 or more"),
        "grad_clip_norm": (params.grad_clip_norm >= 0, "0 (off) or more"),
    }
    for name, (good, wanted) in ranges.items():
        value = getattr(params, name)
        if not abs(value) <= _LARGEST:
            raise FiretitanError(
                Reason.NON_FINITE,
                f"adam_params.{name} is {value}; give a finite number of float32",
                field=f"adam_params.{name}",
            )
        if not good:
            raise FiretitanError(
                Reason.INVALID_ARGUMENT,
                f"adam_params.{name} is {value}; {wanted}",
                field=f"adam_params.{name}",
            )
