"""What a model's name stands for."""

from __future__ import annotations

import pytest

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.model_names import ModelNames, NamedModel, parse_model_id
from firetitan_daemon.core.model_records import Model

MINE = Model("mine", "me", "hf_full", "snapshots/s", "base", 0, "/store/mine", "d", "r", 1, 0.0)
NAMES = ModelNames(
    {
        "accounts/me/models/alias": NamedModel("/models/alias"),
        "accounts/fireworks/models/qwen3-4b": NamedModel("org/other", "v2"),
        "short": NamedModel("/models/short"),
    }
)
NAMES.restore([MINE])


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("/a/folder", "/a/folder"),
        ("models/of/mine", "models/of/mine"),
        ("mine", "mine"),
        ("org/name", "org/name"),
        ("short", "/models/short"),
        ("accounts/me/models/alias", "/models/alias"),
        ("accounts/fireworks/models/qwen3-4b", "org/other@v2"),
        ("accounts/fireworks/models/qwen3-8b", "Qwen/Qwen3-8B"),
        ("accounts/me/models/mine", "/store/mine"),
        ("accounts/local/models/mine", "/store/mine"),
        ("models/mine", "/store/mine"),
    ],
)
def test_a_name_stands_for(name: str, reference: str) -> None:
    assert NAMES.reference(name) == reference


@pytest.mark.parametrize(
    "name",
    [
        "accounts/fireworks/models/mine",
        "accounts/me/models/qwen3-8b",
        "accounts/local/models/alias",
        "accounts/local/models/never",
    ],
)
def test_a_name_that_stands_for_nothing_says_how_it_could(name: str) -> None:
    with pytest.raises(FiretitanError, match=rf'"{name}" = ') as caught:
        NAMES.reference(name)
    assert caught.value.reason is Reason.MODEL_NOT_FOUND


def test_what_a_checkpoint_is_promoted_to_is_an_id_or_a_name() -> None:
    assert parse_model_id("a-1").account == "local"
    assert parse_model_id("accounts/me/models/a-1").account == "me"
    for wrong in ("", "A", "a_b", "a/b", "a" * 64, "accounts/me/models/A", "../a", "models/a"):
        with pytest.raises(FiretitanError) as caught:
            parse_model_id(wrong)
        assert caught.value.reason is Reason.NAME_INVALID
