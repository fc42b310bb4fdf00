"""Losses over embeddings against a plain PyTorch and PEFT loop: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_loop import Reference, relative
from support.models import VOCAB_SIZE, save_tiny

from firetitan_daemon.engine import passes
from firetitan_daemon.engine.api import (
    AdamParams,
    Datum,
    LoraSpec,
    ModelSpec,
    Normalization,
    Pooling,
    SessionSpec,
    SnapshotKind,
)
from firetitan_daemon.engine.graphs import GraphLimits
from firetitan_daemon.engine.hf_train import HfTrainEngine
from firetitan_daemon.engine.raw import read_safetensors
from firetitan_daemon.engine.tensors import from_raw

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]

LORA = LoraSpec(rank=4, alpha=8.0)
LENGTHS = (3, 21, 40, 7, 12)
CONTRASTIVE = {"num_queries": 2.0, "temperature": 0.1, "num_extra_negatives": 1.0}
TRAINED = pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
POOLINGS = pytest.mark.parametrize("pooling", list(Pooling))

TorchLoss = Callable[[list[torch.Tensor]], torch.Tensor]


def make_data() -> list[Datum]:
    draw = np.random.default_rng(0)
    return [Datum(draw.integers(0, VOCAB_SIZE, n).astype(np.int32), {}) for n in LENGTHS]


def plain_embeddings(plain: Reference, data: list[Datum], pooling: Pooling) -> list[torch.Tensor]:
    """One sequence at a time, without padding."""
    rows = []
    for datum in data:
        tokens = torch.from_numpy(datum.token_ids.astype(np.int64))[None]
        output = plain.model(input_ids=tokens, output_hidden_states=True, use_cache=False)
        hidden = output.hidden_states[-1][0]
        rows.append(hidden.mean(0) if pooling is Pooling.MEAN else hidden[-1])
    return rows


def norm_spread(rows: list[torch.Tensor]) -> torch.Tensor:
    stacked = torch.stack(rows)
    return (stacked**2).sum() - 2 * (stacked[0] @ stacked[2]) + stacked[1].sum()


def plain_contrastive(rows: list[torch.Tensor]) -> torch.Tensor:
    unit = torch.nn.functional.normalize(torch.stack(rows), dim=1)
    asking, answering = unit[:2], unit[2:]
    labels = torch.arange(2)
    cross_entropy = torch.nn.functional.cross_entropy
    forth = cross_entropy(asking @ answering.T / 0.1, labels)
    return (forth + cross_entropy(answering[:2] @ asking.T / 0.1, labels)) / 2


def open_engine(
    folder: Path, lora: LoraSpec | None, limits: GraphLimits | None = None
) -> HfTrainEngine:
    """With an adapter that does something: B is zero at first."""
    engine = HfTrainEngine(ModelSpec(str(folder)), limits)
    engine.open_session(SessionSpec(seed=3, lora=lora))
    generator = torch.Generator().manual_seed(4)
    session = engine._session()
    if lora is not None:
        for name, master in session.trainables.masters.items():
            if ".lora_B." in name:
                master.data.normal_(std=0.1, generator=generator)
        session.trainables.refresh()
    return engine


def make_reference(engine: HfTrainEngine, folder: Path, tmp_path: Path) -> Reference:
    if engine._session().spec.lora is None:
        return Reference(folder, None)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    engine.save_snapshot(adapter, "start", SnapshotKind.BASE, None)
    return Reference(folder, adapter)


def pending(engine: HfTrainEngine, folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir()
    engine.save_state(folder)
    return from_raw(read_safetensors(folder / "gradients.safetensors"))


def backward_through_graph(engine: HfTrainEngine, data: list[Datum], pooling: Pooling) -> float:
    """As a client does with a loss of its own."""
    output = engine.forward_embeddings(data, pooling, "", {}, retain_graph=True)
    leaves = [torch.from_numpy(one["embedding"]).requires_grad_() for one in output.outputs]
    loss = norm_spread(leaves)
    loss.backward()
    grads = [leaf.grad.numpy() for leaf in leaves if leaf.grad is not None]
    if output.graph is not None:
        engine.backward(output.graph, grads)
    else:
        given = [
            Datum(d.token_ids, {"embedding_grads": g}) for d, g in zip(data, grads, strict=True)
        ]
        engine.forward_backward_embeddings(given, pooling, "", {})
    return float(loss.detach())


def backward_contrastive(engine: HfTrainEngine, data: list[Datum], pooling: Pooling) -> float:
    output = engine.forward_backward_embeddings(data, pooling, "contrastive", CONTRASTIVE)
    return output.metrics["loss"]


CASES: dict[str, tuple[Callable[[HfTrainEngine, list[Datum], Pooling], float], TorchLoss]] = {
    "custom": (backward_through_graph, norm_spread),
    "contrastive": (backward_contrastive, plain_contrastive),
}


@TRAINED
@POOLINGS
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_loss_and_gradients_equal_plain_pytorch(
    tmp_path: Path, architecture: str, case: str, pooling: Pooling, lora: LoraSpec | None
) -> None:
    folder = save_tiny(tmp_path / "model", architecture)
    engine = open_engine(folder, lora)
    plain = make_reference(engine, folder, tmp_path)
    run, loss = CASES[case]
    data = make_data()
    rows = plain_embeddings(plain, data, pooling)
    expected = loss(rows)
    expected.backward()
    assert run(engine, data, pooling) == pytest.approx(float(expected.detach()), rel=1e-4)
    found = engine.forward_embeddings(data, pooling, "", {}).outputs
    for one, row in zip(found, rows, strict=True):
        np.testing.assert_allclose(one["embedding"], row.detach().numpy(), rtol=1e-4, atol=1e-5)
    mine = pending(engine, tmp_path / "state")
    moved = 0
    for name, gradient in plain.gradients().items():
        assert relative(mine.get(name, torch.zeros_like(gradient)), gradient) <= 1e-4, name
        moved += bool(gradient.any())
    assert moved > 10


@TRAINED
@pytest.mark.parametrize("case", CASES)
def test_neither_passes_nor_the_graph_budget_change_the_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, lora: LoraSpec | None
) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    run, _ = CASES[case]
    data = make_data()
    gradients = []
    for index, (tokens, limits) in enumerate(
        [(4096, None), (25, None), (25, GraphLimits(max_bytes=0))]
    ):
        monkeypatch.setattr("firetitan_daemon.engine.passes.MAX_PASS_TOKENS", tokens)
        assert passes.MAX_PASS_TOKENS == tokens
        engine = open_engine(folder, lora, limits)
        run(engine, data, Pooling.MEAN)
        assert engine.progress.forward_passes == (1 if limits is None else 2)
        gradients.append(pending(engine, tmp_path / f"state-{index}"))
    whole, split, bounded = gradients
    assert whole.keys() == split.keys() == bounded.keys()
    for name in whole:
        assert relative(split[name], whole[name]) <= 1e-5, name
        assert relative(bounded[name], whole[name]) <= 1e-5, name


def test_micro_batches_add_up(tmp_path: Path) -> None:
    """A linear loss over embeddings is the sum of its parts."""
    folder = save_tiny(tmp_path / "model", "llama")
    draw = np.random.default_rng(1)
    data = [
        Datum(d.token_ids, {"embedding_grads": draw.normal(size=32).astype(np.float32)})
        for d in make_data()
    ]
    norms = []
    for parts in ([data], [data[:2], data[2:3], data[3:]]):
        engine = open_engine(folder, LORA)
        for part in parts:
            engine.forward_backward_embeddings(part, Pooling.LAST, "", {})
        norms.append(engine.optim_step(AdamParams(), Normalization.NUM_SEQUENCES)["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
