"""A real `firetitand` process on a home of its own."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from firetitan_daemon.places import Places


class DaemonProcess:
    """Starts, kills and stops a daemon; ends only processes it started or that its home names.

    Args:
        home: Becomes FIRETITAN_HOME.
        environment: Added to the daemon's environment, e.g. failpoints.
        max_files: How many files it may have open; 0: as many as this process.
    """

    def __init__(
        self, home: Path, environment: dict[str, str] | None = None, *, max_files: int = 0
    ) -> None:
        self.home = home
        self.max_files = max_files
        self.environment = environment or {}
        self.process: subprocess.Popen[Any] | None = None

    @property
    def address(self) -> str:
        """The gRPC address of the running daemon."""
        return str(json.loads((self.home / "daemon.json").read_text())["address"])

    @property
    def log(self) -> str:
        """Everything the daemons on this home have printed."""
        return (self.home / "test-daemon.log").read_text()

    def start(self, environment: dict[str, str] | None = None, timeout_s: float = 20.0) -> str:
        """Start and wait until it serves; returns its address."""
        self.launch(environment)
        return self.until_serving(timeout_s)

    def until_serving(self, timeout_s: float = 20.0) -> str:
        """Wait until what was launched serves; returns its address."""
        process, deadline = self.process, time.monotonic() + timeout_s
        assert process is not None
        while not self._serves():
            if process.poll() is not None:
                raise RuntimeError(f"firetitand exited {process.returncode}:\n{self.log}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"firetitand does not serve:\n{self.log}")
            time.sleep(0.02)
        return self.address

    def launch(self, environment: dict[str, str] | None = None) -> subprocess.Popen[Any]:
        """Start it and do not wait for it."""
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        variables = {
            **os.environ,
            **self.environment,
            **(environment or {}),
            "FIRETITAN_HOME": str(self.home),
        }
        variables.pop("FIRETITAN_ADDRESS", None)
        with (self.home / "test-daemon.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "firetitan_daemon", "serve"],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        if self.max_files:
            limits = (self.max_files, self.max_files)
            resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE, limits)
        return self.process

    def _serves(self) -> bool:
        assert self.process is not None
        try:
            return bool(
                json.loads((self.home / "daemon.json").read_text())["pid"] == self.process.pid
            )
        except (FileNotFoundError, json.JSONDecodeError):
            return False

    def kill(self) -> None:
        """`kill -9` and reap."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def wait_exit(self, timeout_s: float = 60.0) -> int:
        """Wait until it ended by itself."""
        assert self.process is not None
        return self.process.wait(timeout_s)

    def stop(self) -> None:
        """SIGTERM, wait, then end the workers it left running."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
        for pid in self.worker_pids():
            os.kill(pid, signal.SIGKILL)
        run = Places(self.home).run
        if run.parent != self.home:
            shutil.rmtree(run, ignore_errors=True)

    def worker_pids(self, kind: str = "") -> list[int]:
        """Live worker processes whose bundle lies under this home, all or of one kind."""
        wanted = kind.encode() or b"firetitan_daemon.worker"
        pids = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if {b"firetitan_daemon.worker", wanted} <= set(command) and any(
                argument.startswith(str(self.home).encode()) for argument in command
            ):
                pids.append(int(entry.name))
        return pids
