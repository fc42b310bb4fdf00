"""`make demo`: a daemon of its own, a short fine-tuning, a short RL run, a table and a picture.

Everything lives under out/demo; the daemon and its workers end with the demo.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpo
import matplotlib
import sft

from firetitan_client import FiretitanServiceClient

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "out"


@contextmanager
def daemon(home: Path) -> Iterator[None]:
    """A `firetitand` with its state under `home`, ended with everything it started."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(mode=0o700, parents=True)
    os.environ["FIRETITAN_HOME"] = str(home)
    os.environ.pop("FIRETITAN_ADDRESS", None)
    command = [sys.executable, "-m", "firetitan_daemon"]
    with (home / "daemon.log").open("wb") as log:
        # A session of its own: Ctrl-C reaches the demo alone, which then clears up over the daemon.
        process = subprocess.Popen(
            [*command, "serve"], stdout=log, stderr=log, start_new_session=True
        )
        try:
            while not (home / "daemon.json").exists():
                if process.poll() is not None:
                    sys.exit(f"firetitand ended; see {home / 'daemon.log'}")
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
            process.wait(timeout=60)


def service(model: str, lora_rank: int) -> FiretitanServiceClient:
    """A service whose trainer and deployment go when it is closed."""
    return FiretitanServiceClient.from_firetitan_config(
        base_model=model,
        lora_rank=lora_rank,
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="delete",
    )


def table(title: str, name: str, values: list[float]) -> None:
    """A row a step, with a bar."""
    print(f"\n{title}\n  step  {name}")
    highest = max(values) or 1.0
    for step, value in enumerate(values, start=1):
        print(f"  {step:4d}  {value:6.3f}  {'#' * round(40 * value / highest)}")


def plot(path: Path, tuned: sft.Report, taught: grpo.Report) -> None:
    """Both curves, side by side."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    steps = range(1, len(tuned.losses) + 1)
    left.plot(steps, tuned.losses, label="training")
    left.plot([1, len(tuned.losses)], tuned.heldout, "o--", label="held out")
    left.set(title="SFT on chats", xlabel="step", ylabel="loss per token", ylim=(0, None))
    steps = range(1, len(taught.rewards) + 1)
    right.plot(steps, taught.rewards, label="training")
    right.plot([1, len(taught.rewards)], taught.heldout, "o--", label="held out")
    right.set(title="GRPO on capitals", xlabel="step", ylabel="mean reward", ylim=(0, 1))
    for axes in (left, right):
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=sft.MODEL, help="Hugging Face id or folder")
    parser.add_argument("--lora-rank", type=int, default=16, help="0: every parameter")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model, rank, seed = options.model, options.lora_rank, options.seed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    start = time.monotonic()
    with daemon(OUT / "demo"):
        with service(model, rank) as one:
            tuned = sft.train(one, model=model, lora_rank=rank, steps=16, seed=seed)
        with service(model, rank) as two:
            taught = grpo.train(two, model=model, lora_rank=rank, steps=16, seed=seed)
    table("SFT: mean loss of the assistant's tokens", "loss", tuned.losses)
    print(f"  conversations never trained on: {tuned.heldout[0]:.3f} -> {tuned.heldout[1]:.3f}")
    table("GRPO: mean reward", "reward", taught.rewards)
    first, last = statistics.mean(taught.rewards[:4]), statistics.mean(taught.rewards[-4:])
    print(f"  first 4 steps {first:.2f}, last 4 steps {last:.2f}")
    print(f"  countries never trained on: {taught.heldout[0]:.2f} -> {taught.heldout[1]:.2f}")
    print(f"\n{sft.QUESTION}\n  before: {tuned.answers[0]}\n  after:  {tuned.answers[1]}")
    print("\nWhat is the capital of Portugal?")
    print(f"  before: {taught.answers[0]}\n  after:  {taught.answers[1]}")
    plot(OUT / "demo.png", tuned, taught)
    print(f"\ncurves in out/demo.png; {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
