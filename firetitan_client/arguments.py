"""Plain arguments, checked in the call: notes, switches, scales, names of models.

Knows: what values are fit to be sent. Must not know: which call they are of, what becomes of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from firetitan_client.convert import invalid, real_number
from firetitan_client.errors import Unsupported


def notes(value: Any, field: str = "user_metadata") -> dict[str, str]:
    """A user's own notes; None: there are none.

    Raises:
        InvalidArgument: Not a mapping of texts to texts.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise invalid(field, f"is a {type(value).__name__}; give a dict of texts")
    for name, note in value.items():
        if not isinstance(name, str) or not isinstance(note, str):
            raise invalid(field, f"holds {name!r}: {note!r}; both must be texts")
    return dict(value)


def switch(value: Any, field: str) -> None:
    """Refuse what is neither True nor False nor None.

    Raises:
        InvalidArgument: Anything else.
    """
    if value is not None and not isinstance(value, bool):
        raise invalid(field, f"is {value!r}; give True or False")


def scale(value: Any, field: str) -> float:
    """A finite number above 0.

    Raises:
        InvalidArgument: Anything else.
    """
    number = real_number(value, field)
    if not 0 < number < math.inf:
        raise invalid(field, f"is {value!r}; give a number above 0")
    return number


def optimizer(value: Any) -> None:
    """Refuse another optimizer than AdamW rather than train with it.

    Args:
        value: A `tinker.types.OptimizerConfig`; None: AdamW.

    Raises:
        Unsupported: Another one.
        InvalidArgument: No such configuration.
    """
    if value is None:
        return
    kind = getattr(value, "type", None)
    if not isinstance(kind, str):
        raise invalid("optimizer", f"is a {type(value).__name__}; leave it out: AdamW is used")
    if kind != "adamw":
        raise Unsupported(f"optimizer: {kind!r} is not supported; only AdamW is", field="optimizer")


def stability_info(wanted: Any) -> None:
    """Refuse to record what nothing here reads.

    Raises:
        Unsupported: It was asked for.
    """
    if wanted:
        raise Unsupported(
            "record_stability_info: is for the loss stable_reinforce, which is not supported; "
            "leave it out",
            field="record_stability_info",
        )


def model_name(value: Any, field: str = "base_model") -> str:
    """The name of a model, or the folder it is in.

    Raises:
        InvalidArgument: Neither text nor path, or empty.
    """
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text.strip():
        raise invalid(field, f"is {value!r}; give a Hugging Face id, a model's name or a folder")
    return text
