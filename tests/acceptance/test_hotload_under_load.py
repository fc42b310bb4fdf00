"""Hotloads while eight clients sample: every answer equals the snapshot it names, and no other."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.daemon import DaemonProcess
from support.data import ragged_data

pytestmark = pytest.mark.timeout(600)

NUM_SAMPLERS = 8
MAX_TOKENS = 12
SAME = 1e-4
"""Largest difference of a logprob l from its recomputation, fp32, relative to 1 + |l|."""
APART = 2e-3
"""Least such difference from the recomputation under any other snapshot."""


class Load:
    """Threads that sample without pause and keep every answer."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.answers: list[tuple[list[int], Any]] = []
        self.errors: list[BaseException] = []
        self.in_flight = 0
        self._lock = threading.Lock()
        self._answered = threading.Condition(self._lock)
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(index,)) for index in range(NUM_SAMPLERS)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, index: int) -> None:
        import tinker

        generator = np.random.default_rng(index)
        while not self._stop.is_set():
            prompt = generator.integers(0, 256, int(generator.integers(2, 10))).tolist()
            with self._lock:
                self.in_flight += 1
            try:
                answer = self.sampler.sample(
                    tinker.ModelInput.from_ints(prompt),
                    num_samples=1,
                    sampling_params=tinker.SamplingParams(
                        max_tokens=MAX_TOKENS,
                        seed=int(generator.integers(1 << 30)),
                        stop=[],
                    ),
                ).result(timeout=60)
            except BaseException as error:
                self.errors.append(error)
                return
            finally:
                with self._lock:
                    self.in_flight -= 1
            with self._answered:
                self.answers.append((prompt, answer))
                self._answered.notify_all()

    def wait_for_answer(self, count: int) -> None:
        """Wait until there are more than `count` answers, or an error."""
        with self._answered:
            assert self._answered.wait_for(lambda: len(self.answers) > count or self.errors, 60)


def recompute(model: Any, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """Logprobs of `tokens` behind `prompt` by the model itself."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0].float()
    logprobs = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return logprobs[torch.arange(len(tokens)), torch.tensor(tokens)].numpy()


def off(wanted: np.ndarray, found: np.ndarray) -> float:
    """The largest difference, relative to 1 + |wanted|."""
    return float((np.abs(wanted - found) / (1 + np.abs(wanted))).max())


def check(answers: list[tuple[list[int], Any]], models: dict[str, Any]) -> set[str]:
    """Every answer equals its own snapshot and neither neighbour, every tenth no other at all.

    Returns the snapshots seen.
    """
    seen = set()
    order = list(models)
    for index, (prompt, answer) in enumerate(answers):
        sequence = answer.sequences[0]
        tokens, found = list(sequence.tokens), np.asarray(sequence.logprobs)
        assert answer.snapshot in models
        seen.add(answer.snapshot)
        own = off(recompute(models[answer.snapshot], prompt, tokens), found)
        assert own < SAME, f"{answer.snapshot}: off by {own}"
        place = order.index(answer.snapshot)
        near = order if index % 10 == 0 else order[max(0, place - 1) : place + 2]
        for name in near:
            if name != answer.snapshot:
                other = off(recompute(models[name], prompt, tokens), found)
                assert other > APART, f"{answer.snapshot} answered as {name} would: off by {other}"
    return seen


def hotload_all(service: Any, names: list[str], load: Load) -> int:
    """Hotload one after the other; returns how many found requests in flight."""
    busy = 0
    for name in names:
        answered = len(load.answers)
        busy += load.in_flight > 0
        service.hotload_sampler_snapshot(name)
        load.wait_for_answer(answered)
    return busy


def train(policy: Any, seed: int, learning_rate: float) -> None:
    import tinker

    policy.forward_backward(ragged_data(seed=seed, count=4), "cross_entropy")
    policy.optim_step(tinker.AdamParams(learning_rate=learning_rate)).result()


def one(home: Path, pattern: str) -> Path:
    """The only file that matches."""
    found = list(home.glob(pattern))
    assert len(found) == 1, found
    return found[0]


@pytest.fixture
def make_service(
    daemon: DaemonProcess, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], Any]:
    from firetitan_client import FiretitanServiceClient

    monkeypatch.setenv("FIRETITAN_ADDRESS", daemon.address)
    return lambda lora_rank: FiretitanServiceClient.from_firetitan_config(
        base_model=str(tiny_llama), lora_rank=lora_rank, seed=5, deployment_id="under-load"
    )


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_lora(daemon: DaemonProcess, tiny_llama: Path, make_service: Callable[[int], Any]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with make_service(4) as service:
        policy = service.create_training_client(base_model=str(tiny_llama), lora_rank=4)
        names = []
        for index in range(4):
            for repeat in range(3):
                # Steeper models would have logits so large that fp32 itself is off by SAME.
                train(policy, seed=10 * index + repeat, learning_rate=2e-2)
            names.append(policy.save_weights_for_sampler(f"step-{index}").result().path)
        sampler = service.create_sampling_client(model_path=names[0])
        with Load(sampler) as load:
            busy = hotload_all(service, list(itertools.islice(itertools.cycle(names), 200)), load)
        assert not load.errors
        assert busy >= 60
        models = {}
        for name in names:
            base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
            folder = one(daemon.home, f"store/snapshots/{name}-*/adapter_config.json").parent
            models[name] = PeftModel.from_pretrained(base, folder).eval()
        assert check(load.answers, models) == set(names)


def test_full_parameter_chain(
    daemon: DaemonProcess, tiny_llama: Path, make_service: Callable[[int], Any]
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    with make_service(0) as service:
        policy = service.create_training_client(base_model=str(tiny_llama), lora_rank=0)
        models = {}
        names = []
        for index in range(40):
            for repeat in range(2):
                train(policy, seed=10 * index + repeat, learning_rate=1e-2)
            names.append(policy.save_weights_for_sampler(f"step-{index}").result().path)
            policy.save_state(f"state-{index}").result()
            model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
            saved = one(daemon.home, f"store/checkpoints/state-{index}-*/weights.safetensors")
            weights = load_file(saved)
            missing, unexpected = model.load_state_dict(weights, strict=False)
            assert not unexpected and set(missing) <= {"lm_head.weight"}
            models[names[-1]] = model.eval()
        folders = [one(daemon.home, f"store/snapshots/{name}-*/manifest.json") for name in names]
        kinds = [json.loads(path.read_text())["kind"] for path in folders]
        assert kinds[0] == "base" and kinds.count("delta") > len(kinds) / 2
        sampler = service.create_sampling_client(model_path=names[0])
        with Load(sampler) as load:
            busy = hotload_all(service, names, load)
        assert not load.errors
        assert busy >= 12
        assert len(check(load.answers, models)) > 20
