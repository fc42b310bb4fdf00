"""Exports in a process of their own: the daemon loads no tensors.

Knows: the job's form, processes. Must not know: what is exported.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.ports import Exporter, ExportJob
from firetitan_daemon.launch.local import environment


class ProcessExporter(Exporter):
    """Runs `firetitan_daemon.worker.export`.

    Args:
        num_threads: It computes with; 0: as many as there are cores.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads

    async def export(self, job: ExportJob) -> None:
        """Write a folder; it is there as a whole, or not."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # whatever lies in the folder the daemon was started in is no module
            "-m",
            "firetitan_daemon.worker.export",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment(os.environ, self._num_threads),
        )
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(json.dumps(dataclasses.asdict(job)).encode() + b"\n")
        # Left open: its end tells the export that the daemon is gone.
        said, log, _ = await asyncio.gather(
            process.stdout.read(), process.stderr.read(), process.wait()
        )
        process.stdin.close()
        if process.returncode != 0:
            # For the log alone: whoever asked is told where in it.
            tail = log.decode(errors="replace").strip()[-4000:]
            raise RuntimeError(f"the export ended with {process.returncode}: {tail}")
        outcome = json.loads(said or b"{}")
        if outcome:
            raise FiretitanError(
                Reason(outcome["reason"]), outcome["message"], field=outcome["field"]
            )
