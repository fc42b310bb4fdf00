from __future__ import annotations

import errno
from pathlib import Path

import pytest

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.store.folders import FileFolders


@pytest.fixture
def folders(tmp_path: Path) -> FileFolders:
    return FileFolders(tmp_path / "blobs")


def sealed(folders: FileFolders, text: str = "weights") -> Path:
    staging = folders.staging()
    (staging / "data").write_text(text)
    durable.seal_folder(staging, {})
    return staging


async def test_publishing_gives_a_new_name_each_time(folders: FileFolders) -> None:
    first = await folders.publish(sealed(folders, "one"), "checkpoints", "step-1")
    second = await folders.publish(sealed(folders, "two"), "checkpoints", "step-1")
    assert first != second
    assert first.name.startswith("step-1-")
    assert first.parent.name == "checkpoints"
    assert (first / "data").read_text() == "one"
    durable.verify_folder(second)


async def test_publishing_again_finishes_or_finds_it(folders: FileFolders) -> None:
    staging = sealed(folders)
    final = await folders.publish(staging, "snapshots", "a")
    assert await folders.publish(staging, "snapshots", "a") == final
    # The save was run again into the same staging folder before its row was written.
    staging.mkdir()
    (staging / "data").write_text("again")
    durable.seal_folder(staging, {})
    assert await folders.publish(staging, "snapshots", "a") == final
    assert (final / "data").read_text() == "again"
    assert not staging.exists()


async def test_files_that_are_gone_are_told(folders: FileFolders) -> None:
    staging = sealed(folders)
    await folders.discard(staging)
    with pytest.raises(FiretitanError, match="the files of a are gone") as caught:
        await folders.publish(staging, "snapshots", "a")
    assert caught.value.reason == Reason.CHECKSUM_MISMATCH


async def test_who_still_writes_to_what_is_discarded_adds_nothing(
    folders: FileFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging, remove = folders.staging(), durable.remove
    (staging / "weights").write_text("weights")

    def while_removing(path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            (staging / "optimizer").write_text("moments")
        remove(path)

    monkeypatch.setattr(durable, "remove", while_removing)
    await folders.discard(staging)
    assert not list(staging.parent.iterdir())


async def test_discarding_stays_inside(folders: FileFolders, tmp_path: Path) -> None:
    final = await folders.publish(sealed(folders), "snapshots", "a")
    await folders.discard(final)
    await folders.discard(final)
    assert not final.exists()
    for outside in (tmp_path, tmp_path / "blobs", tmp_path / "blobs" / "snapshots"):
        with pytest.raises(AssertionError):
            await folders.discard(outside)
        assert outside.exists()


async def test_sweeping_keeps_rows_and_open_saves(folders: FileFolders) -> None:
    published = await folders.publish(sealed(folders), "checkpoints", "kept")
    stray = await folders.publish(sealed(folders), "checkpoints", "stray")
    open_staging = sealed(folders)
    open_published = sealed(folders)
    final = await folders.publish(open_published, "snapshots", "open")
    left = folders.staging()
    keep = [str(published), str(open_staging), str(open_published)]
    assert await folders.sweep(keep) == 2
    assert not stray.exists()
    assert not left.exists()
    assert published.exists()
    assert open_staging.exists()
    assert final.exists()
    assert await folders.sweep([]) == 3


async def test_a_folder_that_cannot_be_looked_at_is_not_in_its_place(
    folders: FileFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = await folders.publish(sealed(folders), "points", "p")
    assert await folders.there(point)

    def broken(_: Path) -> bool:
        raise OSError(errno.EIO, "the disk")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_dir", broken)
        assert not await folders.there(point)
