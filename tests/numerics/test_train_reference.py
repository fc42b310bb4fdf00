"""The engine against a plain PyTorch and PEFT loop: gradients, losses and updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import plain_loop as reference
import pytest
import torch
from plain_loop import Reference, ReferenceLoss, relative
from support.models import VOCAB_SIZE, save_tiny

from firetitan_daemon.engine.api import (
    AdamParams,
    Datum,
    LoraSpec,
    ModelSpec,
    Normalization,
    SessionSpec,
    SnapshotKind,
)
from firetitan_daemon.engine.hf_train import HfTrainEngine
from firetitan_daemon.engine.raw import read_safetensors
from firetitan_daemon.engine.tensors import from_raw

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]

ADAM = AdamParams(
    learning_rate=1e-3, beta1=0.8, beta2=0.97, eps=1e-6, weight_decay=0.05, grad_clip_norm=5.0
)
"""eps is above the rounding noise of gradients that are zero by symmetry (key biases): Adam would
turn that noise into full steps."""
LENGTHS = (3, 21, 40)
LORA = LoraSpec(rank=4, alpha=8.0)
ARCHITECTURES = ("llama", "qwen3", "gemma2", "gpt_neox", "qwen3_moe", "mixtral")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny(root / name, name) for name in ARCHITECTURES}


def make_data(seed: int, policy: bool = False, candidates: int | None = None) -> list[Datum]:
    """Ragged data; some positions have weight or advantage 0, one datum has none that count."""
    rng = np.random.default_rng(seed)
    data = []
    for length in LENGTHS:
        shape = (length,) if candidates is None else (length, candidates)
        inputs: dict[str, np.ndarray] = {"target_tokens": rng.integers(0, VOCAB_SIZE, shape)}
        values = rng.normal(size=shape).astype(np.float32)
        values[rng.random(length) < 0.3] = 0
        if policy:
            inputs["advantages"] = values
            inputs["logprobs"] = (-5.6 + rng.normal(size=shape) * 0.7).astype(np.float32)
        else:
            inputs["weights"] = values
        data.append(Datum(rng.integers(0, VOCAB_SIZE, length).astype(np.int32), inputs))
    data[0].loss_inputs["advantages" if policy else "weights"][:] = 0
    return data


def make_pair(
    folder: Path, tmp_path: Path, lora: LoraSpec | None
) -> tuple[HfTrainEngine, Reference]:
    engine = HfTrainEngine(ModelSpec(str(folder)))
    assert engine.info.packed
    engine.open_session(SessionSpec(seed=3, lora=lora))
    if lora is None:
        return engine, Reference(folder, None)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    engine.save_snapshot(adapter, "start", SnapshotKind.BASE, None)
    return engine, Reference(folder, adapter)


def pending_gradients(engine: HfTrainEngine, folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir()
    engine.save_state(folder)
    return from_raw(read_safetensors(folder / "gradients.safetensors"))


def weights(engine: HfTrainEngine, folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir()
    engine.save_state(folder)
    return from_raw(read_safetensors(folder / "weights.safetensors"))


def compare(
    engine: HfTrainEngine,
    plain: Reference,
    batches: Sequence[list[Datum]],
    run: Callable[[list[Datum]], float],
    loss: ReferenceLoss,
    tmp_path: Path,
) -> None:
    for step, data in enumerate(batches):
        expected = plain.backward(data, loss)
        found = run(data)
        scale = max(1.0, abs(expected))
        assert abs(found - expected) <= 1e-4 * scale, (step, found, expected)
        if step == 0:
            mine = pending_gradients(engine, tmp_path / "first")
            theirs = plain.gradients()
            assert mine.keys() <= theirs.keys()
            for name, gradient in theirs.items():
                found_gradient = mine.get(name, torch.zeros_like(gradient))
                assert relative(found_gradient, gradient) <= 1e-4, name
        norm = plain.step(ADAM)
        metrics = engine.optim_step(ADAM, Normalization.NONE, expected_step=step)
        assert metrics["step"] == step + 1
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-2)
    after = weights(engine, tmp_path / "last")
    moved = torch.cat([(after[n] - plain.start[n]).flatten() for n in plain.parameters])
    wanted = torch.cat([update.flatten() for update in plain.updates().values()])
    assert relative(moved, wanted) <= 2e-3


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_twenty_cross_entropy_steps(
    folders: dict[str, Path], tmp_path: Path, architecture: str, lora: LoraSpec | None
) -> None:
    engine, plain = make_pair(folders[architecture], tmp_path, lora)

    def run(data: list[Datum]) -> float:
        return engine.forward_backward(data, "cross_entropy", {}).metrics["loss:sum"]

    batches = [make_data(seed % 4) for seed in range(20)]
    compare(engine, plain, batches, run, reference.cross_entropy, tmp_path)


POLICY_LOSSES: dict[str, tuple[str, dict[str, float], ReferenceLoss]] = {
    "importance_sampling": ("importance_sampling", {}, reference.importance_sampling),
    "ppo": ("ppo", {}, reference.ppo),
    "ppo_narrow": (
        "ppo",
        {"clip_low_threshold": 0.95, "clip_high_threshold": 1.01},
        lambda logprobs, inputs: reference.ppo(logprobs, inputs, 0.95, 1.01),
    ),
    "cispo": ("cispo", {}, reference.cispo),
    "dro": ("dro", {}, reference.dro),
    "dapo": ("dapo", {"eps_clip_c": 3.0, "ratio_log_cap": 20.0}, reference.dapo),
    "gspo": ("gspo", {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}, reference.gspo),
}


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("case", POLICY_LOSSES)
def test_twenty_policy_steps(
    folders: dict[str, Path], tmp_path: Path, case: str, lora: LoraSpec | None
) -> None:
    name, config, plain_loss = POLICY_LOSSES[case]
    engine, plain = make_pair(folders["llama"], tmp_path, lora)

    def run(data: list[Datum]) -> float:
        return engine.forward_backward(data, name, config).metrics["loss:sum"]

    batches = [make_data(seed % 4, policy=True) for seed in range(20)]
    compare(engine, plain, batches, run, plain_loss, tmp_path)


def test_ppo_takes_thresholds_per_token(folders: dict[str, Path], tmp_path: Path) -> None:
    engine, plain = make_pair(folders["qwen3"], tmp_path, LORA)
    rng = np.random.default_rng(1)
    batches = [make_data(seed, policy=True) for seed in range(4)]
    for datum in (datum for data in batches for datum in data):
        length = len(datum.token_ids)
        datum.loss_inputs["clip_low_threshold"] = rng.uniform(0.5, 1, length).astype(np.float32)
        datum.loss_inputs["clip_high_threshold"] = rng.uniform(1, 1.5, length).astype(np.float32)

    def run(data: list[Datum]) -> float:
        return engine.forward_backward(data, "ppo", {}).metrics["loss:sum"]

    compare(engine, plain, batches, run, reference.ppo_per_token, tmp_path)


@pytest.mark.parametrize("name", ["cross_entropy", "importance_sampling"])
def test_several_candidates_a_position(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    engine, plain = make_pair(folders["llama"], tmp_path, LORA)
    policy = name != "cross_entropy"
    batches = [make_data(seed, policy, candidates=3) for seed in range(5)]

    def run(data: list[Datum]) -> float:
        output = engine.forward_backward(data, name, {})
        assert [o["logprobs"].shape for o in output.outputs] == [(n, 3) for n in LENGTHS]
        return output.metrics["loss:sum"]

    compare(engine, plain, batches, run, getattr(reference, name), tmp_path)


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_twenty_custom_loss_steps_cost_one_forward_each(
    folders: dict[str, Path], tmp_path: Path, lora: LoraSpec | None
) -> None:
    engine, plain = make_pair(folders["gemma2"], tmp_path, lora)

    def custom(logprobs: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return (logprobs**2).mean() + 0.1 * logprobs.sum()

    def run(data: list[Datum]) -> float:
        forward = engine.forward(data, "cross_entropy", {}, retain_graph=True)
        leaves = [torch.from_numpy(o["logprobs"]).requires_grad_() for o in forward.outputs]
        loss = torch.stack([custom(leaf, {}) for leaf in leaves]).sum()
        loss.backward()
        assert forward.graph is not None
        engine.backward(forward.graph, [leaf.grad.numpy() for leaf in leaves])
        return float(loss.detach())

    batches = [make_data(seed % 4) for seed in range(20)]
    compare(engine, plain, batches, run, custom, tmp_path)
    assert engine.progress.forward_passes == 20


@pytest.mark.parametrize("mode", Normalization)
def test_normalization_over_three_ragged_micro_batches(
    folders: dict[str, Path], tmp_path: Path, mode: Normalization
) -> None:
    engine, plain = make_pair(folders["llama"], tmp_path, LORA)
    params = AdamParams(learning_rate=1e-3, weight_decay=0.1, grad_clip_norm=0.7)
    for _ in range(2):
        tokens = sequences = 0
        for seed in range(3):
            data = make_data(seed)[: seed + 1]
            plain.backward(data, reference.cross_entropy)
            engine.forward_backward(data, "cross_entropy", {})
            counts = [int(np.count_nonzero(d.loss_inputs["weights"])) for d in data]
            tokens += sum(counts)
            sequences += sum(count > 0 for count in counts)
        assert 0 < sequences < tokens
        denominator = {
            Normalization.NONE: 1,
            Normalization.NUM_LOSS_TOKENS: tokens,
            Normalization.NUM_SEQUENCES: sequences,
        }[mode]
        norm = plain.step(params, denominator)
        found = engine.optim_step(params, mode)
        assert found["grad_norm"] == pytest.approx(norm, rel=1e-3)
    after = weights(engine, tmp_path / "last")
    for name, update in plain.updates().items():
        assert relative(after[name] - plain.start[name], update) <= 2e-3, name
