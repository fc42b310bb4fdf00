"""What every training engine promises of adapters that are loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.adapters import TOY_LAYER, write_peft

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import (
    AdamParams,
    Datum,
    LoraSpec,
    Normalization,
    SessionSpec,
    TrainEngine,
)
from firetitan_daemon.engine.raw import read_safetensors

ADAM = AdamParams(learning_rate=1e-2)
LORA = SessionSpec(seed=1, lora=LoraSpec(4, alpha=8.0))
HF_LAYERS = {f"model.layers.{i}.self_attn.q_proj": (32, 32) for i in (0, 1)}

MakeEngine = Callable[[], TrainEngine]


def write(engine: TrainEngine, folder: Path, *, rank: int = 4, seed: int = 0) -> Path:
    """A sealed folder with an adapter of the engine's model, as the daemon makes them."""
    layers = {TOY_LAYER: (64, 16)} if engine.info.architecture == "toy" else HF_LAYERS
    draw = np.random.default_rng(seed)
    pairs = {
        name: (
            draw.normal(size=(rank, inputs)).astype(np.float32),
            draw.normal(size=(outputs, rank)).astype(np.float32),
        )
        for name, (outputs, inputs) in layers.items()
    }
    write_peft(folder, pairs)
    durable.seal_folder(folder, {})
    return folder


def data(seed: int = 0) -> list[Datum]:
    tokens = np.random.default_rng(seed).integers(1, 60, 9)
    return [Datum(tokens[:-1].astype(np.int32), {"target_tokens": tokens[1:]})]


def step(engine: TrainEngine) -> None:
    engine.forward_backward(data(), "cross_entropy", {})
    engine.optim_step(ADAM, Normalization.NONE)


def logprobs(engine: TrainEngine) -> np.ndarray:
    return engine.forward(data(5), "cross_entropy", {}).outputs[0]["logprobs"]


def digest(engine: TrainEngine, tmp_path: Path) -> str:
    folder = tmp_path / f"state-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    return engine.save_state(folder).digest


def test_a_load_begins_anew_whatever_was_before(make: MakeEngine, tmp_path: Path) -> None:
    trained, fresh = make(), make()
    for engine in (trained, fresh):
        engine.open_session(LORA)
    start = logprobs(trained)
    folder = write(trained, tmp_path / "adapter")
    step(trained)
    step(trained)
    trained.forward_backward(data(), "cross_entropy", {})
    graph = trained.forward(data(), "cross_entropy", {}, retain_graph=True).graph
    assert graph is not None
    for engine in (trained, fresh):
        engine.load_adapter(folder)
    assert trained.progress.step == trained.progress.pending_backwards == 0
    with pytest.raises(FiretitanError) as caught:
        trained.backward(graph, [np.ones(8, np.float32)])
    assert caught.value.reason is Reason.GRAPH_EXPIRED
    assert not np.allclose(logprobs(trained), start, atol=1e-3)
    assert digest(trained, tmp_path) == digest(fresh, tmp_path)
    for engine in (trained, fresh):
        step(engine)
    assert digest(trained, tmp_path) == digest(fresh, tmp_path), "no moments were left"


def test_a_smaller_rank_is_all_trained(make: MakeEngine, tmp_path: Path) -> None:
    """The filled up rows get gradients: after a step the session uses its whole rank."""
    engine, wide = make(), make()
    for one in (engine, wide):
        one.open_session(LORA)
    engine.load_adapter(write(engine, tmp_path / "small", rank=2))
    before = logprobs(engine)
    for _ in range(4):
        step(engine)
    assert not np.array_equal(logprobs(engine), before)
    folder = tmp_path / "state"
    folder.mkdir()
    engine.save_state(folder)
    weights = read_safetensors(folder / "weights.safetensors")
    name = next(one for one in weights if one.endswith("lora_B.weight") and "head" not in one)
    assert weights[name].array()[:, 2:].any()


def test_what_does_not_fit_changes_nothing(make: MakeEngine, tmp_path: Path) -> None:
    engine = make()
    engine.open_session(LORA)
    step(engine)
    engine.forward_backward(data(), "cross_entropy", {})
    wide = write(engine, tmp_path / "wide", rank=8)
    damaged = write(engine, tmp_path / "damaged")
    weights = damaged / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    before, progress = digest(engine, tmp_path), engine.progress
    for folder, reason in (
        (wide, Reason.INVALID_ARGUMENT),
        (damaged, Reason.CHECKSUM_MISMATCH),
        (nowhere, Reason.CHECKSUM_MISMATCH),
    ):
        with pytest.raises(FiretitanError) as caught:
            engine.load_adapter(folder)
        assert caught.value.reason is reason, folder
    assert digest(engine, tmp_path) == before and engine.progress == progress


def test_sessions_without_an_adapter_take_none(make: MakeEngine, tmp_path: Path) -> None:
    engine = make()
    engine.open_session(SessionSpec(seed=1, lora=None))
    with pytest.raises(FiretitanError, match="lora_rank") as caught:
        engine.load_adapter(write(engine, tmp_path / "adapter"))
    assert caught.value.reason is Reason.INVALID_ARGUMENT
