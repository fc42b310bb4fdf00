"""What every training engine promises of embeddings and of losses over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import (
    AdamParams,
    Datum,
    LoraSpec,
    Normalization,
    Pooling,
    SessionSpec,
    TrainEngine,
)

ADAM = AdamParams(learning_rate=1e-2)
FULL = SessionSpec(seed=1, lora=None)
POOLINGS = pytest.mark.parametrize("pooling", list(Pooling))
CONTRASTIVE = {"num_queries": 2.0, "temperature": 0.5, "num_extra_negatives": 1.0}

MakeEngine = Callable[[], TrainEngine]


@pytest.fixture
def engine(make: MakeEngine) -> TrainEngine:
    """An engine with a full-parameter session."""
    engine = make()
    engine.open_session(FULL)
    return engine


def sequences(count: int = 5, seed: int = 0, **inputs: np.ndarray) -> list[Datum]:
    draw = np.random.default_rng(seed)
    return [
        Datum(draw.integers(1, 60, length).astype(np.int32), inputs)
        for length in draw.integers(2, 9, count)
    ]


def vectors(engine: TrainEngine, data: list[Datum], pooling: Pooling) -> np.ndarray:
    output = engine.forward_embeddings(data, pooling, "", {})
    return np.stack([one["embedding"] for one in output.outputs])


def digest(engine: TrainEngine, tmp_path: Path) -> str:
    folder = tmp_path / f"state-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    return engine.save_state(folder).digest


@POOLINGS
def test_each_sequence_becomes_one_vector(engine: TrainEngine, pooling: Pooling) -> None:
    data = sequences()
    whole = vectors(engine, data, pooling)
    assert whole.dtype == np.float32 and whole.ndim == 2
    alone = np.concatenate([vectors(engine, [one], pooling) for one in data])
    np.testing.assert_allclose(whole, alone, rtol=1e-4, atol=1e-5)
    assert len(np.unique(whole[:, 0])) == len(data)


def test_poolings_agree_on_one_token_and_differ_on_more(engine: TrainEngine) -> None:
    one = [Datum(np.array([7], np.int32), {})]
    np.testing.assert_allclose(
        vectors(engine, one, Pooling.MEAN), vectors(engine, one, Pooling.LAST), rtol=1e-6
    )
    more = sequences()
    assert not np.allclose(
        vectors(engine, more, Pooling.MEAN), vectors(engine, more, Pooling.LAST), atol=1e-3
    )


@POOLINGS
def test_kept_graph_and_linear_loss_have_the_same_gradient(
    make: MakeEngine, pooling: Pooling
) -> None:
    graphed, linear = make(), make()
    for engine in (graphed, linear):
        engine.open_session(FULL)
    data = sequences()
    size = vectors(graphed, data, pooling).shape[1]
    grads = list(np.random.default_rng(3).normal(size=(len(data), size)).astype(np.float32))
    grads[1] = np.zeros(size, np.float32)
    output = graphed.forward_embeddings(data, pooling, "", {}, retain_graph=True)
    assert output.graph is not None and graphed.progress.pending_backwards == 0
    before = graphed.progress.forward_passes
    back = graphed.backward(output.graph, grads)
    assert graphed.progress.forward_passes == before
    given = [Datum(d.token_ids, {"embedding_grads": g}) for d, g in zip(data, grads, strict=True)]
    other = linear.forward_backward_embeddings(given, pooling, "", {})
    expected = sum(
        float((o["embedding"] * g).sum()) for o, g in zip(output.outputs, grads, strict=True)
    )
    for result in (back, other):
        assert result.metrics["loss:sum"] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    norms = [
        engine.optim_step(ADAM, Normalization.NUM_SEQUENCES)["grad_norm"]
        for engine in (graphed, linear)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 0
    np.testing.assert_allclose(
        vectors(graphed, data, pooling), vectors(linear, data, pooling), rtol=1e-4, atol=1e-5
    )


@POOLINGS
def test_contrastive_steps_lower_the_loss(make: MakeEngine, pooling: Pooling) -> None:
    engine = make()
    engine.open_session(FULL)
    data = sequences()
    losses = []
    for _ in range(6):
        evaluated = engine.forward_embeddings(data, pooling, "contrastive", CONTRASTIVE)
        output = engine.forward_backward_embeddings(data, pooling, "contrastive", CONTRASTIVE)
        assert output.metrics["loss"] == pytest.approx(evaluated.metrics["loss"], rel=1e-5)
        losses.append(output.metrics["loss"])
        engine.optim_step(ADAM, Normalization.NONE)
    assert losses[-1] < 0.9 * losses[0]


def test_sequences_are_counted_and_tokens_refused(engine: TrainEngine, tmp_path: Path) -> None:
    data = sequences()
    engine.forward_backward_embeddings(data, Pooling.LAST, "contrastive", CONTRASTIVE)
    before = digest(engine, tmp_path)
    with pytest.raises(FiretitanError) as caught:
        engine.optim_step(ADAM, Normalization.NUM_LOSS_TOKENS)
    assert caught.value.reason is Reason.NO_LOSS_TOKENS
    assert "num_sequences" in caught.value.message
    assert digest(engine, tmp_path) == before
    counted = engine.optim_step(ADAM, Normalization.NUM_SEQUENCES)["grad_norm"]
    engine.open_session(FULL)
    engine.forward_backward_embeddings(data, Pooling.LAST, "contrastive", CONTRASTIVE)
    raw = engine.optim_step(ADAM, Normalization.NONE)["grad_norm"]
    assert counted == pytest.approx(raw / len(data), rel=1e-5)
    # The next step has tokens of its own.
    plain = [Datum(d.token_ids, {"target_tokens": d.token_ids.astype(np.int64)}) for d in data]
    engine.forward_backward(plain, "cross_entropy", {})
    engine.optim_step(ADAM, Normalization.NUM_LOSS_TOKENS)


def test_forward_changes_nothing_and_reads_no_inputs(engine: TrainEngine, tmp_path: Path) -> None:
    before = digest(engine, tmp_path)
    with_inputs = sequences(target_tokens=np.array([10**6]))
    np.testing.assert_array_equal(
        vectors(engine, with_inputs, Pooling.LAST), vectors(engine, sequences(), Pooling.LAST)
    )
    engine.forward_embeddings(sequences(), Pooling.MEAN, "", {}, retain_graph=True)
    assert digest(engine, tmp_path) == before


def test_the_base_model_has_embeddings_too(make: MakeEngine) -> None:
    engine, base = make(), make()
    engine.open_session(SessionSpec(seed=1, lora=LoraSpec(4)))
    base.open_session(FULL)
    data = sequences()
    plain = [Datum(d.token_ids, {"target_tokens": d.token_ids.astype(np.int64)}) for d in data]
    for _ in range(2):
        engine.forward_backward(plain, "cross_entropy", {})
        engine.optim_step(ADAM, Normalization.NONE)
    output = engine.forward_embeddings(data, Pooling.MEAN, "", {}, base_only=True)
    found = np.stack([one["embedding"] for one in output.outputs])
    np.testing.assert_array_equal(found, vectors(base, data, Pooling.MEAN))


def _bad_calls(engine: TrainEngine) -> list[tuple[Callable[[], object], Reason, str]]:
    data = sequences()
    size = vectors(engine, data, Pooling.LAST).shape[1]

    def run(data: list[Datum], loss_fn: str = "", **config: float | str) -> Callable[[], object]:
        return lambda: engine.forward_backward_embeddings(data, Pooling.LAST, loss_fn, config)

    def with_grads(grads: np.ndarray, **more: np.ndarray) -> list[Datum]:
        ones = np.ones(size, np.float32)
        good = [Datum(d.token_ids, {"embedding_grads": ones}) for d in data]
        return [*good[:2], Datum(data[2].token_ids, {"embedding_grads": grads, **more})]

    def settings(**changed: float | str) -> Callable[[], object]:
        return run(data, "contrastive", **(CONTRASTIVE | changed))

    ones = np.ones(size, np.float32)
    kept = engine.forward_embeddings(data, Pooling.MEAN, "", {}, retain_graph=True).graph
    assert kept is not None
    too_long = [Datum(np.zeros(engine.info.max_context_length + 1, np.int32), {})]
    argument = Reason.INVALID_ARGUMENT
    return [
        (run([]), Reason.INVALID_DATUM, "data"),
        (run(too_long), Reason.INVALID_DATUM, "data[0].model_input"),
        (run(data), Reason.LOSS_INPUT_MISSING, "data[0].loss_fn_inputs"),
        (run(with_grads(ones[:-1])), argument, "data[2]"),
        (run(with_grads(ones * np.nan)), Reason.NON_FINITE, "data[2]"),
        (run(with_grads(ones, weights=ones)), Reason.INVALID_DATUM, "weights"),
        (run(data, "triplet"), Reason.UNKNOWN_LOSS, "triplet"),
        (settings(num_queries=3.0), argument, "are 7"),
        (settings(num_queries=0.0), argument, "num_queries"),
        (settings(num_queries=1.5), argument, "num_queries"),
        (settings(temperature=0.0), argument, "temperature"),
        (settings(temperature="warm"), argument, "temperature"),
        (settings(num_extra_negatives=-1.0), argument, "num_extra_negatives"),
        (settings(margin=0.5), argument, "margin"),
        (lambda: engine.backward(kept, [ones]), argument, "output_grads"),
        (lambda: engine.backward(kept, [ones[:-1]] * len(data)), argument, "output_grads[0]"),
        (lambda: engine.backward(kept, [ones * np.inf] * len(data)), Reason.NON_FINITE, "grads[0]"),
    ]


@pytest.mark.parametrize("index", range(17))
def test_bad_input_is_named_and_changes_nothing(
    engine: TrainEngine, tmp_path: Path, index: int
) -> None:
    calls = _bad_calls(engine)
    assert len(calls) == 17
    before, progress = digest(engine, tmp_path), engine.progress
    call, reason, text = calls[index]
    with pytest.raises(FiretitanError) as caught:
        call()
    assert caught.value.reason is reason and text in caught.value.message
    assert digest(engine, tmp_path) == before
    assert engine.progress.pending_backwards == progress.pending_backwards
