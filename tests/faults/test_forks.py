"""Forks of a client's process, clients sent to others: they work or say why, and never hang."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.daemon import DaemonProcess
from support.forking import TOY, datum
from support.sizes import figure, size

from firetitan_client import DeploymentSampler, FiretitanServiceClient

pytestmark = pytest.mark.timeout(240)

IMPORTS_S = 60


def run(daemon: DaemonProcess, ways: list[str], pace: str) -> list[dict[str, float]]:
    """The program; it ends itself where a way hangs, and nothing of it is left here."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    program = subprocess.Popen(
        [sys.executable, "-m", "support.forking", daemon.address, ",".join(ways), pace],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        output, errors = program.communicate(timeout=IMPORTS_S + 30 * len(ways))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
    assert program.returncode == 0, errors[-6000:]
    return [json.loads(line) for line in output.splitlines()]


@pytest.mark.parametrize("pace", ["idle", "busy"])
def test_every_way_to_fork(daemon: DaemonProcess, pace: str) -> None:
    ways = ["DataLoader", "fork", "executor", "os.fork"] * size(1, 10)
    if pace == "idle":
        ways += ["spawn", "forkserver"]
    *found, end = run(daemon, ways, pace)
    assert [one["way"] for one in found] == ways
    assert all(one["alike"] for one in found), found
    assert end["doubled_or_lost"] == 0
    assert (end["beside"] > 0) == (pace == "busy")
    figure(
        "R29",
        busy=pace == "busy",
        forks=len(ways),
        longest_s=round(max(one["s"] for one in found), 1),
    )


def test_a_child_lets_its_parents_pin_alone(daemon: DaemonProcess) -> None:
    service = FiretitanServiceClient.from_firetitan_config(
        address=daemon.address, base_model=TOY, lora_rank=0
    )
    policy = service.create_training_client()
    first = policy.save_weights_for_sampler("first").result().path
    pinned = service.create_sampling_client(first, pinned=True)
    child = os.fork()
    if child == 0:
        pinned.close()
        service.create_sampling_client().sample([1, 2], 1).result(30)
        time.sleep(0.5)  # a pin is released in the background
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    service.hotload_sampler_snapshot(policy.save_weights_for_sampler("second").result().path)
    assert pinned.sample([1, 2], 1).result(30).snapshot == first


def test_what_does_not_travel_says_what_does(daemon: DaemonProcess) -> None:
    service = FiretitanServiceClient.from_firetitan_config(
        address=daemon.address, base_model=TOY, lora_rank=2
    )
    policy = service.create_training_client()
    for thing, way_out in (
        (policy.forward([datum()], "cross_entropy"), "send its result"),
        (DeploymentSampler(daemon.address, "d"), "make one there"),
        (service.create_reference_client(), "pickle its service"),
    ):
        with pytest.raises(TypeError, match=way_out):
            pickle.dumps(thing)


def test_a_travelled_client_of_a_daemon_that_is_gone_says_so(daemon: DaemonProcess) -> None:
    """In its first call: an error while unpickling would hang a pool of processes."""
    service = FiretitanServiceClient.from_firetitan_config(
        address=daemon.address, base_model=TOY, create_deployment=False
    )
    sent = pickle.dumps(service.create_training_client())
    daemon.stop()
    code = (
        "import pickle, sys\n"
        "policy = pickle.loads(bytes.fromhex(sys.stdin.read()))\n"
        "try:\n"
        "    policy.result(20)\n"
        "except ConnectionError as error:\n"
        "    print(error)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], input=sent.hex(), capture_output=True, text=True, timeout=60
    )
    assert "firetitand serve" in told.stdout, told.stderr
