"""Ending something in steps: all of them, in order, once, whatever fails or interrupts.

Knows: nothing of what the steps do. Must not know: services, trainers.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from firetitan_client import forking

logger = logging.getLogger("firetitan")


class Closing:
    """The steps of a `close()`.

    Args:
        what: What is closed, for people.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._steps: deque[tuple[str, Callable[[], object]]] | None = None
        self._after_fork()
        forking.on_fork(self)

    def _after_fork(self) -> None:
        """In a child: another thread of the parent may be closing."""
        self._lock = threading.RLock()

    def run(self, *steps: tuple[str, Callable[[], object]], wait: bool = True) -> None:
        """Do every step, each once; a run that was broken off is gone on with.

        A first Ctrl-C breaks off the step it comes in and is raised when the others are done; a
        second one leaves the rest, and says so. A signal's handler that closes while its own thread
        does goes on with the step that was interrupted.

        Args:
            steps: What each does, for people, and how; only those of the first run count.
            wait: Where another thread is at it, wait for its end.

        Raises:
            KeyboardInterrupt: As it came.
            Exception: The first that a step ended with; others are logged.
        """
        if not self._lock.acquire(blocking=wait):
            return
        try:
            if self._steps is None:
                self._steps = deque(steps)
            self._run(self._steps)
        finally:
            self._lock.release()

    def _run(self, steps: deque[tuple[str, Callable[[], object]]]) -> None:
        first: BaseException | None = None
        while steps:
            current = label, step = steps[0]
            try:
                step()
            except KeyboardInterrupt as interrupt:
                if isinstance(first, KeyboardInterrupt):
                    left = ", ".join(one for one, _ in steps)
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
            if steps and steps[0] is current:
                steps.popleft()
        if first is not None:
            raise first

    def _note(self, error: BaseException | None) -> None:
        if error is not None:
            logger.warning("%s: %s", self._what, error)
