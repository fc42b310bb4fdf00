"""SQLite's own writes, seen and failed: a VFS under the ledger, which apsw lets Python write.

In a block of `ledger_on_vfs`, `sqlite3.connect`, as the store calls it, opens its file through a
VFS that tells the recordings under way what is written and made durable, or lets a call fail.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest

from support.power_loss import active

_CODES = {apsw.FullError: apsw.SQLITE_FULL, apsw.IOError: apsw.SQLITE_IOERR}
_number = itertools.count()
Fail = Callable[[str], None]
"""Called before each write, sync and truncate; raises where it is to fail."""


# The names of methods are SQLite's.
# ruff: noqa: N802


class _Vfs(apsw.VFS):
    def __init__(self, name: str, fail: Fail) -> None:
        super().__init__(name, "")
        self.name = name
        self.fail = fail

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        for recording in active():
            recording.look()
        return _File(self, name, flags)

    def xDelete(self, name: str, sync_folder: bool) -> None:
        self.fail("delete")
        super().xDelete(name, sync_folder)
        for recording in active():
            recording.look()
            if sync_folder:
                recording.synced(Path(name).parent.stat())


class _File(apsw.VFSFile):
    def __init__(self, vfs: _Vfs, name: Any, flags: list[int]) -> None:
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        self._path = Path(path or "/nowhere")
        self._vfs = vfs
        journals = apsw.SQLITE_OPEN_MAIN_JOURNAL | apsw.SQLITE_OPEN_WAL
        self._new_journal = bool(flags[0] & journals) and not self._path.exists()
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:
        self._vfs.fail("write")
        self._tell(bytes(data), offset)
        super().xWrite(data, offset)

    def xTruncate(self, size: int) -> None:
        self._vfs.fail("truncate")
        self._tell(None, size)
        super().xTruncate(size)

    def xSync(self, flags: int) -> None:
        self._vfs.fail("fsync")
        super().xSync(flags)
        for recording in active():
            recording.synced(self._path.stat())
            if self._new_journal:
                # As SQLite's own files do: the first sync of a new journal is of its folder too.
                recording.synced(self._path.parent.stat())
        self._new_journal = False

    def _tell(self, data: bytes | None, place: int) -> None:
        if self._path.exists():
            for recording in active():
                recording.wrote(self._path.stat(), data, place)


class _Rows:
    def __init__(self, rows: Sequence[Any], changes: int) -> None:
        self._rows = iter(rows)
        self.rowcount = changes

    def __iter__(self) -> Iterator[Any]:
        return self._rows

    def fetchone(self) -> Any:
        return next(self._rows, None)

    def fetchall(self) -> list[Any]:
        return list(self._rows)


class _Connection:
    """What the store uses of `sqlite3.Connection`, over apsw."""

    def __init__(self, path: Path, vfs: _Vfs) -> None:
        self._vfs = vfs
        with _translated():
            self._db = apsw.Connection(str(path), vfs=vfs.name)

    def execute(self, query: str, arguments: Sequence[Any] = ()) -> _Rows:
        with _translated():
            rows = list(self._db.execute(query, tuple(arguments)))
            return _Rows(rows, self._db.changes())

    @property
    def in_transaction(self) -> bool:
        return self._db.in_transaction

    def close(self) -> None:
        with _translated():
            self._db.close()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except apsw.Error as error:
        kind = sqlite3.OperationalError
        if isinstance(error, apsw.ConstraintError):
            kind = sqlite3.IntegrityError
        told = kind(str(error))
        # One that `fail` raised has no code of its own.
        code = getattr(error, "extendedresult", None) or _CODES.get(type(error), 0)
        names = apsw.mapping_extended_result_codes | apsw.mapping_result_codes
        told.sqlite_errorname = names.get(code, "SQLITE_ERROR")
        raise told from error


@contextmanager
def ledger_on_vfs(fail: Fail = lambda call: None) -> Iterator[None]:
    """In this block the store's files are opened through a VFS of ours."""
    vfs = _Vfs(f"firetitan-test-{next(_number)}", fail)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "connect", lambda path, **_: _Connection(Path(path), vfs))
        yield
