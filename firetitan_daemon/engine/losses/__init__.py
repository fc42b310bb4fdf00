"""The built-in losses by name, and the check of their settings.

To add one: a file with a `Loss`, a line in `LOSSES`, a reference in the numerics tests.
"""

from __future__ import annotations

import math

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import LossConfig
from firetitan_daemon.engine.losses.base import Loss, Settings
from firetitan_daemon.engine.losses.cispo import CISPO
from firetitan_daemon.engine.losses.cross_entropy import CROSS_ENTROPY
from firetitan_daemon.engine.losses.dapo import DAPO
from firetitan_daemon.engine.losses.dro import DRO
from firetitan_daemon.engine.losses.gspo import GSPO
from firetitan_daemon.engine.losses.importance_sampling import IMPORTANCE_SAMPLING
from firetitan_daemon.engine.losses.ppo import PPO

__all__ = ["LOSSES", "Loss", "Settings", "choose_loss"]

LOSSES: dict[str, Loss] = {
    loss.name: loss for loss in (CROSS_ENTROPY, IMPORTANCE_SAMPLING, PPO, CISPO, DRO, DAPO, GSPO)
}
"""Every built-in loss; raw sums over tokens and data."""

_SUPPORT = "target_logprob_support"
_FULL_VOCABULARY = "full_vocabulary"


def choose_loss(name: str, config: LossConfig) -> tuple[Loss, Settings]:
    """Look a loss up and complete its settings.

    Raises:
        FiretitanError: UNKNOWN_LOSS, or INVALID_ARGUMENT for an unknown or unusable setting.
    """
    loss = LOSSES.get(name)
    if loss is None:
        raise FiretitanError(
            Reason.UNKNOWN_LOSS,
            f'loss_fn="{name}" is not one of {", ".join(sorted(LOSSES))}',
            field="loss_fn",
        )
    settings = dict(loss.settings)
    for key, value in config.items():
        if key == _SUPPORT and value == _FULL_VOCABULARY:
            continue
        if key == _SUPPORT:
            raise _refused(key, value, f"only {_FULL_VOCABULARY!r} is supported")
        if key not in settings:
            known = ", ".join(sorted(settings)) or "no settings"
            raise _refused(key, value, f"{name} knows {known}")
        if isinstance(value, str | bool) or not math.isfinite(value):
            raise _refused(key, value, "give a finite number")
        minimum = (loss.least or {}).get(key)
        if minimum is not None and value < minimum:
            raise _refused(key, value, f"at least {minimum:g}")
        settings[key] = float(value)
    low, high = settings.get("clip_low_threshold"), settings.get("clip_high_threshold")
    if low is not None and high is not None and low > high:
        raise _refused("clip_low_threshold", low, f"above clip_high_threshold={high:g}")
    return loss, settings


def _refused(key: str, value: object, why: str) -> FiretitanError:
    field = f'loss_fn_config["{key}"]'
    return FiretitanError(Reason.INVALID_ARGUMENT, f"{field}={value!r}: {why}", field=field)
