"""tinker's traced losses: functions of one datum, from `create_custom_loss`.

Knows: where tinker keeps them. Must not know: how a custom loss is run.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from firetitan_client.errors import Unsupported
from firetitan_client.types import has_tinker

_MODULE = "tinker.lib.public_interfaces.custom_loss"


def trace(fn: Any, input_ranks: Mapping[str, int]) -> Any:
    """A `LossHandle`.

    Args:
        fn: `fn(logprobs, *inputs) -> (loss, metrics)`, in torch.
        input_ranks: Dimensions of each of its arguments.

    Raises:
        ValueError: It cannot be traced, or the ranks do not fit.
        Unsupported: There is no tinker, or one without such losses.
    """
    traced = getattr(_losses(), "trace_loss", None)
    if traced is None:
        raise Unsupported(
            "create_custom_loss: needs tinker 0.36 or newer; pass forward_backward_custom a "
            "function of all datums instead"
        )
    return traced(fn, input_ranks, "firetitan")


def as_function(loss: Any, data: Any) -> Callable[[Any, list[Any]], Any] | None:
    """A traced loss as a function of all datums; None: it is none.

    Args:
        loss: What the user passed as a loss.
        data: The datums it is for.

    Raises:
        ValueError: A datum lacks an input that it reads, or has it with another rank.
    """
    if type(loss).__name__ != "LossHandle":
        return None
    losses = _losses()
    losses.check_loss_inputs(loss, data)
    run: Callable[[Any, list[Any]], Any] = functools.partial(losses.run_loss_handle, loss)
    return run


def _losses() -> Any:
    if not has_tinker():
        return None
    try:
        return importlib.import_module(_MODULE)
    except ImportError:
        return None
