"""`make chaos`: train while processes die, train again undisturbed, compare bit for bit.

    python tests/chaos/run.py                       # the 135M model, about 10 minutes
    python tests/chaos/run.py --lora-rank 0         # every parameter

The first run goes on until enough was killed and enough steps were taken; the second takes as many
steps. No future may fail in either, and what they drew and saved must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "chaos")]
from killer import Killer  # noqa: E402
from recipe import Trained, train  # noqa: E402
from support.daemon import DaemonProcess  # noqa: E402

from firetitan_client import FiretitanServiceClient  # noqa: E402

_FACT = re.compile(r"(\w+)=(\S+)")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Settings:
    """How much of what."""

    model: str = MODEL
    lora_rank: int = 16
    seed: int = 0
    steps: int = 20
    """At least; more where it takes longer to kill enough."""
    kills: int = 10
    of_each: int = 2
    interval_s: float = 20.0
    trainer_gap_s: float = 60.0
    steps_between: int = 0
    max_steps: int = 500


@dataclass(frozen=True)
class Result:
    """What happened."""

    steps: int
    kills: list[str]
    disturbed_s: float
    undisturbed_s: float
    recoveries: list[dict[str, float]]
    """Of the trainer: seconds from its end until its session went on, loading and replaying. One in
    whose midst the daemon was killed is not told of: the next daemon went on with it."""
    trainers: int
    """Processes that were the trainer, one after another."""
    digests: tuple[str, str]
    same: bool
    void: bool
    """Too little was killed, or too few steps taken."""


def chaos(settings: Settings, folder: Path) -> Result:
    """Both runs.

    Args:
        settings: How much.
        folder: For the homes of both daemons; emptied.
    """
    shutil.rmtree(folder, ignore_errors=True)
    daemon = DaemonProcess(folder / "disturbed")
    daemon.start(timeout_s=60)
    killer = Killer(
        daemon,
        interval_s=settings.interval_s,
        trainer_gap_s=settings.trainer_gap_s,
        steps_between=settings.steps_between,
        seed=settings.seed,
    )

    def while_killing(steps: int) -> bool:
        killer.steps = steps
        if steps == 1:
            killer.start()
        enough = steps >= settings.steps and killer.enough(settings.kills, settings.of_each)
        return not enough and steps < settings.max_steps and killer.error is None

    try:
        disturbed, disturbed_s = _train(settings, daemon, while_killing)
        killer.finish()
    finally:
        daemon.stop()
    taken = len(disturbed.losses)
    calm = DaemonProcess(folder / "undisturbed")
    calm.start(timeout_s=60)
    try:
        undisturbed, undisturbed_s = _train(settings, calm, lambda steps: steps < taken)
    finally:
        calm.stop()
    return Result(
        steps=taken,
        kills=killer.kills,
        disturbed_s=disturbed_s,
        undisturbed_s=undisturbed_s,
        recoveries=_recoveries(daemon.log),
        trainers=len(set(re.findall(r"worker=(trainer-\w+)", daemon.log))),
        digests=(disturbed.digest, undisturbed.digest),
        same=disturbed == undisturbed,
        void=taken < settings.steps or not killer.enough(settings.kills, settings.of_each),
    )


def _train(
    settings: Settings, daemon: DaemonProcess, go_on: Callable[[int], bool]
) -> tuple[Trained, float]:
    began = time.monotonic()
    with FiretitanServiceClient.from_firetitan_config(
        address=daemon.address, base_model=settings.model, lora_rank=settings.lora_rank
    ) as service:
        trained = train(
            service,
            settings.model,
            lora_rank=settings.lora_rank,
            seed=settings.seed,
            go_on=go_on,
        )
    return trained, time.monotonic() - began


def _recoveries(log: str) -> list[dict[str, float]]:
    lines = re.findall(r"recovered session=\S+ (.*)", log)
    return [{name: float(value) for name, value in _FACT.findall(line)} for line in lines]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = Settings()
    parser.add_argument("--model", default=default.model, help="Hugging Face id or folder")
    parser.add_argument("--lora-rank", type=int, default=default.lora_rank, help="0: every one")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--steps", type=int, default=default.steps, help="at least")
    parser.add_argument("--kills", type=int, default=default.kills, help="at least")
    parser.add_argument("--interval-s", type=float, default=default.interval_s)
    parser.add_argument("--trainer-gap-s", type=float, default=default.trainer_gap_s)
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "chaos")
    given = vars(parser.parse_args())
    os.environ["OMP_NUM_THREADS"] = str(given.pop("threads"))
    folder = given.pop("folder")
    result = chaos(Settings(**given), folder)
    (folder / "chaos.json").write_text(json.dumps(asdict(result), indent=2) + "\n")
    print(json.dumps(asdict(result), indent=2))
    if result.void:
        sys.exit("void: too little was killed or too few steps were taken")
    if not result.same:
        sys.exit("the weights, losses or tokens differ from those of the undisturbed run")


if __name__ == "__main__":
    main()
