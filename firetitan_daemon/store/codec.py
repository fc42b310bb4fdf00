"""Records as JSON text and back.

Knows: frozen dataclasses of strings, numbers, enums, tuples, mappings and one another. Must not
know: tables. A field that the text lacks takes its default; one the record lacks is dropped.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Record = TypeVar("Record")
_Convert = Callable[[Any], Any]
_SHOWN = 80
"""Characters of an unreadable text in an error."""


class UnreadableRecordError(Exception):
    """A text that `encode` did not write, or that was damaged since."""


def encode(record: object) -> str:
    """A record as compact JSON."""
    return json.dumps(record, default=_plain, separators=(",", ":"), ensure_ascii=False)


def decode(kind: type[Record], text: str) -> Record:
    """The record of a kind that `encode` wrote.

    Raises:
        UnreadableRecordError: It is none.
    """
    try:
        record: Record = _build(kind, json.loads(text))
    except (ValueError, TypeError, AttributeError) as error:
        shown = text[:_SHOWN]
        raise UnreadableRecordError(f"{shown!r} is no {kind.__name__}: {error}") from error
    return record


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if hasattr(value, "items"):
        return dict(value.items())
    raise TypeError(f"{type(value).__name__} cannot be kept in the ledger")


def _build(kind: type[Any], values: dict[str, Any]) -> Any:
    converters = _converters(kind)  # type: ignore[arg-type]  # mypy: a type is hashable
    return kind(
        **{
            name: converters[name](value) if value is not None else None
            for name, value in values.items()
            if name in converters
        }
    )


@cache
def _converters(kind: type[Any]) -> dict[str, _Convert]:
    hints = get_type_hints(kind)
    return {field.name: _converter(hints[field.name]) for field in fields(kind)}


def _converter(hint: Any) -> _Convert:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        (hint,) = (one for one in get_args(hint) if one is not type(None))
        origin = get_origin(hint)
    if origin is tuple:
        return tuple
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return hint
    if isinstance(hint, type) and is_dataclass(hint):
        return lambda values: _build(hint, values)
    return _same


def _same(value: Any) -> Any:
    return value
