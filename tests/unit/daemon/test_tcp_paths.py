"""Which locations a request over TCP may name."""

from __future__ import annotations

from pathlib import Path

import pytest

from firetitan_daemon.core.errors import FiretitanError
from firetitan_daemon.rpc.tcp import check_location


def taken(name: str, value: str, *roots: Path) -> bool:
    try:
        check_location(name, value, roots)
    except FiretitanError as error:
        assert (error.reason.value, error.field) == ("INVALID_ARGUMENT", name)
        return False
    return True


@pytest.mark.parametrize(
    "value",
    [
        "",
        "gpt2",
        "Qwen/Qwen3-8B",
        "Qwen/Qwen3-8B@main",
        "Qwen/Qwen3-8B@refs/pr/1",
        "accounts/me/models/base",
        "models/mine",
        "firetitan/toy",
    ],
)
def test_names_need_no_root(value: str) -> None:
    assert taken("base_model", value)
    assert taken("adapter", value)
    assert value == "" or not taken("folder", value)


@pytest.mark.parametrize(
    "value",
    [
        "/etc",
        "/",
        "//etc",
        "~",
        "~/model",
        ".",
        "./model",
        "../model",
        "a/../../etc",
        "model/",
        "a//b",
        "file:///etc",
        "s3://bucket/a",
        "http://169.254.169.254/a",
        "zip://a::file:///etc",
        "C:\\model",
        "a\nb",
        "a\0b",
        "/roots\0/etc",
        "modèle",
    ],
)
def test_other_texts_need_one(value: str, tmp_path: Path) -> None:
    for name in ("base_model", "adapter", "folder"):
        assert not taken(name, value)
        assert not taken(name, value, tmp_path)


def test_below_a_root_links_resolved(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "in", outside / "deep", tmp_path / "rooted"):
        folder.mkdir(parents=True)
    (root / "out").symlink_to(outside)
    (root / "within").symlink_to(root / "in")
    (root / "loop").symlink_to(root / "loop")
    (tmp_path / "to-root").symlink_to(root)
    for one in (root, root / "in", root / "in" / ".", root / "new" / "deeper", root / "within"):
        assert taken("base_model", str(one), outside / "deep", root), one
    for one in (
        root / "out",
        root / "out" / "deep",
        root / "out" / ".." / "rooted",
        root / "in" / ".." / ".." / "rooted",
        tmp_path,
        tmp_path / "rooted",
        tmp_path / "to-root" / "in",
    ):
        assert not taken("base_model", str(one), root), one
    assert taken("base_model", str(tmp_path / "to-root" / "in"), tmp_path / "to-root")
    assert not taken("base_model", str(root / "in"))
