"""`make bench`: compare speed with transformers and PEFT, both sides in turns, in one run.

    python bench/run.py                  # everything, minutes
    python bench/run.py --only uniform   # one comparison
    python bench/run.py --quick          # tiny batches: does it still run?

Times of one machine say little elsewhere and change with what else runs on it; the ratios are what
counts. Each round times both sides back to back, and the median over the rounds is reported.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ledger
import psutil
import recovery
import tinker
import workload
from report import Finding, interleaved, show, write
from sides import OUT, Side, Timed, daemon, worker_usage

from firetitan_client import FiretitanServiceClient
from firetitan_daemon.engine.resolve import SMOLLM, resolve_model


@dataclass(frozen=True)
class Options:
    """What to run."""

    model: str
    threads: int
    rounds: int
    quick: bool
    clock: str

    def lengths(self, full: tuple[int, ...]) -> list[int]:
        """Sequence lengths of a batch."""
        return list(workload.QUICK if self.quick else full)

    @property
    def vocab(self) -> int:
        """Token ids are drawn below it."""
        return workload.QUICK_VOCAB if self.quick else workload.VOCAB


def uniform(options: Options) -> list[Finding]:
    """Equal lengths, every position in the loss: nothing to gain from packing."""
    lengths = options.lengths(workload.UNIFORM)
    return _steps(options, "step, 8 x 256, all in the loss", lengths, False, 1.0)


def ragged(options: Options) -> list[Finding]:
    """Lengths 32 to 512, the loss on the last half: as chats and rollouts are."""
    lengths = options.lengths(workload.RAGGED)
    return _steps(options, "step, ragged 32..512, half in the loss", lengths, True, 2.0)


def early(options: Options) -> list[Finding]:
    """How far the loss falls in the first steps, against PEFT in float32 from the same adapter."""
    lengths = options.lengths(workload.EARLY)
    adapter = str(OUT / "bench-adapter")
    falls: dict[str, float] = {}
    losses: dict[str, list[float]] = {}
    for name, kind, arguments in (
        ("engine", "engine", {"adapter": adapter}),
        ("float32", "peft", {"adapter": adapter, "dtype": "float32"}),
        ("bfloat16", "peft", {"adapter": adapter, "dtype": "bfloat16"}),
    ):
        with Side(kind, options.threads, model=options.model, **arguments) as side:
            side.call("batch", lengths=lengths, vocab=options.vocab, half=False)
            losses[name] = [side.call("step").result for _ in range(3)]
        falls[name] = losses[name][0] - losses[name][-1]
    return [
        Finding(
            f"loss's fall in 3 steps, as part of PEFT float32's{note}",
            f"{falls[name]:.4f}",
            f"{falls['float32']:.4f}",
            falls[name] / falls["float32"],
            target,
            {"losses": losses},
        )
        for name, note, target in (("engine", "", 0.95), ("bfloat16", " (PEFT bfloat16)", None))
    ]


def custom(options: Options) -> list[Finding]:
    """A loss of the user's own, against a built-in one and against two passes."""
    lengths = options.lengths(workload.CUSTOM)
    ways = ("kept_graph", "built_in", "two_passes")
    times: dict[str, list[float]] = {way: [] for way in ways}
    with Side("engine", options.threads, model=options.model) as side:
        side.call("batch", lengths=lengths, vocab=options.vocab, half=True)
        for way in ways:
            side.call(way)
        for _ in range(options.rounds):
            for way in ways:
                times[way].append(side.call(way).cost(options.clock))
    kept = times["kept_graph"]
    return [
        interleaved("custom loss against a built-in one", kept, times["built_in"], None, {}),
        interleaved("custom loss against two passes", kept, times["two_passes"], None, {}),
    ]


def sampling(options: Options) -> list[Finding]:
    """Groups of samples through client, daemon and worker, against `generate` in a process."""
    lengths = list(workload.QUICK_PROMPTS if options.quick else workload.PROMPTS)
    samples, tokens = (2, 4) if options.quick else (8, 64)
    params = tinker.SamplingParams(max_tokens=tokens, temperature=1.0, stop=[])
    ours: list[Timed] = []
    other: list[Timed] = []
    with (
        daemon(options.threads) as home,
        FiretitanServiceClient.from_firetitan_config(
            base_model=options.model,
            cleanup_trainer_on_close=True,
            cleanup_deployment_on_close="delete",
        ) as service,
        Side("generate", options.threads, model=options.model) as side,
    ):
        sampler = service.create_sampling_client()

        def sample(prompts: list[list[int]], max_tokens: int) -> int:
            futures = [
                sampler.sample(
                    prompt=tinker.ModelInput.from_ints(prompt),
                    num_samples=samples,
                    sampling_params=params.model_copy(update={"max_tokens": max_tokens}),
                )
                for prompt in prompts
            ]
            sequences = [one for future in futures for one in future.result().sequences]
            return sum(len(one.tokens) for one in sequences)

        def generate(prompts: list[list[int]], max_tokens: int) -> Timed:
            return side.call(
                "generate", prompts=prompts, num_samples=samples, max_tokens=max_tokens
            )

        prompts = workload.make_prompts(lengths, options.vocab, 0)
        sample(prompts, 2)
        generate(prompts, 2)
        for number in range(options.rounds):
            prompts = workload.make_prompts(lengths, options.vocab, number + 1)
            started = time.monotonic()
            cpu = worker_usage(home)[0] + time.process_time()
            made = sample(prompts, tokens)
            seconds = time.monotonic() - started
            used, peak_bytes = worker_usage(home)
            ours.append(Timed(made, seconds, used + time.process_time() - cpu, peak_bytes))
            other.append(generate(prompts, tokens))
            assert made == other[-1].result == len(lengths) * samples * tokens
        details = {
            "tokens": len(lengths) * samples * tokens,
            "sides": [{}, side.about],
            "cpu_s": _cpu_seconds(ours, other),
            "peak_bytes": [ours[-1].peak_bytes, other[-1].peak_bytes],
        }
    name = "sampling, 8 prompts x 8 x 64 tokens, by the daemon"
    return [_compared(options, name, ours, other, 2.0, details)]


def hotload(options: Options) -> list[Finding]:
    """From trained weights to a sampler that serves them: seconds, nothing to compare with."""
    findings = []
    with daemon(options.threads):
        for rank, name in ((workload.RANK, "adapter"), (0, "every parameter, deltas")):
            with FiretitanServiceClient.from_firetitan_config(
                base_model=options.model,
                lora_rank=rank,
                cleanup_trainer_on_close=True,
                cleanup_deployment_on_close="delete",
            ) as service:
                findings.append(_hotload(options, service, rank, name))
    return findings


def deaths(options: Options) -> list[Finding]:
    """Recovery points and the death of a trainer, against what they may take."""
    lengths = options.lengths(workload.UNIFORM)
    return recovery.measure(options.model, options.threads, lengths, options.vocab, options.rounds)


def kept(options: Options) -> list[Finding]:
    """What it costs to lose no command, against what it may."""
    lengths = options.lengths(workload.UNIFORM)
    return ledger.measure(options.model, options.threads, lengths, options.vocab, options.rounds)


def _hotload(options: Options, service: Any, rank: int, name: str) -> Finding:
    policy = service.create_training_client(base_model=options.model, lora_rank=rank)
    (sequence,) = workload.make_batch([16], options.vocab, half=False)
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints(sequence.tokens.tolist()),
        loss_fn_inputs={"target_tokens": sequence.targets, "weights": sequence.weights},
    )
    saves, loads = [], []
    for step in range(options.rounds + 1):
        policy.forward_backward([datum], "cross_entropy")
        policy.optim_step(tinker.AdamParams(learning_rate=1e-5)).result()
        started = time.monotonic()
        saved = policy.save_weights_for_sampler(f"step-{step}").result()
        ready = time.monotonic()
        service.create_sampling_client(model_path=saved.path).result()
        saves.append(ready - started)
        loads.append(time.monotonic() - ready)
    # The first one started the deployment, and was a base.
    return interleaved(f"save / hotload, {name}", saves[1:], loads[1:], None, {})


def _steps(
    options: Options, name: str, lengths: list[int], half: bool, target: float
) -> list[Finding]:
    adapter = str(OUT / "bench-adapter")
    threads, model = options.threads, options.model
    with (
        Side("engine", threads, model=model, adapter=adapter) as engine,
        Side("peft", threads, model=model, adapter=adapter, dtype="bfloat16") as peft,
    ):
        sides = (engine, peft)
        for side in sides:
            side.call("batch", lengths=lengths, vocab=options.vocab, half=half)
            side.call("step")
        rounds = [[side.call("step") for side in sides] for _ in range(options.rounds)]
        about = [side.about for side in sides]
        start = [side.start_bytes for side in sides]
    ours, other = ([one[at] for one in rounds] for at in (0, 1))
    peaks = [max(each.peak_bytes for each in timed) for timed in (ours, other)]
    details: dict[str, Any] = {
        "sides": about,
        "cpu_s": _cpu_seconds(ours, other),
        "peak_bytes": peaks,
        "step_bytes": [peak - before for peak, before in zip(peaks, start, strict=True)],
    }
    above, theirs = details["step_bytes"]
    return [
        _compared(options, name, ours, other, target, details),
        Finding(
            "  its memory above the weights",
            f"{above / 1e9:.2f} GB",
            f"{theirs / 1e9:.2f} GB",
            theirs / max(above, 1),
            None,
        ),
    ]


def _compared(
    options: Options,
    name: str,
    ours: list[Timed],
    other: list[Timed],
    target: float,
    details: dict[str, Any],
) -> Finding:
    costs = [[each.cost(options.clock) for each in timed] for timed in (ours, other)]
    return interleaved(name, costs[0], costs[1], target, details)


def _cpu_seconds(ours: list[Timed], other: list[Timed]) -> list[list[float]]:
    return [[each.cpu_seconds for each in timed] for timed in (ours, other)]


COMPARISONS: dict[str, Callable[[Options], list[Finding]]] = {
    "uniform": uniform,
    "ragged": ragged,
    "early": early,
    "custom": custom,
    "sampling": sampling,
    "hotload": hotload,
    "deaths": deaths,
    "ledger": kept,
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=SMOLLM, help="Hugging Face id or folder")
    parser.add_argument("--only", action="append", choices=COMPARISONS, help="may be repeated")
    parser.add_argument("--threads", type=int, default=0, help="of each side; 0: all cores")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu (with --threads 1): on a busy machine",
    )
    parser.add_argument("--quick", action="store_true", help="tiny batches, one round")
    parser.add_argument("--out", type=Path, default=OUT / "bench.json")
    given = parser.parse_args()
    folder = str(resolve_model(given.model).path)
    rounds = 1 if given.quick else given.rounds
    options = Options(folder, given.threads, rounds, given.quick, given.clock)
    findings: list[Finding] = []
    started = time.monotonic()
    for name in given.only or COMPARISONS:
        print(f"{name} ...", flush=True)
        findings += COMPARISONS[name](options)
        show(findings[-2:])
    print()
    show(findings)
    about = {
        "model": given.model,
        "quick": given.quick,
        "clock": given.clock,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "seconds": time.monotonic() - started,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write(given.out, findings, about)
    print(f"\n{given.out}; {about['seconds']:.0f} s")


if __name__ == "__main__":
    main()
