"""Learning-rate schedules: what a recipe may configure, and the rate of each step.

Knows: schedules, their names in configuration files, today's and the older flat ones. Must not
know: optimizers, the daemon; nothing here is sent anywhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias


@dataclass(frozen=True, kw_only=True)
class _Schedule:
    """What every schedule has: a linear warm-up from 0, in steps or as a part of all steps."""

    type: str = ""
    warmup_steps: int = 0
    """Steps of warm-up; the last of them has the full rate."""
    warmup_ratio: float | None = None
    """Warm-up as a part of all steps, below 1; instead of `warmup_steps`."""

    def __post_init__(self) -> None:
        expected = type(self).type
        if self.type != expected:
            raise ValueError(f"type: is {self.type!r}; {type(self).__name__} is {expected!r}")
        steps = self.warmup_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"warmup_steps: is {steps!r}; give a whole number of at least 0")
        if self.warmup_steps and self.warmup_ratio is not None:
            raise ValueError(
                "warmup_steps and warmup_ratio are mutually exclusive; got "
                f"warmup_steps={self.warmup_steps} and warmup_ratio={self.warmup_ratio}"
            )
        if self.warmup_ratio is not None:
            _check_ratio("warmup_ratio", self.warmup_ratio)
            if self.warmup_ratio >= 1:
                raise ValueError(f"warmup_ratio: is {self.warmup_ratio!r}; give less than 1")
        if isinstance(self, ConstantSchedule):
            return
        for name in ("decay_ratio", "min_lr_ratio"):
            value = getattr(self, name)
            if value is not None:
                _check_ratio(name, value)

    def model_dump(self) -> dict[str, Any]:
        """The settings as a plain dict, `type` with them."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class ConstantSchedule(_Schedule):
    """The base rate, after an optional warm-up."""

    type: Literal["constant"] = "constant"


@dataclass(frozen=True, kw_only=True)
class LinearSchedule(_Schedule):
    """A straight line down, after the warm-up."""

    type: Literal["linear"] = "linear"
    decay_ratio: float | None = None
    """The last part of all steps, in which the rate falls; None: all after the warm-up."""
    min_lr_ratio: float = 0.0
    """What is left of the base rate at the end."""


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(_Schedule):
    """Half a cosine down, after the warm-up."""

    type: Literal["cosine"] = "cosine"
    decay_ratio: float | None = None
    """The last part of all steps, in which the rate falls; None: all after the warm-up."""
    min_lr_ratio: float = 0.0
    """What is left of the base rate at the end."""


@dataclass(frozen=True, kw_only=True)
class WSDSchedule(_Schedule):
    """Warm-up, stable, decay: the base rate until a short fall at the end."""

    type: Literal["wsd"] = "wsd"
    decay_ratio: float = 0.1
    """The last part of all steps, in which the rate falls; above 0."""
    decay_type: Literal["linear", "cosine", "sqrt"] = "linear"
    min_lr_ratio: float = 0.0
    """What is left of the base rate at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay_ratio is None or self.decay_ratio <= 0:
            raise ValueError(f"decay_ratio: is {self.decay_ratio!r}; give more than 0")
        if self.decay_type not in ("linear", "cosine", "sqrt"):
            raise ValueError(
                f"decay_type: is {self.decay_type!r}; give 'linear', 'cosine' or 'sqrt'"
            )


LRSchedulerSpec: TypeAlias = ConstantSchedule | LinearSchedule | CosineSchedule | WSDSchedule
"""Any of the schedules."""

_BY_TYPE: dict[str, type[LRSchedulerSpec]] = {
    "constant": ConstantSchedule,
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "wsd": WSDSchedule,
}
_FLAT_FIELDS = frozenset(
    {"lr_schedule", "lr_warmup_steps", "warmup_steps", "warmup_ratio", "min_lr_ratio"}
)


def _check_ratio(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        raise ValueError(f"{name}: is {value!r}; give a number from 0 to 1")


def default_constant_schedule() -> ConstantSchedule:
    """The base rate at every step, without a warm-up."""
    return ConstantSchedule()


def parse_lr_scheduler_spec(data: Any) -> LRSchedulerSpec:
    """A schedule from a configuration's mapping; a schedule is returned as it is.

    Args:
        data: `{"type": "constant" | "linear" | "cosine" | "wsd", ...}` with that schedule's fields.

    Raises:
        ValueError: No mapping, an unknown type or field, or a value out of range.
    """
    if isinstance(data, LRSchedulerSpec):
        return data
    if not isinstance(data, Mapping):
        raise ValueError(
            f"lr_scheduler: is a {type(data).__name__}; give a schedule or its settings"
        )
    kind = _BY_TYPE.get(str(data.get("type")))
    if kind is None:
        raise ValueError(
            f"lr_scheduler.type: is {data.get('type')!r}; give 'constant', 'linear', 'cosine' or "
            "'wsd'"
        )
    known = {entry.name for entry in dataclasses.fields(kind)}
    unknown = sorted(str(name) for name in data if name not in known)
    if unknown:
        raise ValueError(
            f"lr_scheduler.{unknown[0]}: {kind.__name__} has no such field; it has "
            f"{', '.join(sorted(known))}"
        )
    return kind(**{str(name): value for name, value in data.items()})


def normalize_lr_scheduler_spec(
    data: Any = None,
    *,
    legacy_lr_schedule: str | None = None,
    legacy_warmup_steps: int | None = None,
    legacy_warmup_ratio: float | None = None,
    legacy_min_lr_ratio: float | None = None,
) -> LRSchedulerSpec:
    """The schedule of a configuration that may have today's field, the older flat ones, or both.

    The older ones count only where `data` asks for nothing: None, or a constant schedule without
    a warm-up.

    Args:
        data: A schedule, its settings, or None.
        legacy_lr_schedule: Name of a schedule.
        legacy_warmup_steps: Its `warmup_steps`; wins over the ratio.
        legacy_warmup_ratio: Its `warmup_ratio`.
        legacy_min_lr_ratio: Its `min_lr_ratio`; a constant schedule has none.

    Raises:
        ValueError: As `parse_lr_scheduler_spec`.
    """
    spec = default_constant_schedule() if data is None else parse_lr_scheduler_spec(data)
    asked = (
        bool(legacy_warmup_steps)
        or bool(legacy_warmup_ratio)
        or bool(legacy_min_lr_ratio)
        or legacy_lr_schedule not in (None, "constant")
    )
    if not asked or spec != default_constant_schedule():
        return spec
    settings: dict[str, Any] = {"type": legacy_lr_schedule or spec.type}
    if legacy_warmup_steps:
        settings["warmup_steps"] = legacy_warmup_steps
    elif legacy_warmup_ratio:
        settings["warmup_ratio"] = legacy_warmup_ratio
    if settings["type"] != "constant" and legacy_min_lr_ratio is not None:
        settings["min_lr_ratio"] = legacy_min_lr_ratio
    return parse_lr_scheduler_spec(settings)


def has_v1_scheduler_fields(flat: Iterable[str]) -> bool:
    """Whether a configuration names one of the older flat fields.

    Args:
        flat: Names of its fields, or a mapping.
    """
    return not _FLAT_FIELDS.isdisjoint(flat)


def compute_lr(
    spec: LRSchedulerSpec, step: int, base_lr: float, total_steps: int | None = None
) -> float:
    """The learning rate of one optimizer step.

    Args:
        spec: The schedule.
        step: The step, counted from 1.
        base_lr: The full rate.
        total_steps: Steps of the whole run; only a constant schedule whose warm-up is counted in
            steps does without.

    Raises:
        ValueError: `total_steps` is missing or not positive where the schedule needs it.
    """
    warmup = spec.warmup_steps
    if spec.warmup_ratio is not None:
        warmup = round(spec.warmup_ratio * _total("warmup_ratio", total_steps))
    if warmup and step <= warmup:
        return base_lr * (step / warmup)
    if isinstance(spec, ConstantSchedule):
        return base_lr
    total = _total(type(spec).__name__, total_steps)
    start = warmup
    if spec.decay_ratio is not None:
        start = max(warmup, total - max(1, round(spec.decay_ratio * total)))
    if step <= start:
        return base_lr
    if step >= total:
        return base_lr * spec.min_lr_ratio
    fallen = _fallen(spec, (step - start) / (total - start))
    return base_lr * max(spec.min_lr_ratio, 1 - fallen * (1 - spec.min_lr_ratio))


def _total(needed_by: str, total_steps: int | None) -> int:
    if total_steps is None or total_steps <= 0:
        raise ValueError(
            f"total_steps: is {total_steps!r}; {needed_by} needs the number of steps of the run"
        )
    return total_steps


def _fallen(spec: LinearSchedule | CosineSchedule | WSDSchedule, progress: float) -> float:
    """How much of the way to the lowest rate lies behind, 0 to 1."""
    shape = spec.decay_type if isinstance(spec, WSDSchedule) else spec.type
    if shape == "cosine":
        return 0.5 * (1 - math.cos(math.pi * progress))
    if shape == "sqrt":
        return math.sqrt(progress)
    return progress
