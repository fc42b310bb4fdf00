"""What surviving a trainer's death costs, and how long the death takes.

Knows: the daemon's log of its recovery points, the client. Must not know: how points are made.
"""

from __future__ import annotations

import os
import re
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import tinker
import workload
from firetitan.v1 import system_service_pb2, trainer_service_pb2
from report import Finding
from sides import daemon

from firetitan_client import FiretitanServiceClient
from firetitan_daemon.core.recovery import RecoveryLimits

COST_TARGET = 0.03
"""Largest share of training time that recovery points of an adapter may take."""
OUTAGE_S = 2.0
"""What may pass between a death and the next step beside loading the model and replaying."""
_EVERY_STEP = {"FIRETITAN_RECOVERY_INTERVAL_S": "0", "FIRETITAN_RECOVERY_COST_SHARE": "1e9"}
_POINT = re.compile(r"recovery point .* bytes=(\d+) blocked_s=(\S+) compute_s=(\S+)")


def measure(model: str, threads: int, lengths: list[int], vocab: int, rounds: int) -> list[Finding]:
    """Points and a death, of an adapter and of every parameter.

    Args:
        model: Hugging Face id or folder.
        threads: Of the trainer; 0: as many as there are cores.
        lengths: Of the sequences of a step.
        vocab: Token ids are drawn below it.
        rounds: Steps and points that are timed.
    """
    findings = []
    for rank, name in ((workload.RANK, "adapter"), (0, "every parameter")):
        with daemon(threads, **_EVERY_STEP) as home:
            findings += _measure(home, model, rank, name, lengths, vocab, rounds)
    return findings


def _measure(
    home: Path, model: str, rank: int, name: str, lengths: list[int], vocab: int, rounds: int
) -> list[Finding]:
    data = _data(lengths, vocab)
    with FiretitanServiceClient.from_firetitan_config(
        base_model=model, lora_rank=rank, create_deployment=False, cleanup_trainer_on_close=True
    ) as service:
        policy = service.create_training_client(base_model=model, lora_rank=rank)
        steps = [_step(policy, data) for _ in range(rounds + 1)][1:]
        points = _points(home, rounds)
        # A pass whose gradients no step has taken: this is what has to be run again.
        policy.forward_backward(data, "cross_entropy").result()
        _kill_trainer(service)
        delayed_s = _optim_step(policy)
        policy.forward_backward(data, "cross_entropy").result()
        outage_s = delayed_s - _optim_step(policy)
        (stats,) = _info(service).recoveries
    cost_s = statistics.median(blocked + compute for _, blocked, compute in points)
    interval_s = max(_interval(cost_s), statistics.median(steps))
    share, allowed_s = cost_s / interval_s, stats.load_s + stats.replay_s + OUTAGE_S
    return [
        Finding(
            f"recovery points, {name}: share of the time",
            f"{share:.2%}",
            f"{COST_TARGET:.2%}" if rank else "",
            COST_TARGET / share,
            1.0 if rank else None,
            {
                "bytes": points[-1][0],
                "blocked_s": [blocked for _, blocked, _ in points],
                "compute_s": [compute for _, _, compute in points],
                "interval_s": interval_s,
                "step_s": steps,
            },
        ),
        Finding(
            f"trainer's death to the next step, {name}",
            f"{outage_s:.2f} s",
            f"{allowed_s:.2f} s",
            allowed_s / outage_s,
            1.0,
            {"load_s": stats.load_s, "replay_s": stats.replay_s, "recovery_s": stats.recovery_s},
        ),
    ]


def _interval(cost_s: float) -> float:
    """Seconds of work between two points that cost so much, as the daemon's policy has it."""
    limits = RecoveryLimits()
    wished = max(limits.interval_s, cost_s / limits.cost_share)
    return min(wished, max(limits.replay_s, cost_s / limits.max_cost_share))


def _data(lengths: list[int], vocab: int) -> list[tinker.Datum]:
    return [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints(one.tokens.tolist()),
            loss_fn_inputs={"target_tokens": one.targets, "weights": one.weights},
        )
        for one in workload.make_batch(lengths, vocab, half=False)
    ]


def _step(policy: Any, data: list[tinker.Datum]) -> float:
    began = time.monotonic()
    policy.forward_backward(data, "cross_entropy")
    _optim_step(policy)
    return time.monotonic() - began


def _optim_step(policy: Any) -> float:
    began = time.monotonic()
    policy.optim_step(tinker.AdamParams(learning_rate=1e-4)).result()
    return time.monotonic() - began


def _points(home: Path, count: int) -> list[tuple[int, float, float]]:
    """Bytes, seconds the trainer stood still and seconds of computing beside it, of each point.

    Waits for those that are being written; where they overlap with steps there are fewer.
    """
    time.sleep(1.0)
    deadline = time.monotonic() + 60
    while not (found := _POINT.findall((home / "daemon.log").read_text())):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no recovery point; see {home / 'daemon.log'}")
        time.sleep(0.1)
    numbers = [(int(size), float(blocked), float(compute)) for size, blocked, compute in found]
    return numbers[-count:]


def _info(service: FiretitanServiceClient) -> system_service_pb2.GetSystemInfoResponse:
    return service.stubs.system.GetSystemInfo(system_service_pb2.GetSystemInfoRequest())


def _kill_trainer(service: FiretitanServiceClient) -> None:
    request = trainer_service_pb2.GetTrainerRequest(name=f"trainers/{service.trainer_job_id}")
    os.kill(service.stubs.trainers.GetTrainer(request).trainer.worker_pid, signal.SIGKILL)
