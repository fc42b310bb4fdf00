"""AdamW in numpy.

Knows: arrays by parameter name. Must not know: the model, sessions.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.failpoints import failpoint
from firetitan_daemon.engine.api import AdamParams
from firetitan_daemon.engine.toy.model import Float64Array, Weights


def check_adam(params: AdamParams) -> None:
    """Refuse hyper-parameters out of range.

    Raises:
        FiretitanError: NON_FINITE or INVALID_ARGUMENT naming the field.
    """
    for name in ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm"):
        value = getattr(params, name)
        if not np.isfinite(value):
            raise FiretitanError(
                Reason.NON_FINITE, f"{name}={value}: give a finite number", field=name
            )
        if value < 0 or (name.startswith("beta") and value >= 1):
            limits = "0 <= value < 1" if name.startswith("beta") else "0 or more"
            raise FiretitanError(Reason.INVALID_ARGUMENT, f"{name}={value}: {limits}", field=name)


def adamw(
    weights: Weights,
    first: Weights,
    second: Weights,
    gradients: Mapping[str, Float64Array],
    params: AdamParams,
    step: int,
) -> None:
    """One update, in place: bias-corrected moments, decoupled decay.

    Args:
        weights: Parameters, float32.
        first: Their first moments.
        second: Their second moments.
        gradients: Normalised and clipped.
        params: Hyper-parameters.
        step: 1 for the first.

    Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.
    """
    for name, gradient in gradients.items():
        moment = params.beta1 * first[name] + (1 - params.beta1) * gradient
        square = params.beta2 * second[name] + (1 - params.beta2) * gradient**2
        divisor = np.sqrt(square / (1 - params.beta2**step)) + params.eps
        corrected = moment / (1 - params.beta1**step)
        move = np.divide(corrected, divisor, out=np.zeros_like(divisor), where=divisor > 0)
        kept = weights[name] * (1 - params.learning_rate * params.weight_decay)
        weights[name] = (kept - params.learning_rate * move).astype(np.float32)
        first[name] = moment.astype(np.float32)
        second[name] = square.astype(np.float32)
        failpoint("engine.step")
