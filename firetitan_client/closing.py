"""Ending something in steps: all of them, in order, once, whatever fails or interrupts.

Knows: nothing of what the steps do. Must not know: services, trainers.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

logger = logging.getLogger("firetitan")


class Closing:
    """The steps of a `close()`.

    Args:
        what: What is closed, for people.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._steps: deque[tuple[str, Callable[[], object]]] | None = None

    @property
    def begun(self) -> bool:
        """Whether it was ever run."""
        return self._steps is not None

    def run(self, *steps: tuple[str, Callable[[], object]]) -> None:
        """Do every step, each once; a run that was broken off is gone on with.

        A first Ctrl-C breaks off the step it comes in and is raised when the others are done; a
        second one leaves the rest, and says so.

        Args:
            steps: What each does, for people, and how; only those of the first run count.

        Raises:
            KeyboardInterrupt: As it came.
            Exception: The first that a step ended with; others are logged.
        """
        if self._steps is None:
            self._steps = deque(steps)
        first: BaseException | None = None
        while self._steps:
            label, step = self._steps[0]
            try:
                step()
            except KeyboardInterrupt as interrupt:
                if isinstance(first, KeyboardInterrupt):
                    left = ", ".join(one for one, _ in self._steps)
                    logger.warning(
                        "%s: interrupted again, not finished: %s; close() again goes on with it",
                        self._what,
                        left,
                    )
                    raise
                self._note(first)
                first = interrupt
                logger.warning("%s: interrupted; no longer waiting for: %s", self._what, label)
            except Exception as error:  # a supervisor: one step's failure must not skip the others
                if first is None:
                    first = error
                else:
                    self._note(error)
            self._steps.popleft()
        if first is not None:
            raise first

    def _note(self, error: BaseException | None) -> None:
        if error is not None:
            logger.warning("%s: %s", self._what, error)
