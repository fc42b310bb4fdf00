"""A notebook's kernel: a process that runs cells in an event loop of its main thread, one by one.

Run as a program it reads cells as JSON, a line each, and answers each with what it left in `out` or
with how it failed. It calls itself ipykernel, which lets blocking calls block inside its loop.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

from support.daemon import DaemonProcess

BEGUN = "begun\n"
FIRST_CELL = """
import tinker
from firetitan_client import FiretitanServiceClient
ADAM = tinker.AdamParams(learning_rate=0.1)
DATA = [tinker.Datum(
    model_input=tinker.ModelInput.from_ints([1, 2, 3]),
    loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [1.0, 1.0, 1.0]})]
def make(trainer, **settings):
    return FiretitanServiceClient.from_firetitan_config(
        base_model="firetitan/toy", lora_rank=0, trainer_job_id=trainer, **settings)
"""


class Kernel:
    """The process, and the notebook in front of it."""

    def __init__(self, daemon: DaemonProcess) -> None:
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.kernel"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "FIRETITAN_ADDRESS": daemon.address},
        )
        self.run(FIRST_CELL)

    def run(self, cell: str) -> Any:
        """Run a cell; returns what it left in `out`."""
        self.begin(cell)
        answer = self.end()
        assert not answer["error"], answer["error"]
        return answer["out"]

    def begin(self, cell: str) -> None:
        """Start a cell and do not wait for its end."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps(cell)}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == BEGUN

    def end(self) -> dict[str, Any]:
        """What came of the cell that was begun."""
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def interrupt(self) -> None:
        """Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """`kill -9`, as a restart does where nothing else helps."""
        self._process.kill()
        self._process.communicate()


def _run(loop: asyncio.AbstractEventLoop, cell: str, names: dict[str, Any]) -> str:
    """Run a cell; returns how it failed, empty where it did not."""
    code = compile(cell, "<cell>", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)

    async def work() -> None:
        print(BEGUN, end="", flush=True)
        value = eval(code, names)
        if inspect.iscoroutine(value):
            await value

    task = loop.create_task(work())
    try:
        loop.run_until_complete(task)
    except KeyboardInterrupt:
        if not task.done():  # it waits: an interrupt cancels it
            task.cancel()
            loop.run_until_complete(asyncio.wait([task]))
        return "KeyboardInterrupt"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    """Serve cells until the notebook is closed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.modules["ipykernel"] = types.ModuleType("ipykernel")
    loop, names = asyncio.new_event_loop(), dict[str, Any]()
    for line in sys.stdin:
        names["out"] = None
        error = _run(loop, json.loads(line), names)
        print(json.dumps({"error": error, "out": names.get("out")}), flush=True)


if __name__ == "__main__":
    main()
