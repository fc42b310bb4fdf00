"""The chunked head against all logits at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from firetitan_daemon.engine import head as head_module
from firetitan_daemon.engine.head import Head
from firetitan_daemon.engine.lora import LoraPair
from firetitan_daemon.engine.models import HeadSpec

ROWS, WIDTH, VOCAB, RANK = 23, 12, 50, 3


def make(spec: HeadSpec, lora: bool, bias: bool) -> tuple[Any, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    pair = None
    if lora:
        a, b = torch.randn(RANK, WIDTH), torch.randn(VOCAB, RANK) * 0.1
        pair = LoraPair(a.requires_grad_(), b.requires_grad_(), 2.0, torch.float32)
    weight = torch.randn(VOCAB, WIDTH).requires_grad_()
    loaded = SimpleNamespace(
        head_parts=(weight, torch.randn(VOCAB).requires_grad_() if bias else None, pair),
        head_spec=spec,
    )
    return loaded, torch.randn(ROWS, WIDTH).requires_grad_(), torch.randint(0, VOCAB, (ROWS, 2))


def plain(loaded: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    weight, bias, pair = loaded.head_parts
    logits = hidden @ weight.T + (0 if bias is None else bias)
    if pair is not None:
        logits = logits + 2.0 * (hidden @ pair.a.T) @ pair.b.T
    logits = logits * loaded.head_spec.factor
    if loaded.head_spec.softcap is not None:
        logits = loaded.head_spec.softcap * torch.tanh(logits / loaded.head_spec.softcap)
    return torch.log_softmax(logits, 1).gather(1, targets)


@pytest.mark.parametrize("spec", [HeadSpec(), HeadSpec(0.25), HeadSpec(1.5, 4.0)])
@pytest.mark.parametrize(("lora", "bias"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("chunk", [5, 256])
def test_logprobs_and_gradients(
    monkeypatch: pytest.MonkeyPatch, spec: HeadSpec, lora: bool, bias: bool, chunk: int
) -> None:
    monkeypatch.setattr(head_module, "CHUNK_ROWS", chunk)
    loaded, hidden, targets = make(spec, lora, bias)
    slopes = torch.randn(ROWS, 2)
    slopes[3:9] = 0
    slopes[12, 0] = 0
    head = Head(loaded, train_weight=True)
    found, grads = head.gradients(hidden.detach(), targets, lambda rows, _: slopes[rows])
    wanted = plain(loaded, hidden, targets)
    torch.testing.assert_close(found, wanted.detach(), atol=1e-5, rtol=1e-5)
    assert torch.equal(head.logprobs(hidden.detach(), targets), found)
    weight, bias_, pair = loaded.head_parts
    leaves = {"hidden": hidden, "weight": weight, "bias": bias_}
    if pair is not None:
        leaves |= {"lora_a": pair.a, "lora_b": pair.b}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    expected = torch.autograd.grad((wanted * slopes).sum(), list(leaves.values()))
    for name, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(getattr(grads, name), gradient, atol=1e-4, rtol=1e-4)


def test_rows_without_gradient_cost_nothing_and_get_zero() -> None:
    loaded, hidden, targets = make(HeadSpec(), True, False)
    _, grads = Head(loaded).gradients(
        hidden.detach(), targets, lambda rows, logprobs: torch.zeros_like(logprobs)
    )
    assert grads.hidden.abs().max() == 0
    assert grads.lora_a is None and grads.lora_b is None


def test_the_gradient_function_sees_every_logprob_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CHUNK_ROWS", 7)
    loaded, hidden, targets = make(HeadSpec(), False, False)
    seen = []

    def gradient(rows: slice, logprobs: torch.Tensor) -> torch.Tensor:
        seen.append(logprobs.clone())
        return torch.ones_like(logprobs)

    found, _ = Head(loaded).gradients(hidden.detach(), targets, gradient)
    assert torch.equal(torch.cat(seen), found)
