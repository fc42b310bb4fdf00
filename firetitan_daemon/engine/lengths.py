"""How far a model reaches, by its configuration: positions it takes, keys a query sees.

Knows: transformers' configurations. Must not know: weights, how a model is run.

Under `longrope` (Phi-3, Phi-4) transformers computes a whole call with one set of frequencies: the
short one where all its positions are below pretraining's length, else the long one. A packed row
holds sequences of any length, and a prompt's first chunk does not know how long it gets, so their
numbers would depend on what else runs. Such a model is run up to where the sets change. `dynamic`
changes at `max_position_embeddings`, which no model is run beyond.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from firetitan_daemon.core.errors import FiretitanError, Reason

_NO_LIMIT = 1 << 30


def context_length(config: Any, asked: int | None, base_model: str) -> int:
    """Tokens a sequence may have.

    Args:
        config: Of the text model.
        asked: What is to be enough; None: what the model takes.
        base_model: What messages call it.

    Raises:
        FiretitanError: INVALID_ARGUMENT for more than the model takes, UNSUPPORTED for more than
            this engine runs of it; both name `max_context_length`.
    """
    own = int(getattr(config, "max_position_embeddings", None) or _NO_LIMIT)
    if own < 1:  # some architectures write -1 for no limit
        own = _NO_LIMIT
    limit = int(min(own, *_longrope_changes(config), _NO_LIMIT))
    length = limit if asked is None else asked
    if limit < length <= own:
        raise FiretitanError(
            Reason.UNSUPPORTED,
            f"max_context_length is {length}; {base_model} is run with up to {limit} tokens: "
            "beyond, its longrope frequencies are those of a call's longest sequence; give "
            f"{limit} or less",
            field="max_context_length",
        )
    if not 1 <= length <= limit:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"max_context_length is {length}; {base_model} takes 1 to {limit} tokens",
            field="max_context_length",
        )
    return length


def active_window(config: Any, context: int) -> int | None:
    """Keys a query of some layer sees, where that is less than a sequence may have.

    Args:
        config: Of the text model.
        context: Tokens a sequence may have.
    """
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or not 0 < window < context:
        return None
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return window if "sliding_attention" in kinds else None
    return window if getattr(config, "use_sliding_window", True) else None


def _longrope_changes(config: Any) -> Iterator[float]:
    """Positions behind which frequencies change; a configuration may have some for each layer."""
    whole = getattr(config, "rope_parameters", None)
    if not isinstance(whole, Mapping):
        return
    for one in (whole, *whole.values()):
        if isinstance(one, Mapping) and one.get("rope_type") == "longrope":
            change = one.get("original_max_position_embeddings")
            if isinstance(change, int | float) and change >= 1:
                yield change
