"""How much text a client may have the daemon keep.

Knows: lengths. Must not know: what a text is for. Names have a rule of their own (`core/names.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

from firetitan_daemon.core.errors import FiretitanError, Reason

MAX_TEXT = 128
"""Longest client id, request id and the like."""
MAX_METADATA = 65_536
"""Characters of all keys and values that a user attaches to one thing."""


def check_text(text: str, field: str, *, least: int = 0) -> None:
    """Refuse a client id, a request id or the like that is too long to be kept.

    Raises:
        FiretitanError: INVALID_ARGUMENT naming the field.
    """
    if not least <= len(text) <= MAX_TEXT:
        span = f"up to {MAX_TEXT}" if least == 0 else f"{least} to {MAX_TEXT}"
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"{field}: has {len(text)} characters; use {span}, e.g. a random UUID",
            field=field,
        )


def check_metadata(metadata: Mapping[str, str], field: str = "user_metadata") -> None:
    """Refuse more of a user's own notes than a row of the ledger is for.

    Raises:
        FiretitanError: INVALID_ARGUMENT naming the field.
    """
    found = sum(len(key) + len(value) for key, value in metadata.items())
    if found > MAX_METADATA:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"{field}: has {found} characters in all keys and values; use up to {MAX_METADATA}, "
            "and a file for more",
            field=field,
        )
