"""Shapes by name: pinned, derived, and refused only where a named one cannot serve."""

from __future__ import annotations

from dataclasses import replace

import pytest

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.model_records import ModelInfo, Shape
from firetitan_daemon.core.shapes import (
    DEPLOYMENT,
    FULL_MODE,
    LORA_MODE,
    TRAINING,
    Shapes,
    Wish,
    as_loaded,
)

SMALL = Shape(
    "small", 3, base_model="m", max_context_length=64, dtype="bfloat16", deployment_shape="serving"
)
MINE = Shape("accounts/me/trainingShapes/mine", trainer_mode=LORA_MODE)
SHAPES = Shapes([SMALL, MINE], [Shape("serving", 2, deployment_shape="")])
MODEL = ModelInfo("/m", "folder", "ff", "Llama", "float32", "cpu", 64, 128, 9, True, 1)
FULL = "accounts/local/trainingShapes/small"


@pytest.mark.parametrize("name", ["small", FULL, f"{FULL}/versions/3", "small/versions/3"])
def test_a_name_is_pinned_to_its_version(name: str) -> None:
    found = SHAPES.find(TRAINING, name)
    assert found.name == f"{FULL}/versions/3"
    assert found.deployment_shape == "accounts/local/deploymentShapes/serving/versions/2"
    assert SHAPES.find(TRAINING, found.name) == found


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (f"{FULL}/versions/2", "has version 3 here, not 2"),
        ("accounts/local/trainingShapes/never", "there are local, local-cpu"),
        ("accounts/a/deploymentShapes/x", "is no name"),
        ("a b", "is no name"),
        ("", "is no name"),
    ],
)
def test_a_name_that_is_none_is_refused(name: str, why: str) -> None:
    with pytest.raises(FiretitanError, match=why) as caught:
        SHAPES.find(TRAINING, name)
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_ARGUMENT, "training_shape")


@pytest.mark.parametrize("name", ["accounts/fireworks/trainingShapes/qwen3-8b-128k-h200", "any"])
def test_this_host_stands_in_for_a_shape_of_a_data_centre(name: str) -> None:
    found = SHAPES.choose(TRAINING, f"{name}/versions/7", Wish("m", mode=FULL_MODE))
    assert found.name == f"{name}/versions/7"
    assert name in found.notes[0] and "stands in" in found.notes[0]
    assert (found.max_context_length, found.device) == (0, "auto")
    assert SHAPES.find(TRAINING, name).name == f"{name}/versions/1"


@pytest.mark.parametrize(
    ("name", "wish", "why"),
    [
        ("small", Wish("other"), "is for 'm', not for 'other'"),
        ("small", Wish("m", 65), "takes 64 tokens, and max_context_length is 65"),
        ("small", Wish("m", dtype="float32"), "is in bfloat16, and dtype is float32"),
        (MINE.name, Wish("m", mode=FULL_MODE), "is for LORA_TRAINER, and a POLICY_TRAINER"),
        ("local-gpu", Wish("m"), "needs 1 GPU"),
    ],
)
def test_a_named_shape_that_cannot_serve_says_why(name: str, wish: Wish, why: str) -> None:
    with pytest.raises(FiretitanError, match=why):
        SHAPES.choose(TRAINING, name, wish)


def test_a_shape_fills_in_what_was_left_open() -> None:
    found = SHAPES.choose(TRAINING, "small", Wish("m", mode=LORA_MODE))
    assert (found.max_context_length, found.dtype) == (64, "bfloat16")
    assert (found.trainer_mode, found.base_model) == (LORA_MODE, "m")
    assert SHAPES.choose(TRAINING, "small", Wish("m", 32)).max_context_length == 32
    assert Shapes(num_gpus=1).choose(TRAINING, "local-gpu", Wish("m")).device == "cuda"


def test_without_a_name_a_shape_is_derived_and_its_name_can_be_given_back() -> None:
    derived = SHAPES.choose(TRAINING, "", Wish("m", mode=FULL_MODE))
    assert "derived" in derived.notes[0]
    loaded = as_loaded(derived, MODEL)
    assert (loaded.max_context_length, loaded.dtype, loaded.device) == (128, "float32", "cpu")
    on_gpu = as_loaded(derived, replace(MODEL, device="cuda:0"))
    assert (on_gpu.device, on_gpu.num_devices) == ("cuda", 1)
    assert SHAPES.choose(TRAINING, derived.name, Wish("m")).name == derived.name
    assert SHAPES.choose(DEPLOYMENT, derived.deployment_shape, Wish("m")).deployment_shape == ""


def test_a_configured_shape_must_link_one_that_is_there() -> None:
    linked = "accounts/local/deploymentShapes/never"
    with pytest.raises(FiretitanError, match="there is no"):
        Shapes([Shape("x", deployment_shape=linked)])
