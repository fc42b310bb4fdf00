from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.records import SpoolRef
from firetitan_daemon.store.spool import FileSpool


@pytest.fixture
def spool(tmp_path: Path) -> FileSpool:
    return FileSpool(tmp_path / "spool")


def content(ref: SpoolRef) -> bytes | None:
    path = Path(ref.path)
    return path.read_bytes() if path.exists() else None


def damage(ref: SpoolRef, data: bytes | None) -> None:
    if data is None:
        Path(ref.path).unlink()
    else:
        Path(ref.path).write_bytes(data)


async def test_bytes_come_back(spool: FileSpool) -> None:
    refs = [await spool.write(data) for data in (b"", b"abc", b"abc", b"x" * 100_000)]
    assert len({ref.path for ref in refs}) == 4
    assert [ref.size_bytes for ref in refs] == [0, 3, 3, 100_000]
    assert [await spool.read(ref) for ref in refs] == [b"", b"abc", b"abc", b"x" * 100_000]
    assert content(refs[1]) == b"abc"


@pytest.mark.parametrize("data", [b"abd", b"ab", b"", None])
async def test_damage_is_told(spool: FileSpool, data: bytes | None) -> None:
    ref = await spool.write(b"abc")
    damage(ref, data)
    with pytest.raises(FiretitanError, match=ref.path.rpartition("/")[2]) as caught:
        await spool.read(ref)
    assert caught.value.reason == Reason.CHECKSUM_MISMATCH
    assert caught.value.metadata["expected"] == ref.digest


async def test_removing_twice_is_fine(spool: FileSpool) -> None:
    ref = await spool.write(b"abc")
    await spool.remove([ref, ref])
    await spool.remove([ref])
    await spool.remove([])
    assert content(ref) is None


async def test_a_reference_never_leads_out(spool: FileSpool, tmp_path: Path) -> None:
    outside = tmp_path / "precious"
    outside.write_bytes(b"abc")
    ref = await spool.write(b"abc")
    await spool.remove([replace(ref, path=str(outside))])
    assert outside.exists()


async def test_sweeping_keeps_only_what_is_named(spool: FileSpool, tmp_path: Path) -> None:
    kept, stray = await spool.write(b"a"), await spool.write(b"b")
    (tmp_path / "spool" / ".tmp-unfinished").write_bytes(b"c")
    assert await spool.sweep([kept]) == 2
    assert await spool.read(kept) == b"a"
    assert content(stray) is None
    assert await spool.sweep([kept]) == 0


async def test_a_vanished_folder_is_named(spool: FileSpool, tmp_path: Path) -> None:
    (tmp_path / "spool").rmdir()
    with pytest.raises(FiretitanError, match=r"cannot write to .*spool") as caught:
        await spool.write(b"a")
    assert caught.value.reason == Reason.STATE_NOT_WRITABLE
