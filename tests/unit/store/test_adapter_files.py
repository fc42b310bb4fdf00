"""Adapters of users: what is copied, and what nobody may make the daemon read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from support.adapters import write_toy

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.store import adapters
from firetitan_daemon.store.adapters import fetch_adapter, readable_name
from firetitan_daemon.store.folders import FileFolders

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_toy(tmp_path / "my adapter")


@pytest.fixture
def staging(tmp_path: Path) -> Path:
    folder = tmp_path / "staging"
    folder.mkdir()
    return folder


def refused(location: str, staging: Path) -> FiretitanError:
    with pytest.raises(FiretitanError) as caught:
        fetch_adapter(location, staging)
    assert caught.value.field == "adapter_path"
    return caught.value


@pytest.mark.parametrize("form", ["path", "file", "file-host", "escaped"])
def test_two_files_are_copied_and_sealed(adapter: Path, staging: Path, form: str) -> None:
    (adapter / "README.md").write_text("# mine")
    (adapter / "optimizer.pt").write_bytes(b"a pickle")
    location = {
        "path": str(adapter),
        "file": f"file://{adapter}",
        "file-host": f"file://localhost{adapter}",
        "escaped": f"file://{str(adapter).replace(' ', '%20')}",
    }[form]
    digest = fetch_adapter(location, staging)
    assert {one.name for one in staging.iterdir()} == {CONFIG, WEIGHTS, durable.MANIFEST}
    assert durable.verify_folder(staging, digest)["source"] == location
    assert (staging / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()


def _link(adapter: Path, name: str) -> None:
    target = adapter.parent / name
    (adapter / name).rename(target)
    (adapter / name).symlink_to(target)


def _fifo(adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()
    os.mkfifo(adapter / WEIGHTS)


def _folder(adapter: Path) -> None:
    (adapter / CONFIG).unlink()
    (adapter / CONFIG).mkdir()


def _pickled(adapter: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")


def _no_config(adapter: Path) -> None:
    (adapter / CONFIG).unlink()


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda adapter: _link(adapter, CONFIG), "symbolic link"),
        (lambda adapter: _link(adapter, WEIGHTS), "symbolic link"),
        (_fifo, "no regular file"),
        (_folder, "no regular file"),
        (_pickled, "pickle"),
        (_no_config, f"holds no {CONFIG}"),
    ],
    ids=["linked config", "linked weights", "pipe", "folder", "pickle", "no config"],
)
def test_hostile_folders(
    adapter: Path, staging: Path, damage: Callable[[Path], None], text: str
) -> None:
    damage(adapter)
    error = refused(str(adapter), staging)
    assert error.reason is Reason.INVALID_ARGUMENT and text in error.message


def test_files_have_a_largest_size(
    adapter: Path, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(adapters.MAX_BYTES, CONFIG, 20)
    assert "more than 20 bytes" in refused(str(adapter), staging).message


@pytest.mark.parametrize(
    ("location", "reason", "text"),
    [
        ("relative/folder", Reason.INVALID_ARGUMENT, "absolute path"),
        ("meta-llama/Llama-3", Reason.INVALID_ARGUMENT, "accounts/<account>/models/<id>"),
        ("/nowhere/at/all", Reason.MODEL_NOT_FOUND, "does not exist"),
        ("/etc/passwd", Reason.INVALID_ARGUMENT, "no folder"),
        ("/tmp/a\0b", Reason.INVALID_ARGUMENT, "no address"),
        ("file:///tmp/%00", Reason.INVALID_ARGUMENT, "absolute path"),
        ("file://elsewhere/a", Reason.INVALID_ARGUMENT, "another machine"),
        ("local:///tmp", Reason.INVALID_ARGUMENT, "file:///"),
        ("zip://a::file:///tmp/b.zip", Reason.INVALID_ARGUMENT, "one plain address"),
        ("zip://a", Reason.INVALID_ARGUMENT, "no address of a store"),
        ("reference://a", Reason.INVALID_ARGUMENT, "no address of a store"),
        ("dir:///tmp", Reason.INVALID_ARGUMENT, "no address of a store"),
        ("asynclocal:///tmp", Reason.INVALID_ARGUMENT, "no address of a store"),
        ("gopher://a/b", Reason.UNSUPPORTED, "gopher"),
        ("memory://nothing/here", Reason.INVALID_ARGUMENT, f"holds no {CONFIG}"),
    ],
)
def test_locations_that_are_none(staging: Path, location: str, reason: Reason, text: str) -> None:
    error = refused(location, staging)
    assert error.reason is reason and text in error.message


@pytest.mark.parametrize(
    "location",
    [
        "gopher://user:hunter22@host/a",
        "memory://user:hunter22@nothing/here",
        "memory://nothing/here?sig=hunter22",
        "file://user:hunter22@elsewhere/a",
    ],
)
def test_passwords_in_addresses_are_not_repeated(staging: Path, location: str) -> None:
    assert "hunter22" not in refused(location, staging).message


def test_a_missing_driver_is_named(staging: Path) -> None:
    """gcsfs is not installed here; where it is, this address would be asked for."""
    error = refused("gs://my-bucket/adapters/run-42", staging)
    assert error.reason is Reason.UNSUPPORTED
    assert "gcsfs" in error.message and "local folder" in error.message


def test_what_fsspec_reads_is_copied(adapter: Path, staging: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in (CONFIG, WEIGHTS):
        memory.pipe(f"/bucket/run-42/{name}", (adapter / name).read_bytes())
    fetch_adapter("memory://bucket/run-42", staging)
    assert (staging / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()


def test_folders_outside_the_roots_are_not_read(
    adapter: Path, tmp_path: Path, staging: Path
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(adapter)
    write_toy(inside / "own")
    (tmp_path / "inside-not").symlink_to(inside / "own")
    roots = [tmp_path / "nowhere", inside]
    for outside in (adapter, inside / "link", inside / ".." / adapter.name):
        with pytest.raises(FiretitanError, match="adapter_roots") as caught:
            fetch_adapter(str(outside), staging, roots)
        assert caught.value.reason is Reason.INVALID_ARGUMENT
        assert list(staging.iterdir()) == []
    fetch_adapter(str(tmp_path / "inside-not"), staging, roots)


async def test_a_refused_import_leaves_nothing(tmp_path: Path, adapter: Path) -> None:
    folders = FileFolders(tmp_path / "blobs")
    source = await folders.import_adapter(str(adapter))
    assert source.folder.parent.name == "adapters" and source.folder.name.startswith("my_adapter-")
    durable.verify_folder(source.folder, source.digest)
    (adapter / WEIGHTS).unlink()
    with pytest.raises(FiretitanError):
        await folders.import_adapter(str(adapter))
    assert list((tmp_path / "blobs" / "staging").iterdir()) == []
    assert list((tmp_path / "blobs" / "adapters").iterdir()) == [source.folder]
    assert await folders.sweep([]) == 1


def test_names_are_safe() -> None:
    assert readable_name("gs://bucket/run 42/") == "run_42"
    assert readable_name("/..") == "adapter"
    assert len(readable_name("/" + "x" * 300)) == 64
