"""Learning rates by step, and what a schedule's settings may be."""

from __future__ import annotations

import math

import pytest

from firetitan_client.training_spec import (
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    LRSchedulerSpec,
    WSDSchedule,
    compute_lr,
    default_constant_schedule,
    has_v1_scheduler_fields,
    normalize_lr_scheduler_spec,
    parse_lr_scheduler_spec,
)


def rates(spec: object, total: int | None = 10) -> list[float]:
    return [compute_lr(spec, step, 2.0, total_steps=total) for step in range(1, 11)]  # type: ignore[arg-type]


def test_constant_needs_no_total() -> None:
    assert rates(ConstantSchedule(), None) == [2.0] * 10
    assert rates(ConstantSchedule(warmup_steps=4), None) == [0.5, 1.0, 1.5, *[2.0] * 7]


def test_warmup_ratio_is_a_part_of_all_steps() -> None:
    assert rates(ConstantSchedule(warmup_ratio=0.2)) == [1.0, *[2.0] * 9]
    with pytest.raises(ValueError, match="total_steps: is None; warmup_ratio needs"):
        compute_lr(ConstantSchedule(warmup_ratio=0.2), 1, 2.0)


def test_linear_falls_from_the_warmup_to_the_end() -> None:
    spec = LinearSchedule(warmup_steps=2, min_lr_ratio=0.2)
    expected = [1.0, 2.0] + [2.0 * (1 - 0.8 * done / 8) for done in range(1, 9)]
    assert rates(spec) == pytest.approx(expected)
    assert rates(spec)[-1] == pytest.approx(0.4)


def test_linear_stays_until_the_decay() -> None:
    assert rates(LinearSchedule(decay_ratio=0.4)) == pytest.approx([2.0] * 6 + [1.5, 1.0, 0.5, 0.0])


def test_cosine_is_half_a_wave() -> None:
    got = rates(CosineSchedule(min_lr_ratio=0.1))
    expected = [
        2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 10))) for step in range(1, 11)
    ]
    assert got == pytest.approx(expected)


@pytest.mark.parametrize(
    ("decay_type", "halfway"),
    [("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - math.sqrt(0.5))],
)
def test_wsd_is_stable_then_falls(decay_type: str, halfway: float) -> None:
    spec = WSDSchedule(decay_ratio=0.2, decay_type=decay_type)  # type: ignore[arg-type]
    assert rates(spec) == pytest.approx([2.0] * 8 + [2 * halfway, 0.0])


def test_sqrt_never_falls_below_the_minimum() -> None:
    spec = WSDSchedule(decay_ratio=0.9, decay_type="sqrt", min_lr_ratio=0.5)
    assert min(rates(spec)) == pytest.approx(1.0)


def test_decay_never_begins_in_the_warmup() -> None:
    got = rates(WSDSchedule(warmup_steps=6, decay_ratio=1.0))
    assert got[:6] == pytest.approx([2 * step / 6 for step in range(1, 7)])
    assert got[6:] == pytest.approx([1.5, 1.0, 0.5, 0.0])


def test_decay_needs_a_total() -> None:
    for total in (None, 0):
        with pytest.raises(ValueError, match=r"total_steps: is .*CosineSchedule needs"):
            compute_lr(CosineSchedule(), 1, 1.0, total)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"type": "step"}, "lr_scheduler.type: is 'step'; give 'constant', 'linear'"),
        ({"min_lr_ratio": 0.1}, "lr_scheduler.type: is None"),
        ({"type": "constant", "min_lr_ratio": 0.1}, "lr_scheduler.min_lr_ratio: ConstantSchedule"),
        ({"type": "linear", "warmup_steps": -1}, "warmup_steps: is -1"),
        ({"type": "linear", "warmup_steps": 1.5}, "warmup_steps: is 1.5"),
        ({"type": "linear", "warmup_ratio": 1.0}, "warmup_ratio: is 1.0; give less than 1"),
        ({"type": "cosine", "min_lr_ratio": 1.1}, "min_lr_ratio: is 1.1; give a number from 0"),
        ({"type": "cosine", "decay_ratio": math.nan}, "decay_ratio: is nan"),
        ({"type": "wsd", "decay_ratio": 0.0}, "decay_ratio: is 0.0; give more than 0"),
        ({"type": "wsd", "decay_type": "exp"}, "decay_type: is 'exp'"),
        ({"type": "wsd", "warmup_steps": 1, "warmup_ratio": 0.1}, "mutually exclusive"),
        ("cosine", "lr_scheduler: is a str"),
    ],
)
def test_wrong_settings_are_named(settings: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_lr_scheduler_spec(settings)


def test_settings_go_round() -> None:
    spec = WSDSchedule(warmup_ratio=0.1, decay_type="sqrt")
    assert parse_lr_scheduler_spec(spec.model_dump()) == spec
    assert parse_lr_scheduler_spec(spec) is spec
    assert spec.type == "wsd" and isinstance(spec, LRSchedulerSpec)


def test_older_fields_count_where_nothing_else_is_asked_for() -> None:
    older = {"legacy_lr_schedule": "cosine", "legacy_warmup_ratio": 0.2, "legacy_min_lr_ratio": 0.1}
    cosine = CosineSchedule(warmup_ratio=0.2, min_lr_ratio=0.1)
    assert normalize_lr_scheduler_spec(**older) == cosine  # type: ignore[arg-type]
    assert normalize_lr_scheduler_spec({"type": "constant"}, **older) == cosine  # type: ignore[arg-type]
    asked = LinearSchedule(warmup_steps=3)
    assert normalize_lr_scheduler_spec(asked, **older) == asked  # type: ignore[arg-type]
    warm = ConstantSchedule(warmup_steps=3)
    assert normalize_lr_scheduler_spec(warm, **older) == warm  # type: ignore[arg-type]


def test_older_fields_in_part() -> None:
    assert normalize_lr_scheduler_spec() == default_constant_schedule()
    assert normalize_lr_scheduler_spec({"type": "linear"}) == LinearSchedule()
    assert normalize_lr_scheduler_spec(
        legacy_warmup_steps=5, legacy_warmup_ratio=0.5, legacy_min_lr_ratio=0.3
    ) == ConstantSchedule(warmup_steps=5)


def test_older_fields_are_recognised() -> None:
    assert has_v1_scheduler_fields(["seed", "warmup_ratio"])
    assert has_v1_scheduler_fields({"lr_warmup_steps": 3})
    assert not has_v1_scheduler_fields(["lr_scheduler", "learning_rate"])
