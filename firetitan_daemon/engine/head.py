"""The output layer and the loss in row chunks: logprobs, then gradients, never all logits at once.

Knows: the head's weight, bias and adapter, what follows its product. Must not know: which loss,
which optimizer, where hidden states come from.

Every position's logprob is computed; gradient work is done only for rows whose dL/dlogprob is not
zero. In one pass a chunk's logits serve both, so a loss that looks at one position at a time costs
two matrix products, as a loss that needs all logprobs first costs three.

Shapes: T rows, C rows of a chunk, K targets a row, H hidden, V vocabulary, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from firetitan_daemon.engine.lora import LoraPair, lora_linear
from firetitan_daemon.engine.models import HeadSpec, LoadedModel

CHUNK_ROWS = 256

RowGradient = Callable[[slice, torch.Tensor], torch.Tensor]
"""(rows, logprobs [C, K]) to dL/dlogprob [C, K], both float32."""


@dataclass
class HeadGradients:
    """What the head passes down and what it keeps; float32 where it is a parameter's."""

    hidden: torch.Tensor
    """dL/dhidden [T, H] in the model's dtype."""
    lora_a: torch.Tensor | None = None
    lora_b: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None


class Head:
    """The output layer of one model, as its adapter stands at the moment of creation.

    Args:
        loaded: The model.
        train_weight: Whether gradients of the weight and the bias are wanted.
    """

    def __init__(self, loaded: LoadedModel, *, train_weight: bool = False) -> None:
        weight, bias, pair = loaded.head_parts
        self._weight = weight.detach()
        self._bias = None if bias is None else bias.detach()
        self._pair: LoraPair | None = pair
        self._spec: HeadSpec = loaded.head_spec
        self._train_weight = train_weight

    @torch.no_grad()
    def logprobs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the targets.

        Args:
            hidden: [T, H].
            targets: int64 [T, K].

        Returns:
            float32 [T, K].
        """
        result = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            result[rows], _, _ = _softmax_(self._logits(hidden[rows]), targets[rows])
        return result

    @torch.no_grad()
    def top(self, hidden: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest tokens of each position, likeliest first.

        Args:
            hidden: [T, H].
            count: How many.

        Returns:
            Ids int64 and log-probabilities float32, both [T, count].
        """
        ids, logprobs = [], []
        for start in range(0, len(hidden), CHUNK_ROWS):
            scores = self._logits(hidden[start : start + CHUNK_ROWS]).log_softmax(1)
            values, tokens = scores.topk(count, 1)
            ids.append(tokens)
            logprobs.append(values)
        return torch.cat(ids), torch.cat(logprobs)

    @torch.no_grad()
    def gradients(
        self, hidden: torch.Tensor, targets: torch.Tensor, gradient: RowGradient
    ) -> tuple[torch.Tensor, HeadGradients]:
        """Logprobs, and the gradients that `gradient` of them leads to.

        Args:
            hidden: [T, H], detached.
            targets: int64 [T, K].
            gradient: Gives dL/dlogprob of a chunk; called once a chunk, in order.

        Returns:
            Logprobs float32 [T, K], and the gradients.
        """
        result = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        grads = HeadGradients(torch.zeros_like(hidden))
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits = self._logits(hidden[rows])
            slope = self._slope(logits)
            result[rows], exponentials, total = _softmax_(logits, targets[rows])
            grad_CK = gradient(rows, result[rows])
            active = (grad_CK != 0).any(1)
            index = active.nonzero()[:, 0]
            if len(index) == 0:
                continue
            if len(index) < len(active):
                exponentials, total = exponentials[index], total[index]
                grad_CK = grad_CK[index]
                slope = None if slope is None else slope[index]
            index += start
            self._chunk_gradients(
                hidden, index, exponentials, total, grad_CK, targets[index], slope, grads
            )
        return result, grads

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final logits float32 [C, V], a tensor of its own."""
        logits = lora_linear(hidden, self._weight, self._bias, self._pair)
        return self._spec.apply_(logits.float())

    def _slope(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Derivative of the logits by factor * product; None where it is 1."""
        if self._spec.softcap is None:
            return None
        return 1 - (logits / self._spec.softcap).square_()

    def _chunk_gradients(
        self,
        hidden: torch.Tensor,
        index: torch.Tensor,
        exponentials: torch.Tensor,
        total: torch.Tensor,
        grad_CK: torch.Tensor,
        targets_CK: torch.Tensor,
        slope: torch.Tensor | None,
        grads: HeadGradients,
    ) -> None:
        """Add one chunk's gradients; writes over `exponentials`.

        d logprob_k / d logits = onehot(target_k) - softmax.
        """
        grad_logits = exponentials.mul_(-grad_CK.sum(1, keepdim=True) / total)
        grad_logits.scatter_add_(1, targets_CK, grad_CK)
        if slope is not None:
            grad_logits.mul_(slope)
        if self._spec.factor != 1.0:
            grad_logits.mul_(self._spec.factor)
        grad = grad_logits.to(self._weight.dtype)
        rows = hidden[index]
        pair = self._pair
        if pair is None:
            grads.hidden[index] = grad @ self._weight
        else:
            low = rows @ pair.compute_a.T
            grad_low = grad @ pair.compute_b
            grad_hidden = grad_low @ pair.compute_a
            grads.hidden[index] = grad_hidden.addmm_(grad, self._weight)
            of_a = (grad_low.T @ rows).float()
            of_b = (grad.T @ low).float().mul_(pair.scaling)
            grads.lora_a = of_a if grads.lora_a is None else grads.lora_a.add_(of_a)
            grads.lora_b = of_b if grads.lora_b is None else grads.lora_b.add_(of_b)
        if self._train_weight:
            of_weight = (grad.T @ rows).float()
            grads.weight = of_weight if grads.weight is None else grads.weight.add_(of_weight)
            if self._bias is not None:
                of_bias = grad_logits.sum(0)
                grads.bias = of_bias if grads.bias is None else grads.bias.add_(of_bias)


def _softmax_(
    logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logprobs of the targets [C, K], exp(logits - max) [C, V] in place, its row sums [C, 1]."""
    top = logits.amax(1, keepdim=True)
    exponentials = logits.sub_(top)
    chosen = exponentials.gather(1, targets)
    exponentials.exp_()
    total = exponentials.sum(1, keepdim=True)
    return chosen - total.log(), exponentials, total
