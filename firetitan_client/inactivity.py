"""How long something may be unused before its worker is stopped, as users write it.

Knows: the documented forms of `inactivity_timeout`. Must not know: who stops what.
"""

from __future__ import annotations

import datetime
import math
import re

from google.protobuf.duration_pb2 import Duration

from firetitan_client.errors import InvalidArgument

InactivityTimeout = datetime.timedelta | float | str
_TEXT = re.compile(r"\d+(\.\d+)?s")


def inactivity_s(value: InactivityTimeout) -> float:
    """Seconds.

    Args:
        value: A timedelta, seconds, or a text like "1800s".

    Raises:
        InvalidArgument: None of these, or negative.
    """
    if isinstance(value, datetime.timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, str) and _TEXT.fullmatch(value):
        seconds = float(value[:-1])
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    else:
        raise InvalidArgument(
            "inactivity_timeout must be a datetime.timedelta or a text like '1800s', not "
            f"{value!r}",
            field="inactivity_timeout",
        )
    if not 0 <= seconds < math.inf:
        raise InvalidArgument(
            f"inactivity_timeout must be non-negative, not {value!r}", field="inactivity_timeout"
        )
    return seconds


def to_proto(value: InactivityTimeout | None, disabled: bool) -> Duration | None:
    """What a request carries; None leaves it to the daemon.

    Args:
        value: As the user gave it.
        disabled: Never stop it, whatever the value.

    Raises:
        InvalidArgument: As `inactivity_s`.
    """
    if value is None and not disabled:
        return None
    message = Duration()
    if value is not None and not disabled:
        message.FromNanoseconds(int(inactivity_s(value) * 1e9))
    return message
