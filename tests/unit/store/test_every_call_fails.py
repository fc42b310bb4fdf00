"""R8: every write, fsync and rename of the store fails once, one after the other.

The Nth call fails for N = 1, 2, ... until none is left to fail. Whatever fails, what was saved is
there whole, nothing half is listed, no temporary file stays, and the same again works.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import apsw
import pytest
from support.sizes import figure
from support.sqlite_files import ledger_on_vfs

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.ports import Change
from firetitan_daemon.core.records import Checkpoint
from firetitan_daemon.store.folders import FileFolders
from firetitan_daemon.store.spool import FileSpool
from firetitan_daemon.store.sqlite import SqliteStore

S = "trainers/t/sessions/s"
NAME = f"{S}/checkpoints/c"


class Trouble:
    """Lets the Nth call that reaches the disk fail."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.left = 0
        """Calls until the one that fails; 0: none does."""
        self.calls = 0

    def count(self) -> bool:
        self.calls += 1
        self.left -= self.left > 0
        return self.left == 0 and self.armed and self._once()

    def _once(self) -> bool:
        self.armed = False
        return True

    armed = False

    def arm(self, number: int) -> None:
        self.left, self.armed, self.calls = number, True, 0

    def sqlite(self, call: str) -> None:
        if self.count():
            raise apsw.FullError() if self.code == errno.ENOSPC else apsw.IOError()

    def files(self, patch: pytest.MonkeyPatch) -> None:
        def failing(real: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **more: object) -> object:
                if self.count():
                    raise OSError(self.code, os.strerror(self.code))
                return real(*arguments, **more)

            return call

        for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "mkdir")):
            patch.setattr(owner, name, failing(getattr(owner, name)))
        real_open = Path.open

        def opened(path: Path, mode: str = "r", *rest: object, **more: object) -> object:
            if set(mode) & set("xwa") and self.count():
                raise OSError(self.code, os.strerror(self.code))
            return real_open(path, mode, *rest, **more)  # type: ignore[call-overload]

        patch.setattr(Path, "open", opened)


class Home:
    """The parts of a store, and a save as the daemon does it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = SqliteStore(root / "state.db", fsync_operations=True)
        self.spool = FileSpool(root / "spool", fsync=True)
        self.folders = FileFolders(root / "store")

    async def save(self, content: bytes) -> None:
        former = await self.store.checkpoint(NAME)
        result = await self.spool.write(b"result of " + content)
        try:
            row = await self._published(content)
            try:
                await self.store.write(Change(checkpoints=[row], durable=True))
            except FiretitanError:
                await self.folders.discard(Path(row.folder))
                raise
        finally:
            await self.spool.remove([result])
        if former is not None:
            await self.folders.discard(Path(former.folder))

    async def _published(self, content: bytes) -> Checkpoint:
        staging = self.folders.staging()
        try:
            (staging / "data").write_bytes(content)
            digest, size_bytes = durable.seal_folder(staging, {})
            final = await self.folders.publish(staging, "checkpoints", "c")
        finally:
            await self.folders.discard(staging)
        return Checkpoint(NAME, S, "base", 8, 1, 1, str(final), digest, size_bytes, 0.0)

    async def content(self) -> bytes:
        """What the listed checkpoint holds, verified; nothing else may be left."""
        row = await self.store.checkpoint(NAME)
        assert row is not None
        durable.verify_folder(Path(row.folder), row.digest)
        published = list((self.root / "store" / "checkpoints").iterdir())
        assert published == [Path(row.folder)]
        assert not list((self.root / "store" / "staging").iterdir())
        assert not list((self.root / "spool").iterdir())
        assert not list(self.root.rglob(f"{durable.TEMPORARY_PREFIX}*"))
        return (Path(row.folder) / "data").read_bytes()

    async def close(self) -> None:
        for part in (self.store, self.spool, self.folders):
            await part.close()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.ENOSPC, Reason.STATE_DISK_FULL),
        (errno.EROFS, Reason.STATE_NOT_WRITABLE),
        (errno.EIO, Reason.STATE_NOT_WRITABLE),
    ],
)
async def test_whatever_fails_the_old_is_whole_and_the_same_again_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, reason: Reason
) -> None:
    trouble, failed, number = Trouble(code), 0, 0
    with ledger_on_vfs(trouble.sqlite), monkeypatch.context() as patch:
        home = Home(tmp_path)
        trouble.files(patch)
        await home.save(b"0")
        while True:
            number += 1
            before = await home.content()
            trouble.arm(number)
            try:
                await home.save(b"%d" % number)
            except (FiretitanError, OSError) as error:
                assert await home.content() == before
                if isinstance(error, FiretitanError):
                    assert error.reason is reason, error
                    assert str(tmp_path) in error.message
                else:
                    assert error.errno == code
                trouble.armed = False
                await home.save(b"%d" % number)
                failed += 1
            assert await home.content() == b"%d" % number
            if trouble.calls < number and trouble.armed:
                break
            trouble.armed = False
        trouble.armed = False
        await home.close()
    assert failed > 8
    figure("R8", calls_that_failed=failed, errno=code)
