"""Mixtures of experts: recorded choices, forced choices and their gradients, weights in service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_loop import Reference, cross_entropy, relative
from support.experts import chosen, forced, near_ties, own_choice
from support.models import VOCAB_SIZE, save_tiny
from support.sampling import plain_logprobs, plain_model

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.model_records import RoutingShape
from firetitan_daemon.engine.api import (
    AdamParams,
    Datum,
    LoraSpec,
    ModelSpec,
    Normalization,
    Pooling,
    SessionSpec,
    SnapshotKind,
    SnapshotLayer,
)
from firetitan_daemon.engine.hf_sample import HfSampleEngine
from firetitan_daemon.engine.hf_train import HfTrainEngine
from firetitan_daemon.engine.raw import read_safetensors
from firetitan_daemon.engine.sample_api import SampleRequest, SampleResult
from firetitan_daemon.engine.scheduler import SamplerConfig
from firetitan_daemon.engine.tensors import from_raw

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]

ARCHITECTURES = ("qwen3_moe", "mixtral")
EXPERTS = {"qwen3_moe": 8, "mixtral": 4}
PROMPT = np.arange(60, 77, dtype=np.int32)
LORA = LoraSpec(rank=4, alpha=8.0)
SESSIONS = pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
CONFIG = SamplerConfig(max_rows=8, branch_rows=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny(root / name, name) for name in ARCHITECTURES}


@pytest.fixture
def sampler(folders: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[HfSampleEngine]:
    engine = HfSampleEngine(ModelSpec(str(folders[request.param])), CONFIG)
    yield engine
    engine.close()


def sample(engine: HfSampleEngine, tokens: int = 20, rows: int = 3, seed: int = 4) -> SampleResult:
    request = SampleRequest(
        PROMPT, rows, tokens, seed=seed, use_eos=False, routing=True, prompt_routing=True
    )
    return engine.submit(request).result()


def datums(result: SampleResult, replay: bool) -> list[Datum]:
    """What a policy gradient trains on: prompt and completion, shifted by one."""
    data = []
    for sequence in result.sequences:
        tokens = np.concatenate((PROMPT, sequence.token_ids))
        routing = [*result.prompt_routing[:-1], *sequence.routing]
        data.append(
            Datum(
                tokens[:-1],
                {"target_tokens": tokens[1:].astype(np.int64)},
                routing if replay else (),
            )
        )
    return data


def random_choice(seed: int, length: int, experts: int) -> list[bytes]:
    """Experts nobody would choose, two a layer; every fifth token is left to the routers."""
    rng = np.random.default_rng(seed)
    matrices = []
    for position in range(length):
        layers = [rng.permutation(experts)[:2].astype(np.uint8).tobytes() for _ in range(2)]
        matrices.append(b"" if position % 5 == 4 else b"".join(layers))
    return matrices


def make_data(seed: int, experts: int) -> list[Datum]:
    rng = np.random.default_rng(seed)
    data = []
    for index, length in enumerate((5, 31, 18)):
        inputs = {
            "target_tokens": rng.integers(0, VOCAB_SIZE, length),
            "weights": rng.normal(size=length).astype(np.float32),
        }
        tokens = rng.integers(0, VOCAB_SIZE, length).astype(np.int32)
        # The last datum has none at all: its routers choose.
        routing = random_choice(seed + index, length, experts) if index < 2 else ()
        data.append(Datum(tokens, inputs, routing))
    return data


def make_trainer(folder: Path, lora: LoraSpec | None, dtype: str = "auto") -> HfTrainEngine:
    engine = HfTrainEngine(ModelSpec(str(folder), dtype=dtype))
    engine.open_session(SessionSpec(seed=3, lora=lora))
    return engine


def pending(engine: HfTrainEngine, folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir()
    engine.save_state(folder)
    return from_raw(read_safetensors(folder / "gradients.safetensors"))


# Recording


@pytest.mark.parametrize("sampler", ARCHITECTURES, indirect=True)
def test_recorded_experts_are_those_the_model_chooses(
    sampler: HfSampleEngine, folders: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    architecture = request.node.callspec.params["sampler"]
    assert sampler.info.routing == RoutingShape(2, 2, EXPERTS[architecture])
    result = sample(sampler)
    assert len(result.prompt_routing) == len(PROMPT)
    model = plain_model(folders[architecture])
    for sequence in result.sequences:
        assert len(sequence.routing) == len(sequence.token_ids)
        assert sequence.routing[0] == result.prompt_routing[-1]
        tokens = np.concatenate((PROMPT, sequence.token_ids))[:-1]
        found = chosen([*result.prompt_routing[:-1], *sequence.routing])
        assert torch.equal(found, own_choice(model, tokens))
    assert len({matrix for s in result.sequences for matrix in s.routing}) > 10


def test_experts_are_returned_only_where_asked_for(folders: dict[str, Path]) -> None:
    engine = HfSampleEngine(ModelSpec(str(folders["mixtral"])), CONFIG)
    try:
        plain = SampleRequest(PROMPT, 1, 3, seed=1)
        result = engine.submit(plain).result()
        assert not result.prompt_routing and not result.sequences[0].routing
    finally:
        engine.close()


def test_a_dense_model_has_no_experts_to_return(tiny_llama: Path) -> None:
    engine = HfSampleEngine(ModelSpec(str(tiny_llama)), CONFIG)
    try:
        assert engine.info.routing is None
        result = sample(engine)
        assert not result.prompt_routing and not result.sequences[0].routing
    finally:
        engine.close()


# Replay


@SESSIONS
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_forced_experts_are_those_of_plain_torch(
    folders: dict[str, Path], tmp_path: Path, architecture: str, lora: LoraSpec | None
) -> None:
    engine = make_trainer(folders[architecture], lora)
    adapter = None
    if lora is not None:
        # B starts at zero, where A has no gradient: take one step first.
        engine.forward_backward(make_data(1, EXPERTS[architecture]), "cross_entropy", {})
        engine.optim_step(AdamParams(learning_rate=1e-2), Normalization.NONE)
        adapter = tmp_path / "adapter"
        adapter.mkdir()
        engine.save_snapshot(adapter, "start", SnapshotKind.BASE, None)
    plain = Reference(folders[architecture], adapter)
    data = make_data(7, EXPERTS[architecture])
    expected = 0.0
    logprobs = []
    for datum in data:
        matrices = datum.routing or [b""] * len(datum.token_ids)
        with forced(plain.model, chosen(matrices)):
            expected += plain.backward([datum], cross_entropy)
            logprobs.extend(values.detach().numpy() for values in plain.logprobs([datum]))

    before = engine.forward(data, "cross_entropy", {})
    output = engine.forward_backward(data, "cross_entropy", {})

    assert output.metrics["loss:sum"] == pytest.approx(expected, rel=1e-5)
    for found, wanted, once in zip(output.outputs, logprobs, before.outputs, strict=True):
        np.testing.assert_allclose(found["logprobs"], wanted, atol=2e-5)
        assert np.array_equal(found["logprobs"], once["logprobs"])
    mine, theirs = pending(engine, tmp_path / "state"), plain.gradients()
    assert mine.keys() <= theirs.keys()
    for name, gradient in theirs.items():
        assert relative(mine.get(name, torch.zeros_like(gradient)), gradient) <= 1e-4, name
    if lora is None:
        assert float(theirs["model.layers.0.mlp.gate.weight"].norm()) > 1e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_kept_graph_goes_back_through_the_forced_experts(
    folders: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    data = make_data(7, EXPERTS[architecture])
    kept, direct = (make_trainer(folders[architecture], None) for _ in range(2))
    output = kept.forward(data, "cross_entropy", {}, retain_graph=True)
    assert output.graph is not None
    kept.backward(output.graph, [-datum.loss_inputs["weights"] for datum in data])
    direct.forward_backward(data, "cross_entropy", {})
    mine, theirs = pending(kept, tmp_path / "kept"), pending(direct, tmp_path / "direct")
    for name, gradient in theirs.items():
        assert relative(mine[name], gradient) <= 1e-6, name


def test_the_models_own_choice_replayed_changes_no_bit(folders: dict[str, Path]) -> None:
    engine = make_trainer(folders["qwen3_moe"], LORA)
    model = plain_model(folders["qwen3_moe"])
    data = [Datum(d.token_ids, d.loss_inputs) for d in make_data(2, 8)]
    replayed = [
        Datum(
            d.token_ids,
            d.loss_inputs,
            [row.numpy().astype(np.uint8).tobytes() for row in own_choice(model, d.token_ids)],
        )
        for d in data
    ]
    found, expected = (engine.forward(each, "cross_entropy", {}) for each in (replayed, data))
    for one, other in zip(found.outputs, expected.outputs, strict=True):
        assert np.array_equal(one["logprobs"], other["logprobs"])


def test_the_padded_path_replays_too(folders: dict[str, Path]) -> None:
    packed = make_trainer(folders["mixtral"], None)
    padded = make_trainer(folders["mixtral"], None)
    object.__setattr__(padded._loaded.info, "packed", False)
    padded._loaded.model.set_attn_implementation("eager")
    data = make_data(7, 4)
    outputs = [engine.forward(data, "cross_entropy", {}).outputs for engine in (packed, padded)]
    for one, other in zip(*outputs, strict=True):
        np.testing.assert_allclose(one["logprobs"], other["logprobs"], atol=2e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_embeddings_are_of_the_forced_experts(folders: dict[str, Path], architecture: str) -> None:
    engine = make_trainer(folders[architecture], LORA)
    model = plain_model(folders[architecture])
    data = make_data(7, EXPERTS[architecture])[:2]
    output = engine.forward_embeddings(data, Pooling.MEAN, "", {})
    for datum, found in zip(data, output.outputs, strict=True):
        tokens = torch.from_numpy(datum.token_ids.astype(np.int64))[None]
        with forced(model, chosen(datum.routing)), torch.no_grad():
            hidden = model.base_model(input_ids=tokens).last_hidden_state[0]
        np.testing.assert_allclose(found["embedding"], hidden.mean(0).numpy(), atol=2e-5)


def test_a_dense_model_ignores_routing_matrices(tiny_llama: Path) -> None:
    engine = make_trainer(tiny_llama, LORA)
    data = make_data(7, 4)
    bare = [Datum(d.token_ids, d.loss_inputs) for d in data]
    found, expected = (engine.forward(each, "cross_entropy", {}) for each in (data, bare))
    for one, other in zip(found.outputs, expected.outputs, strict=True):
        assert np.array_equal(one["logprobs"], other["logprobs"])


@pytest.mark.parametrize(
    ("matrices", "at", "message"),
    [
        ([b"\0\1\2\3", b"\0\1\2", b""], "[1]", "has 3 bytes; 2 layers x 2 experts of 1 bytes"),
        ([b"", b"", b"\0\1\2\4"], "[2]", r"\[2, 4\] at layer 1; .* 0 to 3"),
        ([b"", b"\1\1\2\3", b""], "[1]", r"\[1, 1\] at layer 0; give different ones"),
        ([b"\0\1\2\3", b""], "", "has 2 matrices for 3 tokens"),
    ],
)
def test_bad_matrices_are_named_and_change_nothing(
    folders: dict[str, Path], tmp_path: Path, matrices: list[bytes], at: str, message: str
) -> None:
    engine = make_trainer(folders["mixtral"], LORA)
    good = make_data(3, 4)
    engine.forward_backward(good, "cross_entropy", {})
    before = pending(engine, tmp_path / "before")
    tokens = np.int32([1, 2, 3])
    bad = Datum(tokens, {"target_tokens": tokens.astype(np.int64)}, matrices)
    for call in (engine.forward, engine.forward_backward):
        with pytest.raises(FiretitanError, match=message) as caught:
            call([good[0], bad], "cross_entropy", {})
        assert caught.value.reason is Reason.INVALID_DATUM
        assert caught.value.field == f"data[1].model_input.routing_matrices{at}"
    after = pending(engine, tmp_path / "after")
    assert engine.progress.pending_backwards == 1
    assert all(torch.equal(after[name], before[name]) for name in before)


# What replay is for


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replay_closes_the_gap_that_other_experts_open(
    folders: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    folder = near_ties(tmp_path / "model", architecture)
    engine = HfSampleEngine(ModelSpec(str(folder), dtype="bfloat16"), CONFIG)
    try:
        result = sample(engine, tokens=40, rows=4)
    finally:
        engine.close()
    trainer = make_trainer(folder, LORA, dtype="float32")
    gaps = {}
    for replay in (False, True):
        output = trainer.forward(datums(result, replay), "cross_entropy", {})
        gaps[replay] = np.mean(
            [
                np.abs(found["logprobs"][len(PROMPT) - 1 :] - sequence.inference_logprobs).mean()
                for found, sequence in zip(output.outputs, result.sequences, strict=True)
            ]
        )
    print(f"{architecture}: {gaps[False]:.4f} without replay, {gaps[True]:.4f} with it")
    assert gaps[True] < 0.02
    assert gaps[False] > 10 * gaps[True]


# Weights in service


@SESSIONS
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trained_experts_come_into_service(
    folders: dict[str, Path], tmp_path: Path, architecture: str, lora: LoraSpec | None
) -> None:
    trainer = make_trainer(folders[architecture], lora)
    sampler = HfSampleEngine(ModelSpec(str(folders[architecture])), CONFIG)
    data = make_data(5, EXPERTS[architecture])
    layers: list[SnapshotLayer] = []
    try:
        for step in range(3):
            trainer.forward_backward(data, "cross_entropy", {})
            trainer.optim_step(AdamParams(learning_rate=1e-2), Normalization.NONE)
            parent = layers[-1].name if layers and lora is None else None
            kind = SnapshotKind.BASE if parent is None else SnapshotKind.DELTA
            folder = tmp_path / f"step-{step}"
            folder.mkdir()
            saved = trainer.save_snapshot(folder, folder.name, kind, parent)
            layers = [] if parent is None else layers
            layers.append(
                SnapshotLayer(
                    folder.name, kind, saved.format, folder, saved.files.digest, saved.result_digest
                )
            )
            sampler.apply(layers)
            result = sample(sampler)
            assert result.snapshot == folder.name
            output = trainer.forward(datums(result, False), "cross_entropy", {})
            for found, sequence in zip(output.outputs, result.sequences, strict=True):
                np.testing.assert_allclose(
                    found["logprobs"][len(PROMPT) - 1 :], sequence.inference_logprobs, atol=1e-4
                )
    finally:
        sampler.close()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_full_snapshot_is_a_model_folder(
    folders: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    trainer = make_trainer(folders[architecture], None)
    trainer.forward_backward(make_data(5, EXPERTS[architecture]), "cross_entropy", {})
    trainer.optim_step(AdamParams(learning_rate=1e-2), Normalization.NONE)
    folder = tmp_path / "snapshot"
    folder.mkdir()
    trainer.save_snapshot(folder, "whole", SnapshotKind.BASE, None)
    data = make_data(6, EXPERTS[architecture])[2:]
    (expected,) = trainer.forward(data, "cross_entropy", {}).outputs
    (datum,) = data
    model = plain_model(folder)
    tokens = np.append(datum.token_ids, datum.loss_inputs["target_tokens"][-1])
    found = plain_logprobs(model, tokens)[-1]
    assert found == pytest.approx(expected["logprobs"][-1], abs=1e-4)
    again = make_trainer(folder, None)
    (reloaded,) = again.forward(data, "cross_entropy", {}).outputs
    np.testing.assert_allclose(reloaded["logprobs"], expected["logprobs"], atol=1e-5)


def test_lora_leaves_experts_and_routers_as_they_are(folders: dict[str, Path]) -> None:
    engine = make_trainer(folders["qwen3_moe"], LORA)
    adapted = {name.rpartition(".")[2] for name in engine._current.trainables.adapter}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}
    with pytest.raises(FiretitanError, match="experts") as caught:
        engine.open_session(
            SessionSpec(1, LoraSpec(4, train_attn=False, train_mlp=True, train_unembed=False))
        )
    assert caught.value.reason is Reason.UNSUPPORTED
