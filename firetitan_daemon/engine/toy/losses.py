"""Checks of a batch, and three losses with their gradients by logprob, in numpy.

Knows: datums, the losses' formulas. Must not know: the model, the optimizer.

Shape legend: `N` positions, `K` candidates a position; every array of a datum is [N] or [N, K].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import Array, Datum, LossConfig
from firetitan_daemon.engine.toy.model import Float64Array

Inputs = Mapping[str, Array]
LossAndGradient = tuple[float, Float64Array]


@dataclass(frozen=True)
class Loss:
    """A loss: what it reads and how to compute it from logprobs."""

    required: frozenset[str]
    optional: frozenset[str]
    config: Mapping[str, float | None]
    """Known settings and what absence means."""
    compute: Callable[[Float64Array, Inputs, Mapping[str, float | None]], LossAndGradient]
    """(logprobs, inputs, config) -> (sum, d sum / d logprobs)."""


def check(
    data: Sequence[Datum], loss_fn: str, config: LossConfig, vocab: int, context: int, strict: bool
) -> tuple[Loss, dict[str, float | None]]:
    """Refuse what cannot be computed, naming the field.

    Args:
        data: The batch.
        loss_fn: Name of the loss.
        config: Its settings.
        vocab: Tokens the model knows.
        context: Longest sequence.
        strict: Refuse loss inputs that the loss does not read.

    Raises:
        FiretitanError: UNKNOWN_LOSS, INVALID_ARGUMENT, INVALID_DATUM, LOSS_INPUT_MISSING.
    """
    loss = LOSSES.get(loss_fn)
    if loss is None:
        names = ", ".join(sorted(LOSSES))
        raise FiretitanError(
            Reason.UNKNOWN_LOSS, f'loss_fn="{loss_fn}": not one of {names}', field="loss_fn"
        )
    settings = dict(loss.config)
    for name, value in config.items():
        if name not in settings or not isinstance(value, int | float) or not np.isfinite(value):
            raise FiretitanError(
                Reason.INVALID_ARGUMENT,
                f'loss_fn_config["{name}"]={value!r}: {loss_fn} takes finite numbers for '
                f"{sorted(settings) or 'no settings'}",
                field=f'loss_fn_config["{name}"]',
            )
        settings[name] = float(value)
    check_tokens(data, vocab, context)
    for index, datum in enumerate(data):
        _check_datum(f"data[{index}]", datum, loss, vocab, strict)
    return loss, settings


def check_tokens(data: Sequence[Datum], vocab: int, context: int) -> None:
    """Refuse sequences the model cannot read.

    Raises:
        FiretitanError: INVALID_DATUM.
    """
    if not data:
        raise _bad("data", "is empty; give at least one datum")
    for index, datum in enumerate(data):
        where = f"data[{index}].model_input"
        if datum.token_ids.ndim != 1:
            raise _bad(where, "must be a flat list of integer tokens")
        length = datum.token_ids.shape[0]
        if not 1 <= length <= context:
            raise _bad(where, f"has {length} tokens; 1 to {context} are possible")
        _check_tokens(where, datum.token_ids, vocab)


def _check_datum(at: str, datum: Datum, loss: Loss, vocab: int, strict: bool) -> None:
    length = datum.token_ids.shape[0]
    for name in sorted(loss.required - datum.loss_inputs.keys()):
        raise FiretitanError(
            Reason.LOSS_INPUT_MISSING,
            f"{at}.loss_fn_inputs: missing required field '{name}'",
            field=f'{at}.loss_fn_inputs["{name}"]',
        )
    known = loss.required | loss.optional
    shape = datum.loss_inputs["target_tokens"].shape
    for name, values in datum.loss_inputs.items():
        where = f'{at}.loss_fn_inputs["{name}"]'
        if name not in known:
            if strict:
                raise _bad(where, f"is not read by this loss; it reads {sorted(known)}")
            continue
        if values.ndim not in (1, 2) or values.shape[0] != length or 0 in values.shape:
            raise _bad(where, f"has shape {list(values.shape)}, model_input has {length} tokens")
        if values.shape != shape:
            raise _bad(
                where,
                f"has shape {list(values.shape)}, target_tokens has {list(shape)}; "
                "give one value per target",
            )
        if name == "target_tokens":
            _check_tokens(where, values, vocab)
        elif not np.isfinite(values).all():
            first = np.argwhere(~np.isfinite(values))[0].tolist()
            raise _bad(where, f"holds NaN or infinity at {first}", Reason.NON_FINITE)


def _check_tokens(where: str, tokens: Array, vocab: int) -> None:
    outside = np.argwhere((tokens < 0) | (tokens >= vocab))
    if outside.size:
        first = tuple(outside[0].tolist())
        raise _bad(
            where, f"holds token {int(tokens[first])} at {list(first)}; 0 to {vocab - 1} exist"
        )


def _bad(where: str, what: str, reason: Reason = Reason.INVALID_DATUM) -> FiretitanError:
    return FiretitanError(reason, f"{where}: {what}", field=where)


def _cross_entropy(
    logprobs: Float64Array, inputs: Inputs, config: Mapping[str, float | None]
) -> LossAndGradient:
    weights = inputs.get("weights")
    ones = np.ones_like(logprobs) if weights is None else weights.astype(np.float64)
    return float(-(ones * logprobs).sum()), -ones


def _ratio(
    logprobs: Float64Array, inputs: Inputs, cap: float | None
) -> tuple[Float64Array, Float64Array]:
    """Importance ratio and its derivative by logprob (0 where the cap holds it)."""
    log_ratio = logprobs - inputs["logprobs"]
    if cap is None:
        ratio = np.exp(log_ratio)
        return ratio, ratio
    ratio = np.exp(np.clip(log_ratio, -cap, cap))
    return ratio, np.where(np.abs(log_ratio) <= cap, ratio, 0.0)


def _importance_sampling(
    logprobs: Float64Array, inputs: Inputs, config: Mapping[str, float | None]
) -> LossAndGradient:
    ratio, slope = _ratio(logprobs, inputs, config["ratio_log_cap"])
    advantages = inputs["advantages"]
    return float(-(ratio * advantages).sum()), -slope * advantages


def _ppo(
    logprobs: Float64Array, inputs: Inputs, config: Mapping[str, float | None]
) -> LossAndGradient:
    ratio, slope = _ratio(logprobs, inputs, None)
    advantages = inputs["advantages"].astype(np.float64)
    low = inputs.get("clip_low_threshold", config["clip_low_threshold"])
    high = inputs.get("clip_high_threshold", config["clip_high_threshold"])
    free, held = ratio * advantages, np.clip(ratio, low, high) * advantages
    gradient = np.where(free <= held, slope * advantages, 0.0)
    return float(-np.minimum(free, held).sum()), -gradient


_POLICY = frozenset({"target_tokens", "logprobs", "advantages"})

LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(frozenset({"target_tokens"}), frozenset({"weights"}), {}, _cross_entropy),
    "importance_sampling": Loss(
        _POLICY, frozenset(), {"ratio_log_cap": None}, _importance_sampling
    ),
    "ppo": Loss(
        _POLICY,
        frozenset({"clip_low_threshold", "clip_high_threshold"}),
        {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
        _ppo,
    ),
}
"""The losses the toy engine has; raw sums over tokens and data."""
