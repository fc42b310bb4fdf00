"""The hot path, whole: admit -> spool -> order -> worker -> settle, for one session.

Knows: the sequencer, the store, the spool, one trainer worker. Must not know: what is in a
payload, how a worker is reached.

A command is accepted once its payload is in the spool and its row in the store; from then on it
runs, whatever becomes of its sender or of this process. Accepted commands run in the order of their
commit_seq, one at a time. After a restart those that are not settled are sent again; the worker
knows which it has run and answers with the stored outcome.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from firetitan_daemon.control.checkpoints import CheckpointManager, Finished, Prepared
from firetitan_daemon.control.codec import Header
from firetitan_daemon.control.services import Services, error_record, internal_error
from firetitan_daemon.core import chain
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.failpoints import failpoint
from firetitan_daemon.core.ports import Change, Command, Outcome, Worker
from firetitan_daemon.core.records import (
    ErrorRecord,
    Lane,
    Operation,
    OperationState,
    Session,
    SessionState,
    SpoolRef,
)
from firetitan_daemon.core.sequencer import Incoming, Replay, SessionSequencer

logger = logging.getLogger("firetitan.commands")
_DISK_RETRY_S = 1.0


class CommandPipeline:
    """One session: its record, its order, its task.

    Owns the session's record and sequencer; both change only under `_lock`, and every row of the
    session, its lanes and its operations is written under it too.
    """

    def __init__(
        self,
        session: Session,
        sequencer: SessionSequencer,
        services: Services,
        checkpoints: CheckpointManager,
    ) -> None:
        self.session = session
        self._sequencer = sequencer
        self._services = services
        self._checkpoints = checkpoints
        self._lock = asyncio.Lock()
        self._ready: deque[str] = deque()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._running: str | None = None
        self._settled = asyncio.Event()
        """Set while nothing is on its way from the worker to the store."""
        self._settled.set()
        self._settled_through = session.commit_seq
        self._worker: Worker | None = None
        self._task: asyncio.Task[None] | None = None
        self._refusal: FiretitanError | None = None
        self._pausing = False
        self._admissions: set[asyncio.Task[Operation]] = set()

    @property
    def current(self) -> Session:
        """The session's record with the highest commit_seq given out."""
        return replace(self.session, commit_seq=self._sequencer.last_commit_seq)

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
        name = self.session.name
        self._services.operations.reserve(name, len(payload))
        try:
            ref = await self._services.spool.write(payload)
            failpoint("commands.spooled")
            try:
                async with self._lock:
                    operation = await self._accept(header, method, ref)
            except BaseException:
                await self._services.spool.remove([ref])
                raise
        finally:
            self._services.operations.release(name, len(payload))
        if operation.payload != ref:
            await self._services.spool.remove([ref])
        failpoint("commands.accepted")
        return operation

    async def _accept(self, header: Header, method: str, ref: SpoolRef) -> Operation:
        name, store = self.session.name, self._services.store
        self._check_open()
        incoming = Incoming(
            operation_id=uuid.uuid4().hex,
            client_id=header.client_id,
            seq=header.seq,
            request_id=header.request_id,
            payload_digest=ref.digest,
            epoch=header.epoch,
        )
        existing = None
        if self._sequencer.taken(header.client_id, header.seq):
            existing = await store.operation_by_seq(name, header.client_id, header.seq)
        decision = self._sequencer.decide(incoming, existing)
        if isinstance(decision, Replay):
            assert existing is not None
            return existing
        operation = Operation(
            id=incoming.operation_id,
            method=method,
            target=name,
            request_id=header.request_id,
            payload_digest=ref.digest,
            state=OperationState.ACCEPTED,
            create_time=self._services.clock.now(),
            client_id=header.client_id,
            seq=header.seq,
            commit_seq=decision.commit_seq,
            epoch=self._sequencer.epoch,
            seen_failure=header.seen_failure,
            payload=ref,
        )
        operations = [operation]
        for commit in decision.commits[1:]:
            held = self._services.operations.current(commit.operation_id)
            assert held is not None
            operations.append(replace(held, commit_seq=commit.commit_seq))
        try:
            await self._services.operations.write(
                Change(operations=operations, lanes=[decision.lane])
            )
        except FiretitanError as error:
            if error.reason is Reason.REQUEST_ID_REUSED:
                other = await store.operation_by_request(name, header.request_id)
                if other is not None:
                    self._sequencer.decide(incoming, other)
            raise
        self._sequencer.admit(decision, self._services.clock.monotonic())
        for commit in decision.commits:
            self._ready.append(commit.operation_id)
        if decision.commits:
            self._idle.clear()
            self._wake.set()
        return operation

    def attach(self, client_id: str) -> Lane:
        """The lane of a client; its `next_seq` is what the next command must carry.

        Raises:
            FiretitanError: INVALID_ARGUMENT, LANE_BROKEN, RECOVERING, CLOSED.
        """
        if self.session.state is not SessionState.LOST:
            self._check_open()
        return self._sequencer.attach(client_id)

    def _check_header(self, header: Header) -> None:
        if header.part or header.parts > 1:
            raise FiretitanError(
                Reason.UNSUPPORTED,
                f"header.parts: {header.parts} parts; a call has to fit one message of "
                f"{self._services.limits.max_message_bytes} bytes, send fewer data a call",
                field="header.parts",
            )

    def _check_open(self) -> None:
        if self._refusal is not None:
            raise self._refusal
        if self.session.state is SessionState.ACTIVE:
            return
        if self.session.state is SessionState.RECOVERING:
            raise FiretitanError(
                Reason.RECOVERING,
                f"{self.session.name}: the daemon restarted and is reaching the worker; "
                "send the command again",
                retry_after_s="0.1",
            )
        if self.session.state is SessionState.LOST:
            raise FiretitanError(
                Reason.SESSION_LOSS,
                f"{self.session.name} lost its worker; create {self._trainer} again with the same "
                "id, open its session and load the last checkpoint",
                session=self.session.name,
            )
        raise FiretitanError(Reason.CLOSED, f"{self.session.name} is closed")

    @property
    def _trainer(self) -> str:
        return f"trainers/{self.session.trainer_id}"

    # -- running -------------------------------------------------------------------------------

    def start(self, worker: Worker) -> None:
        """Begin to run commands on a worker; those not settled are sent again, in order."""
        self._worker, self._pausing = worker, False
        self.session = replace(self.session, state=SessionState.ACTIVE)
        waiting = [
            operation
            for operation in self._services.operations.open_of(self.session.name)
            if operation.commit_seq
        ]
        self._ready = deque(
            operation.id for operation in sorted(waiting, key=lambda one: one.commit_seq)
        )
        self._settled_through = (
            min((operation.commit_seq for operation in waiting), default=0) - 1
            if waiting
            else self._sequencer.last_commit_seq
        )
        if self._ready:
            self._idle.clear()
        self._wake.set()
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(self._report)

    @staticmethod
    def _report(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            internal_error("session task ended", task.exception() or RuntimeError())

    async def _run(self) -> None:
        while True:
            while not self._ready or self._pausing:
                if not self._ready:
                    self._idle.set()
                self._wake.clear()
                await self._wake.wait()
            operation = self._services.operations.current(self._ready.popleft())
            if operation is None:
                continue
            self._running = operation.id
            self._settled.clear()
            try:
                await self._process(operation)
            finally:
                self._running = None
                self._settled.set()
            if self._pausing or not self._ready:
                self._wake.set()

    async def _process(self, operation: Operation) -> None:
        prepared: Prepared | None = None
        try:
            self._check_preceding(operation)
            assert operation.payload is not None
            payload = b""
            if operation.method in ("SaveState", "SaveSnapshot", "LoadState"):
                payload = await self._services.spool.read(operation.payload)
            prepared = await self._checkpoints.prepare(self.session, operation, payload)
            operation = await self._dispatch(operation, prepared)
            outcome = await self._execute(operation, prepared)
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
            await self._succeed(operation, finished)

    def _check_preceding(self, operation: Operation) -> None:
        client_id, seq = operation.client_id, operation.seq
        if self._sequencer.fails_with_preceding(client_id, seq, operation.seen_failure):
            lane = self._sequencer.attach(client_id)
            raise FiretitanError(
                Reason.PRECEDING_FAILED,
                f"{operation.method} (seq {seq}) was not run: seq {lane.failed_seq} before it "
                "failed and its sender had not seen that yet; look at that failure, then go on",
                session=self.session.name,
                failed_seq=str(lane.failed_seq),
            )

    async def _dispatch(self, operation: Operation, prepared: Prepared) -> Operation:
        staging = str(prepared.save.staging) if prepared.save is not None else ""
        dispatched = replace(operation, state=OperationState.DISPATCHED, staging=staging)
        if dispatched != operation:
            async with self._lock:
                await self._services.operations.write(Change(operations=[dispatched]))
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
        try:
            return await self._worker.execute(command)
        except FiretitanError as error:
            if error.reason is not Reason.WORKER_UNAVAILABLE:
                raise
            # The worker is gone: whoever watches it calls `lose`, which ends this task.
            logger.warning("worker gone session=%s op=%s", self.session.name, operation.id)
            self._settled.set()
            await asyncio.Event().wait()
            raise

    # -- settling ------------------------------------------------------------------------------

    async def _succeed(self, operation: Operation, finished: Finished) -> None:
        failpoint("commands.published")
        while True:
            try:
                result = await self._services.spool.write(finished.result)
                failpoint("commands.result_spooled")
                done = replace(
                    operation,
                    state=OperationState.DONE,
                    result=result,
                    payload=None,
                    staging="",
                    finish_time=self._services.clock.now(),
                )
                await self._settle(
                    [done],
                    finished.session,
                    Change(checkpoints=finished.checkpoints, snapshots=finished.snapshots),
                )
                break
            except (FiretitanError, OSError) as error:
                await self._await_space(operation, error)
        failpoint("commands.settled")
        for folder in finished.obsolete:
            await self._services.folders.discard(Path(folder))

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
            session = chain.reset(session)
        failed = replace(
            operation,
            state=OperationState.FAILED,
            error=error,
            payload=None,
            staging="",
            finish_time=self._services.clock.now(),
        )
        own = error.reason != Reason.PRECEDING_FAILED
        while True:
            try:
                await self._settle([failed], session, Change(), own_failure=own)
                break
            except (FiretitanError, OSError) as problem:
                await self._await_space(operation, problem)
        if prepared is not None:
            await self._checkpoints.discard(prepared)

    async def _settle(
        self,
        operations: Sequence[Operation],
        session: Session,
        change: Change,
        *,
        own_failure: bool = False,
    ) -> None:
        async with self._lock:
            commit_seq = max(one.commit_seq for one in operations)
            session = replace(session, commit_seq=max(commit_seq, self.session.commit_seq))
            lanes = []
            if own_failure:
                last = operations[-1]
                lanes = [self._sequencer.record_failure(last.client_id, last.seq)]
            await self._services.operations.write(
                replace(
                    change,
                    operations=operations,
                    sessions=[session],
                    lanes=lanes,
                    durable=bool(change.checkpoints or change.snapshots),
                )
            )
            self.session = session
            self._settled_through = max(self._settled_through, commit_seq)

    async def _await_space(self, operation: Operation, error: FiretitanError | OSError) -> None:
        # The worker has run it: saying that it failed would be wrong, so wait for the disk.
        if isinstance(error, FiretitanError) and error.reason is not Reason.STATE_DISK_FULL:
            raise error
        logger.error("cannot settle op=%s, trying again: %s", operation.id, error)
        await asyncio.sleep(_DISK_RETRY_S)

    # -- cancelling, expiring, losing, closing -------------------------------------------------

    async def cancel(self, operation: Operation) -> Operation:
        """Cancel a command that has not been sent to the worker; others go on."""
        async with self._lock:
            current = self._services.operations.current(operation.id)
            if current is None:
                return await self._services.operations.get(operation.id)
            if current.state is not OperationState.ACCEPTED or current.id == self._running:
                return current
            cancelled = self._ended(
                current,
                OperationState.CANCELLED,
                ErrorRecord(str(Reason.CANCELLED), f"{current.name} was cancelled before it ran"),
            )
            session = replace(
                self.session, commit_seq=max(current.commit_seq, self.session.commit_seq)
            )
            await self._services.operations.write(
                Change(operations=[cancelled], sessions=[session])
            )
            self.session = session
            if not current.commit_seq:
                self._sequencer.cancel(current.client_id, current.seq)
            return cancelled

    async def expire(self) -> None:
        """Close lanes whose missing command is overdue."""
        now, gap_s = self._services.clock.monotonic(), self._services.limits.gap_timeout_s
        due = self._sequencer.next_expiry(gap_s)
        if due is None or due > now:
            return
        async with self._lock:
            for expired in self._sequencer.expired(now, gap_s):
                record = error_record(expired.error)
                held = map(self._services.operations.current, expired.operation_ids)
                failed = [
                    self._ended(one, OperationState.FAILED, record) for one in held if one
                ]
                await self._services.operations.write(
                    Change(operations=failed, lanes=[expired.lane])
                )
                self._sequencer.break_lane(expired.lane.client_id)
                logger.warning(
                    "lane broken session=%s client=%s missing_seq=%d held=%d",
                    self.session.name,
                    expired.lane.client_id,
                    expired.missing_seq,
                    len(failed),
                )

    async def lose(self, cause: str) -> None:
        """The worker is gone: open operations end LOST, a new epoch begins."""
        await self._park()
        await self._stop_task()
        async with self._lock:
            open_operations = self._services.operations.open_of(self.session.name)
            epoch, lanes = self._sequencer.restart()
            error = await self._loss(cause, open_operations)
            lost = [self._ended(one, OperationState.LOST, error) for one in open_operations]
            session = replace(
                chain.reset(self.session),
                state=SessionState.LOST,
                epoch=epoch,
                commit_seq=self._sequencer.last_commit_seq,
            )
            await self._services.operations.write(
                Change(operations=lost, sessions=[session], lanes=lanes, durable=True)
            )
            self.session = session
            self._worker = None
            self._ready.clear()
            self._idle.set()
        logger.error("session lost session=%s cause=%s", session.name, cause)

    async def _loss(self, cause: str, lost: Sequence[Operation]) -> ErrorRecord:
        rows = await self._services.store.checkpoints(self.session.trainer_id)
        own = [row for row in rows if row.session == self.session.name]
        last = max(own, key=lambda row: row.commit_seq, default=None)
        advice = (
            f"load_state_with_optimizer({last.name.rpartition('/')[2]!r}) (step {last.step}), "
            f"then resubmit from step {last.step + 1}"
            if last is not None
            else "start over: no checkpoint was saved"
        )
        step = last.step if last is not None else 0
        hint = f"create {self._trainer} again with the same id and open its session, then {advice}"
        return ErrorRecord(
            str(Reason.SESSION_LOSS),
            f"{self.session.name} lost its weights: {cause}; {len(lost)} commands were not "
            f"finished; {hint}",
            {
                "session": self.session.name,
                "cause": cause,
                "restored_step": str(step),
                "lost_steps": str(max(0, self.session.step - step)),
                "lost_operations": ",".join(one.name for one in lost),
                "hint": hint,
            },
        )

    async def reopen(self, worker: Worker) -> None:
        """Go on after a loss, from the session's first weights, on a new worker."""
        await worker.open_session(self.session)
        async with self._lock:
            session = replace(self.session, state=SessionState.ACTIVE, step=0)
            await self._services.operations.write(Change(sessions=[session], durable=True))
            self.session = session
        self.start(worker)

    async def close(self) -> None:
        """Take no more commands, finish the accepted ones, close the session for good."""
        self._refusal = FiretitanError(Reason.CLOSED, f"{self.session.name} is closed")
        if self._task is not None:
            await self._idle.wait()
        await self._stop_task()
        async with self._lock:
            record = error_record(self._refusal)
            left = [
                self._ended(one, OperationState.FAILED, record)
                for one in self._services.operations.open_of(self.session.name)
            ]
            session = replace(self.session, state=SessionState.CLOSED)
            await self._services.operations.write(
                Change(operations=left, sessions=[session], durable=True)
            )
            self.session = session

    def refuse(self, error: FiretitanError) -> None:
        """Answer every further command with an error; accepted ones go on."""
        self._refusal = error

    async def pause(self, timeout_s: float) -> None:
        """Let the running command end and start no other; the rest stays in the spool."""
        self._pausing = True  # at once, not after the admissions
        if self._admissions:
            await asyncio.wait(self._admissions, timeout=timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                await self._park()
        except TimeoutError:
            logger.warning("still running at exit session=%s", self.session.name)
        await self._stop_task()

    async def _park(self) -> None:
        """Wait until no command is being settled: none runs, or one waits for a dead worker."""
        self._pausing = True
        await self._settled.wait()

    async def _stop_task(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    def _ended(
        self, operation: Operation, state: OperationState, error: ErrorRecord
    ) -> Operation:
        return replace(
            operation,
            state=state,
            error=error,
            payload=None,
            staging="",
            finish_time=self._services.clock.now(),
        )
