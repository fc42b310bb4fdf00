"""Kills a daemon, its trainer and its sampler in turns, as long as there is something to kill.

Knows: processes. Must not know: what they compute.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter

from support.daemon import DaemonProcess

KINDS = ("daemon", "trainer", "sampler")


class Killer(threading.Thread):
    """`kill -9` of one process every interval: of the kind killed least, else by the seed.

    A daemon is started again at once, as a service manager would. A worker is killed only where a
    step was taken since the last death of its kind, and a trainer not more often than given: one
    that dies again and again in one command is another case.

    Args:
        daemon: Running.
        interval_s: Between two kills.
        trainer_gap_s: Least time between two of the trainer.
        steps_between: Least steps between two kills of any kind.
        seed: Of the choice among kinds killed equally often.
    """

    def __init__(
        self,
        daemon: DaemonProcess,
        *,
        interval_s: float,
        trainer_gap_s: float,
        steps_between: int,
        seed: int,
    ) -> None:
        super().__init__(name="killer", daemon=True)
        self.steps = 0
        """Steps taken; the run that trains counts them."""
        self.kills: list[str] = []
        """Kinds, in order."""
        self.error: BaseException | None = None
        self._daemon = daemon
        self._interval_s, self._trainer_gap_s = interval_s, trainer_gap_s
        self._steps_between = steps_between
        self._random = random.Random(seed)
        self._done = threading.Event()
        self._trainer_died_s = -trainer_gap_s
        self._died = dict.fromkeys(KINDS, 0)
        """After how many steps each kind was killed last."""

    @property
    def counts(self) -> Counter[str]:
        """Kills by kind."""
        return Counter(self.kills)

    def enough(self, total: int, of_each: int) -> bool:
        """Whether so many were killed."""
        return len(self.kills) >= total and min(self.counts[kind] for kind in KINDS) >= of_each

    def finish(self) -> None:
        """Kill no more; the daemon is there when this returns.

        Raises:
            BaseException: What ended the killing.
        """
        self._done.set()
        self.join()
        if self.error is not None:
            raise self.error

    def run(self) -> None:
        """Kill until `finish`."""
        try:
            while not self._done.wait(self._interval_s):
                # Soon again where there was none to choose, or the one chosen was not there.
                while not self._kill(self._choose()) and not self._done.wait(0.2):
                    pass
        except BaseException as error:
            self.error = error

    def _choose(self) -> str | None:
        steps = self.steps
        if steps - max(self._died.values()) < self._steps_between:
            return None
        kinds = [kind for kind in KINDS if kind == "daemon" or steps > self._died[kind]]
        if time.monotonic() - self._trainer_died_s < self._trainer_gap_s and "trainer" in kinds:
            kinds.remove("trainer")
        fewest = min(self.counts[kind] for kind in kinds)
        return self._random.choice([kind for kind in kinds if self.counts[kind] == fewest])

    def _kill(self, kind: str | None) -> bool:
        if kind is None:
            return False
        if kind == "daemon":
            self._daemon.kill()
            self._daemon.start(timeout_s=60)
        else:
            pids = self._daemon.worker_pids(kind)
            if not pids:
                return False
            os.kill(pids[0], signal.SIGKILL)
        if kind == "trainer":
            self._trainer_died_s = time.monotonic()
        self._died[kind] = self.steps
        self.kills.append(kind)
        print(f"killed the {kind} after {self.steps} steps", flush=True)
        return True
