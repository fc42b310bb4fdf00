"""Publishing files: whole or not at all, whatever the power does, and damage is told."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from blake3 import blake3

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


class Disk:
    """Records what reaches a folder, and can say what may be there after the power is lost.

    Names and contents are lost apart: a file's bytes are safe once it was fsynced, an entry of a
    folder once the folder was. What was not safe may be there or not, each by itself.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.events: list[tuple[str, ...]] = []
        self.contents: dict[str, bytes] = {}
        self.nodes: dict[str, str] = {str(root): "root"}
        for path in sorted(root.rglob("*")):
            self.nodes[str(path)] = f"n{len(self.nodes)}"
            if path.is_file():
                self.contents[self.nodes[str(path)]] = path.read_bytes()
        self.start = dict(self.nodes)

    def entry(self, path: Path) -> tuple[str, str]:
        return self.nodes[str(path.parent)], path.name

    def created(self, path: Path) -> None:
        self.nodes[str(path)] = f"n{len(self.events)}e"
        self.contents[self.nodes[str(path)]] = b""
        self.events.append(("link", *self.entry(path), self.nodes[str(path)]))

    def written(self, path: Path) -> None:
        node, data = self.nodes[str(path)], path.read_bytes()
        if self.contents.get(node, b"") != data:
            self.contents[node] = data
            self.events.append(("write", node))

    def renamed(self, source: Path, target: Path) -> None:
        old, new = self.entry(source), self.entry(target)
        moved = {path: node for path, node in self.nodes.items()
                 if path == str(source) or path.startswith(f"{source}/")}  # fmt: skip
        for path, node in moved.items():
            del self.nodes[path]
            self.nodes[str(target) + path[len(str(source)) :]] = node
        self.events.append(("move", *old, *new, self.nodes[str(target)]))

    def synced(self, path: Path) -> None:
        self.events.append(("sync", self.nodes[str(path)]))

    @contextmanager
    def watching(self) -> Iterator[None]:
        real_open, real_rename, real_fsync = Path.open, Path.rename, os.fsync

        def fsync(descriptor: int) -> None:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            if path.is_file():
                self.written(path)
            self.synced(path)
            real_fsync(descriptor)

        def rename(path: Path, target: Path) -> Path:
            if path.is_file():
                self.written(path)
            self.renamed(path, target)
            return real_rename(path, target)

        def opened(path: Path, mode: str = "r", *rest: object, **more: object) -> object:
            file = real_open(path, mode, *rest, **more)  # type: ignore[call-overload]
            if "x" in mode:
                self.created(path)
            return file

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            patch.setattr(Path, "rename", rename)
            patch.setattr(Path, "open", opened)
            yield

    def crashes(self, scratch: Path) -> Iterator[tuple[bool, Path]]:
        """Every state a crash may leave, as a folder, and whether all had been done by then."""
        for length in range(len(self.events) + 1):
            done = self.events[:length]
            unsafe = [i for i, event in enumerate(done) if not self.safe(i, event, done)]
            for lost in itertools.product([False, True], repeat=len(unsafe)):
                missing = {i for i, gone in zip(unsafe, lost, strict=True) if gone}
                shutil.rmtree(scratch, ignore_errors=True)
                self.build(scratch, done, missing)
                yield length == len(self.events), scratch

    @staticmethod
    def safe(index: int, event: tuple[str, ...], done: list[tuple[str, ...]]) -> bool:
        folders = {"sync": [], "write": [event[1]], "link": [event[1]]}.get(event[0])
        if folders is None:
            folders = [event[1], event[3]]
        return all(("sync", folder) in done[index:] for folder in folders)

    def build(self, scratch: Path, done: list[tuple[str, ...]], missing: set[int]) -> None:
        entries: dict[tuple[str, str], str] = {
            (self.start[str(Path(path).parent)], Path(path).name): node
            for path, node in self.start.items()
            if node != "root"
        }
        contents = {node: self.contents[node] for node in self.start.values()
                    if node in self.contents}  # fmt: skip
        for index, event in enumerate(done):
            if event[0] == "write":
                data = self.contents[event[1]]
                contents[event[1]] = data[: len(data) // 2] if index in missing else data
            elif event[0] == "link" and index not in missing:
                entries[event[1], event[2]] = event[3]
            elif event[0] == "move" and index not in missing:
                entries.pop((event[1], event[2]), None)
                entries[event[3], event[4]] = event[5]
        self.lay_out(scratch, "root", entries, contents)

    def lay_out(self, folder: Path, node: str, entries: dict[tuple[str, str], str],
                contents: dict[str, bytes]) -> None:  # fmt: skip
        folder.mkdir()
        for (parent, name), child in entries.items():
            if parent != node:
                continue
            is_folder = child not in self.contents
            if is_folder:
                self.lay_out(folder / name, child, entries, contents)
            else:
                (folder / name).write_bytes(contents.get(child, b""))


def file_states(tmp_path: Path, *, fsync: bool) -> list[tuple[bool, bytes]]:
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").write_bytes(b"the old content")
    disk = Disk(root)
    with disk.watching():
        durable.publish_file(root / "file", b"the new content", fsync=fsync)
    return [(acked, (crash / "file").read_bytes()) for acked, crash in disk.crashes(tmp_path / "x")]


def test_a_file_is_old_or_new_after_power_loss_and_new_once_published(tmp_path: Path) -> None:
    states = file_states(tmp_path, fsync=True)
    assert {content for _, content in states} == {b"the old content", b"the new content"}
    assert {content for acked, content in states if acked} == {b"the new content"}


def test_without_fsync_the_enumerator_finds_what_is_wrong(tmp_path: Path) -> None:
    states = file_states(tmp_path, fsync=False)
    assert (True, b"the old content") in states
    assert (True, b"the new") in states


def folder_states(tmp_path: Path, *names: str) -> list[tuple[bool, bool, bool]]:
    """After every crash: whether all was done, the folder is there, it verifies."""
    root = tmp_path / "root"
    staging = root / "staging" / "id"
    staging.mkdir(parents=True)
    (root / "kind").mkdir()
    disk = Disk(root)
    for name in names:
        (staging / name).write_bytes(b"content of " + name.encode())
        disk.created(staging / name)
        disk.written(staging / name)
    with disk.watching():
        digest, _ = durable.seal_folder(staging, {})
        durable.publish_folder(staging, root / "kind" / "final")
    states = []
    for acked, crash in disk.crashes(tmp_path / "x"):
        final = crash / "kind" / "final"
        try:
            durable.verify_folder(final, digest)
            sound = True
        except FiretitanError:
            sound = False
        states.append((acked, final.exists(), sound))
    return states


def test_a_folder_is_whole_or_absent_after_power_loss_and_there_once_published(
    tmp_path: Path,
) -> None:
    states = folder_states(tmp_path, "a", "b")
    assert len(states) > 90
    assert all(sound for _, there, sound in states if there)
    assert all(there for acked, there, _ in states if acked)
    assert not all(there for _, there, _ in states)


def test_a_folder_published_without_fsync_would_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "fsync_path", lambda path: None)
    states = folder_states(tmp_path, "a")
    assert any(there and not sound for _, there, sound in states)
    assert any(acked and not there for acked, there, _ in states)
