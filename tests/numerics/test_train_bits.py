"""What must be equal to the bit, what a bfloat16 base may cost, and the padded path."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from plain_loop import Reference, cross_entropy, relative
from support.models import VOCAB_SIZE, save_tiny
from torch.utils._python_dispatch import TorchDispatchMode

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine import passes
from firetitan_daemon.engine.api import (
    AdamParams,
    Datum,
    LoraSpec,
    ModelSpec,
    Normalization,
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
ADAM = AdamParams(learning_rate=1e-3, weight_decay=0.01)
LORA = LoraSpec(4, 8.0)
KINDS = pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / request.param, dtype=request.param)


def make(folder: Path, lora: LoraSpec | None, limits: GraphLimits | None = None) -> HfTrainEngine:
    engine = HfTrainEngine(ModelSpec(str(folder)), limits)
    engine.open_session(SessionSpec(7, lora))
    return engine


def make_data(seed: int, lengths: tuple[int, ...] = (30, 7, 45, 1)) -> list[Datum]:
    rng = np.random.default_rng(seed)
    data = []
    for length in lengths:
        weights = (rng.random(length) > 0.4).astype(np.float32)
        weights[0] = 1
        targets = rng.integers(0, VOCAB_SIZE, length)
        tokens = rng.integers(0, VOCAB_SIZE, length).astype(np.int32)
        data.append(Datum(tokens, {"target_tokens": targets, "weights": weights}))
    return data


def state(engine: HfTrainEngine, folder: Path, file: str = "") -> dict[str, torch.Tensor]:
    folder.mkdir()
    engine.save_state(folder)
    names = [file] if file else ["weights", "optimizer", "gradients"]
    return {
        f"{name}.{key}": tensor
        for name in names
        for key, tensor in from_raw(read_safetensors(folder / f"{name}.safetensors")).items()
    }


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@KINDS
def test_the_same_calls_give_the_same_bits(
    folder: Path, tmp_path: Path, lora: LoraSpec | None
) -> None:
    states, losses = [], []
    for run in range(2):
        engine = make(folder, lora)
        losses.append([])
        for step in range(4):
            for micro in range(2):
                data = make_data(10 * step + micro)
                if run:
                    engine.forward(make_data(99), "cross_entropy", {}, retain_graph=True)
                output = engine.forward_backward(data, "cross_entropy", {})
                losses[run].append(output.metrics["loss:sum"])
            engine.optim_step(ADAM, Normalization.NUM_LOSS_TOKENS)
        engine.forward_backward(make_data(50), "cross_entropy", {})
        states.append(state(engine, tmp_path / str(run)))
    assert losses[0] == losses[1]
    assert_same(*states)


@KINDS
def test_a_kept_graph_and_the_surrogate_give_the_same_bits(
    folder: Path, tmp_path: Path, lora: LoraSpec | None
) -> None:
    """And forward, backward and forward_backward return the same logprobs."""
    data = make_data(1)
    rng = np.random.default_rng(2)
    grads = [rng.normal(size=len(d.token_ids)).astype(np.float32) for d in data]
    for grad in grads:
        grad[grad > 0.8] = 0
    kept, surrogate = make(folder, lora), make(folder, lora)
    forward = kept.forward(data, "cross_entropy", {}, retain_graph=True)
    assert forward.graph is not None
    backward = kept.backward(forward.graph, grads)
    weighted = [
        Datum(d.token_ids, {**d.loss_inputs, "weights": -g})
        for d, g in zip(data, grads, strict=True)
    ]
    recomputed = surrogate.forward_backward(weighted, "cross_entropy", {})
    for outputs in zip(forward.outputs, backward.outputs, recomputed.outputs, strict=True):
        for output in outputs[1:]:
            assert np.array_equal(outputs[0]["logprobs"], output["logprobs"])
    assert backward.metrics == recomputed.metrics
    assert (kept.progress.forward_passes, surrogate.progress.forward_passes) == (1, 1)
    assert_same(state(kept, tmp_path / "kept"), state(surrogate, tmp_path / "surrogate"))
    counters = [engine._session().counters for engine in (kept, surrogate)]
    assert counters[0] == counters[1]


def test_over_budget_no_graph_is_kept(folder: Path) -> None:
    engine = make(folder, LORA, GraphLimits(max_bytes=1000))
    output = engine.forward(make_data(1), "cross_entropy", {}, retain_graph=True)
    assert output.graph is None
    roomy = make(folder, LORA)
    assert roomy.forward(make_data(1), "cross_entropy", {}, retain_graph=True).graph is not None


@KINDS
def test_a_graph_that_is_dropped_is_freed(folder: Path, lora: LoraSpec | None) -> None:
    engine, data = make(folder, lora), make_data(1)

    def drop(how: str) -> int:
        gc.collect()
        before = {id(item) for item in gc.get_objects() if issubclass(type(item), torch.Tensor)}
        for _ in range(3):
            graph = engine.forward(data, "cross_entropy", {}, retain_graph=True).graph
            assert graph is not None
            if how == "released":
                engine.release_graph(graph)
            else:
                engine._graphs.clear()
        gc.collect()
        after = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
        return sum(id(item) not in before for item in after)

    assert drop("released") == 0
    assert drop("cleared") == 0


def test_passes_change_rounding_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    found = []
    for run, budget in enumerate((4096, 40)):
        monkeypatch.setattr(passes, "MAX_PASS_TOKENS", budget)
        engine = make(tiny_llama, None)
        output = engine.forward(make_data(1), "cross_entropy", {}, retain_graph=True)
        assert output.graph is not None
        engine.backward(output.graph, [np.ones(n, np.float32) for n in (30, 7, 45, 1)])
        engine.forward_backward(make_data(2), "cross_entropy", {})
        found.append(state(engine, tmp_path / str(run), "gradients"))
    for name in found[0]:
        assert relative(found[1][name], found[0][name]) < 1e-5, name


@KINDS
def test_a_loss_that_overflows_changes_nothing(
    folder: Path, tmp_path: Path, lora: LoraSpec | None
) -> None:
    engine = make(folder, lora)
    engine.forward_backward(make_data(1), "cross_entropy", {})
    engine.optim_step(ADAM, Normalization.NONE)
    engine.forward_backward(make_data(2), "cross_entropy", {})
    graph = engine.forward(make_data(3), "cross_entropy", {}, retain_graph=True).graph
    before = state(engine, tmp_path / "before")
    data = make_data(4)
    for datum in data:
        del datum.loss_inputs["weights"]
        datum.loss_inputs["advantages"] = np.ones(len(datum.token_ids), np.float32)
        datum.loss_inputs["logprobs"] = np.full(len(datum.token_ids), -5, np.float32)
    data[2].loss_inputs["logprobs"][5] = -1000
    for call in (engine.forward, engine.forward_backward):
        with pytest.raises(FiretitanError, match=r"data\[2\].*position 5") as caught:
            call(data, "importance_sampling", {})
        assert caught.value.reason is Reason.NON_FINITE
    assert_same(before, state(engine, tmp_path / "after"))
    assert graph is not None
    nothing = [np.zeros(n, np.float32) for n in (30, 7, 45, 1)]
    engine.backward(graph, nothing)


def test_sums_that_overflow_refuse_the_step_and_keep_the_graph(
    tiny_llama: Path, tmp_path: Path
) -> None:
    engine = make(tiny_llama, None)
    huge = make_data(1)
    for datum in huge:
        datum.loss_inputs["weights"][:] = 1e36
    for _ in range(2):
        engine.forward_backward(huge, "cross_entropy", {})
    graph = engine.forward(make_data(3), "cross_entropy", {}, retain_graph=True).graph
    before = state(engine, tmp_path / "before")
    progress = engine.progress
    with pytest.raises(FiretitanError, match="not finite") as caught:
        engine.optim_step(ADAM, Normalization.NONE)
    assert caught.value.reason is Reason.NON_FINITE
    after = state(engine, tmp_path / "after")
    for name in before:
        np.testing.assert_array_equal(before[name].numpy(), after[name].numpy())
    assert engine.progress == progress
    assert graph is not None
    engine.backward(graph, [np.zeros(n, np.float32) for n in (30, 7, 45, 1)])


@KINDS
def test_a_bfloat16_base_learns_as_fast_as_float32_at_first(
    tmp_path: Path, lora: LoraSpec | None
) -> None:
    """Small first steps must not vanish in the base's rounding."""
    bf16 = save_tiny(tmp_path / "bf16", dtype="bfloat16")
    params = AdamParams(learning_rate=2e-4)
    data = make_data(1, (60, 60, 60, 60))
    falls = []
    for dtype in ("float32", "bfloat16"):
        engine = HfTrainEngine(ModelSpec(str(bf16), dtype=dtype))
        engine.open_session(SessionSpec(7, lora))
        losses = []
        for _ in range(4):
            losses.append(engine.forward_backward(data, "cross_entropy", {}).metrics["loss:sum"])
            engine.optim_step(params, Normalization.NUM_LOSS_TOKENS)
        falls.append(losses[0] - losses[-1])
    assert falls[0] > 0
    assert falls[1] == pytest.approx(falls[0], rel=0.1)


def test_full_masters_collect_steps_too_small_for_bfloat16(tmp_path: Path) -> None:
    engine = make(save_tiny(tmp_path / "bf16", dtype="bfloat16"), None)
    start = state(engine, tmp_path / "start", "weights")
    params = AdamParams(learning_rate=1e-6)
    for step in range(3):
        engine.forward_backward(make_data(step), "cross_entropy", {})
        engine.optim_step(params, Normalization.NONE)
    end = state(engine, tmp_path / "end", "weights")
    name = "weights.model.layers.0.self_attn.q_proj.weight"
    assert end[name].dtype == torch.float32
    moved = (end[name] - start[name]).abs()
    assert 0 < float(moved.max()) < 4e-6
    assert float((moved > 0).float().mean()) > 0.99
    live = dict(engine._loaded.model.named_parameters())
    assert torch.equal(live[name.removeprefix("weights.")], end[name].bfloat16())


@KINDS
def test_the_padded_path_trains_right(tmp_path: Path, lora: LoraSpec | None) -> None:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=2,
        sliding_window=8,
        max_position_embeddings=128,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "model")
    engine = make(tmp_path / "model", lora)
    assert not engine.info.packed and "sinks" in engine.info.notes[0]
    adapter = None
    if lora is not None:
        adapter = tmp_path / "adapter"
        adapter.mkdir()
        engine.save_snapshot(adapter, "start", SnapshotKind.BASE, None)
    plain = Reference(tmp_path / "model", adapter)
    for step in range(3):
        data = make_data(step)
        wanted = plain.backward(data, cross_entropy)
        output = engine.forward_backward(data, "cross_entropy", {})
        assert output.metrics["loss:sum"] == pytest.approx(wanted, rel=1e-5)
        if step == 0:
            mine = state(engine, tmp_path / "state", "gradients")
            for name, gradient in plain.gradients().items():
                found = mine.get(f"gradients.{name}", torch.zeros_like(gradient))
                assert relative(found, gradient) <= 1e-4, name
        plain.step(ADAM)
        engine.optim_step(ADAM, Normalization.NONE)


def test_open_session_again_starts_from_the_base(tiny_llama: Path) -> None:
    engine = make(tiny_llama, None)
    first = engine.forward(make_data(1), "cross_entropy", {}).metrics
    for lora in (LORA, None):
        engine.forward_backward(make_data(1), "cross_entropy", {})
        engine.optim_step(ADAM, Normalization.NONE)
        assert engine.forward(make_data(1), "cross_entropy", {}).metrics != first
        engine.open_session(SessionSpec(8, lora))
        assert engine.progress.step == 0
        again = engine.forward(make_data(1), "cross_entropy", {}).metrics
        assert again["loss:sum"] == pytest.approx(first["loss:sum"], rel=1e-6)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return result


def test_all_logits_never_exist_at_once(folder: Path) -> None:
    engine = make(folder, LORA)
    data = make_data(1, (50,) * 20)
    rows = 1000
    with LargestTensor() as largest:
        graph = engine.forward(data, "cross_entropy", {}, retain_graph=True).graph
        assert graph is not None
        engine.backward(graph, [np.ones(50, np.float32)] * 20)
        engine.forward_backward(data, "cross_entropy", {})
    assert 0 < largest.numel < rows * VOCAB_SIZE / 2


def test_response_tokens(tiny_llama: Path) -> None:
    engine = make(tiny_llama, LORA)
    data = make_data(1)
    count = sum(int(np.count_nonzero(d.loss_inputs["weights"])) for d in data)
    metrics = engine.forward_backward(data, "cross_entropy", {}).metrics
    assert metrics["response_tokens"] == count
    assert "response_tokens" not in engine.forward(data, "cross_entropy", {}).metrics
