"""The likeliest tokens of each position of a forward: `loss_fn_config={"top_k": K}`.

Knows: the setting, how rows are cut into datums. Must not know: how logits come to be, losses.

Shapes: T rows of a batch, N positions of a datum, K likeliest tokens.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import LossConfig, NamedArrays
from firetitan_daemon.engine.batch import Batch, check_cells

_SETTING = "top_k"
_FIELD = f'loss_fn_config["{_SETTING}"]'


def take_top_k(loss_fn: str, config: LossConfig, target_size: int) -> tuple[int, LossConfig]:
    """How many tokens are asked for, 0 for none, and the other settings.

    Args:
        loss_fn: Only cross_entropy has it; another loss refuses the setting as unknown.
        config: As it was sent.
        target_size: How many tokens there are.

    Raises:
        FiretitanError: INVALID_ARGUMENT where it is no number from 1 to that.
    """
    if loss_fn != "cross_entropy" or _SETTING not in config:
        return 0, config
    value = config[_SETTING]
    number = 0.0 if isinstance(value, str) or not math.isfinite(value) else value
    if number != int(number) or not 1 <= number <= target_size:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"{_FIELD}={value!r}: give a whole number from 1 to {target_size}",
            field=_FIELD,
        )
    return int(number), {name: one for name, one in config.items() if name != _SETTING}


def check_top_k(top_k: int, positions: int) -> None:
    """Refuse more tokens than one answer may hold.

    Args:
        top_k: How many are asked for, 0 for none.
        positions: Of all datums.

    Raises:
        FiretitanError: INVALID_ARGUMENT.
    """
    check_cells(_FIELD, top_k, positions)


def add_candidates(
    outputs: list[NamedArrays], batch: Batch, parts: list[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Put `top_k_indices` int64 and `top_k_logprobs`, both [N, K], into each datum's output.

    Args:
        outputs: One a datum.
        batch: Whose rows these are.
        parts: Ids and logprobs [T, K] of each pass, in order.
    """
    ids_TK, logprobs_TK = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    start = 0
    for output, shape in zip(outputs, batch.shapes, strict=True):
        rows = slice(start, start + shape[0])
        start += shape[0]
        output["top_k_indices"] = np.ascontiguousarray(ids_TK[rows])
        output["top_k_logprobs"] = np.ascontiguousarray(logprobs_TK[rows])
