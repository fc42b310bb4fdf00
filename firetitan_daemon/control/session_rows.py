"""One session's record, order and rows: what is accepted, begun, settled, cancelled, lost.

Knows: the sequencer, the store. Must not know: payloads, workers, how a command runs.

Everything here happens under one lock: a row of the session, of its lanes or of its operations is
never written from a state that another write has just changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from firetitan_daemon.control.codec import Header
from firetitan_daemon.control.services import Services, error_record
from firetitan_daemon.core import chain
from firetitan_daemon.core.errors import FiretitanError, Reason
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
from firetitan_daemon.core.recovery import pending_backwards
from firetitan_daemon.core.sequencer import Admit, Incoming, Replay, SessionSequencer

logger = logging.getLogger("firetitan.sessions")


@dataclass(frozen=True)
class Accepted:
    """A command's operation, and what can run now that it is there."""

    operation: Operation
    runnable: Sequence[str] = ()
    """Ids of operations, in order."""


class SessionRows:
    """Owns a session's record and its sequencer.

    That its worker is away is no part of the record: no write that began before may undo it.
    """

    def __init__(self, session: Session, sequencer: SessionSequencer, services: Services) -> None:
        self._suspended = session.state is SessionState.RECOVERING
        self._stored = replace(session, state=SessionState.ACTIVE) if self._suspended else session
        self._served = asyncio.Event()
        """Set unless it waits for a worker."""
        if not self._suspended:
            self._served.set()
        self._sequencer = sequencer
        self._services = services
        self._lock = asyncio.Lock()
        self._begun: str | None = None
        """The command that was begun last, or that may be in the worker already."""
        self._cancelling: str | None = None
        """The command whose cancellation is being written."""

    @property
    def session(self) -> Session:
        """The record as it is stored, but RECOVERING while the session waits for a worker."""
        if self._suspended and self._stored.state is SessionState.ACTIVE:
            return replace(self._stored, state=SessionState.RECOVERING)
        return self._stored

    def suspend(self) -> None:
        """Its worker is away."""
        self._suspended = True
        self._served.clear()

    def resume(self, begun: str | None) -> None:
        """It has a worker.

        Args:
            begun: The command that may be in it already.
        """
        self._suspended, self._begun = False, begun
        self._served.set()

    async def wait_served(self, timeout_s: float) -> None:
        """Wait for its worker; one that is lost or closed waits for none."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._served.wait()

    @property
    def current(self) -> Session:
        """The session's record with the highest commit_seq given out."""
        return replace(self.session, commit_seq=self._sequencer.last_commit_seq)

    def check_open(self) -> None:
        """Refuse a command where the session's state takes none.

        Raises:
            FiretitanError: RECOVERING, SESSION_LOSS, CLOSED.
        """
        name, trainer = self.session.name, f"trainers/{self.session.trainer_id}"
        if self.session.state is SessionState.RECOVERING:
            raise FiretitanError(
                Reason.RECOVERING,
                f"{name}: its worker is being reached or replaced; send the command again",
                retry_after_s="0.1",
            )
        if self.session.state is SessionState.LOST:
            raise FiretitanError(
                Reason.SESSION_LOSS,
                f"{name} lost its worker; create {trainer} again with the same id, open its "
                "session and load the last checkpoint",
                session=name,
            )
        if self.session.state is SessionState.CLOSED:
            raise self.closed()

    def closed(self) -> FiretitanError:
        """The answer to commands of a session that is, or is being, closed."""
        return FiretitanError(Reason.CLOSED, f"{self.session.name} is closed")

    def attach(self, client_id: str) -> Lane:
        """The lane of a client.

        Raises:
            FiretitanError: INVALID_ARGUMENT, LANE_BROKEN.
        """
        return self._sequencer.attach(client_id)

    def awaits(self, client_id: str, seq: int) -> bool:
        """Whether held commands of a lane wait for this one."""
        return self._sequencer.awaits(client_id, seq)

    def open_operations(self) -> list[Operation]:
        """Accepted and not done."""
        return self._services.operations.open_of(self.session.name)

    def check_preceding(self, operation: Operation) -> None:
        """Refuse to run a command behind a failure its sender had not seen.

        Raises:
            FiretitanError: PRECEDING_FAILED.
        """
        client_id, seq = operation.client_id, operation.seq
        if self._sequencer.fails_with_preceding(client_id, seq, operation.seen_failure):
            failed_seq = self._sequencer.lane(client_id).failed_seq
            raise FiretitanError(
                Reason.PRECEDING_FAILED,
                f"{operation.method} (seq {seq}) was not run: seq {failed_seq} before it "
                "failed and its sender had not seen that yet; look at that failure, then go on",
                session=self.session.name,
                failed_seq=str(failed_seq),
            )

    async def accept(
        self, header: Header, method: str, ref: SpoolRef, check: Callable[[], None]
    ) -> Accepted:
        """Write a command's row; a repeat is answered by the operation it made before.

        Args:
            header: Its place.
            method: The RPC's name.
            ref: Its payload.
            check: Raises where nothing may be accepted any more.

        Raises:
            FiretitanError: INVALID_ARGUMENT, SEQ_REUSED, REQUEST_ID_REUSED, LANE_BROKEN,
                SESSION_RESTARTED, STATE_DISK_FULL.
        """
        async with self._lock:
            check()
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
                existing = await self._services.store.operation_by_seq(
                    self.session.name, header.client_id, header.seq
                )
            decision = self._sequencer.decide(incoming, existing)
            if isinstance(decision, Replay):
                assert existing is not None
                return Accepted(existing)
            operation = self._new_operation(decision, header, method, ref)
            await self._write_accepted(operation, decision)
            self._sequencer.admit(decision, self._services.clock.monotonic())
            return Accepted(operation, [one.operation_id for one in decision.commits])

    def _new_operation(
        self, decision: Admit, header: Header, method: str, ref: SpoolRef
    ) -> Operation:
        return Operation(
            id=decision.command.operation_id,
            method=method,
            target=self.session.name,
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

    async def _write_accepted(self, operation: Operation, decision: Admit) -> None:
        operations = [operation]
        for commit in decision.commits[1:]:
            held = self._services.operations.current(commit.operation_id)
            assert held is not None, "a held command is open"
            operations.append(replace(held, commit_seq=commit.commit_seq))
        try:
            await self._services.operations.write(
                Change(operations=operations, lanes=[decision.lane])
            )
        except FiretitanError as error:
            if error.reason is Reason.REQUEST_ID_REUSED:
                other = await self._services.store.operation_by_request(
                    operation.target, operation.request_id
                )
                if other is not None:
                    # Says which operation has the id.
                    self._sequencer.decide(decision.command, other)
            raise

    async def begin(self, operation_id: str) -> Operation | None:
        """The command whose turn it is: it is not cancelled any more; None where it was before."""
        self._begun = operation_id
        if operation_id == self._cancelling:
            async with self._lock:
                pass  # that came first, and is written now
        return self._services.operations.current(operation_id)

    async def write_operation(self, operation: Operation) -> None:
        """Write an operation that is not done yet."""
        async with self._lock:
            await self._services.operations.write(Change(operations=[operation]))

    async def settle(
        self,
        operation: Operation,
        session: Session,
        change: Change,
        *,
        own_failure: bool = False,
    ) -> None:
        """Write an operation's end and all that changes with it, in one transaction.

        Args:
            operation: Done.
            session: The session after it.
            change: Its checkpoint or snapshot.
            own_failure: It failed by itself: those behind it in its lane fail too.
        """
        async with self._lock:
            session = self._reached(session, operation.commit_seq)
            lanes = []
            if own_failure:
                lanes = [self._sequencer.record_failure(operation.client_id, operation.seq)]
            await self._services.operations.write(
                replace(
                    change,
                    operations=[operation],
                    sessions=[session],
                    lanes=lanes,
                    durable=bool(change.checkpoints or change.snapshots),
                )
            )
            self._stored = session

    async def cancel(self, operation_id: str) -> Operation:
        """Cancel a command that was not begun; one that was goes on."""
        async with self._lock:
            found = self._services.operations.current(operation_id)
            if found is None:
                return await self._services.operations.get(operation_id)
            if found.state is not OperationState.ACCEPTED or found.id == self._begun:
                return found
            error = ErrorRecord(str(Reason.CANCELLED), f"{found.name} was cancelled before it ran")
            cancelled = self.ended(found, OperationState.CANCELLED, error)
            session = self._reached(self._stored, found.commit_seq)
            self._cancelling = found.id
            try:
                await self._services.operations.write(
                    Change(operations=[cancelled], sessions=[session])
                )
            finally:
                self._cancelling = None
            self._stored = session
            if not found.commit_seq:
                self._sequencer.cancel(found.client_id, found.seq)
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
                failed = [self.ended(one, OperationState.FAILED, record) for one in held if one]
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

    def wait_anew(self) -> None:
        """Give missing commands their whole time again: those that came were refused."""
        self._sequencer.wait_anew(self._services.clock.monotonic())

    async def lose(self, cause: str) -> None:
        """The worker is gone: open operations end LOST, a new epoch begins."""
        async with self._lock:
            if self._stored.state is not SessionState.ACTIVE:
                return  # closed meanwhile, or lost before: this is a repeat
            # Those without a commit_seq wait for an earlier one of their lane.
            left = sorted(
                self.open_operations(), key=lambda one: (not one.commit_seq, one.commit_seq)
            )
            epoch, lanes = self._sequencer.restarted()
            error = await self._loss(cause, left)
            session = replace(
                chain.reset(self._stored),
                state=SessionState.LOST,
                origin_commit_seq=self._sequencer.last_commit_seq,
                epoch=epoch,
                commit_seq=self._sequencer.last_commit_seq,
            )
            await self._services.operations.write(
                Change(
                    operations=[self.ended(one, OperationState.LOST, error) for one in left],
                    sessions=[session],
                    lanes=lanes,
                    durable=True,
                )
            )
            self._sequencer.restart()
            self._stored = session
            self._served.set()
        logger.error("session lost session=%s cause=%s", session.name, cause)

    async def _loss(self, cause: str, lost: Iterable[Operation]) -> ErrorRecord:
        rows = await self._services.store.checkpoints(self.session.trainer_id)
        own = [row for row in rows if row.session == self.session.name]
        last = max(own, key=lambda row: row.commit_seq, default=None)
        step, held, advice = 0, self.session.origin_commit_seq, "start over: none was saved"
        if last is not None:
            step, held, name = last.step, last.commit_seq, last.name.rpartition("/")[2]
            advice = (
                f"load_state_with_optimizer({name!r}) (step {step}), "
                f"then resubmit from step {step + 1}"
            )
        hint = (
            f"create trainers/{self.session.trainer_id} again with the same id and open its "
            f"session, then {advice}"
        )
        names = [one.name for one in lost]
        gone = await self._services.store.done_operations(self.session.name, held)
        return ErrorRecord(
            str(Reason.SESSION_LOSS),
            f"{self.session.name} lost its weights: {cause}; {len(names)} commands were not "
            f"finished; {hint}",
            {
                "session": self.session.name,
                "cause": cause,
                "restored_step": str(step),
                "restored_from": last.name if last is not None else "",
                "lost_steps": str(max(0, self.session.step - step)),
                "lost_backwards": str(pending_backwards(gone)),
                "lost_operations": ",".join(names),
                "hint": hint,
            },
        )

    async def cut_chain(self) -> None:
        """The worker does not hold the last snapshot: the next one is a base."""
        async with self._lock:
            session = chain.cut(self._stored)
            if session != self._stored:
                await self._services.operations.write(Change(sessions=[session]))
                self._stored = session

    async def restart(self) -> None:
        """After a loss: ready again, at step 0.

        Raises:
            FiretitanError: CLOSED where it was closed meanwhile; STATE_DISK_FULL.
        """
        async with self._lock:
            if self._stored.state is SessionState.CLOSED:
                raise self.closed()
            session = replace(self._stored, state=SessionState.ACTIVE, step=0)
            await self._services.operations.write(Change(sessions=[session], durable=True))
            self._stored = session

    async def close(self) -> None:
        """Closed for good; what is still open ends with an error."""
        async with self._lock:
            record = error_record(self.closed())
            left = [
                self.ended(one, OperationState.FAILED, record) for one in self.open_operations()
            ]
            # Lanes go on behind what was held: whoever watches one waits for no gap.
            _, lanes = self._sequencer.restarted()
            session = replace(self._stored, state=SessionState.CLOSED)
            await self._services.operations.write(
                Change(operations=left, sessions=[session], lanes=lanes, durable=True)
            )
            self._sequencer.restart()
            self._stored = session
            self._served.set()

    def ended(
        self, operation: Operation, state: OperationState, error: ErrorRecord | None
    ) -> Operation:
        """The operation in a final state."""
        return replace(
            operation,
            state=state,
            error=error,
            payload=None,
            staging="",
            loaded=None,
            finish_time=self._services.clock.now(),
        )

    def _reached(self, session: Session, commit_seq: int) -> Session:
        # Its state is none of a command's.
        return replace(
            session,
            state=self._stored.state,
            commit_seq=max(commit_seq, self._stored.commit_seq),
        )
