"""The measured row quantum: products padded to its multiples give every row the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from firetitan_daemon.engine.routing import routes_tokens
from firetitan_daemon.engine.rows import LinearShape, RowQuantum, linear_shapes

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs, outputs", [(32, 16), (48, 272), (576, 192)])
def test_rows_keep_their_bits(dtype: torch.dtype, inputs: int, outputs: int) -> None:
    quantum = RowQuantum(dtype, CPU, 64)
    quantum.measure([LinearShape(inputs, outputs, False, 0)])
    assert quantum.value is not None
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    rows = torch.randn(64, inputs, generator=generator).to(dtype)
    whole = nn.functional.linear(rows, weight)
    for total in range(quantum.value, 65, quantum.value):
        assert torch.equal(nn.functional.linear(rows[:total], weight), whole[:total])
        assert torch.equal(nn.functional.linear(rows[-total:], weight), whole[-total:])


def test_a_kernel_that_changes_with_the_rows_raises_the_quantum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fickle(x, weight, bias, pair):
        chunk = 3 if len(x) < 24 else 7
        parts = zip(x.split(chunk, 1), weight.split(chunk, 1), strict=True)
        return sum(left @ right.T for left, right in parts)

    monkeypatch.setattr("firetitan_daemon.engine.rows.lora_linear", fickle)
    quantum = RowQuantum(torch.float32, CPU, 64)
    quantum.measure([LinearShape(40, 20, False, 0)])
    assert quantum.value == 32


def test_no_quantum_where_rows_always_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "firetitan_daemon.engine.rows.lora_linear", lambda x, *_: x + x.mean(0, keepdim=True)
    )
    quantum = RowQuantum(torch.float32, CPU, 16)
    quantum.measure([LinearShape(8, 8, False, 0)])
    assert quantum.value is None


def test_shapes_of_a_model_with_and_without_an_adapter() -> None:
    model = nn.Sequential(
        nn.Embedding(9, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6, False)
    )
    assert linear_shapes(model, None) == {LinearShape(4, 6, True, 0), LinearShape(6, 6, False, 0)}


def test_experts_are_seen() -> None:
    dense = nn.ModuleDict({"mlp": nn.Linear(2, 2)})
    routed = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])})})
    assert not routes_tokens(dense)
    assert routes_tokens(routed)
