"""Several processes, one session: what the second sees, and what a dead first one leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.daemon import DaemonProcess
from support.data import ragged_data

pytestmark = pytest.mark.timeout(180)

_SECOND = """
import os, sys, time
from firetitan_client import FiretitanServiceClient
from support.data import ragged_data

trainer, mode = sys.argv[1:3]
service = FiretitanServiceClient.from_firetitan_config(trainer_job_id=trainer)
policy = service.create_training_client()
for datum in ragged_data(seed=1, count=3):
    policy.forward_backward([datum], "cross_entropy").result()
print("accumulated", flush=True)
if mode == "hang":
    time.sleep(600)
"""


def second_process(daemon: DaemonProcess, trainer: str, mode: str) -> subprocess.Popen[str]:
    """A process that is given the trainer's id alone and accumulates three micro-batches."""
    return subprocess.Popen(
        [sys.executable, "-c", _SECOND, trainer, mode],
        env={
            **os.environ,
            "FIRETITAN_ADDRESS": daemon.address,
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
        stdout=subprocess.PIPE,
        text=True,
    )


def pending_gradients(home: Path, name: str) -> dict[str, np.ndarray]:
    """The gradients in the checkpoint that was saved last under a name."""
    files = (home / "store" / "checkpoints").glob(f"{name}-*/gradients.safetensors")
    return load_file(max(files, key=os.path.getmtime))


def relative_l2(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """The largest relative L2 distance over the tensors."""
    assert found.keys() == wanted.keys() and found
    return max(
        float(np.linalg.norm(found[name] - wanted[name]) / np.linalg.norm(wanted[name]))
        for name in wanted
        if np.linalg.norm(wanted[name]) > 0
    )


@pytest.mark.parametrize("lora_rank", [4, 0])
def test_killed_process_leaves_its_gradients(
    daemon: DaemonProcess, tiny_llama: Path, lora_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tinker

    from firetitan_client import FiretitanServiceClient

    monkeypatch.setenv("FIRETITAN_ADDRESS", daemon.address)

    def service() -> FiretitanServiceClient:
        return FiretitanServiceClient.from_firetitan_config(
            base_model=str(tiny_llama), lora_rank=lora_rank, seed=11, create_deployment=False
        )

    with service() as shared, service() as alone:
        policy = shared.create_training_client(base_model=str(tiny_llama), lora_rank=lora_rank)
        doomed = second_process(daemon, shared.trainer_job_id, "hang")
        assert doomed.stdout is not None
        own = [
            policy.forward_backward([datum], "cross_entropy")
            for datum in ragged_data(seed=2, count=3)
        ]
        for future in own:
            future.result()
        assert doomed.stdout.readline() == "accumulated\n"
        doomed.send_signal(signal.SIGKILL)
        doomed.communicate()
        policy.save_state("shared").result()
        metrics = policy.optim_step(tinker.AdamParams(learning_rate=1e-3)).result().metrics

        control = alone.create_training_client(base_model=str(tiny_llama), lora_rank=lora_rank)
        everything = ragged_data(seed=1, count=3) + ragged_data(seed=2, count=3)
        control.forward_backward(everything, "cross_entropy").result()
        control.save_state("alone").result()
        wanted = control.optim_step(tinker.AdamParams(learning_rate=1e-3)).result().metrics

        found_gradients = pending_gradients(daemon.home, "shared")
        assert relative_l2(found_gradients, pending_gradients(daemon.home, "alone")) < 1e-5
        assert metrics["step"] == wanted["step"] == 1
        assert metrics["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("mode", ["none", "num_loss_tokens", "num_sequences"])
def test_normalisation_counts_every_process(
    daemon: DaemonProcess, tiny_llama: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three ragged micro-batches of two processes, one of them with weight 0 throughout."""
    import tinker

    from firetitan_client import FiretitanServiceClient

    monkeypatch.setenv("FIRETITAN_ADDRESS", daemon.address)
    with FiretitanServiceClient.from_firetitan_config(
        base_model=str(tiny_llama), lora_rank=4, seed=11, create_deployment=False
    ) as service:
        policy = service.create_training_client(base_model=str(tiny_llama), lora_rank=4)

        def norm_of(normalization: str | None) -> float:
            step = policy.optim_step(
                tinker.AdamParams(learning_rate=0.0), grad_accumulation_normalization=normalization
            )
            return float(step.result().metrics["grad_norm"])

        mine = ragged_data(seed=5, count=2)
        silent = ragged_data(seed=6, count=1, weight=0.0)
        theirs = ragged_data(seed=1, count=3)
        policy.forward_backward([*mine, *silent, *theirs], "cross_entropy").result()
        raw = norm_of(None)

        policy.forward_backward(mine, "cross_entropy").result()
        other = second_process(daemon, service.trainer_job_id, "leave")
        assert other.communicate(timeout=120)[0] == "accumulated\n"
        policy.forward_backward(silent, "cross_entropy").result()
        loss_tokens = sum(
            int(np.count_nonzero(datum.loss_fn_inputs["weights"].to_numpy()))
            for datum in [*mine, *theirs]
        )
        divisor = {"none": 1, "num_loss_tokens": loss_tokens, "num_sequences": 5}[mode]
        assert norm_of(mode) == pytest.approx(raw / divisor, rel=1e-5)
