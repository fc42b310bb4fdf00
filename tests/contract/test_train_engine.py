"""What every training engine promises, whatever is inside: the toy and the real one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import (
    AdamParams,
    Array,
    Datum,
    Float32Array,
    LoraSpec,
    Normalization,
    SessionSpec,
    SnapshotKind,
    TrainEngine,
)
from firetitan_daemon.engine.grad_norms import GradNormMetrics

ADAM = AdamParams(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=5.0)
FULL = SessionSpec(seed=1, lora=None)
LORA = SessionSpec(seed=1, lora=LoraSpec(4))
SESSIONS = pytest.mark.parametrize("session", [FULL, LORA], ids=["full", "lora"])

MakeEngine = Callable[[], TrainEngine]


@pytest.fixture
def engine(make: MakeEngine) -> TrainEngine:
    """An engine with a full-parameter session."""
    engine = make()
    engine.open_session(FULL)
    return engine


def _data(seed: int = 0, count: int = 3) -> list[Datum]:
    draw = np.random.default_rng(seed)
    data = []
    for length in draw.integers(3, 12, count):
        tokens = draw.integers(0, 60, length + 1)
        weights = draw.choice([0.0, 1.0, -0.5], length).astype(np.float32)
        weights[0] = 1.0
        data.append(
            Datum(tokens[:-1].astype(np.int32), {"target_tokens": tokens[1:], "weights": weights})
        )
    return data


def _normal(draw: np.random.Generator, count: int) -> Float32Array:
    return draw.standard_normal(count, np.float32)


def _policy_data(engine: TrainEngine, seed: int = 0) -> list[Datum]:
    data = [
        replace(each, loss_inputs={"target_tokens": each.loss_inputs["target_tokens"]})
        for each in _data(seed)
    ]
    outputs = engine.forward(data, "cross_entropy", {}).outputs
    draw = np.random.default_rng(seed)
    return [
        replace(
            each,
            loss_inputs={
                **each.loss_inputs,
                "logprobs": out["logprobs"] + _normal(draw, len(out["logprobs"])) * np.float32(0.4),
                "advantages": _normal(draw, len(out["logprobs"])),
            },
        )
        for each, out in zip(data, outputs, strict=True)
    ]


def _step(engine: TrainEngine, seed: int = 0) -> dict[str, float]:
    engine.forward_backward(_data(seed), "cross_entropy", {})
    return engine.optim_step(ADAM, Normalization.NONE)


def _fingerprint(engine: TrainEngine, tmp_path: Path) -> str:
    """Changes with any bit of weights, moments, gradients or counters."""
    folder = tmp_path / f"state-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    return engine.save_state(folder).digest


def _logprobs(engine: TrainEngine) -> np.ndarray:
    outputs = engine.forward(_data(99), "cross_entropy", {}).outputs
    return np.concatenate([output["logprobs"] for output in outputs])


def _refused(call: Callable[[], object], reason: Reason) -> str:
    with pytest.raises(FiretitanError) as caught:
        call()
    assert caught.value.reason is reason, caught.value.message
    return caught.value.message


@SESSIONS
def test_training_lowers_the_loss(make: MakeEngine, session: SessionSpec) -> None:
    engine = make()
    engine.open_session(session)
    data = [
        replace(d, loss_inputs={"target_tokens": d.loss_inputs["target_tokens"]}) for d in _data()
    ]
    losses = []
    for step in range(1, 9):
        losses.append(engine.forward_backward(data, "cross_entropy", {}).metrics["loss:sum"])
        metrics = engine.optim_step(ADAM, Normalization.NONE, expected_step=step - 1)
        assert metrics["step"] == step and metrics["grad_norm"] > 0
    assert losses[-1] < 0.9 * losses[0]


def test_loss_is_the_weighted_sum_of_logprobs(engine: TrainEngine) -> None:
    data = _data()
    output = engine.forward(data, "cross_entropy", {})
    total = -sum(
        float((d.loss_inputs["weights"] * o["logprobs"]).sum())
        for d, o in zip(data, output.outputs, strict=True)
    )
    assert output.metrics["loss:sum"] == pytest.approx(total, rel=1e-5)
    for datum, arrays in zip(data, output.outputs, strict=True):
        assert arrays["logprobs"].dtype == np.float32
        assert arrays["logprobs"].shape == datum.token_ids.shape
        assert (arrays["logprobs"] < 0).all()


def test_candidates_in_two_dimensions(engine: TrainEngine) -> None:
    one = _data()[0]
    flat = engine.forward([one], "cross_entropy", {}).outputs[0]["logprobs"]
    targets = one.loss_inputs["target_tokens"]
    wide: dict[str, Array] = {
        "target_tokens": np.stack([targets, (targets + 1) % 60], axis=1),
        "weights": np.stack([one.loss_inputs["weights"]] * 2, axis=1),
    }
    both = engine.forward_backward([replace(one, loss_inputs=wide)], "cross_entropy", {})
    assert both.outputs[0]["logprobs"].shape == (len(targets), 2)
    np.testing.assert_allclose(both.outputs[0]["logprobs"][:, 0], flat, rtol=1e-5)


def test_forward_leaves_everything_as_it_was(engine: TrainEngine, tmp_path: Path) -> None:
    engine.forward_backward(_data(), "cross_entropy", {})
    before = _fingerprint(engine, tmp_path)
    engine.forward(_data(5), "cross_entropy", {}, retain_graph=True)
    engine.forward(_data(6), "cross_entropy", {})
    assert _fingerprint(engine, tmp_path) == before
    assert engine.progress.pending_backwards == 1


@SESSIONS
@pytest.mark.parametrize("loss_fn", ["cross_entropy", "importance_sampling", "ppo"])
def test_gradient_is_the_slope_of_the_loss(
    make: MakeEngine, session: SessionSpec, loss_fn: str
) -> None:
    """With both betas 0 the step is lr * sign(gradient): small enough, it lowers any loss."""
    engine = make()
    engine.open_session(session)
    _step(engine)
    data = _data(3) if loss_fn == "cross_entropy" else _policy_data(engine, 3)
    before = engine.forward(data, loss_fn, {}).metrics["loss:sum"]
    engine.forward_backward(data, loss_fn, {})
    plain = AdamParams(learning_rate=2e-5, beta1=0.0, beta2=0.0)
    engine.optim_step(plain, Normalization.NONE)
    after = engine.forward(data, loss_fn, {}).metrics["loss:sum"]
    assert after < before


def test_backward_from_logprob_gradients_equals_the_loss(make: MakeEngine) -> None:
    """forward(retain_graph) and backward(-weights) is cross_entropy, at one forward."""
    left, right = make(), make()
    for engine in (left, right):
        engine.open_session(LORA)
        _step(engine)
    data = _data(3)
    left.forward_backward(data, "cross_entropy", {})
    runs = right.progress.forward_passes
    output = right.forward(data, "cross_entropy", {}, retain_graph=True)
    assert output.graph is not None
    right.backward(output.graph, [np.float32(-1) * datum.loss_inputs["weights"] for datum in data])
    assert right.progress.forward_passes == runs + 1
    norms = [e.optim_step(ADAM, Normalization.NUM_LOSS_TOKENS)["grad_norm"] for e in (left, right)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    np.testing.assert_allclose(_logprobs(left), _logprobs(right), rtol=1e-4, atol=1e-5)


def test_graph_is_gone_after_use_release_and_any_write(engine: TrainEngine, tmp_path: Path) -> None:
    data = _data()
    grads = [np.ones(len(datum.token_ids), np.float32) for datum in data]
    folder = tmp_path / "ckpt"
    folder.mkdir()
    engine.save_state(folder)

    def graph() -> str:
        made = engine.forward(data, "cross_entropy", {}, retain_graph=True).graph
        assert made is not None
        return made

    used = graph()
    engine.backward(used, grads)
    released = graph()
    engine.release_graph(released)
    engine.release_graph("never was")
    stepped = graph()
    engine.optim_step(ADAM, Normalization.NONE)
    loaded = graph()
    engine.load_state(folder, with_optimizer=True)
    for name in (used, released, stepped, loaded):
        _refused(partial(engine.backward, name, grads), Reason.GRAPH_EXPIRED)
    assert engine.progress.pending_backwards == 0


def test_parts_and_whole_agree(make: MakeEngine) -> None:
    whole, parts = make(), make()
    for engine in (whole, parts):
        engine.open_session(FULL)
    data = _data(1, count=5)
    whole.forward_backward(data, "cross_entropy", {})
    for part in (data[:2], data[2:3], data[3:]):
        parts.forward_backward(part, "cross_entropy", {})
        parts.forward(_data(8), "cross_entropy", {})
    norms = [e.optim_step(ADAM, Normalization.NUM_SEQUENCES)["grad_norm"] for e in (whole, parts)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    np.testing.assert_allclose(_logprobs(whole), _logprobs(parts), rtol=0, atol=1e-4)


def test_normalization_divides_by_its_count(make: MakeEngine) -> None:
    norms = {}
    for mode in Normalization:
        engine = make()
        engine.open_session(FULL)
        for seed in range(3):
            engine.forward_backward(_data(seed), "cross_entropy", {})
        norms[mode] = engine.optim_step(ADAM, mode)["grad_norm"]
    tokens = sum(
        int((d.loss_inputs["weights"] != 0).sum()) for seed in range(3) for d in _data(seed)
    )
    whole = norms[Normalization.NONE]
    assert norms[Normalization.NUM_LOSS_TOKENS] == pytest.approx(whole / tokens, rel=1e-5)
    assert norms[Normalization.NUM_SEQUENCES] == pytest.approx(whole / 9, rel=1e-5)


@SESSIONS
def test_a_step_tells_more_of_its_gradients_where_it_is_asked(
    make: MakeEngine, session: SessionSpec
) -> None:
    told = {}
    for mode in GradNormMetrics:
        engine = make()
        engine.open_session(session)
        engine.forward_backward(_data(3), "cross_entropy", {})
        params = replace(ADAM, grad_norm_metrics=mode)
        told[mode] = engine.optim_step(params, Normalization.NUM_LOSS_TOKENS)
    off, basic, detailed = told.values()
    assert set(off) == {"step", "grad_norm"}
    assert basic.items() > off.items() and detailed.items() > basic.items()
    assert 0 < basic["grad_rms"] < basic["grad_norm"]
    if session is FULL:
        elements = engine.info.num_parameters
        assert basic["grad_rms"] == pytest.approx(basic["grad_norm"] / elements**0.5)
    parts = [value for name, value in detailed.items() if name.startswith("grad_norm/")]
    assert len(parts) >= 1
    assert sum(value**2 for value in parts) == pytest.approx(basic["grad_norm"] ** 2)


def test_all_zero_gradients_count_as_gradients(engine: TrainEngine) -> None:
    data = [
        replace(d, loss_inputs={**d.loss_inputs, "weights": np.zeros(len(d.token_ids), np.float32)})
        for d in _data()
    ]
    engine.forward_backward(data, "cross_entropy", {})
    metrics = engine.optim_step(replace(ADAM, weight_decay=0.0), Normalization.NUM_LOSS_TOKENS)
    assert metrics["grad_norm"] == 0 and metrics["step"] == 1


def _with(datum: Datum, **inputs: Array) -> Datum:
    return replace(datum, loss_inputs={**datum.loss_inputs, **inputs})


def _bad_calls(engine: TrainEngine) -> list[tuple[Callable[[], object], Reason, str]]:
    good = _data()
    first = good[0]
    size = len(first.token_ids)
    ones = np.ones(size, np.float32)

    def run(datum: Datum, loss_fn: str = "cross_entropy", **config: float) -> Callable[[], object]:
        return lambda: engine.forward_backward([*good, datum], loss_fn, config)

    too_long = np.zeros(engine.info.max_context_length + 1, np.int32)
    outside = np.full(size, engine.info.vocab_size, np.int64)
    policy = _with(first, logprobs=ones, advantages=ones)
    policy = replace(
        policy, loss_inputs={k: v for k, v in policy.loss_inputs.items() if k != "weights"}
    )
    datum, missing = Reason.INVALID_DATUM, Reason.LOSS_INPUT_MISSING
    return [
        (lambda: engine.forward_backward([], "cross_entropy", {}), datum, "data"),
        (run(replace(first, token_ids=np.zeros(0, np.int32))), datum, "data[3]"),
        (run(replace(first, token_ids=outside.astype(np.int32))), datum, "data[3]"),
        (run(replace(first, token_ids=-np.ones(size, np.int32))), datum, "data[3]"),
        (run(Datum(too_long, {"target_tokens": too_long.astype(np.int64)})), datum, "data[3]"),
        (run(_with(first, target_tokens=outside)), datum, "target_tokens"),
        (run(_with(first, weights=ones[:-1])), datum, "weights"),
        (run(_with(first, weights=ones * np.nan)), Reason.NON_FINITE, "weights"),
        (run(_with(first, weights=ones * np.inf)), Reason.NON_FINITE, "weights"),
        (run(_with(first, surprise=ones)), datum, "surprise"),
        (run(replace(first, loss_inputs={"weights": ones})), missing, "target_tokens"),
        (run(first, "ppo"), missing, "data[0].loss_fn_inputs"),
        (run(first, "no_such_loss"), Reason.UNKNOWN_LOSS, "no_such_loss"),
        (
            lambda: engine.forward_backward([policy], "ppo", {"no_such_setting": 1.0}),
            Reason.INVALID_ARGUMENT,
            "no_such_setting",
        ),
        (
            lambda: engine.optim_step(replace(ADAM, learning_rate=np.nan), Normalization.NONE),
            Reason.NON_FINITE,
            "learning_rate",
        ),
        (
            lambda: engine.optim_step(replace(ADAM, beta1=1.0), Normalization.NONE),
            Reason.INVALID_ARGUMENT,
            "beta1",
        ),
        (
            lambda: engine.optim_step(ADAM, Normalization.NONE, expected_step=7),
            Reason.STEP_MISMATCH,
            "7",
        ),
    ]


@pytest.mark.parametrize("index", range(17))
def test_bad_input_is_named_and_changes_nothing(
    engine: TrainEngine, tmp_path: Path, index: int
) -> None:
    engine.forward_backward(_data(4), "cross_entropy", {})
    before, progress = _fingerprint(engine, tmp_path), engine.progress
    calls = _bad_calls(engine)
    assert len(calls) == 17
    call, reason, text = calls[index]
    assert text in _refused(call, reason)
    assert _fingerprint(engine, tmp_path) == before
    assert engine.progress == progress


def test_forward_ignores_unknown_inputs(engine: TrainEngine) -> None:
    data = _data()
    extra = [_with(d, surprise=np.ones(3, np.float32)) for d in data]
    plain = engine.forward(data, "cross_entropy", {}).metrics
    assert engine.forward(extra, "cross_entropy", {}).metrics == plain


def test_step_without_gradients_is_refused(engine: TrainEngine) -> None:
    message = _refused(lambda: engine.optim_step(ADAM, Normalization.NONE), Reason.NO_GRADIENTS)
    assert "no gradients accumulated" in message
    _step(engine)
    _refused(lambda: engine.optim_step(ADAM, Normalization.NONE), Reason.NO_GRADIENTS)


@SESSIONS
def test_resumed_with_optimizer_equals_uninterrupted_bitwise(
    make: MakeEngine, session: SessionSpec, tmp_path: Path
) -> None:
    whole, resumed, cold, fresh = make(), make(), make(), make()
    for engine in (whole, resumed, cold, fresh):
        engine.open_session(session)
    for seed in range(3):
        _step(whole, seed)
    folder = tmp_path / "ckpt"
    folder.mkdir()
    whole.save_state(folder)
    _step(resumed, 9)
    resumed.forward_backward(_data(8), "cross_entropy", {})
    resumed.load_state(folder, with_optimizer=True)
    assert resumed.progress.step == 3 and resumed.progress.pending_backwards == 0
    cold.load_state(folder, with_optimizer=False)
    assert cold.progress.step == 0
    metrics = [_step(engine, 5) for engine in (whole, resumed)]
    assert metrics[0] == metrics[1]
    states = [_fingerprint(engine, tmp_path) for engine in (whole, resumed)]
    assert states[0] == states[1]
    _step(cold, 5)
    assert not np.array_equal(_logprobs(cold), _logprobs(whole))


def test_pending_gradients_are_part_of_a_state(engine: TrainEngine, tmp_path: Path) -> None:
    empty = _fingerprint(engine, tmp_path)
    engine.forward_backward(_data(), "cross_entropy", {})
    once = _fingerprint(engine, tmp_path)
    engine.forward_backward(_data(1), "cross_entropy", {})
    assert len({empty, once, _fingerprint(engine, tmp_path)}) == 3


def test_damaged_and_foreign_states_change_nothing(make: MakeEngine, tmp_path: Path) -> None:
    engine, other = make(), make()
    engine.open_session(LORA)
    other.open_session(SessionSpec(1, LoraSpec(2)))
    folder, foreign = tmp_path / "ckpt", tmp_path / "foreign"
    for path, owner in ((folder, engine), (foreign, other)):
        path.mkdir()
        owner.save_state(path)
    engine.forward_backward(_data(), "cross_entropy", {})
    before = _fingerprint(engine, tmp_path)
    damaged = next(path for path in folder.glob("weights*"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    _refused(lambda: engine.load_state(folder, with_optimizer=True), Reason.CHECKSUM_MISMATCH)
    message = _refused(
        lambda: engine.load_state(foreign, with_optimizer=True), Reason.INVALID_ARGUMENT
    )
    assert "rank" in message
    assert _fingerprint(engine, tmp_path) == before


def test_snapshots_and_the_chain(engine: TrainEngine, tmp_path: Path) -> None:
    def save(name: str, kind: SnapshotKind, parent: str | None) -> str:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        saved = engine.save_snapshot(folder, name, kind, parent)
        assert saved.kind is kind
        manifest = durable.verify_folder(folder, saved.files.digest)
        assert manifest["result_digest"] == saved.result_digest
        return saved.result_digest

    first = save("a", SnapshotKind.BASE, None)
    _step(engine)
    second = save("b", SnapshotKind.DELTA, "a")
    assert first != second
    assert save("b-again", SnapshotKind.BASE, None) == second
    (tmp_path / "c").mkdir()
    delta = SnapshotKind.DELTA
    _refused(lambda: engine.save_snapshot(tmp_path / "c", "c", delta, "a"), Reason.CHAIN_BROKEN)
    state = tmp_path / "state"
    state.mkdir()
    engine.save_state(state)
    engine.load_state(state, with_optimizer=True)
    _refused(
        lambda: engine.save_snapshot(tmp_path / "c", "c", delta, "b-again"), Reason.CHAIN_BROKEN
    )
    _refused(
        lambda: engine.load_state(tmp_path / "a", with_optimizer=True), Reason.INVALID_ARGUMENT
    )


def test_adapter_snapshot_is_always_a_base(make: MakeEngine, tmp_path: Path) -> None:
    engine = make()
    engine.open_session(LORA)
    for name, parent in (("a", None), ("b", "a")):
        _step(engine)
        (tmp_path / name).mkdir()
        kind = SnapshotKind.DELTA if parent else SnapshotKind.BASE
        saved = engine.save_snapshot(tmp_path / name, name, kind, parent)
        assert saved.kind is SnapshotKind.BASE


def test_session_starts_anew(make: MakeEngine, tmp_path: Path) -> None:
    engine = make()
    engine.open_session(LORA)
    before = _fingerprint(engine, tmp_path)
    untouched = _logprobs(engine)
    _step(engine)
    engine.forward_backward(_data(), "cross_entropy", {})
    engine.open_session(LORA)
    assert _fingerprint(engine, tmp_path) == before
    assert engine.progress.step == engine.progress.pending_backwards == 0
    engine.open_session(FULL)
    np.testing.assert_allclose(_logprobs(engine), untouched, rtol=1e-5, atol=1e-6)
