"""The ledger's tables, and how an older file becomes today's.

Knows: SQLite's schema. Must not know: records beyond the columns below.

    trainers      id | body
      sessions    name | trainer | body
        lanes     session, client_id | next_seq  acked_through  broken  failed_seq
        operations  number | id | target, client_id, seq | target, commit_seq |
                    target, request_id | done  has_payload  has_result | body
    checkpoints   number | name | trainer  folder | body
    snapshots     number | id | trainer  folder | body
    deleted_snapshots id | trainer
    recovery_points session, commit_seq | folder | body
    models        id | folder | body
    deployments   id | body
      pins        deployment, snapshot, holder
    workers       id | body
    leases        client_id | body
    cleanups      number | name | body

`body` is the whole record as JSON; other columns repeat what is searched for or must be unique.
`number` counts up and is never used again: order of acceptance, order of saving. Checkpoints and
snapshots outlive their trainer; its sessions, lanes, their operations and recovery points go with
it. An operation's `target` is a session (then it has a lane), a trainer or a deployment.

This drawing changes whenever the structure does. Every change is a new function at the end of
`MIGRATIONS`; `PRAGMA user_version` counts those that were applied.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason

Migration = Callable[[sqlite3.Connection], None]
_MAX_PROBLEMS = 10

_FIRST = (
    "CREATE TABLE trainers (id TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE sessions (name TEXT PRIMARY KEY, trainer TEXT NOT NULL, body TEXT NOT NULL)"
    " WITHOUT ROWID",
    "CREATE INDEX sessions_trainer ON sessions (trainer)",
    "CREATE TABLE lanes (session TEXT NOT NULL, client_id TEXT NOT NULL,"
    " next_seq INTEGER NOT NULL, acked_through INTEGER NOT NULL, broken INTEGER NOT NULL,"
    " failed_seq INTEGER NOT NULL, PRIMARY KEY (session, client_id)) WITHOUT ROWID",
    "CREATE TABLE operations (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,"
    " target TEXT NOT NULL, request_id TEXT NOT NULL, client_id TEXT NOT NULL,"
    " seq INTEGER NOT NULL, commit_seq INTEGER NOT NULL, done INTEGER NOT NULL,"
    " has_payload INTEGER NOT NULL, has_result INTEGER NOT NULL, body TEXT NOT NULL)",
    "CREATE UNIQUE INDEX operations_lane ON operations (target, client_id, seq)"
    " WHERE client_id <> ''",
    "CREATE UNIQUE INDEX operations_order ON operations (target, commit_seq) WHERE commit_seq > 0",
    "CREATE UNIQUE INDEX operations_request ON operations (target, request_id)"
    " WHERE request_id <> ''",
    "CREATE INDEX operations_target ON operations (target, number)",
    "CREATE INDEX operations_open ON operations (target, number) WHERE done = 0",
    "CREATE INDEX operations_payload ON operations (number) WHERE has_payload = 1",
    "CREATE INDEX operations_result ON operations (target, client_id, seq) WHERE has_result = 1",
    "CREATE TABLE checkpoints (number INTEGER PRIMARY KEY AUTOINCREMENT,"
    " name TEXT NOT NULL UNIQUE, trainer TEXT NOT NULL, folder TEXT NOT NULL, body TEXT NOT NULL)",
    "CREATE INDEX checkpoints_trainer ON checkpoints (trainer, number)",
    "CREATE TABLE snapshots (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,"
    " trainer TEXT NOT NULL, folder TEXT NOT NULL, body TEXT NOT NULL)",
    "CREATE INDEX snapshots_trainer ON snapshots (trainer, number)",
    "CREATE TABLE deployments (id TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE pins (deployment TEXT NOT NULL, snapshot TEXT NOT NULL, holder TEXT NOT NULL,"
    " PRIMARY KEY (deployment, snapshot, holder)) WITHOUT ROWID",
    "CREATE TABLE workers (id TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID",
)


def _create(connection: sqlite3.Connection) -> None:
    for statement in _FIRST:
        connection.execute(statement)


_SECOND = (
    "CREATE TABLE recovery_points (session TEXT NOT NULL, commit_seq INTEGER NOT NULL,"
    " folder TEXT NOT NULL, body TEXT NOT NULL, PRIMARY KEY (session, commit_seq)) WITHOUT ROWID",
)


def _add_recovery_points(connection: sqlite3.Connection) -> None:
    for statement in _SECOND:
        connection.execute(statement)


_THIRD = (
    "CREATE TABLE deleted_snapshots (id TEXT PRIMARY KEY, trainer TEXT NOT NULL) WITHOUT ROWID",
    "CREATE INDEX deleted_snapshots_trainer ON deleted_snapshots (trainer)",
)


def _remember_deleted_snapshots(connection: sqlite3.Connection) -> None:
    for statement in _THIRD:
        connection.execute(statement)


def _add_models(connection: sqlite3.Connection) -> None:
    connection.execute(
        "CREATE TABLE models (id TEXT PRIMARY KEY, folder TEXT NOT NULL, body TEXT NOT NULL)"
        " WITHOUT ROWID"
    )


_LEASES = (
    "CREATE TABLE leases (client_id TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE cleanups (number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE,"
    " body TEXT NOT NULL)",
)


def _add_leases(connection: sqlite3.Connection) -> None:
    for statement in _LEASES:
        connection.execute(statement)


def _several_samplers(connection: sqlite3.Connection) -> None:
    for key, text in connection.execute("SELECT id, body FROM deployments").fetchall():
        body = json.loads(text)
        worker = body.pop("worker_id", None)
        body["worker_ids"] = [worker] if worker is not None else []
        text = json.dumps(body, separators=(",", ":"), ensure_ascii=False)
        connection.execute("UPDATE deployments SET body = ? WHERE id = ?", (text, key))


MIGRATIONS: tuple[Migration, ...] = (
    _create,
    _add_recovery_points,
    _remember_deleted_snapshots,
    _add_models,
    _add_leases,
    _several_samplers,
)
"""Each takes a file one version up."""


def migrate(
    connection: sqlite3.Connection, path: Path, migrations: Sequence[Migration] = MIGRATIONS
) -> None:
    """Bring an open file to today's schema; an older one is copied beside itself first.

    Args:
        connection: In autocommit mode.
        path: The file; the copy is called `{path}.v{version}.bak`.
        migrations: All there are.

    Raises:
        FiretitanError: UNSUPPORTED for a newer file; nothing was changed.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(migrations):
        raise FiretitanError(
            Reason.UNSUPPORTED,
            f"{path} has schema {version}, this firetitand knows schemas up to {len(migrations)}: "
            "a newer version wrote it. Run that version, or another FIRETITAN_HOME; nothing was "
            "changed",
            found=str(version),
            known=str(len(migrations)),
        )
    if version == len(migrations):
        return
    if version > 0:
        _back_up(connection, path, version)
    with transaction(connection):
        for number, step in enumerate(migrations[version:], version + 1):
            step(connection)
            connection.execute(f"PRAGMA user_version = {number}")


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All that is done within, or nothing. The connection is in autocommit mode."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # else SQLite has rolled it back, as on a full disk
            connection.execute("ROLLBACK")
        raise


def tables(connection: sqlite3.Connection) -> list[str]:
    """What `problems` looks at one by one: the tables, and the list of them and of free pages."""
    query = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
    try:
        return ["sqlite_schema", *(name for (name,) in connection.execute(query))]
    except sqlite3.DatabaseError:
        return ["sqlite_schema"]  # where this is found again


def problems(connection: sqlite3.Connection, table: str = "") -> list[str]:
    """What SQLite's quick_check finds wrong with an open file, the first ten; empty: nothing.

    Args:
        connection: To the file.
        table: Look at that one alone, and its indices; empty: at all, and whether two use one page.
    """
    try:
        # It takes the one or the other, never both.
        rows = connection.execute(f"PRAGMA quick_check({table or _MAX_PROBLEMS})").fetchall()
    except sqlite3.DatabaseError as error:
        return [str(error)]
    return [str(row[0]) for row in rows[:_MAX_PROBLEMS] if row[0] != "ok"]


def examine(copy: Path) -> tuple[list[str], int]:
    """What is wrong with a ledger that no daemon has open, and its schema's version.

    Args:
        copy: Of the file; it may be changed.
    """
    connection = sqlite3.connect(copy)
    try:
        found = problems(connection)
        version = 0 if found else connection.execute("PRAGMA user_version").fetchone()[0]
    finally:
        connection.close()
    return found, int(version)


def _back_up(connection: sqlite3.Connection, path: Path, version: int) -> None:
    copy = path.with_name(f"{path.name}.v{version}.bak")
    unfinished = path.with_name(f"{durable.TEMPORARY_PREFIX}{copy.name}")
    durable.remove(unfinished)
    connection.execute("VACUUM INTO ?", (str(unfinished),))
    durable.publish_written(unfinished, copy)
