"""What fuzzing and the hostile tests found, one test a finding: each was an unforeseen error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from firetitan_client import address
from firetitan_client.references import adapter_reference
from firetitan_daemon.control import exports
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.shapes import Shapes
from firetitan_daemon.engine.resolve import resolve_model
from firetitan_daemon.engine.sample_api import SampleRequest
from firetitan_daemon.engine.score import check_scoring
from firetitan_daemon.engine.versions import Version, VersionTable
from firetitan_daemon.rpc.paging import page

LONG = "x" * 300
"""Longer than a file's name may be: looking for it is an error of its own."""


def test_a_page_token_of_thousands_of_digits() -> None:
    with pytest.raises(FiretitanError) as caught:
        page([1], 0, "9" * 5000)
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_ARGUMENT, "page_token")


def test_a_kind_of_shape_that_is_none() -> None:
    with pytest.raises(FiretitanError) as caught:
        Shapes((), (), 0).all("noShapes")
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_ARGUMENT, "kind")


@pytest.mark.parametrize("text", [LONG, f"{LONG}/x", "~nobody-has-this-name/x"])
def test_an_adapter_whose_name_can_be_no_path(text: str) -> None:
    assert adapter_reference(text) == text


def test_an_address_in_the_home_of_nobody() -> None:
    found = address.resolve("~nobody-has-this-name/x.sock").address
    assert found == f"unix:{Path.cwd()}/~nobody-has-this-name/x.sock"


@pytest.mark.parametrize("text", [LONG, f"/{LONG}", "~nobody-has-this-name/x"])
def test_a_base_model_whose_name_can_be_no_path(text: str) -> None:
    with pytest.raises(FiretitanError) as caught:
        resolve_model(text)
    assert (caught.value.reason, caught.value.field) == (Reason.MODEL_NOT_FOUND, "base_model")


def test_alternatives_that_would_hold_a_sampler_up_for_minutes() -> None:
    request = SampleRequest(
        np.array([1, 2, 3], np.int32), 1, 1, seed=0, prompt_alt_tokens_k=200_000
    )
    with pytest.raises(FiretitanError, match=r"2 positions; at most 131072 ") as caught:
        check_scoring(request, vocab_size=64)
    assert (caught.value.reason, caught.value.field) == (
        Reason.INVALID_ARGUMENT,
        "prompt_alt_tokens_k",
    )
    check_scoring(replace(request, prompt_alt_tokens_k=131_072), vocab_size=64)


def test_a_folder_to_export_to_whose_name_is_too_long() -> None:
    with pytest.raises(FiretitanError) as caught:
        exports._check_folder(f"/{LONG}", Path("/home/of/it"))
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_ARGUMENT, "folder")


def test_a_folder_to_export_to_that_is_new(tmp_path: Path) -> None:
    assert exports._check_folder(str(tmp_path / "new"), tmp_path / "home") == tmp_path / "new"


def test_a_snapshot_with_a_name_of_thousands_of_characters() -> None:
    table = VersionTable(Version("base", "digest", full=True))
    with pytest.raises(FiretitanError, match="is not loaded") as caught:
        table.check("🦊" * 1000)
    assert caught.value.reason is Reason.SNAPSHOT_NOT_ACTIVE
    assert len(caught.value.message) + len(str(caught.value.metadata)) < 1500
