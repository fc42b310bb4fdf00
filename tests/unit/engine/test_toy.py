"""The toy engines: exact gradients, equal bits, answers that name what made them."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import (
    AdamParams,
    Array,
    Datum,
    Float32Array,
    LoraSpec,
    ModelSpec,
    Normalization,
    SessionSpec,
    SnapshotKind,
    SnapshotLayer,
)
from firetitan_daemon.engine.sample_api import SampleRequest, SampleResult, StopReason
from firetitan_daemon.engine.toy import TOY_MODEL, ToySampleEngine, ToyTrainEngine, model

SPEC = ModelSpec(TOY_MODEL)
FULL = SessionSpec(3, None)
LORA = SessionSpec(3, LoraSpec(4, alpha=8.0))
ADAM = AdamParams(learning_rate=1e-2)


def _engine(session: SessionSpec = FULL) -> ToyTrainEngine:
    engine = ToyTrainEngine(SPEC)
    engine.open_session(session)
    return engine


def _data(seed: int, count: int = 3, **config: float) -> list[Datum]:
    draw = np.random.default_rng(seed)
    data = []
    for _ in range(count):
        length = int(draw.integers(2, 9))
        inputs: dict[str, Array] = {
            "target_tokens": draw.integers(0, model.VOCAB, length),
            "logprobs": draw.uniform(-6, -3, length).astype(np.float32),
            "advantages": draw.standard_normal(length, np.float32),
        }
        data.append(Datum(draw.integers(0, model.VOCAB, length).astype(np.int32), inputs))
    return data


def _plain(data: list[Datum]) -> list[Datum]:
    return [replace(d, loss_inputs={"target_tokens": d.loss_inputs["target_tokens"]}) for d in data]


@pytest.mark.parametrize("session", [FULL, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("loss_fn", "config"),
    [
        ("cross_entropy", {}),
        ("importance_sampling", {}),
        ("importance_sampling", {"ratio_log_cap": 0.5}),
        ("ppo", {}),
        ("ppo", {"clip_low_threshold": 0.1, "clip_high_threshold": 5.0}),
    ],
)
def test_gradient_is_the_numerical_one(
    session: SessionSpec, loss_fn: str, config: dict[str, float]
) -> None:
    engine = _engine(session)
    for name, array in engine._weights.items():
        engine._weights[name] = array + np.random.default_rng(1).normal(0, 0.1, array.shape).astype(
            np.float32
        )
    engine._moved()
    data = _data(5) if loss_fn != "cross_entropy" else _plain(_data(5))
    engine.forward_backward(data, loss_fn, config)
    exact = engine._pending.of_parameters(engine._base, engine._weights, session.lora, 1)
    draw = np.random.default_rng(2)
    for name in exact:
        direction = draw.standard_normal(exact[name].shape).astype(np.float32)
        start, sides = engine._weights[name], []
        for sign in (1, -1):
            engine._weights[name] = start + np.float32(sign * 2e-3) * direction
            engine._logprobs_VV = None
            sides.append(engine.forward(data, loss_fn, config).metrics["loss:sum"])
        engine._weights[name] = start
        slope = (sides[0] - sides[1]) / 4e-3
        assert slope == pytest.approx(float((exact[name] * direction).sum()), rel=2e-3, abs=2e-2)


def test_ppo_is_its_formula() -> None:
    engine = _engine()
    data = _data(1)
    output = engine.forward(data, "ppo", {})
    total = 0.0
    for datum, arrays in zip(data, output.outputs, strict=True):
        ratio = np.exp(arrays["logprobs"] - datum.loss_inputs["logprobs"])
        advantages = datum.loss_inputs["advantages"]
        clipped = np.clip(ratio, 0.8, 1.2)
        total -= float(np.minimum(ratio * advantages, clipped * advantages).sum())
        assert ((ratio < 0.8) | (ratio > 1.2)).any()
    assert output.metrics["loss:sum"] == pytest.approx(total, rel=1e-5)


def test_parts_and_whole_are_bitwise_the_same(tmp_path: Path) -> None:
    whole, parts = _engine(), _engine()
    data = _plain(_data(7, count=6))
    digests = []
    for index in range(3):
        whole.forward_backward(data, "cross_entropy", {})
        for part in (data[:1], data[1:4], data[4:]):
            parts.forward_backward(part, "cross_entropy", {})
        for name, engine in (("whole", whole), ("parts", parts)):
            engine.optim_step(ADAM, Normalization.NUM_LOSS_TOKENS)
            folder = tmp_path / f"{name}-{index}"
            folder.mkdir()
            digests.append(engine.save_state(folder).digest)
        assert digests[-1] == digests[-2]


def test_adamw_is_torchs() -> None:
    torch = pytest.importorskip("torch")
    engine = _engine()
    params = AdamParams(3e-3, 0.8, 0.97, 1e-6, 0.05, 2.0)
    mine = {n: torch.nn.Parameter(torch.tensor(w)) for n, w in model.base_weights().items()}
    optimizer = torch.optim.AdamW(
        mine.values(), lr=3e-3, betas=(0.8, 0.97), eps=1e-6, weight_decay=0.05
    )
    for seed in range(4):
        data = _plain(_data(seed))
        engine.forward_backward(data, "cross_entropy", {})
        metrics = engine.optim_step(params, Normalization.NUM_SEQUENCES)
        logits = mine[model.EMBED] @ mine[model.UNEMBED].T
        loss = sum(
            torch.nn.functional.cross_entropy(
                logits[torch.tensor(d.token_ids).long()],
                torch.tensor(d.loss_inputs["target_tokens"]),
                reduction="sum",
            )
            for d in data
        )
        optimizer.zero_grad()
        (loss / len(data)).backward()
        norm = torch.nn.utils.clip_grad_norm_(mine.values(), 2.0)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        optimizer.step()
    for name, parameter in mine.items():
        np.testing.assert_allclose(engine._weights[name], parameter.detach().numpy(), atol=2e-6)


def test_a_step_is_fast() -> None:
    engine = _engine()
    data = _plain(_data(0))
    times = []
    for _ in range(30):
        started = time.perf_counter()
        engine.forward_backward(data, "cross_entropy", {})
        engine.optim_step(ADAM, Normalization.NONE)
        times.append(time.perf_counter() - started)
    assert min(times) < 2e-3


def test_toy_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from firetitan_daemon.engine.api import ModelSpec\n"
        "from firetitan_daemon.engine.factory import make_sample_engine, make_train_engine\n"
        "make_train_engine(ModelSpec('firetitan/toy')).close()\n"
        "make_sample_engine(ModelSpec('firetitan/toy')).close()\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_context_is_honoured() -> None:
    engine = ToyTrainEngine(replace(SPEC, max_context_length=4))
    engine.open_session(FULL)
    with pytest.raises(FiretitanError, match="1 to 4 are possible"):
        engine.forward(
            [Datum(np.zeros(5, np.int32), {"target_tokens": np.zeros(5, np.int64)})],
            "cross_entropy",
            {},
        )
    with pytest.raises(FiretitanError, match="max_context_length=99999"):
        ToySampleEngine(replace(SPEC, max_context_length=99999))


@pytest.fixture
def sampler() -> Iterator[ToySampleEngine]:
    engine = ToySampleEngine(SPEC)
    yield engine
    engine.close()


def _request(seed: int = 0, **changes: object) -> SampleRequest:
    request = SampleRequest(np.array([5, 9], np.int32), 2, 12, seed=seed, use_eos=False)
    return replace(request, **changes)  # type: ignore[arg-type]


def _tokens(result: SampleResult) -> list[list[int]]:
    return [each.token_ids.tolist() for each in result.sequences]


def _layers(tmp_path: Path, count: int) -> list[SnapshotLayer]:
    """A base and the deltas on it, each after one training step."""
    engine = _engine()
    layers: list[SnapshotLayer] = []
    for index in range(count):
        engine.forward_backward(_plain(_data(index)), "cross_entropy", {})
        engine.optim_step(AdamParams(learning_rate=0.3), Normalization.NONE)
        folder = tmp_path / f"s{index}"
        folder.mkdir()
        kind = SnapshotKind.DELTA if layers else SnapshotKind.BASE
        parent = layers[-1].name if layers else None
        saved = engine.save_snapshot(folder, f"s{index}", kind, parent)
        layers.append(
            SnapshotLayer(
                f"s{index}", kind, saved.format, folder, saved.files.digest, saved.result_digest
            )
        )
    return layers


@pytest.mark.timeout(30)
def test_sampler_agrees_with_the_trainer(tmp_path: Path, sampler: ToySampleEngine) -> None:
    engine = _engine()
    engine.forward_backward(_plain(_data(0)), "cross_entropy", {})
    engine.optim_step(AdamParams(learning_rate=0.3), Normalization.NONE)
    sampler.apply(_layers(tmp_path, 1))
    result = sampler.submit(_request(prompt_logprobs=True)).result()
    tokens = np.array([5, 9, *_tokens(result)[0]])
    datum = Datum(tokens[:-1].astype(np.int32), {"target_tokens": tokens[1:]})
    logprobs = engine.forward([datum], "cross_entropy", {}).outputs[0]["logprobs"]
    np.testing.assert_allclose(logprobs[1:], result.sequences[0].inference_logprobs, atol=1e-5)
    assert result.prompt.logprobs is not None and np.isnan(result.prompt.logprobs[0])
    assert result.prompt.logprobs[1] == pytest.approx(logprobs[0], abs=1e-5)


@pytest.mark.timeout(30)
def test_tokens_do_not_depend_on_batch_mates(sampler: ToySampleEngine) -> None:
    alone = [_tokens(sampler.submit(_request(seed)).result()) for seed in range(4)]
    together = [sampler.submit(_request(seed)) for seed in range(4)]
    assert [_tokens(future.result()) for future in together] == alone
    assert alone[0] != alone[1] and alone[0][0] != alone[0][1]


@pytest.mark.timeout(30)
def test_stops(sampler: ToySampleEngine) -> None:
    full = sampler.submit(_request()).result().sequences[0]
    assert full.stop_reason is StopReason.LENGTH and len(full.token_ids) == 12
    cut = int(full.token_ids[4])
    first = full.token_ids.tolist().index(cut)
    for changes in ({"stop_token_ids": (cut,)}, {"stop": (model.decode([cut]),)}):
        stopped = sampler.submit(_request(**changes)).result().sequences[0]
        assert stopped.stop_reason is StopReason.STOP
        assert stopped.token_ids.tolist() == full.token_ids.tolist()[: first + 1]


@pytest.mark.timeout(30)
def test_chain_serves_each_snapshot_under_its_name(
    tmp_path: Path, sampler: ToySampleEngine
) -> None:
    layers = _layers(tmp_path, 4)
    base = _tokens(sampler.submit(_request()).result())
    sampler.apply(layers[:1])
    assert (sampler.active, sampler.loaded) == ("s0", ("s0",))
    one = sampler.submit(_request()).result()
    assert one.snapshot == "s0" and _tokens(one) != base
    sampler.apply(layers[1:3], keep=("s0",))
    assert set(sampler.loaded) == {"s0", "s2"}
    assert _tokens(sampler.submit(_request(snapshot="s0")).result()) == _tokens(one)
    assert _tokens(sampler.submit(_request(snapshot="")).result()) == base
    two = sampler.submit(_request()).result()
    assert two.snapshot == "s2"
    other = ToySampleEngine(SPEC)
    other.apply(layers[:3])
    assert _tokens(other.submit(_request()).result()) == _tokens(two)
    other.close()
    sampler.apply(layers[3:])
    assert sampler.loaded == ("s3",)
    with pytest.raises(FiretitanError, match='"s0": not loaded') as caught:
        sampler.submit(_request(snapshot="s0"))
    assert caught.value.reason is Reason.SNAPSHOT_NOT_ACTIVE


@pytest.mark.timeout(30)
def test_failed_apply_serves_on(tmp_path: Path, sampler: ToySampleEngine) -> None:
    layers = _layers(tmp_path, 3)
    sampler.apply(layers[:1])
    before = _tokens(sampler.submit(_request()).result())
    file = layers[1].path / "delta.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    cases = [
        (layers[1:], Reason.CHECKSUM_MISMATCH),
        (layers[2:], Reason.CHAIN_BROKEN),
        ([replace(layers[0], result_digest="0" * 64)], Reason.CHECKSUM_MISMATCH),
        ([replace(layers[0], digest="0" * 64)], Reason.CHECKSUM_MISMATCH),
    ]
    for bad, reason in cases:
        with pytest.raises(FiretitanError) as caught:
            sampler.apply(bad)
        assert caught.value.reason is reason
    assert sampler.active == "s0"
    assert _tokens(sampler.submit(_request()).result()) == before


@pytest.mark.timeout(30)
def test_what_is_prepared_is_not_served_until_it_is_applied(
    tmp_path: Path, sampler: ToySampleEngine
) -> None:
    layers = _layers(tmp_path, 3)
    sampler.apply(layers[:1])
    before = _tokens(sampler.submit(_request()).result())
    sampler.prepare(layers[1:2])
    assert (sampler.active, sampler.loaded) == ("s0", ("s0",))
    with pytest.raises(FiretitanError, match='"s1": not loaded'):
        sampler.submit(_request(snapshot="s1"))
    assert _tokens(sampler.submit(_request()).result()) == before
    layers[1].path.rename(tmp_path / "gone")
    sampler.apply(layers[1:2])  # nothing is read again
    assert (sampler.active, sampler.loaded) == ("s1", ("s1",))
    sampler.prepare(layers[2:])
    sampler.retain(())
    layers[2].path.rename(tmp_path / "gone too")
    with pytest.raises(FiretitanError):
        sampler.apply(layers[2:])  # it was let go
    assert sampler.active == "s1"


@pytest.mark.timeout(60)
def test_swaps_under_load_name_the_right_snapshot(tmp_path: Path, sampler: ToySampleEngine) -> None:
    layers = _layers(tmp_path, 6)
    futures: list[tuple[int, Future[SampleResult]]] = []
    ended = threading.Event()

    def submit() -> None:
        seed = 0
        while not ended.is_set():
            futures.append((seed, sampler.submit(_request(seed, max_tokens=60))))
            seed += 1
            time.sleep(2e-4)

    thread = threading.Thread(target=submit)
    thread.start()
    for index in range(len(layers)):
        sampler.apply(layers[index : index + 1])
        # At least one takes each.
        futures.append((-1 - index, sampler.submit(_request(-1 - index, max_tokens=60))))
        futures[-1][1].result()
    ended.set()
    thread.join()
    results = [(seed, future.result()) for seed, future in futures]
    assert len({result.snapshot for _, result in results}) >= 5
    alone = ToySampleEngine(SPEC)
    for index in range(len(layers)):
        alone.apply(layers[index : index + 1])
        for seed, result in [each for each in results if each[1].snapshot == f"s{index}"][:20]:
            again = alone.submit(_request(seed, max_tokens=60)).result()
            assert _tokens(again) == _tokens(result)
    alone.close()


@pytest.mark.timeout(30)
def test_cancelled_request_leaves_the_batch(sampler: ToySampleEngine) -> None:
    long = sampler.submit(_request(num_samples=4, max_tokens=8000))
    assert long.cancel()
    assert len(sampler.submit(_request()).result().sequences) == 2
    assert not sampler._requests


@pytest.mark.timeout(30)
def test_close_fails_what_is_queued() -> None:
    engine = ToySampleEngine(SPEC)
    future = engine.submit(_request(num_samples=4, max_tokens=8000))
    engine.close()
    error = future.exception()
    assert isinstance(error, FiretitanError) and error.reason is Reason.CLOSED
    with pytest.raises(FiretitanError):
        engine.submit(_request())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"prompt": np.empty(0, np.int32)}, "prompt: is empty"),
        ({"prompt": np.array([3, 64], np.int32)}, r"out of vocabulary at \[1\]"),
        ({"num_samples": 0}, "num_samples: is 0"),
        ({"max_tokens": 0}, "max_tokens: is 0"),
        ({"max_tokens": 8191}, r"prompt has 2 tokens \+ max_tokens 8191 > 8192"),
        ({"temperature": float("nan")}, "temperature: is nan"),
        ({"temperature": -1.0}, "temperature: is -1"),
        ({"top_p": 0.0}, "top_p: is 0"),
    ],
)
def test_bad_requests_are_named(
    sampler: ToySampleEngine, changes: dict[str, object], text: str
) -> None:
    with pytest.raises(FiretitanError, match=text) as caught:
        sampler.submit(_request(**changes))
    assert caught.value.reason is Reason.INVALID_ARGUMENT


def test_adapter_trains_the_head_alone() -> None:
    engine = _engine(LORA)
    before: Float32Array = engine._base[model.UNEMBED].copy()
    engine.forward_backward(_plain(_data(0)), "cross_entropy", {})
    engine.optim_step(ADAM, Normalization.NONE)
    assert np.array_equal(engine._base[model.UNEMBED], before)
    assert np.any(engine._weights[model.LORA_B])
