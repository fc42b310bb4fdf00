"""LoRA layers: arithmetic, selection, determinism, and small deltas on a bfloat16 base."""

from __future__ import annotations

import math

import pytest
import torch
from support.models import save_tiny
from torch import nn
from transformers import AutoModelForCausalLM

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import LoraSpec
from firetitan_daemon.engine.lora import (
    LoraLinear,
    LoraPair,
    attach_lora,
    init_adapter,
    lora_linear,
    select_modules,
    unwrap_modules,
    wrap_modules,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("lora")
    return {name: str(save_tiny(root / name, name)) for name in ("llama", "gpt_neox")}


def load(path: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(path).requires_grad_(False)


def pair_of(dtype: torch.dtype, b_size: float, bias: bool = True) -> tuple[LoraPair, list]:
    torch.manual_seed(1)
    a, b = torch.randn(4, 64) / 8, torch.randn(96, 4) * b_size
    pair = LoraPair(a.requires_grad_(), b.requires_grad_(), 2.0, dtype)
    weight = (torch.randn(96, 64) / 8).to(dtype)
    return pair, [weight, torch.randn(96).to(dtype) if bias else None]


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_the_formula(bias: bool) -> None:
    pair, (weight, shift) = pair_of(torch.float32, 0.3, bias)
    x = torch.randn(2, 5, 64, requires_grad=True)
    found = lora_linear(x, weight, shift, pair)
    plain = nn.functional.linear(x, weight, shift) + 2.0 * (x @ pair.a.T) @ pair.b.T
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    probe = torch.randn_like(plain)
    leaves = [x, pair.a, pair.b]
    mine = torch.autograd.grad((found * probe).sum(), leaves)
    theirs = torch.autograd.grad((plain * probe).sum(), leaves)
    for left, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


def test_a_small_delta_survives_on_a_bfloat16_base() -> None:
    pair, (weight, _) = pair_of(torch.bfloat16, 1e-4, bias=False)
    x = torch.randn(4096, 64).bfloat16()
    delta = (2.0 * (x.float() @ pair.a.T) @ pair.b.T).detach()
    base = nn.functional.linear(x, weight)

    def share(output: torch.Tensor) -> float:
        moved = output.detach().float() - base.float()
        return float((moved * delta).sum() / (delta * delta).sum())

    assert share(lora_linear(x, weight, None, pair)) == pytest.approx(1.0, abs=0.1)
    added_last = base + (2.0 * (x @ pair.a.T.bfloat16()) @ pair.b.T.bfloat16())
    assert share(added_last) < 0.6


def test_equal_seeds_give_equal_adapters(models: dict[str, str]) -> None:
    model = load(models["llama"])
    names = select_modules(model, LoraSpec(4))
    first, again, other = (init_adapter(model, names, 4, 8.0, seed) for seed in (5, 5, 6))
    for name in names:
        assert torch.equal(first[name].a, again[name].a)
        assert not torch.equal(first[name].a, other[name].a)
        assert first[name].b.abs().max() == 0
        bound = 1 / math.sqrt(first[name].a.shape[1])
        assert 0.5 * bound < first[name].a.abs().max() <= bound
        assert first[name].scaling == 2.0


def test_selection_follows_the_flags(models: dict[str, str]) -> None:
    cases = {
        "llama": (
            {"q_proj", "k_proj", "v_proj", "o_proj"},
            {"gate_proj", "up_proj", "down_proj"},
            {"lm_head"},
        ),
        "gpt_neox": (
            {"query_key_value", "dense"},
            {"dense_h_to_4h", "dense_4h_to_h"},
            {"lm_head"},
        ),
    }
    for name, kinds in cases.items():
        model = load(models[name])
        for index, expected in enumerate(kinds):
            flags = [place == index for place in range(3)]
            spec = LoraSpec(2, 4.0, *flags)
            found = {module.rsplit(".", 1)[-1] for module in select_modules(model, spec)}
            assert found == expected, (name, flags)


def test_nothing_to_train_is_refused(models: dict[str, str]) -> None:
    model = load(models["llama"])
    with pytest.raises(FiretitanError) as caught:
        select_modules(model, LoraSpec(2, 4.0, False, False, False))
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    for rank, alpha in ((0, 1.0), (2, 0.0), (2, float("nan"))):
        with pytest.raises(FiretitanError) as caught:
            init_adapter(model, ["lm_head"], rank, alpha, 0)
        assert caught.value.reason is Reason.INVALID_ARGUMENT


def test_conv1d_is_refused() -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(FiretitanError, match="Conv1D") as caught:
        select_modules(model, LoraSpec(2))
    assert caught.value.reason is Reason.UNSUPPORTED


def test_the_slot_switches_adapters_and_unwrap_restores(models: dict[str, str]) -> None:
    model = load(models["llama"])
    tokens = torch.arange(9)[None]
    plain = model(tokens).logits
    adapter = attach_lora(model, LoraSpec(4), seed=0)
    slot = next(module for module in model.modules() if isinstance(module, LoraLinear)).slot
    torch.testing.assert_close(model(tokens).logits, plain, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for pair in adapter.values():
            pair.b.normal_()
            pair.refresh()
    changed = model(tokens).logits
    assert (changed - plain).abs().max() > 0.1
    slot.active = None
    assert torch.equal(model(tokens).logits, plain)
    assert wrap_modules(model, ["lm_head"]) is slot
    slot.active = adapter
    assert torch.equal(model(tokens).logits, changed)
    unwrap_modules(model)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    assert torch.equal(model(tokens).logits, plain)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_refresh_writes_into_what_is_there(dtype: torch.dtype) -> None:
    """One that allocates can fail behind a step whose weights are written."""
    pair, _ = pair_of(dtype, 0.3)
    copies = pair.compute_a, pair.compute_b
    with torch.no_grad():
        pair.a.mul_(1.1)
        pair.b.add_(0.01)
    pair.refresh()
    assert pair.compute_a is copies[0] and pair.compute_b is copies[1]
    fresh = LoraPair(pair.a, pair.b, pair.scaling, dtype)
    assert torch.equal(pair.compute_a, fresh.compute_a)
    assert torch.equal(pair.compute_b, fresh.compute_b)
    assert torch.equal(pair.compute_b, (pair.b.detach() * pair.scaling).to(dtype))
