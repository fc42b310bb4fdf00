"""State files: every bit comes back, and nothing foreign or damaged is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import LoraSpec
from firetitan_daemon.engine.raw import RawTensor, RawTensors
from firetitan_daemon.engine.state import (
    Counters,
    StateOrigin,
    TrainingState,
    load_state,
    save_state,
)

ORIGIN = StateOrigin(
    base_fingerprint="f" * 64, lora=LoraSpec(4), base_model="org/tiny", seed=7, versions={"x": "1"}
)


def _tensors(seed: int) -> dict[str, RawTensor]:
    draw = np.random.default_rng(seed)
    return {
        "a.lora_A": RawTensor.of_array(draw.standard_normal((4, 6)).astype(np.float32)),
        "a.lora_B": RawTensor.of_array(draw.standard_normal((5, 4)).astype(np.float32)),
    }


def _state() -> TrainingState:
    counters = Counters(step=3, pending_backwards=2, loss_tokens=31, loss_sequences=4)
    return TrainingState(_tensors(0), _tensors(1), _tensors(2), _tensors(3), counters)


def _save(tmp_path: Path, state: TrainingState | None = None, origin: StateOrigin = ORIGIN) -> Path:
    folder = tmp_path / "ckpt"
    folder.mkdir()
    save_state(folder, state or _state(), origin)
    return folder


def _same(left: RawTensors, right: RawTensors) -> bool:
    return left.keys() == right.keys() and all(
        np.array_equal(left[name].data, right[name].data) for name in left
    )


def test_all_comes_back_bitwise(tmp_path: Path) -> None:
    state = _state()
    loaded = load_state(_save(tmp_path), ORIGIN, _tensors(9), with_optimizer=True)
    for name in ("weights", "first_moment", "second_moment", "gradients"):
        assert _same(getattr(loaded, name), getattr(state, name)), name
    assert loaded.counters == state.counters


def test_without_optimizer_only_the_weights(tmp_path: Path) -> None:
    loaded = load_state(_save(tmp_path), ORIGIN, _tensors(9), with_optimizer=False)
    assert _same(loaded.weights, _tensors(0))
    assert not loaded.first_moment and not loaded.second_moment and not loaded.gradients
    assert loaded.counters == Counters()


def test_state_before_the_first_step_needs_no_moments(tmp_path: Path) -> None:
    fresh = TrainingState(_tensors(0), {}, {}, {}, Counters())
    loaded = load_state(_save(tmp_path, fresh), ORIGIN, _tensors(9), with_optimizer=True)
    assert not loaded.first_moment and loaded.counters.step == 0


def test_missing_moments_after_a_step_are_an_error(tmp_path: Path) -> None:
    folder = _save(tmp_path, replace(_state(), first_moment={}, second_moment={}))
    with pytest.raises(FiretitanError, match="has no optimizer"):
        load_state(folder, ORIGIN, _tensors(9), with_optimizer=True)
    load_state(folder, ORIGIN, _tensors(9), with_optimizer=False)


@pytest.mark.parametrize("file", ["weights", "optimizer", "gradients"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_before_first_use(tmp_path: Path, file: str, damage: str) -> None:
    folder = _save(tmp_path)
    path = folder / f"{file}.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-4])
    else:
        path.unlink()
    with pytest.raises(FiretitanError, match=f"{file}.safetensors is damaged") as caught:
        load_state(folder, ORIGIN, _tensors(9), with_optimizer=False)
    assert caught.value.reason is Reason.CHECKSUM_MISMATCH


def test_unfinished_folder_is_refused(tmp_path: Path) -> None:
    folder = _save(tmp_path)
    (folder / durable.MANIFEST).unlink()
    with pytest.raises(FiretitanError, match="readable manifest"):
        load_state(folder, ORIGIN, _tensors(9), with_optimizer=True)


@pytest.mark.parametrize(
    ("origin", "text"),
    [
        (replace(ORIGIN, base_fingerprint="e" * 64, base_model="org/other"), "org/other"),
        (replace(ORIGIN, lora=LoraSpec(8)), "LoRA rank=4, this session 8"),
        (replace(ORIGIN, lora=LoraSpec(4, alpha=16)), "LoRA alpha=32.0, this session 16"),
        (replace(ORIGIN, lora=LoraSpec(4, train_mlp=False)), "train_mlp=True"),
        (replace(ORIGIN, lora=None), "is of a LoRA adapter, this session trains full-parameter"),
    ],
)
def test_other_origin_is_refused_by_name(tmp_path: Path, origin: StateOrigin, text: str) -> None:
    with pytest.raises(FiretitanError, match=text) as caught:
        load_state(_save(tmp_path), origin, _tensors(9), with_optimizer=True)
    assert caught.value.reason is Reason.INVALID_ARGUMENT


def test_other_seed_and_versions_are_fine(tmp_path: Path) -> None:
    origin = replace(ORIGIN, seed=8, versions={"x": "2"})
    load_state(_save(tmp_path), origin, _tensors(9), with_optimizer=True)


@pytest.mark.parametrize("change", ["shape", "missing", "extra"])
def test_other_layout_is_refused_by_name(tmp_path: Path, change: str) -> None:
    mine = _tensors(9)
    if change == "shape":
        mine["a.lora_B"] = RawTensor.of_array(np.zeros((4, 5), np.float32))
    elif change == "missing":
        del mine["a.lora_B"]
    else:
        mine["a.lora_Bb"] = mine["a.lora_B"]
    with pytest.raises(FiretitanError, match=r"a\.lora_B"):
        load_state(_save(tmp_path), ORIGIN, mine, with_optimizer=True)


def test_snapshot_is_no_state(tmp_path: Path) -> None:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    durable.seal_folder(folder, {"kind": "base"})
    with pytest.raises(FiretitanError, match="holds a base snapshot"):
        load_state(folder, ORIGIN, _tensors(9), with_optimizer=True)
