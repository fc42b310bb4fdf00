"""Pages of lists.

Knows: page sizes and tokens. Must not know: what is listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from firetitan_daemon.core.errors import FiretitanError, Reason

DEFAULT_PAGE = 100
MAX_PAGE = 1000
_MAX_DIGITS = 18
"""Of a token; Python refuses to read a number of thousands of digits."""
_T = TypeVar("_T")


def page_limit(page_size: int) -> int:
    """How many entries to answer with.

    Raises:
        FiretitanError: INVALID_ARGUMENT for a negative size.
    """
    if page_size < 0:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"page_size: {page_size} is negative; 0 means {DEFAULT_PAGE}",
            field="page_size",
        )
    return min(page_size or DEFAULT_PAGE, MAX_PAGE)


def page(entries: Sequence[_T], page_size: int, page_token: str) -> tuple[Sequence[_T], str]:
    """One page of a list, and the token of the next; empty on the last.

    Raises:
        FiretitanError: INVALID_ARGUMENT.
    """
    limit = page_limit(page_size)
    if page_token and not (
        page_token.isascii() and page_token.isdigit() and len(page_token) <= _MAX_DIGITS
    ):
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"page_token: {page_token!r} is not from an answer of this list",
            field="page_token",
        )
    start = int(page_token or 0)
    following = start + limit
    return entries[start:following], str(following) if following < len(entries) else ""
