"""A process that holds one side of a comparison and runs what it is told, one line of JSON a call.

Knows: pipes, clocks, its own memory. Must not know: what is compared with what.

Line in: {"call": name, "arguments": {...}}. Line out: {"result", "seconds", "cpu_seconds",
"peak_bytes"}. The first line in makes the side; its own output goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from typing import Any

SIDES = {
    "engine": ("side_engine", "EngineSide"),
    "peft": ("side_peft", "PeftSide"),
    "generate": ("side_generate", "GenerateSide"),
}


def main() -> None:
    """Serve standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, name = SIDES[sys.argv[1]]
    side: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        started, cpu = time.monotonic(), time.process_time()
        if side is None:
            side = getattr(importlib.import_module(module), name)(**request["arguments"])
            result = side.describe()
        else:
            result = getattr(side, request["call"])(**request["arguments"])
        answer = {
            "result": result,
            "seconds": time.monotonic() - started,
            "cpu_seconds": time.process_time() - cpu,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
