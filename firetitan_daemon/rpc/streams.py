"""How many streams are open at a time, over all clients.

Knows: the limit. Must not know: what a stream carries. A stream costs no thread, but a task and
what waits in it for its reader; more than are allowed are refused with a hint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from firetitan_daemon.core.errors import FiretitanError, Reason

_RETRY_AFTER_S = "0.5"


class OpenStreams:
    """Counts them.

    Args:
        max_streams: How many may be open.
    """

    def __init__(self, max_streams: int) -> None:
        self._max_streams = max_streams
        self._open = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for one stream, for as long as it is open.

        Raises:
            FiretitanError: QUEUE_FULL naming the limit, with `retry_after_s`.
        """
        if self._open >= self._max_streams:
            raise FiretitanError(
                Reason.QUEUE_FULL,
                f"max_streams is {self._max_streams} and as many are open; open this one again "
                "when others have ended",
                limit="max_streams",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
