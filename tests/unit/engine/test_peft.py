"""Adapters of others, read and fitted into a session's own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.adapters import write_peft

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.peft import ArrayPair, fit_adapter, read_adapter
from firetitan_daemon.engine.raw import RawTensor, read_safetensors, write_safetensors

LAYERS = {"model.layers.0.q_proj": (6, 5), "model.layers.1.q_proj": (6, 5)}
"""Outputs and inputs."""
SCALING = 2.0


def arrays(rank: int, seed: int = 0, dtype: Any = np.float32) -> dict[str, ArrayPair]:
    draw = np.random.default_rng(seed)
    return {
        name: (
            draw.normal(size=(rank, inputs)).astype(dtype),
            draw.normal(size=(outputs, rank)).astype(dtype),
        )
        for name, (outputs, inputs) in LAYERS.items()
    }


def fresh(rank: int) -> dict[str, ArrayPair]:
    return {name: (a, np.zeros_like(b)) for name, (a, b) in arrays(rank, seed=9).items()}


def products(pairs: dict[str, ArrayPair], scaling: float) -> dict[str, np.ndarray]:
    return {
        name: scaling * b.astype(np.float64) @ a.astype(np.float64)
        for name, (a, b) in pairs.items()
    }


@pytest.mark.parametrize(
    ("rank", "alpha", "settings", "scaling"),
    [
        (4, 8.0, {}, 2.0),
        (2, 16.0, {}, 8.0),
        (4, 3.0, {"use_rslora": True}, 1.5),
        (1, -1.0, {}, -1.0),
    ],
)
def test_the_product_stays(
    tmp_path: Path, rank: int, alpha: float, settings: dict[str, Any], scaling: float
) -> None:
    stored = arrays(rank)
    adapter = read_adapter(write_peft(tmp_path / "a", stored, alpha=alpha, **settings))
    assert (adapter.rank, adapter.scaling) == (rank, scaling)
    fitted = fit_adapter(adapter, fresh(4), SCALING)
    wanted = products(stored, scaling)
    for name, product in products(fitted, SCALING).items():
        np.testing.assert_allclose(product, wanted[name], rtol=1e-5, atol=1e-6)
        a, b = fitted[name]
        assert a.dtype == b.dtype == np.float32
        assert (b[:, rank:] == 0).all()
        np.testing.assert_array_equal(a[rank:], fresh(4)[name][0][rank:])


def test_equal_settings_keep_every_bit(tmp_path: Path) -> None:
    stored = arrays(4)
    fitted = fit_adapter(read_adapter(write_peft(tmp_path / "a", stored)), fresh(4), SCALING)
    for name in LAYERS:
        for mine, theirs in zip(fitted[name], stored[name], strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_layers_left_out_stay_fresh(tmp_path: Path) -> None:
    first, second = LAYERS
    folder = write_peft(tmp_path / "a", {first: arrays(4)[first]})
    fitted = fit_adapter(read_adapter(folder), fresh(4), SCALING)
    np.testing.assert_array_equal(fitted[second][0], fresh(4)[second][0])
    assert not fitted[second][1].any() and fitted[first][1].any()


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F64"])
def test_other_precisions_are_read(tmp_path: Path, dtype: str) -> None:
    pairs = arrays(4, dtype=np.float64)
    folder = write_peft(tmp_path / "a", pairs)
    if dtype != "F64":
        tensors = {}
        for name, tensor in read_safetensors(folder / "adapter_model.safetensors").items():
            array = tensor.array().astype(np.float16 if dtype == "F16" else np.float32)
            if dtype == "BF16":
                high = (array.view(np.uint32) >> 16).astype(np.uint16)
                tensors[name] = RawTensor("BF16", array.shape, high.reshape(-1).view(np.uint8))
            else:
                tensors[name] = RawTensor.of_array(array)
        write_safetensors(folder / "adapter_model.safetensors", tensors)
    fitted = fit_adapter(read_adapter(folder), fresh(4), SCALING)
    for name, (a, b) in pairs.items():
        np.testing.assert_allclose(fitted[name][0], a, rtol=1e-2)
        np.testing.assert_allclose(fitted[name][1], b, rtol=1e-2)


def test_bigger_ranks_are_refused_naming_both(tmp_path: Path) -> None:
    adapter = read_adapter(write_peft(tmp_path / "run", arrays(8)))
    with pytest.raises(FiretitanError, match="adapter run: has rank 8, the session 4"):
        fit_adapter(adapter, fresh(4), SCALING)


def test_foreign_layers_and_shapes_are_named(tmp_path: Path) -> None:
    pairs = arrays(4)
    a, b = pairs.pop("model.layers.1.q_proj")
    adapter = read_adapter(write_peft(tmp_path / "a", {**pairs, "model.layers.1.o_proj": (a, b)}))
    with pytest.raises(FiretitanError, match=r'adapts "model.layers.1.o_proj"'):
        fit_adapter(adapter, fresh(4), SCALING)
    wide = {**pairs, "model.layers.1.q_proj": (np.zeros((4, 7), np.float32), b)}
    adapter = read_adapter(write_peft(tmp_path / "b", wide))
    with pytest.raises(FiretitanError, match=r"A \[4, 7\].*takes \[4, 5\]"):
        fit_adapter(adapter, fresh(4), SCALING)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none(tmp_path: Path, value: float) -> None:
    pairs = arrays(4)
    pairs["model.layers.1.q_proj"][1][2, 2] = value
    adapter = read_adapter(write_peft(tmp_path / "a", pairs))
    with pytest.raises(FiretitanError) as caught:
        fit_adapter(adapter, fresh(4), SCALING)
    assert caught.value.reason is Reason.NON_FINITE and "layers.1" in caught.value.message


def test_numbers_that_overflow_in_this_sessions_scale(tmp_path: Path) -> None:
    pairs = arrays(4)
    pairs["model.layers.0.q_proj"][1][:] = 1e38
    adapter = read_adapter(write_peft(tmp_path / "a", pairs, alpha=1e6))
    with pytest.raises(FiretitanError) as caught:
        fit_adapter(adapter, fresh(4), SCALING)
    assert caught.value.reason is Reason.NON_FINITE


@pytest.mark.parametrize(
    ("settings", "reason", "text"),
    [
        ({"peft_type": "ADALORA"}, Reason.UNSUPPORTED, "peft_type"),
        ({"use_dora": True}, Reason.UNSUPPORTED, "use_dora"),
        ({"rank_pattern": {"q_proj": 8}}, Reason.UNSUPPORTED, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, Reason.UNSUPPORTED, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, Reason.UNSUPPORTED, "modules_to_save"),
        ({"fan_in_fan_out": True}, Reason.UNSUPPORTED, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, Reason.UNSUPPORTED, "init_lora_weights"),
        ({"trust_remote_code": True}, Reason.UNSUPPORTED, "trust_remote_code"),
        ({"auto_mapping": {"parent_library": "evil"}}, Reason.UNSUPPORTED, "auto_mapping"),
        ({"auto_mapping": "os"}, Reason.UNSUPPORTED, "auto_mapping"),
        ({"r": 0}, Reason.INVALID_ARGUMENT, "r=0"),
        ({"r": 4.5}, Reason.INVALID_ARGUMENT, "r=4.5"),
        ({"r": 10**9}, Reason.INVALID_ARGUMENT, "r=1000000000"),
        ({"r": 2}, Reason.INVALID_ARGUMENT, "r is 2"),
        ({"lora_alpha": math.nan}, Reason.INVALID_ARGUMENT, "lora_alpha"),
        ({"lora_alpha": "8"}, Reason.INVALID_ARGUMENT, "lora_alpha"),
        ({"lora_alpha": 10**400}, Reason.INVALID_ARGUMENT, "lora_alpha"),
        ({"lora_alpha": -(10**400)}, Reason.INVALID_ARGUMENT, "lora_alpha"),
        ({"target_modules": ["k_proj"]}, Reason.INVALID_ARGUMENT, "target_modules"),
        ({"target_modules": [1]}, Reason.INVALID_ARGUMENT, "target_modules"),
    ],
)
def test_settings_that_cannot_be_honoured_are_named(
    tmp_path: Path, settings: dict[str, Any], reason: Reason, text: str
) -> None:
    folder = write_peft(tmp_path / "a", arrays(4), **settings)
    with pytest.raises(FiretitanError) as caught:
        read_adapter(folder)
    assert caught.value.reason is reason and text in caught.value.message


@pytest.mark.parametrize("setting", ["peft_type", "r", "lora_alpha", "target_modules"])
def test_settings_that_are_missing_are_named(tmp_path: Path, setting: str) -> None:
    folder = write_peft(tmp_path / "a", arrays(4))
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_bytes())
    del settings[setting]
    path.write_text(json.dumps(settings))
    with pytest.raises(FiretitanError) as caught:
        read_adapter(folder)
    error = caught.value
    assert (error.reason, error.field) == (Reason.INVALID_ARGUMENT, "path")
    assert "adapter_config.json" in error.message and setting in error.message


def test_what_peft_notes_by_itself_is_read(tmp_path: Path) -> None:
    mapping = {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": "transformers.models.llama.modeling_llama",
    }
    folder = write_peft(
        tmp_path / "a",
        arrays(4),
        auto_mapping=mapping,
        layers_to_transform=[0, 1],
        use_dora=False,
        something_new=None,
        target_modules="all-linear",
    )
    assert read_adapter(folder).modules == sorted(LAYERS)


@pytest.mark.parametrize("content", ["[]", "{", "null", "[" * 100_000, '{"peft_type": "LORA"}'])
def test_files_that_are_no_settings(tmp_path: Path, content: str) -> None:
    folder = write_peft(tmp_path / "a", arrays(4))
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(FiretitanError) as caught:
        read_adapter(folder)
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    assert len(json.dumps(caught.value.message)) < 4000
