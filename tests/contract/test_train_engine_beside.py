"""Several sessions over one model, for every engine: none sees or disturbs another."""

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
    SnapshotKind,
    TrainEngine,
)

ADAM = AdamParams(learning_rate=5e-2)
SPECS = [
    SessionSpec(seed=1, lora=LoraSpec(4)),
    SessionSpec(seed=2, lora=LoraSpec(2, alpha=8.0, train_attn=False, train_unembed=False)),
    SessionSpec(seed=3, lora=LoraSpec(8, train_mlp=False)),
]
FROZEN = SessionSpec(seed=0, lora=None, forward_only=True)

MakeEngine = Callable[[], TrainEngine]


def _data(seed: int) -> list[Datum]:
    draw = np.random.default_rng(seed)
    data = []
    for length in draw.integers(3, 12, 3):
        tokens = draw.integers(0, 60, length + 1)
        weights = np.ones(length, np.float32)
        data.append(
            Datum(tokens[:-1].astype(np.int32), {"target_tokens": tokens[1:], "weights": weights})
        )
    return data


def _slopes(seed: int) -> list[np.ndarray]:
    return [np.full(len(datum.token_ids), 0.5, np.float32) for datum in _data(seed)]


def _logprobs(engine: TrainEngine, *, base_only: bool = False) -> list[np.ndarray]:
    outputs = engine.forward(_data(9), "cross_entropy", {}, base_only=base_only).outputs
    return [output["logprobs"] for output in outputs]


def _equal(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


def _digests(engine: TrainEngine, tmp_path: Path) -> tuple[str, str]:
    """Of the whole state, and of the weights as they are served."""
    folders = [tmp_path / f"save-{len(list(tmp_path.iterdir()))}-{i}" for i in range(2)]
    for folder in folders:
        folder.mkdir()
    saved = engine.save_snapshot(folders[1], "s", SnapshotKind.BASE, None)
    return engine.save_state(folders[0]).digest, saved.result_digest


def _part(engine: TrainEngine, number: int, step: int) -> None:
    """A fraction of one session's work."""
    if step % 3 == 2:
        engine.optim_step(ADAM, Normalization.NUM_LOSS_TOKENS)
        return
    seed = 10 * number + step
    if step % 3 == 0:
        engine.forward_backward(_data(seed), "cross_entropy", {})
        return
    graph = engine.forward(_data(seed), "cross_entropy", {}, retain_graph=True).graph
    assert graph is not None
    engine.backward(graph, _slopes(seed))


def test_interleaved_sessions_come_to_what_each_comes_to_alone(
    make: MakeEngine, tmp_path: Path
) -> None:
    alone = []
    for number, spec in enumerate(SPECS):
        engine = make()
        engine.open_session(spec)
        for step in range(7):
            _part(engine, number, step)
        alone.append((_logprobs(engine), _digests(engine, tmp_path)))
    base = _logprobs(engine, base_only=True)

    first = make()
    sessions = [first.beside() for _ in SPECS]
    frozen = first.beside()
    for engine, spec in zip(sessions, SPECS, strict=True):
        engine.open_session(spec)
    frozen.open_session(FROZEN)
    for step in range(7):
        for number, engine in enumerate(sessions):
            _part(engine, number, step)
            assert _equal(_logprobs(frozen), base)
    for engine, (logprobs, digests) in zip(sessions, alone, strict=True):
        assert _equal(_logprobs(engine), logprobs)
        assert _equal(_logprobs(engine, base_only=True), base)
        assert _digests(engine, tmp_path) == digests
    assert [engine.progress.step for engine in sessions] == [2, 2, 2]


def test_a_step_of_one_keeps_the_graphs_of_another(make: MakeEngine) -> None:
    first = make()
    left, right = first.beside(), first.beside()
    left.open_session(SPECS[0])
    right.open_session(SPECS[1])
    kept = left.forward(_data(1), "cross_entropy", {}, retain_graph=True).graph
    own = right.forward(_data(1), "cross_entropy", {}, retain_graph=True).graph
    assert kept is not None and own is not None
    right.forward_backward(_data(2), "cross_entropy", {})
    right.optim_step(ADAM, Normalization.NONE)
    with pytest.raises(FiretitanError) as caught:
        right.backward(own, _slopes(1))
    assert caught.value.reason is Reason.GRAPH_EXPIRED
    left.backward(kept, _slopes(1))
    assert left.progress.pending_backwards == 1


def test_a_closed_session_leaves_the_others(make: MakeEngine) -> None:
    first = make()
    left, right = first.beside(), first.beside()
    left.open_session(SPECS[0])
    right.open_session(SPECS[1])
    _part(left, 0, 0)
    _part(left, 0, 2)
    before = _logprobs(left)
    right.close()
    assert _equal(_logprobs(left), before)
    third = first.beside()
    third.open_session(SPECS[2])
    _part(third, 2, 0)
    assert _equal(_logprobs(left), before)
