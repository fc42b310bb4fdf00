"""How many rows a matrix product needs so that no row depends on the others.

Knows: linear layers, their shapes and the libraries' habits. Must not know: models' architectures,
requests, caches.

BLAS libraries pick a kernel by the number of rows, or of rows a thread, and kernels sum in another
order. A product padded to a multiple of the right number of rows always meets the same kernel. The
number differs between libraries, dtypes, shapes and thread counts, so it is measured.

The measurement multiplies rows and weights whose exact product is zero: what comes out is rounding
error alone, and a change in the order of sums changes it, where in ordinary numbers rounding to
bfloat16 would hide it nearly always, and not always.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from firetitan_daemon.engine.lora import Adapter, LoraPair, lora_linear

_QUANTA = (4, 8, 16, 32)
_LARGE = 1 << 22
"""Weights from this size on are tried with a few numbers of rows only."""


@dataclass(frozen=True)
class LinearShape:
    """What decides which kernels a linear layer meets."""

    inputs: int
    outputs: int
    bias: bool
    rank: int
    """Of the adapter on it; 0 without one."""
    conv1d: bool = False
    """The weight is stored [inputs, outputs], as GPT-2's is."""


def linear_shapes(model: torch.nn.Module, adapter: Adapter | None) -> set[LinearShape]:
    """The shapes of a model's linear layers, with and without an adapter's products."""
    shapes = set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
            continue
        if isinstance(module, torch.nn.Embedding):
            continue
        outputs, inputs = weight.shape
        conv1d = type(module).__name__ == "Conv1D"
        if conv1d:
            inputs, outputs = outputs, inputs
        pair = (adapter or {}).get(name)
        rank = 0 if pair is None else pair.a.shape[0]
        has_bias = getattr(module, "bias", None) is not None
        shapes.add(LinearShape(inputs, outputs, has_bias, rank, conv1d))
    return shapes


class RowQuantum:
    """The multiple that rows are padded to.

    Args:
        dtype: Of the weights.
        device: Where they are.
        max_rows: Rows a step has at most; the last resort is that every step has as many.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, max_rows: int) -> None:
        self._dtype = dtype
        self._device = device
        self._max_rows = max_rows
        self._candidates = [*(each for each in _QUANTA if each < max_rows), max_rows]
        self._measured: set[LinearShape] = set()

    @property
    def value(self) -> int | None:
        """The quantum that holds for every shape measured; None where none does."""
        return self._candidates[0] if self._candidates else None

    def measure(self, shapes: Iterable[LinearShape]) -> None:
        """Raise the quantum until it holds for these shapes too; known ones cost nothing."""
        for shape in sorted(set(shapes) - self._measured, key=repr):
            while self._candidates and not self._holds(shape, self._candidates[0]):
                self._candidates.pop(0)
            self._measured.add(shape)

    def _holds(self, shape: LinearShape, quantum: int) -> bool:
        most = self._max_rows + -self._max_rows % quantum
        totals = list(range(quantum, most + 1, quantum))
        if shape.inputs * shape.outputs > _LARGE:
            totals = sorted({*totals[:3], totals[len(totals) // 2], most})
        generator = torch.Generator().manual_seed(shape.inputs)
        layer = _NoiseLayer(shape, self._dtype, self._device, generator)
        rows = layer.rows(most, generator)
        expected = layer(rows)
        for total in totals:
            chosen = torch.randperm(most, generator=generator)[:total].to(self._device)
            if not torch.equal(layer(rows[chosen]), expected[chosen]):
                return False
        return True


class _NoiseLayer:
    """A linear layer whose exact outputs are zero for the rows it makes."""

    def __init__(
        self,
        shape: LinearShape,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        self._half = shape.inputs // 2
        self._inputs = shape.inputs
        self._order = torch.randperm(2 * self._half, generator=generator)
        self._dtype = dtype
        self._device = device
        self._weight = self._twice(shape.outputs, 1.0, generator)
        self._conv1d = shape.conv1d
        if shape.conv1d:
            self._weight = self._weight.T.contiguous()
        self._bias = None
        if shape.bias:
            self._bias = torch.zeros(shape.outputs, dtype=dtype, device=device)
        self._pair = None
        if shape.rank:
            a = self._twice(shape.rank, 1.0, generator).float()
            b = torch.randn(shape.outputs, shape.rank, generator=generator).to(device)
            self._pair = LoraPair(a, b, 1.0, dtype)

    def rows(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Inputs whose second half takes back what the first half gives, shuffled."""
        return self._twice(count, -1.0, generator)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        if self._conv1d:
            assert self._bias is not None, "Conv1D has a bias"
            return torch.addmm(self._bias, rows, self._weight)
        return lora_linear(rows, self._weight, self._bias, self._pair)

    def _twice(self, count: int, sign: float, generator: torch.Generator) -> torch.Tensor:
        half = torch.randn(count, self._half, generator=generator)
        full = torch.zeros(count, self._inputs)
        full[:, : 2 * self._half] = torch.cat((half, sign * half), 1)[:, self._order]
        return full.to(self._device, self._dtype)
