"""What a step tells of its gradients: the arithmetic, and which part is which."""

from __future__ import annotations

import math

import pytest

from firetitan_daemon.engine.grad_norms import GradNormMetrics, grad_norm_metrics, part_of

NORMS = {
    "model.layers.0.self_attn.q_proj.weight": 3.0,
    "model.layers.1.self_attn.q_norm.weight": 4.0,
    "model.layers.0.mlp.up_proj.lora_A.weight": 12.0,
}
SIZES = dict(zip(NORMS, (16, 9, 144), strict=True))


def test_off_tells_nothing() -> None:
    assert grad_norm_metrics(GradNormMetrics.OFF, NORMS, SIZES) == {}


def test_basic_is_the_root_mean_square_of_all_elements() -> None:
    found = grad_norm_metrics(GradNormMetrics.BASIC, NORMS, SIZES)
    assert found == {"grad_rms": pytest.approx(13.0 / 13.0)}


def test_detailed_adds_the_parts() -> None:
    found = grad_norm_metrics(GradNormMetrics.DETAILED, NORMS, SIZES)
    assert found == {
        "grad_rms": pytest.approx(1.0),
        "grad_norm/attn": pytest.approx(5.0),
        "grad_rms/attn": pytest.approx(1.0),
        "grad_norm/mlp": pytest.approx(12.0),
        "grad_rms/mlp": pytest.approx(1.0),
    }


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.0.self_attn.o_proj.weight", "attn"),
        ("transformer.h.1.attn.c_attn.weight", "attn"),
        ("model.layers.0.mlp.experts.3.down_proj.weight", "mlp"),
        ("model.layers.0.input_layernorm.weight", "norm"),
        ("model.norm.weight", "norm"),
        ("model.embed_tokens.weight", "embed"),
        ("lm_head.lora_B.weight", "unembed"),
        ("unembed", "unembed"),
        ("something.else", "other"),
    ],
)
def test_the_part_of_a_parameter(name: str, part: str) -> None:
    assert part_of(name) == part


def test_nothing_trained_is_no_division_by_zero() -> None:
    assert math.isfinite(grad_norm_metrics(GradNormMetrics.BASIC, {}, {})["grad_rms"])
