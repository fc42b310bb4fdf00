"""The ledger in one SQLite file.

Knows: SQL, the tables of `schema`. Must not know: what the records mean beyond their keys.

One connection, owned by one thread; calls are queued to it and take effect in call order. The file
is locked against any other connection. WAL: a commit survives the death of the process, and with
`durable` the loss of power.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import ParamSpec, TypeVar

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.model_records import Model
from firetitan_daemon.core.ports import Change, Ledger, Store
from firetitan_daemon.core.records import (
    Checkpoint,
    DeferredCleanup,
    Deployment,
    Lane,
    Lease,
    Moment,
    Operation,
    OperationState,
    RecoveryPoint,
    Session,
    Snapshot,
    SpoolRef,
    Trainer,
    WorkerSpec,
)
from firetitan_daemon.disk_errors import disk_full, not_writable
from firetitan_daemon.store import schema, statements
from firetitan_daemon.store.codec import UnreadableRecordError, decode, encode
from firetitan_daemon.store.disk import Ballast
from firetitan_daemon.store.relocation import relocate
from firetitan_daemon.store.rules import clamp, in_use, reused, stood_on, trainer_of, unknown_page

_NOT_WRITABLE = ("SQLITE_READONLY", "SQLITE_IOERR", "SQLITE_CANTOPEN")
_P = ParamSpec("_P")
_T = TypeVar("_T")


class SqliteStore(Store):
    """The ledger on disk.

    Args:
        path: The file; made where there is none. Its folder exists.
        folders: Where the folders that rows name are now; None: where the rows say.
        fsync_operations: Make every change durable, not only those that ask for it.

    Raises:
        FiretitanError: UNSUPPORTED for a file of a newer version; INTERNAL where it cannot be
            opened, is not a ledger or is open elsewhere.
    """

    def __init__(
        self, path: Path, *, folders: Path | None = None, fsync_operations: bool = False
    ) -> None:
        self._path = path
        self._folders = folders
        self._fsync_operations = fsync_operations
        self._ballast = Ballast(path.with_name(f"{path.name}.ballast"))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="firetitan-store")
        self._closed = False
        try:
            self._db = self._thread.submit(self._open).result()
        except BaseException:
            self._thread.shutdown()
            raise

    async def load(self) -> Ledger:
        """What a daemon needs at start."""
        return await self._run(self._load)

    async def write(self, change: Change) -> None:
        """Apply a change as one transaction."""
        await self._run(self._write, change)

    async def operation(self, operation_id: str) -> Operation | None:
        """One operation."""
        return await self._run(self._one, Operation, "operations WHERE id = ?", operation_id)

    async def operation_by_request(self, target: str, request_id: str) -> Operation | None:
        """The operation a request id made on a target."""
        where = "operations WHERE target = ? AND request_id = ? AND request_id <> ''"
        return await self._run(self._one, Operation, where, target, request_id)

    async def operation_by_seq(self, target: str, client_id: str, seq: int) -> Operation | None:
        """The operation at a place in a lane."""
        where = "operations WHERE target = ? AND client_id = ? AND seq = ? AND client_id <> ''"
        return await self._run(self._one, Operation, where, target, client_id, seq)

    async def lane_operations(
        self, session: str, client_id: str, after_seq: int, limit: int | None = None
    ) -> Sequence[Operation]:
        """Done operations of a lane with a higher seq, by seq; the first so many, or all."""
        where = (
            "operations WHERE target = ? AND client_id = ? AND seq > ? AND client_id <> ''"
            " AND done = 1 ORDER BY seq LIMIT ifnull(?, -1)"
        )
        after_seq = clamp(after_seq)
        return await self._run(self._all, Operation, where, session, client_id, after_seq, limit)

    async def done_operations(self, session: str, after_commit_seq: int) -> Sequence[Operation]:
        """Done operations of a session with a higher commit_seq, by commit_seq."""
        where = "operations WHERE target = ? AND commit_seq > ? AND done = 1 ORDER BY commit_seq"
        return await self._run(self._all, Operation, where, session, clamp(after_commit_seq))

    async def operations(
        self, target: str, *, pending_only: bool, after_id: str, limit: int
    ) -> Sequence[Operation]:
        """Operations of a target by commit_seq, a page at a time; those without one last."""
        return await self._run(self._operations, target, pending_only, after_id, limit)

    async def checkpoints(self, trainer_id: str | None) -> Sequence[Checkpoint]:
        """Checkpoints of a trainer, deleted ones too, or all; oldest first."""
        where = "checkpoints WHERE trainer = ifnull(?, trainer) ORDER BY number"
        return await self._run(self._all, Checkpoint, where, trainer_id)

    async def checkpoint(self, name: str) -> Checkpoint | None:
        """One checkpoint by full name."""
        return await self._run(self._one, Checkpoint, "checkpoints WHERE name = ?", name)

    async def snapshots(self, trainer_id: str | None) -> Sequence[Snapshot]:
        """Snapshots of a trainer, or all, oldest first."""
        where = "snapshots WHERE trainer = ifnull(?, trainer) ORDER BY number"
        return await self._run(self._all, Snapshot, where, trainer_id)

    async def snapshot_ids(self, trainer_id: str) -> Sequence[str]:
        """Every id that snapshots of a trainer ever had."""
        return await self._run(self._snapshot_ids, trainer_id)

    async def snapshot(self, snapshot_id: str) -> Snapshot | None:
        """One snapshot by id."""
        return await self._run(self._one, Snapshot, "snapshots WHERE id = ?", snapshot_id)

    async def acknowledge(self, session: str, client_id: str, through_seq: int) -> list[SpoolRef]:
        """Forget results of a lane up to a seq; returns the spool files to remove."""
        return await self._run(self._acknowledge, session, client_id, clamp(through_seq))

    async def untaken_results(self, before: Moment) -> Sequence[Operation]:
        """Operations that ended before a moment and whose result was not acknowledged."""
        # Chosen here and not by whoever reads the rows: there may be a day's, and a few are old.
        where = f"operations WHERE has_result = 1 AND done = 1 AND {statements.ENDED_BEFORE}"
        boot_id, running_s, wall_s = before.boot_id, before.monotonic_s, before.wall_s
        return await self._run(self._all, Operation, where, boot_id, running_s, wall_s)

    async def forget_results(self, operation_ids: Sequence[str]) -> list[SpoolRef]:
        """Forget the results of operations; returns the spool files to remove."""
        return await self._run(self._forget_results, operation_ids) if operation_ids else []

    async def delete_operations(self, before: Moment) -> int:
        """Delete what ended before a moment and belongs to no session; returns how many."""
        return await self._run(self._delete_operations, before)

    async def check(self) -> Sequence[str]:
        """Look the file over, a table at a time, so that changes go between."""
        tables = await self._run(schema.tables, self._db)
        found = [await self._run(schema.problems, self._db, table) for table in tables]
        return [problem for problems in found for problem in problems]

    async def close(self) -> None:
        """Finish what is queued and close the file; again is fine."""
        if not self._closed:
            self._closed = True
            await asyncio.wrap_future(self._thread.submit(self._db.close))
            self._thread.shutdown()

    async def _run(self, call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        # What was queued happens, in its turn, even if the one who asked stops waiting.
        future = self._thread.submit(call, *args, **kwargs)
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except (sqlite3.Error, UnreadableRecordError) as error:
            raise self._failure(error) from error

    def _open(self) -> sqlite3.Connection:
        try:
            db = sqlite3.connect(self._path, isolation_level=None, timeout=1.0)
        except sqlite3.Error as error:
            raise self._failure(error) from error
        try:
            self._path.chmod(0o600)
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            db.execute("PRAGMA foreign_keys = OFF")
            db.execute("PRAGMA synchronous = FULL")
            schema.migrate(db, self._path)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("BEGIN IMMEDIATE")
            db.execute("COMMIT")
            if self._folders is not None:
                relocate(db, self._folders)
            self._ballast.ensure()
            durable.fsync_path(self._path.parent)
        except sqlite3.Error as error:
            db.close()
            raise self._failure(error) from error
        except BaseException:
            db.close()
            raise
        return db

    def _load(self) -> Ledger:
        lanes = self._db.execute(
            "SELECT session, client_id, next_seq, acked_through, broken, failed_seq FROM lanes"
        ).fetchall()
        opened = self._all(
            Operation,
            "operations WHERE done = 0 ORDER BY target, commit_seq, client_id, seq, number",
        )
        where = "operations WHERE has_payload = 1 ORDER BY target, commit_seq"
        payloads = self._all(Operation, where)
        # Of many rows only a little: each that is decoded makes the start longer.
        results = self._db.execute(statements.RESULTS).fetchall()
        folders = self._db.execute(
            "SELECT folder FROM checkpoints UNION SELECT folder FROM snapshots"
            " UNION SELECT folder FROM recovery_points UNION SELECT folder FROM models"
        ).fetchall()
        kept = [one for one in payloads if one.done]
        return Ledger(
            trainers=self._all(Trainer, "trainers ORDER BY id"),
            sessions=self._all(Session, "sessions ORDER BY name"),
            lanes=[Lane(s, c, n, a, bool(broken), f) for s, c, n, a, broken, f in lanes],
            open_operations=opened,
            deployments=self._all(Deployment, "deployments ORDER BY id"),
            workers=self._all(WorkerSpec, "workers ORDER BY id"),
            pins=self._db.execute("SELECT deployment, snapshot, holder FROM pins").fetchall(),
            models=self._all(Model, "models ORDER BY id"),
            recovery_points=self._all(
                RecoveryPoint, "recovery_points ORDER BY session, commit_seq"
            ),
            kept_operations=kept,
            leases=self._all(Lease, "leases ORDER BY client_id"),
            cleanups=self._all(DeferredCleanup, "cleanups ORDER BY number"),
            spool=[
                *(one.payload for one in payloads if one.payload),
                *(SpoolRef(*result) for result in results),
            ],
            folders=[*(folder for (folder,) in folders), *in_use([*opened, *kept])],
        )

    def _write(self, change: Change) -> None:
        try:
            self._apply(change)
        except FiretitanError as error:
            admits = any(one.state is OperationState.ACCEPTED for one in change.operations)
            if error.reason is not Reason.STATE_DISK_FULL or admits:
                raise
            # New work is refused; what settles or frees may use the reserve.
            if not self._ballast.release():
                raise
            self._apply(change)
        if change.durable:
            self._ballast.ensure()

    def _apply(self, change: Change) -> None:
        with self._transaction(change.durable):
            self._delete(change)
            self._upsert(change)

    def _delete(self, change: Change) -> None:
        db = self._db
        for trainer in change.deleted_trainers:
            sessions = "(SELECT name FROM sessions WHERE trainer = ?)"
            db.execute(f"DELETE FROM operations WHERE target IN {sessions}", (trainer,))
            db.execute(f"DELETE FROM recovery_points WHERE session IN {sessions}", (trainer,))
            db.execute(f"DELETE FROM lanes WHERE session IN {sessions}", (trainer,))
            db.execute("DELETE FROM sessions WHERE trainer = ?", (trainer,))
            db.execute("DELETE FROM trainers WHERE id = ?", (trainer,))
        for name_folder in change.deleted_checkpoints:
            db.execute("DELETE FROM checkpoints WHERE name = ? AND folder = ?", name_folder)
        for snapshot in change.deleted_snapshots:
            self._delete_snapshot(snapshot, change.deleted_snapshots)
        for deployment in change.deleted_deployments:
            db.execute("DELETE FROM pins WHERE deployment = ?", (deployment,))
            db.execute("DELETE FROM deployments WHERE id = ?", (deployment,))
        for model in change.deleted_models:
            db.execute("DELETE FROM models WHERE id = ?", (model,))
        for worker in change.deleted_workers:
            db.execute("DELETE FROM workers WHERE id = ?", (worker,))
        for point in change.deleted_recovery_points:
            db.execute("DELETE FROM recovery_points WHERE session = ? AND commit_seq = ?", point)
        for pin in change.deleted_pins:
            db.execute("DELETE FROM pins WHERE deployment = ? AND snapshot = ? AND holder = ?", pin)
        for client_id in change.deleted_leases:
            db.execute("DELETE FROM leases WHERE client_id = ?", (client_id,))
        for name in change.deleted_cleanups:
            db.execute("DELETE FROM cleanups WHERE name = ?", (name,))

    def _delete_snapshot(self, snapshot_id: str, deleted: Sequence[str]) -> None:
        children = self._db.execute(
            "SELECT id FROM snapshots WHERE trainer = (SELECT trainer FROM snapshots WHERE id = ?)"
            " AND json_extract(body, '$.parent') = ?",
            (snapshot_id, snapshot_id),
        )
        for (child,) in children:
            if child not in deleted:
                raise stood_on(snapshot_id, child)
        self._db.execute(
            "INSERT INTO deleted_snapshots SELECT id, trainer FROM snapshots WHERE id = ?",
            (snapshot_id,),
        )
        self._db.execute("DELETE FROM snapshots WHERE id = ?", (snapshot_id,))

    def _snapshot_ids(self, trainer_id: str) -> list[str]:
        rows = self._db.execute(
            "SELECT id FROM snapshots WHERE trainer = ?"
            " UNION SELECT id FROM deleted_snapshots WHERE trainer = ?",
            (trainer_id, trainer_id),
        )
        return [snapshot_id for (snapshot_id,) in rows]

    def _upsert(self, change: Change) -> None:
        db = self._db
        for trainer in change.trainers:
            db.execute("REPLACE INTO trainers VALUES (?, ?)", (trainer.id, encode(trainer)))
        for session in change.sessions:
            row = (session.name, session.trainer_id, encode(session))
            db.execute("REPLACE INTO sessions VALUES (?, ?, ?)", row)
        for lane in change.lanes:
            db.execute(
                statements.LANE,
                (
                    lane.session,
                    lane.client_id,
                    lane.next_seq,
                    lane.acked_through,
                    lane.broken,
                    lane.failed_seq,
                ),
            )
        for operation in change.operations:
            self._put_operation(operation)
        for checkpoint in change.checkpoints:
            row4 = (checkpoint.name, trainer_of(checkpoint.session), checkpoint.folder)
            db.execute(statements.CHECKPOINT, (*row4, encode(checkpoint)))
        for snapshot in change.snapshots:
            row4 = (snapshot.id, trainer_of(snapshot.session), snapshot.folder)
            db.execute(statements.SNAPSHOT, (*row4, encode(snapshot)))
        for deployment in change.deployments:
            row2 = (deployment.id, encode(deployment))
            db.execute("REPLACE INTO deployments VALUES (?, ?)", row2)
        for worker in change.workers:
            db.execute("REPLACE INTO workers VALUES (?, ?)", (worker.worker_id, encode(worker)))
        for model in change.models:
            row3 = (model.id, model.folder, encode(model))
            db.execute("REPLACE INTO models VALUES (?, ?, ?)", row3)
        for pin in change.pins:
            db.execute("REPLACE INTO pins VALUES (?, ?, ?)", pin)
        for point in change.recovery_points:
            key = (point.session, point.commit_seq, point.folder)
            db.execute("REPLACE INTO recovery_points VALUES (?, ?, ?, ?)", (*key, encode(point)))
        for session_name, through in change.released_payloads:
            self._release_payloads(session_name, through)
        for lease in change.leases:
            db.execute("REPLACE INTO leases VALUES (?, ?)", (lease.client_id, encode(lease)))
        for cleanup in change.cleanups:
            db.execute(statements.CLEANUP, (cleanup.name, encode(cleanup)))

    def _put_operation(self, one: Operation) -> None:
        place = (one.client_id, one.seq, one.commit_seq)
        flags = (one.done, one.payload is not None, one.result is not None)
        row = (one.id, one.target, one.request_id, *place, *flags, encode(one))
        try:
            self._db.execute(statements.OPERATION, row)
        except sqlite3.IntegrityError as error:
            raise reused(one, by_request="request_id" in str(error)) from error

    def _release_payloads(self, session: str, through_commit_seq: int) -> None:
        where = (
            "operations WHERE target = ? AND commit_seq BETWEEN 1 AND ? AND has_payload = 1"
            " AND done = 1"
        )
        for operation in self._all(Operation, where, session, clamp(through_commit_seq)):
            self._put_operation(replace(operation, payload=None))

    def _operations(
        self, target: str, pending_only: bool, after_id: str, limit: int
    ) -> list[Operation]:
        # Those without a commit_seq come last, in order of acceptance.
        order = "commit_seq = 0, commit_seq, number"
        after: tuple[int, int, int] = (0, 0, 0)
        if after_id:
            query = f"SELECT {order} FROM operations WHERE id = ?"
            row = self._db.execute(query, (after_id,)).fetchone()
            if row is None:
                raise unknown_page(after_id)
            after = row
        pending = "AND done = 0" if pending_only else ""
        where = f"operations WHERE target = ? AND ({order}) > (?, ?, ?) {pending}"
        return self._all(Operation, f"{where} ORDER BY {order} LIMIT ?", target, *after, limit)

    def _acknowledge(self, session: str, client_id: str, through_seq: int) -> list[SpoolRef]:
        where = (
            "operations WHERE target = ? AND client_id = ? AND seq <= ? AND has_result = 1"
            " AND done = 1 ORDER BY seq"
        )
        taken = self._all(Operation, where, session, client_id, through_seq)
        lane = "UPDATE lanes SET acked_through = max(acked_through, ?)"
        lane += " WHERE session = ? AND client_id = ?"
        try:
            self._forget(taken, lane, (through_seq, session, client_id))
        except FiretitanError as error:
            if error.reason is not Reason.STATE_DISK_FULL or not self._ballast.release():
                raise
            self._forget(taken, lane, (through_seq, session, client_id))
        return [one.result for one in taken if one.result]

    def _forget(
        self, taken: Iterable[Operation], lane: str, arguments: tuple[int, str, str]
    ) -> None:
        with self._transaction(durable=False):
            for operation in taken:
                self._put_operation(replace(operation, result=None))
            self._db.execute(lane, arguments)

    def _forget_results(self, operation_ids: Sequence[str]) -> list[SpoolRef]:
        found = [self._one(Operation, "operations WHERE id = ?", one) for one in operation_ids]
        taken = [one for one in found if one is not None and one.result is not None]
        with self._transaction(durable=False):
            for operation in taken:
                self._put_operation(replace(operation, result=None, forgotten=True))
        return [one.result for one in taken if one.result]

    def _delete_operations(self, before: Moment) -> int:
        query = (
            "DELETE FROM operations WHERE done = 1 AND client_id = '' AND has_payload = 0"
            f" AND {statements.ENDED_BEFORE}"
        )
        clocks = before.boot_id, before.monotonic_s, before.wall_s
        with self._transaction(durable=False):
            return self._db.execute(query, clocks).rowcount

    def _one(self, kind: type[_T], where: str, *arguments: str | int) -> _T | None:
        row = self._db.execute(f"SELECT body FROM {where}", arguments).fetchone()
        return decode(kind, row[0]) if row else None

    def _all(self, kind: type[_T], where: str, *arguments: str | float | None) -> list[_T]:
        rows = self._db.execute(f"SELECT body FROM {where}", arguments)
        return [decode(kind, body) for (body,) in rows]

    @contextmanager
    def _transaction(self, durable: bool) -> Iterator[None]:
        level = "FULL" if durable or self._fsync_operations else "NORMAL"
        try:
            self._db.execute(f"PRAGMA synchronous = {level}")
            with schema.transaction(self._db):
                yield
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def _failure(self, error: sqlite3.Error | UnreadableRecordError) -> FiretitanError:
        name = getattr(error, "sqlite_errorname", "")
        if name == "SQLITE_FULL":
            return disk_full(self._path.parent)
        if name.startswith(_NOT_WRITABLE):
            return not_writable(self._path, str(error))
        if name.startswith("SQLITE_BUSY"):
            why = "another process has it open; end that first"
        elif isinstance(error, UnreadableRecordError):
            why = f"{error}; save a copy, check the disk, restore a backup or use another home"
        else:
            why = f"{error}; see that the disk is sound and the folder writable"
        return FiretitanError(Reason.INTERNAL, f"the ledger {self._path} cannot be used: {why}")
