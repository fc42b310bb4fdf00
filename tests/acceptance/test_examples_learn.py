"""The examples on the real 135M model, through a real daemon over its socket, three seeds each."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from support.daemon import DaemonProcess

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SEEDS = [0, 1, 2]


def run_example(daemon: DaemonProcess, name: str, seed: int) -> dict[str, list[float]]:
    """Run an example in a process of its own; returns its report."""
    program = (
        "import dataclasses, json, sys\n"
        f"import {name} as example\n"
        "from firetitan_client import FiretitanServiceClient\n"
        "with FiretitanServiceClient.from_firetitan_config(\n"
        "    base_model=example.MODEL, lora_rank=16, cleanup_trainer_on_close=True,\n"
        "    cleanup_deployment_on_close='delete') as service:\n"
        f"    report = example.train(service, seed={seed})\n"
        "print(json.dumps(dataclasses.asdict(report)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=EXAMPLES,
        env={**os.environ, "FIRETITAN_ADDRESS": daemon.address},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=1700,
    )
    print(name, seed, done.stdout)
    report: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", SEEDS)
def test_fine_tuning_learns_and_carries_over(daemon: DaemonProcess, seed: int) -> None:
    report = run_example(daemon, "sft", seed)
    losses, (before, after) = report["losses"], report["heldout"]
    assert statistics.mean(losses[-3:]) <= 0.5 * losses[0]
    assert after <= 0.85 * before


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", SEEDS)
def test_reward_rises_on_seen_and_unseen_questions(daemon: DaemonProcess, seed: int) -> None:
    report = run_example(daemon, "grpo", seed)
    rewards, (before, after) = report["rewards"], report["heldout"]
    # One step asks four questions; only several steps, or all held-out ones, tell where it starts.
    assert 0.1 <= statistics.mean(rewards[:4]) <= 0.6
    assert 0.1 <= before <= 0.6
    assert statistics.mean(rewards[-4:]) >= statistics.mean(rewards[:4]) + 0.2
    assert after > before
