"""Publishing files: whole or not at all, whatever the power does, and damage is told."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3
from support.power_loss import Recording

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason


def make(folder: Path) -> str:
    """A sealed folder of two files; returns its digest."""
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"weights")
    (folder / "b.json").write_bytes(b"{}")
    digest, size = durable.seal_folder(folder, {"step": 3})
    assert size == 9
    return digest


def test_a_sealed_folder_verifies(tmp_path: Path) -> None:
    digest = make(tmp_path / "staging")
    durable.publish_folder(tmp_path / "staging", tmp_path / "kind" / "final")
    manifest = durable.verify_folder(tmp_path / "kind" / "final", digest)
    assert manifest["step"] == 3
    assert manifest["files"]["a.safetensors"]["blake3"] == blake3(b"weights").hexdigest()
    assert digest == durable.hash_file(tmp_path / "kind" / "final" / durable.MANIFEST)
    assert not (tmp_path / "staging").exists()


@pytest.mark.parametrize("name", ["a.safetensors", "b.json", durable.MANIFEST])
@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "remove", "append"])
def test_any_damage_is_told_by_file(tmp_path: Path, name: str, how: str) -> None:
    folder = tmp_path / "folder"
    digest = make(folder)
    path = folder / name
    data = path.read_bytes()
    if how == "remove":
        path.unlink()
    else:
        flipped = bytes([data[0] ^ 1]) + data[1:]
        path.write_bytes(
            {"flip": flipped, "truncate": data[:-1], "empty": b"", "append": data + b"x"}[how]
        )
    with pytest.raises(FiretitanError, match=f"folder/{name} is damaged") as caught:
        durable.verify_folder(folder, digest)
    assert caught.value.reason == Reason.CHECKSUM_MISMATCH
    assert caught.value.metadata["file"] == f"folder/{name}"


def test_swapped_files_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_bytes(name.encode())
    digest, _ = durable.seal_folder(folder, {})
    (folder / "a").write_bytes(b"b")
    (folder / "b").write_bytes(b"a")
    with pytest.raises(FiretitanError, match="folder/a is damaged"):
        durable.verify_folder(folder, digest)


@pytest.mark.parametrize(
    "manifest",
    [b"", b"[]", b"{}", b"\xff", b'{"files": 3}', b'{"files": {"a": 1}}', b'{"files": {"a": {}}}',
     json.dumps({"files": {"../a": {"size_bytes": 1, "blake3": blake3(b"x").hexdigest()}}})
     .encode()],
)  # fmt: skip
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, manifest: bytes) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / durable.MANIFEST).write_bytes(manifest)
    with pytest.raises(FiretitanError) as caught:
        durable.verify_folder(tmp_path / "folder")
    assert caught.value.reason == Reason.CHECKSUM_MISMATCH


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failed_publish_leaves_the_old_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "rename")), fail)
    with pytest.raises(OSError, match="full"):
        durable.publish_file(tmp_path / "file", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"old"}


def test_removing_is_forgiving_and_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    durable.remove(tmp_path / "link")
    assert (tmp_path / "folder" / "inner").exists()
    durable.remove(tmp_path / "folder")
    durable.remove(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def file_states(tmp_path: Path, publish: Callable[[Path, bytes], None]) -> list[tuple[bool, bytes]]:
    """After every crash while a file is replaced: whether it was acknowledged, what is there."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").write_bytes(b"the old content")
    recording = Recording(root)
    with recording.watching():
        publish(root / "file", b"the new content")
        recording.note("done")
    crashes = recording.crashes(tmp_path / "x")
    states = []
    for crash in crashes:
        path = crash.root / "file"
        states.append((bool(crash.promised), path.read_bytes() if path.exists() else b"nothing"))
        durable.sweep_temporaries(crash.root)
        assert [one.name for one in crash.root.iterdir() if one.name != "file"] == []
    return states


def broken(states: list[tuple[bool, bytes]]) -> list[tuple[bool, bytes]]:
    """States in which the file is neither old nor new, or acknowledged and not new."""
    allowed = {False: (b"the old content", b"the new content"), True: (b"the new content",)}
    return [(acked, content) for acked, content in states if content not in allowed[acked]]


def test_a_file_is_old_or_new_after_power_loss_and_new_once_published(tmp_path: Path) -> None:
    states = file_states(tmp_path, durable.publish_file)
    assert not broken(states)
    assert {content for _, content in states} == {b"the old content", b"the new content"}
    assert any(acked for acked, _ in states)


def in_place(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    durable.fsync_path(path)
    durable.fsync_path(path.parent)


def without_a_sync_of(what: str) -> Callable[[Path, bytes], None]:
    """`publish_file` that leaves out one fsync."""

    def publish(path: Path, data: bytes) -> None:
        real = os.fsync

        def fsync(descriptor: int) -> None:
            is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            if is_folder != (what == "folder"):
                real(descriptor)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            durable.publish_file(path, data)

    return publish


@pytest.mark.parametrize(
    ("publish", "found"),
    [
        (in_place, (False, b"the new")),
        (without_a_sync_of("file"), (True, b"the new")),
        (without_a_sync_of("folder"), (True, b"the old content")),
        (lambda path, data: durable.publish_file(path, data, fsync=False), (True, b"the new")),
    ],
    ids=["in place", "no fsync of the file", "no fsync of the folder", "no fsync"],
)
def test_the_enumerator_finds_what_is_wrong(
    tmp_path: Path, publish: Callable[[Path, bytes], None], found: tuple[bool, bytes]
) -> None:
    assert found in broken(file_states(tmp_path, publish))


def folder_states(tmp_path: Path, *names: str) -> list[tuple[bool, bool, bool]]:
    """After every crash: whether all was done, the folder is there, it verifies."""
    root = tmp_path / "root"
    staging = root / "staging" / "id"
    staging.mkdir(parents=True)
    recording = Recording(root)
    with recording.watching():
        for name in names:
            (staging / name).write_bytes(b"content of " + name.encode())
        digest, _ = durable.seal_folder(staging, {})
        durable.publish_folder(staging, root / "kind" / "final")
        recording.note("done")
    states = []
    for crash in recording.crashes(tmp_path / "x"):
        final = crash.root / "kind" / "final"
        try:
            durable.verify_folder(final, digest)
            sound = True
        except FiretitanError:
            sound = False
        states.append((bool(crash.promised), final.exists(), sound))
    return states


def test_a_folder_is_whole_or_absent_after_power_loss_and_there_once_published(
    tmp_path: Path,
) -> None:
    states = folder_states(tmp_path, "a", "b")
    assert all(sound for _, there, sound in states if there)
    assert all(there for acked, there, _ in states if acked)
    assert {there for _, there, _ in states} == {False, True}


def test_a_folder_published_without_fsync_would_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "fsync_path", lambda path: None)
    states = folder_states(tmp_path, "a")
    assert any(there and not sound for _, there, sound in states)
    assert any(acked and not there for acked, there, _ in states)
