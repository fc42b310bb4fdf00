"""The base model beside an adapter in training, for every engine: forwards that leave it out."""

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
    SessionSpec,
    TrainEngine,
)

ADAM = AdamParams(learning_rate=5e-2)
FULL = SessionSpec(seed=1, lora=None)
FROZEN = SessionSpec(seed=1, lora=None, forward_only=True)
LORA = SessionSpec(seed=1, lora=LoraSpec(4))

MakeEngine = Callable[[], TrainEngine]


def _data(seed: int = 0) -> list[Datum]:
    draw = np.random.default_rng(seed)
    data = []
    for length in draw.integers(3, 12, 3):
        tokens = draw.integers(0, 60, length + 1)
        weights = np.ones(length, np.float32)
        data.append(
            Datum(tokens[:-1].astype(np.int32), {"target_tokens": tokens[1:], "weights": weights})
        )
    return data


def _logprobs(engine: TrainEngine, *, base_only: bool = False) -> list[np.ndarray]:
    outputs = engine.forward(_data(9), "cross_entropy", {}, base_only=base_only).outputs
    return [output["logprobs"] for output in outputs]


def _equal(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def _state(engine: TrainEngine, tmp_path: Path) -> str:
    """Changes with any bit of weights, moments, gradients or counters."""
    folder = tmp_path / f"state-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    return engine.save_state(folder).digest


def _trained(make: MakeEngine) -> TrainEngine:
    engine = make()
    engine.open_session(LORA)
    for seed in range(3):
        engine.forward_backward(_data(seed), "cross_entropy", {})
        engine.optim_step(ADAM, Normalization.NONE)
    return engine


def test_base_only_is_the_base_model_bit_for_bit(make: MakeEngine) -> None:
    base = make()
    base.open_session(FULL)
    engine = _trained(make)
    adapted = _logprobs(engine)
    assert _equal(_logprobs(engine, base_only=True), _logprobs(base))
    assert not _equal(adapted, _logprobs(base))
    assert _equal(_logprobs(engine), adapted)


def test_base_only_leaves_gradients_and_kept_graphs_bit_for_bit(
    make: MakeEngine, tmp_path: Path
) -> None:
    states = []
    for with_base in (False, True):
        engine = _trained(make)
        engine.forward_backward(_data(5), "cross_entropy", {})
        graph = engine.forward(_data(6), "cross_entropy", {}, retain_graph=True).graph
        assert graph is not None
        if with_base:
            before = _state(engine, tmp_path)
            _logprobs(engine, base_only=True)
            assert _state(engine, tmp_path) == before
        slopes = [np.full(len(datum.token_ids), 0.5, np.float32) for datum in _data(6)]
        engine.backward(graph, slopes)
        states.append(_state(engine, tmp_path))
        engine.optim_step(ADAM, Normalization.NONE)
        states.append(_state(engine, tmp_path))
    assert states[:2] == states[2:]


def test_a_base_forward_that_fails_leaves_the_adapter_in(make: MakeEngine) -> None:
    engine = _trained(make)
    before = _logprobs(engine)
    outside = Datum(np.array([1, 10**6], np.int32), {"target_tokens": np.array([1, 2])})
    with pytest.raises(FiretitanError):
        engine.forward([outside], "cross_entropy", {}, base_only=True)
    assert _equal(_logprobs(engine), before)


def test_a_forward_only_session_is_the_base_model(make: MakeEngine) -> None:
    base, frozen = make(), make()
    base.open_session(FULL)
    frozen.open_session(FROZEN)
    assert _equal(_logprobs(frozen), _logprobs(base))
    assert _equal(_logprobs(frozen, base_only=True), _logprobs(base))
    frozen.open_session(LORA)
    frozen.forward_backward(_data(), "cross_entropy", {})
    assert frozen.optim_step(ADAM, Normalization.NONE)["grad_norm"] > 0


@pytest.mark.parametrize(("session", "retain"), [(FULL, False), (LORA, True)])
def test_what_a_base_forward_cannot_be_is_refused(
    make: MakeEngine, session: SessionSpec, retain: bool
) -> None:
    engine = make()
    engine.open_session(session)
    with pytest.raises(FiretitanError) as caught:
        engine.forward(_data(), "cross_entropy", {}, retain_graph=retain, base_only=True)
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    assert caught.value.field == ("retain_graph" if retain else "base_only")
