"""docs/protocol.md: its program runs as printed, its table of reasons is the one in force."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from firetitan.v1 import training_service_pb2
from support.daemon import DaemonProcess
from support.stubs import TOY

from firetitan_daemon.core.errors import CODES
from firetitan_daemon.core.ports import Limits
from firetitan_daemon.rpc.operations import MAX_STREAMED_BYTES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "protocol.md").read_text()


def program() -> str:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1
    return str(blocks[0])


def test_the_program_needs_the_stubs_alone() -> None:
    imported = set()
    for node in ast.walk(ast.parse(program())):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
    assert imported - set(sys.stdlib_module_names) == {"grpc", "numpy", "firetitan.v1"}


@pytest.mark.timeout(90)
def test_the_program_trains_a_session_that_the_client_made(
    daemon: DaemonProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tinker

    from firetitan_client import FiretitanServiceClient

    monkeypatch.setenv("FIRETITAN_ADDRESS", daemon.address)
    script = tmp_path / "program.py"
    script.write_text(program())
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"target_tokens": np.array([2, 3, 4])},
    )
    params = tinker.AdamParams(learning_rate=1e-2)
    with FiretitanServiceClient.from_firetitan_config(base_model=TOY, lora_rank=0) as service:
        policy = service.create_training_client(base_model=TOY, lora_rank=0)

        def session_step() -> int:
            request = training_service_pb2.GetSessionRequest(name=policy.session_name)
            return int(service.stubs.training.GetSession(request).session.step)

        policy.forward_backward([datum], "cross_entropy").result()
        assert policy.optim_step(params).result().metrics["step"] == 1
        assert session_step() == 1
        done = subprocess.run(
            [sys.executable, str(script), daemon.address, policy.model_id, service.deployment_id],
            env={**os.environ, "PYTHONPATH": str(ROOT / "proto")},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        said = re.fullmatch(
            r"loss \d+\.\d+ over 7 tokens\nstep 2\nsaved (snapshots/from-stubs-[0-9a-f]{8})\n"
            r"sampled \[[0-9, ]+\] from (\S+)\n",
            done.stdout,
        )
        assert said is not None, done.stdout
        assert said[1] == said[2]
        assert session_step() == 2
        policy.forward_backward([datum], "cross_entropy").result()
        assert policy.optim_step(params).result().metrics["step"] == 3
        sampled = service.create_sampling_client().sample(
            tinker.ModelInput.from_ints([1]), 1, tinker.SamplingParams(max_tokens=2)
        )
        assert sampled.result().snapshot == said[1].rpartition("/")[2]


def test_reasons_and_codes_are_those_in_force() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_]+) \|", PAGE, re.MULTILINE)
    assert rows == [(reason.value, code) for reason, code in CODES.items()]


def test_limits_are_the_defaults() -> None:
    section = PAGE.partition("\n## Limits\n")[2].partition("\n## ")[0]
    limits = Limits()
    for text in (
        f"| one message | {limits.max_message_bytes // 2**20} MiB |",
        f"| commands in flight of one session | {limits.max_session_operations} |",
        f"| operations in flight in all | {limits.max_operations} |",
        f"| bytes of queued payloads in all | {limits.max_queued_bytes // 2**20} MiB |",
        f"| streams open at a time | {limits.max_streams} |",
        f"| waiting for a missing seq | {limits.gap_timeout_s:.0f} s |",
        f"| a result inside a stream | {MAX_STREAMED_BYTES // 2**20} MiB |",
    ):
        assert text in section
