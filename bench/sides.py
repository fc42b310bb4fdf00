"""The sides of a comparison as the comparing process sees them: child processes, and a daemon.

Knows: how to start and end both with the same threads and the same allocator. Must not know: what
is compared.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from firetitan_daemon.launch.local import environment

HERE = Path(__file__).resolve().parent
OUT = HERE.parent / "out"


@dataclass(frozen=True)
class Timed:
    """One call, and what it cost."""

    result: Any
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    """Resident memory of the process at its highest so far."""

    def cost(self, clock: str) -> float:
        """Seconds by the clock on the wall or of the processor's work."""
        return self.cpu_seconds if clock == "cpu" else self.seconds


class Side:
    """A child process that holds one side; its environment is that of a worker.

    Args:
        kind: A name in `child.SIDES`.
        threads: 0: as many as there are cores.
        arguments: Of the side's constructor.
    """

    def __init__(self, kind: str, threads: int, **arguments: Any) -> None:
        OUT.mkdir(exist_ok=True)
        self._log = (OUT / "bench.log").open("ab")
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "child.py"), kind],
            env=environment(os.environ, threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        made = self.call("", **arguments)
        self.about: dict[str, Any] = made.result
        self.start_bytes = made.peak_bytes

    def call(self, name: str, **arguments: Any) -> Timed:
        """Run one method of the side."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"call": name, "arguments": arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"a side of the comparison ended; see {OUT / 'bench.log'}")
        return Timed(**json.loads(line))

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait()
        self._log.close()


@contextmanager
def daemon(threads: int, **settings: str) -> Iterator[Path]:
    """A `firetitand` of its own; yields its home. Ends with everything it started.

    Args:
        threads: Of its workers; 0: as many as there are cores.
        settings: Added to its environment.
    """
    home = OUT / "bench"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(mode=0o700, parents=True)
    os.environ["FIRETITAN_HOME"] = str(home)
    os.environ.pop("FIRETITAN_ADDRESS", None)
    variables = {**os.environ, **settings}
    if threads:
        variables["OMP_NUM_THREADS"] = str(threads)
    with (home / "daemon.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "firetitan_daemon", "serve"],
            env=variables,
            stdout=log,
            stderr=log,
        )
        try:
            while not (home / "daemon.json").exists():
                if process.poll() is not None:
                    sys.exit(f"firetitand ended; see {home / 'daemon.log'}")
                time.sleep(0.05)
            yield home
        finally:
            process.terminate()
            process.wait(timeout=60)


def worker_usage(home: Path) -> tuple[float, int]:
    """Processor seconds of a daemon and its workers, and the largest one's highest memory."""
    seconds, peaks = 0.0, [0]
    own = json.loads((home / "daemon.json").read_text())["pid"]
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        is_worker = "firetitan_daemon.worker" in words and any(str(home) in word for word in words)
        if is_worker or process.pid == own:
            times = process.cpu_times()
            seconds += times.user + times.system
            status = Path(f"/proc/{process.pid}/status").read_text()
            lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
            peaks += [int(line.split()[1]) * 1024 for line in lines]
    return seconds, max(peaks)
