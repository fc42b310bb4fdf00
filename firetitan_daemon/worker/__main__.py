"""`python -m firetitan_daemon.worker trainer|sampler <id> <folder>`: a worker process.

Knows: its folder, signals, its end. Must not know: who started it, numbers. Imports no torch: that
comes with the model. The launcher sets threads and malloc in the environment before exec.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

from firetitan.worker.v1 import worker_pb2
from google.protobuf import json_format

from firetitan_daemon import handshake
from firetitan_daemon.durable import publish_file
from firetitan_daemon.worker.server import SAMPLER, TRAINER, WorkerServer

STOP_GRACE_S = 2.0
SWITCH_INTERVAL_S = 0.001
"""How long a computing thread may keep the interpreter from the event loop."""

log = logging.getLogger("firetitan.worker")


def main() -> None:
    """Serve until asked to stop; leaves `exit.json` behind."""
    parser = argparse.ArgumentParser(prog="python -m firetitan_daemon.worker")
    parser.add_argument("kind", choices=(TRAINER, SAMPLER))
    parser.add_argument("worker_id")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    os.umask(0o077)
    logging.basicConfig(
        stream=sys.stderr,
        level=os.environ.get("FIRETITAN_LOG_LEVEL", "info").upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    faulthandler.enable()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    folder: Path = arguments.folder
    code, cause = 1, "crashed"
    try:
        spec = read_spec(folder, arguments.kind, arguments.worker_id)
        cause = asyncio.run(serve(spec, folder))
        code = 0
    except BaseException as error:
        cause = f"{type(error).__name__}: {error}"
        raise
    finally:
        log.info("event=exit code=%d cause=%r", code, cause)
        write_exit(folder, code, cause)
    sys.stdout.flush()
    sys.stderr.flush()
    # The compute thread may be in a long operation; nothing of it is wanted any more.
    os._exit(code)


def read_spec(folder: Path, kind: str, worker_id: str) -> worker_pb2.WorkerSpec:
    """The specification in a worker's folder.

    Raises:
        ValueError: It is for another worker, or of a protocol this one does not speak.
    """
    text = (folder / handshake.SPEC).read_text(encoding="utf-8")
    spec = json_format.Parse(text, worker_pb2.WorkerSpec())
    if (spec.kind, spec.worker_id) != (kind, worker_id):
        raise ValueError(
            f"{folder / handshake.SPEC} is for {spec.kind} {spec.worker_id}, "
            f"this was started as {kind} {worker_id}"
        )
    if spec.protocol_version < handshake.OLDEST_PROTOCOL_VERSION:
        raise ValueError(
            f"the daemon speaks worker protocol {spec.protocol_version}, "
            f"this worker {handshake.OLDEST_PROTOCOL_VERSION} or later"
        )
    return spec


async def serve(spec: worker_pb2.WorkerSpec, folder: Path) -> str:
    """Serve and say so in `bootstrap.json`; returns why it ended."""
    server = WorkerServer(spec)
    cause = "asked to shut down"

    def on_signal(number: int) -> None:
        nonlocal cause
        cause = f"ended by {signal.Signals(number).name}"
        server.ask_to_stop()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    await server.start()
    result = worker_pb2.BootstrapResult(
        protocol_version=handshake.PROTOCOL_VERSION,
        address=spec.address,
        pid=os.getpid(),
        incarnation=spec.incarnation,
        start_ticks=handshake.start_ticks(os.getpid()),
        boot_id=handshake.boot_id(),
    )
    publish_file(
        folder / handshake.BOOTSTRAP, json_format.MessageToJson(result).encode(), fsync=False
    )
    log.info("event=serving kind=%s worker=%s pid=%d", spec.kind, spec.worker_id, os.getpid())
    await server.wait_for_stop()
    await server.stop(STOP_GRACE_S)
    return cause


def write_exit(folder: Path, code: int, cause: str) -> None:
    """Leave word of how the process ended, for a daemon that is not its parent."""
    word = {"code": code, "cause": cause, "time": time.time()}
    publish_file(folder / handshake.EXIT, json.dumps(word).encode(), fsync=False)


if __name__ == "__main__":
    main()
