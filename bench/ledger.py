"""What it costs that nothing accepted is lost: spool, ledger and calls, beside the computing.

Knows: the worker's log of what it computed, the daemon's processor time. Must not know: how a
command is kept.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import psutil
import tinker
import workload
from report import Finding
from sides import daemon

from firetitan_client import FiretitanServiceClient

COST_TARGET = 0.02
"""Largest part of a step's time."""
_WITHOUT_POINTS = {
    # Recovery points are measured by `recovery`.
    "FIRETITAN_RECOVERY_INTERVAL_S": "1e6",
    "FIRETITAN_RECOVERY_REPLAY_S": "1e6",
    "FIRETITAN_LOG_LEVEL": "debug",
}
_COMPUTED = re.compile(r"event=executed .* computed_s=(\S+)")


def measure(model: str, threads: int, lengths: list[int], vocab: int, rounds: int) -> list[Finding]:
    """Steps of an adapter by client, daemon and worker, sent without waiting for one another.

    What of their time the trainer did not compute is cost, and so is all of the daemon's processor
    time, which it takes from the trainer where that uses every core.

    Args:
        model: Hugging Face id or folder.
        threads: Of the trainer; 0: as many as there are cores.
        lengths: Of the sequences of a step.
        vocab: Token ids are drawn below it.
        rounds: Steps, times two.
    """
    data = [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints(one.tokens.tolist()),
            loss_fn_inputs={"target_tokens": one.targets, "weights": one.weights},
        )
        for one in workload.make_batch(lengths, vocab, half=False)
    ]
    with (
        daemon(threads, **_WITHOUT_POINTS) as home,
        FiretitanServiceClient.from_firetitan_config(
            base_model=model,
            lora_rank=workload.RANK,
            create_deployment=False,
            cleanup_trainer_on_close=True,
        ) as service,
    ):
        policy = service.create_training_client(base_model=model, lora_rank=workload.RANK)

        def steps(count: int) -> None:
            futures = []
            for _ in range(count):
                futures.append(policy.forward_backward(data, "cross_entropy"))
                futures.append(policy.optim_step(tinker.AdamParams(learning_rate=1e-4)))
            for future in futures:
                future.result()

        steps(2)
        own = psutil.Process(json.loads((home / "daemon.json").read_text())["pid"])
        before, used, began = len(_computed(home)), own.cpu_times(), time.monotonic()
        steps(2 * rounds)
        wall_s = time.monotonic() - began
        spent = own.cpu_times()
        daemon_s = spent.user + spent.system - used.user - used.system
        computed = _computed(home)[before:]
    computed_s = sum(computed)
    assert len(computed) == 4 * rounds, f"the worker's log tells of {len(computed)} commands"
    share = (wall_s - computed_s + daemon_s) / wall_s
    return [
        Finding(
            "spool, ledger and calls: share of a step",
            f"{share:.2%}",
            f"{COST_TARGET:.2%}",
            COST_TARGET / share,
            1.0,
            {
                "steps": 2 * rounds,
                "wall_s": wall_s,
                "computed_s": computed_s,
                "daemon_cpu_s": daemon_s,
            },
        )
    ]


def _computed(home: Path) -> list[float]:
    """Seconds that the trainer computed, for each command so far."""
    logs = (home / "workers").glob("*/worker.log")
    return [float(one) for log in logs for one in _COMPUTED.findall(log.read_text())]
