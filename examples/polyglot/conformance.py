"""Runs a client in any language against a daemon through a proxy that gets in its way, and judges.

    python examples/polyglot/conformance.py -- node examples/polyglot/node/dist/src/main.js

The client is started as `COMMAND ADDRESS TRAINER_ID DEPLOYMENT_ID STEPS` and has to:

1. attach to the session of the trainer;
2. send ForwardBackward and OptimStep STEPS times, all before it waits for the first;
3. send an OptimStep whose `expected_step` is wrong and a Forward behind it, see both fail, and send
   a Forward that succeeds;
4. save a snapshot, hotload it, sample from it (Sample or SampleStream), and exit with 0.

The rules it is judged by are those of docs/protocol.md; `rules.py` has them one by one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from firetitan.v1 import training_service_pb2, training_service_pb2_grpc
from proxy import UNLIMITED, Call, Proxy
from rules import judge

from firetitan_client import FiretitanServiceClient

TRAINER, DEPLOYMENT, STEPS = "conformance", "conformance", 4
CLIENT_TIMEOUT_S = 120.0


@contextmanager
def daemon(home: Path) -> Iterator[str]:
    """A `firetitand` of its own; yields its address."""
    environment = os.environ | {"FIRETITAN_HOME": str(home)}
    environment.pop("FIRETITAN_ADDRESS", None)
    command = [sys.executable, "-m", "firetitan_daemon"]
    with (home / "daemon.log").open("wb") as log:
        process = subprocess.Popen([*command, "serve"], env=environment, stdout=log, stderr=log)
        try:
            while not (home / "daemon.json").exists():
                if process.poll() is not None:
                    sys.exit((home / "daemon.log").read_text())
                time.sleep(0.05)
            yield json.loads((home / "daemon.json").read_text())["address"]
        finally:
            process.terminate()
            process.wait(timeout=60)


async def record(target: str, folder: Path, command: list[str]) -> tuple[int, list[Call]]:
    """Run the client behind the proxy; its exit code (124: too slow) and what it said."""
    proxy = Proxy(target)
    server = grpc.aio.server(options=UNLIMITED)
    server.add_generic_rpc_handlers((proxy,))
    address = f"unix:{folder / 'proxy.sock'}"
    server.add_insecure_port(address)
    await server.start()
    process = await asyncio.create_subprocess_exec(
        *command, address, TRAINER, DEPLOYMENT, str(STEPS)
    )
    try:
        code = await asyncio.wait_for(process.wait(), CLIENT_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()
        code = 124
    await server.stop(grace=1)
    return code, proxy.calls


def steps_of(address: str, session: str) -> int:
    """Optimizer steps a session has taken."""
    with grpc.insecure_channel(address) as channel:
        stub = training_service_pb2_grpc.TrainingServiceStub(channel)
        request = training_service_pb2.GetSessionRequest(name=session)
        return int(stub.GetSession(request, timeout=30).session.step)


def run(command: list[str]) -> dict[str, list[str]]:
    """What is wrong with a client, rule by rule; empty lists where nothing is."""
    with tempfile.TemporaryDirectory(prefix="ft-") as folder, daemon(Path(folder)) as address:
        with FiretitanServiceClient.from_firetitan_config(
            base_url=address,
            base_model="firetitan/toy",
            lora_rank=0,
            trainer_job_id=TRAINER,
            deployment_id=DEPLOYMENT,
            cleanup_trainer_on_close=True,
            cleanup_deployment_on_close="delete",
        ) as service:
            training = service.create_training_client()
            code, calls = asyncio.run(record(address, Path(folder), command))
            steps = steps_of(address, training.session_name)
    found = judge(calls)
    found["exit"] = [] if code == 0 else [f"the client exited with {code}"]
    found["exactly_once"] = (
        [] if steps == STEPS else [f"the session took {steps} steps, {STEPS} were asked for"]
    )
    return found


def main() -> None:
    """Command line; exits with 1 where a rule is broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="+", help="the client, after --")
    findings = run(parser.parse_args().command)
    for rule, wrong in findings.items():
        print(f"{'ok  ' if not wrong else 'FAIL'} {rule}")
        for line in wrong:
            print(f"     {line}")
    sys.exit(any(findings.values()))


if __name__ == "__main__":
    main()
