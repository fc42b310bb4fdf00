"""The hot path, whole: admit -> spool -> order -> worker -> settle, for one session.

Knows: the spool, the session's rows, one trainer worker. Must not know: what is in a payload, how a
worker is reached.

A command is accepted once its payload is in the spool and its row in the store; from then on it
runs, whatever becomes of its sender or of this process. Accepted commands run in the order of their
commit_seq, one at a time. After a restart those that are not settled are sent again; the worker
knows which it has run and answers with the stored outcome.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from firetitan_daemon.control.checkpoints import CheckpointManager, Finished, Prepared
from firetitan_daemon.control.codec import Header
from firetitan_daemon.control.holds import discard
from firetitan_daemon.control.recovery import MAX_DEATHS, SessionRecovery
from firetitan_daemon.control.services import (
    DISK_TROUBLE,
    Services,
    error_record,
    internal_error,
    when_there_is_space,
)
from firetitan_daemon.control.session_rows import SessionRows
from firetitan_daemon.core import chain
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.failpoints import failpoint
from firetitan_daemon.core.ports import Change
from firetitan_daemon.core.records import (
    ErrorRecord,
    Lane,
    Operation,
    OperationState,
    Session,
    SessionState,
    SpoolRef,
)
from firetitan_daemon.core.sequencer import SessionSequencer
from firetitan_daemon.core.worker_ports import Command, Outcome, Worker

logger = logging.getLogger("firetitan.commands")
_DISK_RETRY_S = 1.0
_READS_PAYLOAD = ("SaveState", "SaveSnapshot", "LoadState", "LoadAdapter")


class CommandPipeline:
    """One session: its queue and the task that runs its commands.

    Owns the order of what can run; the rows are `SessionRows`'.
    """

    def __init__(
        self,
        session: Session,
        sequencer: SessionSequencer,
        services: Services,
        checkpoints: CheckpointManager,
    ) -> None:
        self._rows = SessionRows(session, sequencer, services)
        self.recovery = SessionRecovery(session.name, services)
        self._services = services
        self._checkpoints = checkpoints
        self._ready: deque[str] = deque()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._settled = asyncio.Event()
        """Set while nothing is on its way from the worker to the store."""
        self._settled.set()
        self._settled_through = session.commit_seq
        self._worker: Worker | None = None
        self._ended_in: Operation | None = None
        """The command that the worker was running when it ended."""
        self._task: asyncio.Task[None] | None = None
        self._refusal: FiretitanError | None = None
        self._closing, self._pausing = False, False
        self.broken = False  # its task died of what nobody foresaw
        self._admissions: set[asyncio.Task[Operation]] = set()

    @property
    def session(self) -> Session:
        """The session's record as it is stored, but RECOVERING while it waits for a worker."""
        return self._rows.session

    @property
    def current(self) -> Session:
        """The session's record with the highest commit_seq given out."""
        return self._rows.current

    @property
    def busy(self) -> bool:
        """Whether commands are being accepted, wait or run."""
        return bool(self._admissions or self._rows.open_operations())

    # -- admission -----------------------------------------------------------------------------

    async def submit(self, header: Header, method: str, payload: bytes) -> Operation:
        """Accept a command; a repeat is answered by the operation it made before.

        Raises:
            FiretitanError: INVALID_ARGUMENT, SEQ_REUSED, REQUEST_ID_REUSED, LANE_BROKEN,
                SESSION_RESTARTED, QUEUE_FULL, STATE_DISK_FULL, RECOVERING, SESSION_LOSS, CLOSED.
        """
        self._check_header(header)
        self._check_open()
        # A sender that goes away must not leave a command half accepted.
        admission = asyncio.create_task(self._admit(header, method, payload))
        self._admissions.add(admission)
        admission.add_done_callback(self._admissions.discard)
        return await asyncio.shield(admission)

    async def _admit(self, header: Header, method: str, payload: bytes) -> Operation:
        target, spool = self.session.name, self._services.spool
        needed = self._rows.awaits(header.client_id, header.seq)
        self._services.operations.reserve(target, len(payload), needed=needed)
        try:
            ref = await spool.write(payload)
            failpoint("commands.spooled")
            try:
                accepted = await self._rows.accept(header, method, ref, self._check_open)
            except BaseException:
                await spool.remove([ref])
                raise
        finally:
            self._services.operations.release(target, len(payload))
        if accepted.operation.payload != ref:
            await spool.remove([ref])
        failpoint("commands.accepted")
        if accepted.runnable:
            self._ready.extend(accepted.runnable)
            self._idle.clear()
            self._wake.set()
        return accepted.operation

    def attach(self, client_id: str) -> Lane:
        """The lane of a client; its `next_seq` is what the next command must carry.

        Raises:
            FiretitanError: INVALID_ARGUMENT, LANE_BROKEN, RECOVERING, CLOSED.
        """
        if self.session.state is not SessionState.LOST:
            self._check_open()
        return self._rows.attach(client_id)

    def _check_header(self, header: Header) -> None:
        if header.part or header.parts > 1:
            raise FiretitanError(
                Reason.UNSUPPORTED,
                f"header.parts: {header.parts} parts; a call has to fit one message of "
                f"{self._services.limits.max_message_bytes} bytes, send fewer data a call",
                field="header.parts",
            )

    def _check_open(self) -> None:
        if self._closing:
            raise self._rows.closed()
        if self._refusal is not None:
            raise self._refusal
        self._rows.check_open()

    # -- running -------------------------------------------------------------------------------

    def start(self, worker: Worker) -> None:
        """Begin to run commands on a worker; those not settled are sent again, in order."""
        self._worker, self._pausing, self.broken = worker, False, False
        waiting = sorted(
            (one for one in self._rows.open_operations() if one.commit_seq),
            key=lambda one: one.commit_seq,
        )
        self._ready = deque(one.id for one in waiting)
        # One command at a time is in the worker, so only the first may be there already.
        self._rows.resume(begun=waiting[0].id if waiting else None)
        self._settled_through = waiting[0].commit_seq - 1 if waiting else self.current.commit_seq
        if self._ready:
            self._idle.clear()
        self._wake.set()
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(self._report)

    def _report(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            # Better no more commands than commands out of order.
            self._refusal = internal_error(f"{self.session.name} stopped", error)
            self.broken = True
            self._idle.set()  # it can be closed

    async def _run(self) -> None:
        while True:
            while not self._ready or self._pausing:
                if not self._ready:
                    self._idle.set()
                self._wake.clear()
                await self._wake.wait()
            operation = await self._rows.begin(self._ready.popleft())
            if operation is None:
                continue
            self._settled.clear()
            try:
                await self._process(operation)
            finally:
                self._settled.set()
            if self._pausing or not self._ready:
                self._wake.set()

    async def _process(self, operation: Operation) -> None:
        prepared: Prepared | None = None
        try:
            self._rows.check_preceding(operation)
            assert operation.payload is not None
            while not await self._services.spool.there():
                # Its payload is not damaged, only away.
                logger.error("the spool is gone, waiting for it op=%s", operation.id)
                await asyncio.sleep(_DISK_RETRY_S)
            reads = operation.method in _READS_PAYLOAD
            payload = await self._services.spool.read(operation.payload) if reads else b""
            prepared = await self._checkpoints.prepare(self.session, operation, payload)
            operation = await self._dispatch(operation, prepared)
            started = self._services.clock.monotonic()
            outcome = await self._execute(operation, prepared)
            seconds = self._services.clock.monotonic() - started
            failpoint("commands.applied")
            if outcome.error is not None:
                await self._fail(operation, outcome.error, prepared)
                return
            finished = await self._checkpoints.finish(self.session, operation, prepared, outcome)
        except FiretitanError as error:
            await self._fail(operation, error_record(error), prepared)
        except Exception as error:  # one command's unforeseen failure must not end the session
            record = error_record(internal_error(f"{operation.method} {operation.name}", error))
            await self._fail(operation, record, prepared)
        else:
            done = await self._succeed(operation, prepared, outcome, finished)
            state_bytes = outcome.session.state_bytes if outcome.session is not None else 0
            await self.recovery.ran(done, seconds, state_bytes)
            assert self._worker is not None
            await self.recovery.make_point(self._worker, done)

    async def _dispatch(self, operation: Operation, prepared: Prepared) -> Operation:
        """Note where a save writes and what a load reads, so that the next daemon can finish it.

        Others need no row for it: after a restart the first open command counts as sent.
        """
        dispatched = replace(operation, state=OperationState.DISPATCHED)
        if prepared.save is not None:
            dispatched = replace(dispatched, staging=str(prepared.save.staging))
            await self._rows.write_operation(dispatched)
        elif prepared.load is not None:
            dispatched = replace(dispatched, loaded=prepared.loaded)
            await self._rows.write_operation(dispatched)
        failpoint("commands.dispatched")
        return dispatched

    async def _execute(self, operation: Operation, prepared: Prepared) -> Outcome:
        assert self._worker is not None and operation.payload is not None
        command = Command(
            session=self.session.name,
            commit_seq=operation.commit_seq,
            request_id=operation.request_id,
            method=operation.method,
            payload=operation.payload,
            save=prepared.save,
            load=prepared.load,
            settled_through=self._settled_through,
            client_id=operation.client_id,
            seq=operation.seq,
        )
        alive = self._worker.alive
        try:
            return await self._worker.execute(command)
        except FiretitanError as error:
            if error.reason is not Reason.WORKER_UNAVAILABLE:
                raise
            # The worker is gone: whoever watches it calls `suspend` or `lose`: that ends this task.
            logger.warning("worker gone session=%s op=%s", self.session.name, operation.id)
            self._ended_in = operation if alive else None  # then it was not sent
            self._settled.set()
            await asyncio.Event().wait()
            raise

    # -- settling ------------------------------------------------------------------------------

    async def _succeed(
        self, operation: Operation, prepared: Prepared, outcome: Outcome, finished: Finished
    ) -> Operation:
        failpoint("commands.published")
        change = Change(checkpoints=finished.checkpoints, snapshots=finished.snapshots)
        result: SpoolRef | None = None
        while True:
            try:
                result = result or await self._services.spool.write(finished.result)
                failpoint("commands.result_spooled")
                ended = self._rows.ended(operation, OperationState.DONE, None)
                done = self.recovery.keep(operation, replace(ended, result=result), outcome)
                await self._rows.settle(done, finished.session, change)
                self._checkpoints.settled(change.checkpoints, change.snapshots)
                break
            except (FiretitanError, OSError) as error:
                await self._await_space(operation, error)
        self._settled_through = operation.commit_seq
        failpoint("commands.settled")
        await self._retire(finished.obsolete)
        return done

    async def _fail(
        self, operation: Operation, error: ErrorRecord, prepared: Prepared | None
    ) -> None:
        logger.info(
            "command failed session=%s seq=%d commit_seq=%d method=%s reason=%s",
            operation.target,
            operation.seq,
            operation.commit_seq,
            operation.method,
            error.reason,
        )
        session = self.session
        if operation.method == "SaveSnapshot" and prepared is not None:
            # In doubt what the worker holds as the last one: the next stands alone.
            session = chain.reset(session)
        failed = self._rows.ended(operation, OperationState.FAILED, error)
        own = error.reason != Reason.PRECEDING_FAILED
        while True:
            try:
                await self._rows.settle(failed, session, Change(), own_failure=own)
                break
            except (FiretitanError, OSError) as problem:
                await self._await_space(operation, problem)
        self._settled_through = operation.commit_seq
        if prepared is not None:
            await self._retire(prepared.obsolete)
            if prepared.save is not None:
                await discard(self._services.folders, prepared.save.staging)

    async def _retire(self, folders: Iterable[str]) -> None:
        for folder in folders:
            await self._services.operations.holds.retire(Path(folder), self._services.folders)

    async def _await_space(self, operation: Operation, error: FiretitanError | OSError) -> None:
        # The worker has run it: saying that it failed would be wrong, so wait for the disk.
        if isinstance(error, FiretitanError) and error.reason not in DISK_TROUBLE:
            raise error
        logger.error("cannot settle op=%s, trying again: %s", operation.id, error)
        await asyncio.sleep(_DISK_RETRY_S)

    # -- cancelling, expiring, losing, closing -------------------------------------------------

    async def cancel(self, operation: Operation) -> Operation:
        """Cancel a command that has not been sent to the worker; others go on.

        Raises:
            FiretitanError: RECOVERING while it is not known what was sent.
        """
        if self.session.state is SessionState.RECOVERING:
            self._check_open()
        return await self._rows.cancel(operation.id)

    async def expire(self) -> None:
        """Close lanes whose missing command is overdue, not for want of what was refused."""
        try:
            self._check_open()
        except FiretitanError:
            self._rows.wait_anew()
        else:
            await self._rows.expire()

    async def suspend(self) -> None:
        """The worker is gone and another is wanted: commands wait, new ones answer RECOVERING."""
        self._rows.suspend()
        await self._leave_worker()
        ended_in, self._ended_in = self._ended_in, None
        found = self._services.operations.current(ended_in.id) if ended_in is not None else None
        if found is None:
            return
        found = replace(found, deaths=found.deaths + 1)
        logger.error("worker ended in op=%s method=%s", found.id, found.method)
        if found.deaths < MAX_DEATHS:
            await when_there_is_space(found.name, lambda: self._rows.write_operation(found))
            return
        poison = FiretitanError(
            Reason.POISON_COMMAND,
            f"{found.method} {found.name}: {found.deaths} workers ended while they ran it, so it "
            "is not given to another; the session goes on without it",
            deaths=str(found.deaths),
        )
        await self._fail(found, error_record(poison), None)
        if found.staging:
            await discard(self._services.folders, Path(found.staging))

    async def resume(self, worker: Worker, *, exact: bool) -> None:
        """Go on with a worker: bring it to where the session was, then run what waits.

        Args:
            worker: A former daemon's, or a new one with the model loaded.
            exact: Whether a replay must come out bit for bit.

        Raises:
            FiretitanError: SESSION_LOSS where the session cannot be brought back, and why;
                WORKER_UNAVAILABLE where the worker ended meanwhile.
        """
        if not await self.recovery.rebuild(worker, self.session, exact=exact):
            await when_there_is_space(self.session.name, self._rows.cut_chain)
        failpoint("recovery.restored")
        self.start(worker)

    async def lose(self, cause: str) -> None:
        """The worker is gone for good: open operations end LOST, a new epoch begins."""
        await self._leave_worker()
        self._ended_in = None
        await self._rows.lose(cause)
        await self.recovery.drop()

    async def _leave_worker(self) -> None:
        await self._park()
        await self._stop_task()
        await self.recovery.interrupt()
        self._worker = None
        self._ready.clear()
        self._idle.set()

    async def reopen(self, worker: Worker) -> None:
        """After a loss, make ready to start at the session's first weights on a new worker."""
        # A daemon that died in the loss left what the lost weights could be rebuilt from.
        await self.recovery.drop()
        await worker.open_session(self.session)
        await self._rows.restart()

    async def close(self) -> None:
        """Take no more commands, finish the accepted ones, close the session for good."""
        await self._finish()
        await self._stop_task()
        await self._rows.close()
        await self.recovery.drop()

    async def _finish(self) -> None:
        """Take no more commands; returns once those accepted have run, or none can any more."""
        self._closing = True
        if self._task is not None and not self._task.done():
            await self._idle.wait()

    async def unload(self, wait_s: float) -> None:
        """As `close`, and free the session in its worker, which goes on with its others.

        Args:
            wait_s: For a worker that is being started or replaced.

        Raises:
            FiretitanError: RECOVERING where it still is.
        """
        await self._rows.wait_served(wait_s)
        if self.session.state is SessionState.RECOVERING:
            self._check_open()
        worker = self._worker
        await self._finish()
        if self.session.state is SessionState.RECOVERING:
            # The worker ended: what was accepted runs in the next one before this is asked again.
            self._closing = False
            self._check_open()
        await self.close()
        if worker is not None:
            try:
                await worker.close_session(self.session.name)
            except FiretitanError as error:
                if error.reason is not Reason.WORKER_UNAVAILABLE:  # gone, and the session with it
                    raise

    def refuse(self, error: FiretitanError) -> None:
        """Answer every further command with an error; accepted ones go on."""
        self._refusal = error

    async def pause(self, timeout_s: float) -> None:
        """Let the running command end and start no other; the rest stays in the spool."""
        self._pausing = True  # at once, not after the admissions
        try:
            async with asyncio.timeout(timeout_s):
                if self._admissions:
                    await asyncio.wait(self._admissions)
                await self._park()
        except TimeoutError:
            logger.warning("still running at exit session=%s", self.session.name)
        await self._stop_task()
        await self.recovery.interrupt()

    async def _park(self) -> None:
        """Wait until no command is being settled: none runs, or one waits for a dead worker."""
        self._pausing = True
        await self._settled.wait()

    async def _stop_task(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
