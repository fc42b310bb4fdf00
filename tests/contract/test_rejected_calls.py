"""A refused call changes nothing (R14), whatever was wrong with it: every engine, both sessions.

`tests/hostile/test_every_rpc.py` asks the same of whole daemons.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from support.sizes import seed, size

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import (
    AdamParams,
    Datum,
    LoraSpec,
    Normalization,
    Pooling,
    SessionSpec,
    SnapshotKind,
    TrainEngine,
)

ADAM = AdamParams(learning_rate=1e-2, weight_decay=0.1, grad_clip_norm=5.0)
SESSIONS = pytest.mark.parametrize(
    "session",
    [SessionSpec(seed=1, lora=None), SessionSpec(seed=1, lora=LoraSpec(4))],
    ids=["full", "lora"],
)
LOSSES = ("cross_entropy", "ppo", "importance_sampling", "gspo", "dro", "no_such_loss")
INPUTS = ("target_tokens", "weights", "logprobs", "advantages", "surprise")
FLOATS = st.sampled_from([0.0, 1.0, -1.0, np.nan, np.inf, -np.inf, 3e38, 1e-45]) | st.floats(
    width=32
)
TOKENS = st.integers(0, 60) | st.sampled_from([-1, 2**31 - 1, -(2**31), 100_000])
SHAPES = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4) | st.just((3,))


def good() -> Datum:
    return Datum(np.int32([1, 2, 3]), {"target_tokens": np.int64([2, 3, 4])})


@st.composite
def datums(draw: st.DrawFn) -> Datum:
    """A datum with anything in it that an array can hold."""
    tokens = draw(
        arrays.arrays(np.int32, draw(SHAPES), elements=TOKENS) | st.just(good().token_ids)
    )
    inputs: dict[str, Any] = {}
    for name in draw(st.sets(st.sampled_from(INPUTS), max_size=4)) | {"target_tokens"}:
        shape = draw(SHAPES)
        if name == "target_tokens" and draw(st.booleans()):
            inputs[name] = good().loss_inputs[name]
        elif name == "target_tokens":
            inputs[name] = draw(arrays.arrays(np.int64, shape, elements=TOKENS))
        else:
            inputs[name] = draw(arrays.arrays(np.float32, shape, elements=FLOATS))
    return Datum(tokens, inputs)


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, Callable[[TrainEngine, Path], object]]:
    """One call of an engine, most of them wrong somewhere."""
    # First: what is drawn late is mostly the simplest.
    kind = draw(st.integers(0, 7))
    data = [*draw(st.lists(st.just(good()), max_size=2)), *draw(st.lists(datums(), max_size=2))]
    loss = draw(st.sampled_from(LOSSES))
    config = draw(
        st.dictionaries(
            st.sampled_from(["clip_low_threshold", "clip_high_threshold", "beta", "unknown"]),
            FLOATS | st.sampled_from(["low", ""]),
            max_size=2,
        )
    )
    grads = draw(st.lists(arrays.arrays(np.float32, SHAPES, elements=FLOATS), max_size=3))
    adam = replace(
        ADAM,
        **draw(
            st.dictionaries(
                st.sampled_from(
                    ["learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm"]
                ),
                FLOATS,
                min_size=1,
                max_size=2,
            )
        ),
    )
    pooling = draw(st.sampled_from(Pooling))
    normalization = draw(st.sampled_from(Normalization))
    step = draw(st.none() | st.integers(-1, 3))

    def backward(engine: TrainEngine, folder: Path) -> object:
        kept = engine.forward([good()], "cross_entropy", {}, retain_graph=True).graph
        assert kept is not None
        return engine.backward(kept, grads)

    acts = [
        ("forward", lambda engine, _: engine.forward(data, loss, config)),
        ("forward_backward", lambda engine, _: engine.forward_backward(data, loss, config)),
        (
            "embeddings",
            lambda engine, _: engine.forward_backward_embeddings(data, pooling, loss, config),
        ),
        ("backward", backward),
        ("optim_step", lambda engine, _: engine.optim_step(adam, normalization, step)),
        ("load_state", lambda engine, empty: engine.load_state(empty, with_optimizer=True)),
        ("load_adapter", lambda engine, empty: engine.load_adapter(empty)),
        (
            "save_snapshot",
            lambda engine, empty: engine.save_snapshot(
                empty, "s", SnapshotKind.DELTA, "no-such-parent"
            ),
        ),
    ]
    return acts[kind]


@SESSIONS
def test_a_refused_call_changes_nothing(
    make: Callable[[], TrainEngine], session: SessionSpec, tmp_path: Path
) -> None:
    engine = make()
    engine.open_session(session)
    engine.forward_backward([good()], "cross_entropy", {})
    engine.optim_step(ADAM, Normalization.NONE)
    engine.forward_backward([good()], "cross_entropy", {})
    state = {"now": fingerprint(engine, tmp_path)}
    refused: set[str] = set()

    @hypothesis_seed(seed(14))
    @settings(
        max_examples=size(150, 3000),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(call=calls())
    def run(call: tuple[str, Callable[[TrainEngine, Path], object]]) -> None:
        name, act = call
        empty = Path(tempfile.mkdtemp(dir=tmp_path))
        try:
            with np.errstate(all="ignore"):
                act(engine, empty)
        except FiretitanError as error:
            assert error.reason is not Reason.INTERNAL
            refused.add(name)
            assert fingerprint(engine, tmp_path) == state["now"], f"{name}: {error}"
        finally:
            shutil.rmtree(empty)
        state["now"] = fingerprint(engine, tmp_path)

    run()
    assert len(refused) >= 6, refused


def fingerprint(engine: TrainEngine, tmp_path: Path) -> tuple[str, object]:
    """Digest of weights, moments and gradients, and the counters."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    digest = engine.save_state(folder).digest
    shutil.rmtree(folder)
    progress = engine.progress
    # Passes are counted, refused ones too: they say what a worker did, not where it stands.
    return digest, (progress.step, progress.pending_backwards)
