"""Routing matrices: which experts the tokens of a mixture of experts go to, as users hold them.

Knows: their text form (base64, one a token, empty where the routers are to choose). Must not know:
what a matrix holds; only engines do.
"""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Iterable
from typing import Any

from firetitan_client.errors import InvalidArgument

logger = logging.getLogger("firetitan")

_told_of_lengths = False


def tell_of_lengths(matrices: int, tokens: int) -> None:
    """Say once that matrices and tokens differ in number: nothing is replayed then."""
    global _told_of_lengths
    if not _told_of_lengths:
        _told_of_lengths = True
        logger.error(
            "routing_matrices: has %d values, the model input %d tokens; give one per token",
            matrices,
            tokens,
        )


def matrices_of(model_input: Any, length: int, field: str) -> list[bytes]:
    """The routing matrices of a model input; none where it has none or too few or too many.

    Args:
        model_input: A `tinker.ModelInput`, or anything with or without `routing_matrices`.
        length: Tokens it has.
        field: Of the model input, for errors.

    Raises:
        InvalidArgument: A value that is not base64, by name.
    """
    given = getattr(model_input, "routing_matrices", None)
    if given is None:
        return []
    if len(given) != length:
        tell_of_lengths(len(given), length)
        return []
    matrices = [_decode(text, f"{field}.routing_matrices[{at}]") for at, text in enumerate(given)]
    return matrices if any(matrices) else []


def texts_of(matrices: Iterable[bytes]) -> list[str] | None:
    """Routing matrices as users hold them; None where there are none (a dense model)."""
    return [text_of(matrix) for matrix in matrices] or None


def text_of(matrix: bytes) -> str:
    """A routing matrix as users hold it."""
    return base64.b64encode(matrix).decode("ascii")


def _decode(text: Any, field: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise InvalidArgument(
            f"{field}: is no base64 ({error}); give what the sampler returned, or an empty text",
            field=field,
        ) from None
