"""One client's order in a session: calls wait here in call order until they are sent.

Knows: the queue, places held by custom losses, which failures the user has seen. Must not know:
what commands mean or what results look like; it takes bytes and gives operations.

A call gets its number when it is sent, so a call that first waits for another (a custom loss)
leaves no hole. `submit`, `hold` and `close` may be called from any thread.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from firetitan.v1 import operation_pb2

from firetitan_client import forking
from firetitan_client import transport as transports
from firetitan_client.attachment import Attachment, Command, Place, call_name
from firetitan_client.errors import (
    ClientClosed,
    FiretitanError,
    InvalidArgument,
    NotFound,
    OperationCancelled,
    PrecedingFailed,
    SessionLost,
    from_status,
)
from firetitan_client.futures import APIFuture
from firetitan_client.transport import Transport, deliver

WINDOW = 32
"""Commands accepted and not done, at most."""
SENDS = 4
"""Commands on their way to the daemon, at most."""
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_HEADER_BYTES = 4096
"""What of a message is left for its header."""
_EXIT_FLUSH_S = 5.0

Convert = Callable[[operation_pb2.Operation], Any]


@dataclass(eq=False)
class Failure:
    """A failed call that the user may not have looked at yet."""

    label: str
    error: BaseException
    attachment: object
    seq: int


@dataclass(eq=False)
class Hold:
    """A place in the queue that its owner fills with as many commands as it needs."""

    lane: Lane
    seen_failure: int = 0
    """What the user had seen when calling."""
    commands: deque[Command] = field(default_factory=deque)
    released: bool = False
    barred: FiretitanError | None = None
    """Why nothing is sent from this place any more; it is in no queue then."""

    def submit(
        self, method: str, body: bytes, response: type[Any], convert: Convert
    ) -> APIFuture[Any]:
        """Send a command from this place, of a closed client too: it was called before.

        Its owner must look at how it ends.
        """
        command = self.lane.make(method, body, response, convert)
        command.surfaces = False
        command.seen_failure = self.seen_failure
        self.lane.enqueue(command, self)
        return command.future

    def forgive(self, future: APIFuture[Any]) -> None:
        """Go on after a failed command of this place, as if it had not been sent."""
        self.lane.forgive(future)

    def fail_behind(self, failure: BaseException) -> None:
        """Fail the calls that are behind this place by now."""
        self.lane.fail_behind(self, failure)

    def release(self) -> None:
        """Let the calls behind go on."""
        self.lane.release(self)


class Lane:
    """A client's lane in one session; opened by the first command.

    Args:
        transport: The daemon.
        attach: Attaches under the given client id; says where that stands.
        name: Makes a client id.
    """

    def __init__(
        self,
        transport: Transport,
        attach: Callable[[str], Awaitable[Place]],
        name: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self._transport = transport
        self._attach = attach
        self._name = name
        self._closed = False
        self._reset()
        forking.on_fork(self)
        _lanes.add(self)

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._queue: deque[Command | Hold] = deque()
        self._places: weakref.WeakKeyDictionary[APIFuture[Any], tuple[Attachment, int]]
        self._places = weakref.WeakKeyDictionary()
        self._failures: list[Failure] = []
        self._seen_failure = 0
        self._forgiven = 0
        self._attachment: Attachment | None = None
        self._former: list[Attachment] = []
        self._opening: asyncio.Task[Place] | None = None
        self._accepted, self._finished = threading.Event(), threading.Event()
        self._accepted.set()
        self._finished.set()

    def _after_fork(self) -> None:
        """In a child: a lane of its own; the parent's commands are the parent's."""
        self._reset()

    # From any thread

    def submit(
        self, method: str, body: bytes, response: type[Any], convert: Convert
    ) -> APIFuture[Any]:
        """Queue a command; returns at once.

        Args:
            method: `Service/Method`.
            body: The request's bytes without its header.
            response: Class of the RPC's answer.
            convert: Makes the user's result of the finished operation.

        Raises:
            FiretitanError: What an earlier call failed with that nobody has looked at; or closed;
                or too large.
        """
        self.raise_unseen()
        self._check_open()
        command = self.make(method, body, response, convert)
        self.enqueue(command)
        return command.future

    def hold(self) -> Hold:
        """Take a place in the queue; whoever takes it must release it.

        Raises:
            FiretitanError: As `submit`.
        """
        self.raise_unseen()
        self._check_open()
        hold = Hold(self)
        self.enqueue(hold)
        return hold

    def raise_unseen(self) -> None:
        """Raise what an earlier call failed with, if nobody has looked at it yet."""
        with self._lock:
            failure = self._failures[0] if self._failures else None
        if failure is not None:
            self.see(failure)
            failure.error.add_note(
                f"raised by the next call on this client, which was not sent: {failure.label} "
                "had failed and nobody had looked at its result"
            )
            raise failure.error

    def make(self, method: str, body: bytes, response: type[Any], convert: Convert) -> Command:
        """A command with its future."""
        if len(body) > MAX_MESSAGE_BYTES - _HEADER_BYTES:
            raise InvalidArgument(
                f"data: this call takes {len(body) / 2**20:.0f} MiB, one call may take "
                f"{MAX_MESSAGE_BYTES // 2**20} MiB; send it in several calls, gradients add up",
                reason="REQUEST_TOO_LARGE",
                field="data",
            )
        future: APIFuture[Any] = APIFuture(call_name(method))
        command = Command(method, body, response, convert, future)
        future._canceller = lambda: self._cancel(command)
        return command

    def enqueue(self, item: Command | Hold, hold: Hold | None = None) -> None:
        """Append in call order, to the queue or to a place in it, and wake the loop."""
        with self._lock:
            if hold is None:
                item.seen_failure = self._seen_failure
                self._queue.append(item)
            elif isinstance(item, Command):
                hold.commands.append(item)
            barred = hold is not None and hold.barred is not None
            if not barred:
                self._accepted.clear()
                self._finished.clear()
        if hold is not None and barred:
            self._end_barred(hold)
            return
        transports.loop().call_soon_threadsafe(self._pump)

    def fail_behind(self, hold: Hold, failure: BaseException) -> None:
        """Fail the calls behind a hold; see `Hold.fail_behind`."""
        self._fail_queued(f"a custom loss ended with {type(failure).__name__}", after=hold)

    def release(self, hold: Hold) -> None:
        """Let the calls behind a hold go on; see `Hold.release`."""
        with self._lock:
            hold.released = True
        transports.loop().call_soon_threadsafe(self._pump)

    def report(self, label: str, error: BaseException, cause: APIFuture[Any] | None) -> Failure:
        """Note a failure that the next call raises unless it is seen before."""
        failure = Failure(label, error, *self._place_of(cause))
        with self._lock:
            self._failures.append(failure)
        return failure

    def see(self, failure: Failure) -> None:
        """The user has been shown a failure."""
        with self._lock:
            if failure in self._failures:
                self._failures.remove(failure)
            if failure.attachment is not None and failure.attachment is self._attachment:
                self._seen_failure = max(self._seen_failure, failure.seq)

    def mark_seen(self, future: APIFuture[Any]) -> None:
        """The user has been shown how a command of a hold ended."""
        if _failed_itself(future):
            error = future.exception(0)
            assert error is not None
            self.see(Failure("", error, *self._place_of(future)))

    def forgive(self, future: APIFuture[Any]) -> None:
        """Count a failed command as seen for whatever is sent from now on, called before or not.

        Only for commands whose failure is another command's beginning: nobody is to hear of it.
        """
        if _failed_itself(future):
            attachment, seq = self._place_of(future)
            with self._lock:
                if attachment is not None and attachment is self._attachment:
                    self._forgiven = max(self._forgiven, seq)

    def _place_of(self, future: APIFuture[Any] | None) -> tuple[Attachment | None, int]:
        """Where a command was sent, by its future; seq 0 where it was not."""
        return self._places.get(future, (None, 0)) if future is not None else (None, 0)

    def wait_accepted(self, timeout_s: float | None = None) -> bool:
        """Wait until the daemon has accepted everything queued."""
        return self._accepted.wait(timeout_s)

    def wait_finished(self, timeout_s: float | None = None) -> bool:
        """Wait until everything queued is done."""
        return self._finished.wait(timeout_s)

    def take_unseen(self) -> list[Failure]:
        """The failures nobody has looked at; they count as seen from here on."""
        if not transports.in_own_thread():
            delivered = threading.Event()  # behind the failures that are on their way
            deliver(delivered.set)
            delivered.wait(_EXIT_FLUSH_S)
        with self._lock:
            unseen = list(self._failures)
        for failure in unseen:
            self.see(failure)
        return unseen

    def close(self) -> None:
        """Refuse further calls; what was queued still runs."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise ClientClosed("this client is closed; create a new one")

    def _cancel(self, command: Command) -> bool:
        with self._lock:
            waiting = command in self._queue
            if waiting:
                self._queue.remove(command)
        if waiting:
            return command.future.finish_cancelled()
        attachment = self._attachment
        if attachment is None or not command.seq or transports.in_own_thread():
            return False
        return transports.run(attachment.cancel(command)).result()

    # On the loop

    def _pump(self) -> None:
        if self._attachment is None:
            # What is still on its way was called before what waits here.
            on_their_way = any(one.num_sending for one in self._former)
            if self._queue and self._opening is None and not on_their_way:
                self._open()
        else:
            attachment = self._attachment
            while attachment.num_sending < SENDS and attachment.num_open < WINDOW:
                command = self._next()
                if command is None:
                    break
                command.seen_failure = max(command.seen_failure, self._forgiven)
                attachment.send(command)
                self._places[command.future] = (attachment, command.seq)
        attachments = [*self._former, *([self._attachment] if self._attachment else [])]
        with self._lock:
            if not self._queue:
                if not any(one.num_sending for one in attachments):
                    self._accepted.set()
                if not any(one.num_open for one in attachments):
                    self._finished.set()
        self._former = [one for one in self._former if one.num_open]

    def _next(self) -> Command | None:
        with self._lock:
            while self._queue:
                head = self._queue[0]
                if isinstance(head, Command):
                    self._queue.popleft()
                    return head
                if head.commands:
                    return head.commands.popleft()
                if not head.released:
                    return None
                self._queue.popleft()
            return None

    def _open(self) -> None:
        client_id = self._name()

        async def attach() -> Place:
            return await self._attach(client_id)

        self._opening = transports.loop().create_task(attach())
        self._opening.add_done_callback(lambda task: self._opened(client_id, task))

    def _opened(self, client_id: str, task: asyncio.Task[Place]) -> None:
        self._opening = None
        error = task.exception()
        if error is not None:
            self._fail_queued("the session could not be reached", error)
        else:
            self._attachment = Attachment(
                self._transport,
                client_id,
                task.result(),
                settled=self._settled,
                refused=self._refused,
                lost=self._lost,
                moved=self._pump,
            )
        self._pump()

    def _settled(
        self, attachment: Attachment, command: Command, operation: operation_pb2.Operation
    ) -> None:
        lost = isinstance(from_status(operation.error), SessionLost)
        if lost and self._attachment is attachment:
            self._leave(attachment, "the session lost work")  # a new epoch: attach again
        deliver(self._finish, command, operation, attachment)

    def _finish(
        self, command: Command, operation: operation_pb2.Operation, owner: Attachment
    ) -> None:
        error: BaseException | None = _error_of(operation)
        if error is None:
            try:
                command.future.finish(command.convert(operation))
            except Exception as broken:  # a tinker that does not fit: whoever waits has to know
                self._fail(command, broken, owner)
            return
        if isinstance(error, OperationCancelled):
            command.future.finish_cancelled()
            return
        self._fail(command, error, owner)

    def _fail(self, command: Command, error: BaseException, owner: object) -> None:
        if command.surfaces and not isinstance(error, PrecedingFailed):
            failure = Failure(command.label, error, owner, command.seq)
            with self._lock:
                self._failures.append(failure)
            command.future._on_seen = lambda: self.see(failure)
        command.future.finish(error=error)

    def _refused(self, attachment: Attachment, command: Command, error: BaseException) -> None:
        """A command was not accepted, so nothing behind it will run: go on under a new id."""
        behind = attachment.drop_behind(command.seq)
        attachment.tell_what_may_run(error, error)
        deliver(self._fail, command, error, attachment)
        for other in behind:
            preceding = _preceding(f"{command.label} was not accepted")
            attachment.tell_what_may_run(preceding, error)
            deliver(self._fail, other, preceding, attachment)
        self._leave(attachment, f"{command.label} was not accepted")

    def _lost(self, attachment: Attachment, commands: list[Command], error: BaseException) -> None:
        attachment.tell_what_may_run(error, error)
        for command in commands:
            deliver(self._fail, command, error, attachment)
        self._leave(attachment, "the session was lost")

    def _leave(self, attachment: Attachment, why: str) -> None:
        if self._attachment is attachment:
            self._former.append(attachment)
            with self._lock:
                self._attachment = None
                self._seen_failure = self._forgiven = 0  # of the lane that was left
        if self._attachment is None:
            self._fail_queued(why)
        self._pump()

    def _fail_queued(
        self, why: str, error: BaseException | None = None, after: Hold | None = None
    ) -> None:
        """Fail what waits in the queue: it was called before the user could know."""
        with self._lock:
            waiting = list(self._queue)
            if after is not None:
                waiting = waiting[waiting.index(after) + 1 :] if after in waiting else []
            for item in waiting:
                self._queue.remove(item)
                if isinstance(item, Hold):
                    item.barred = _preceding(why) if error is None else _as_error(error)
        first = error is not None
        for item in waiting:
            if isinstance(item, Command):
                deliver(self._fail, item, error if first and error else _preceding(why), None)
                first = False
            else:
                self._end_barred(item)

    def _end_barred(self, hold: Hold) -> None:
        """End what was to be sent from a place that is left."""
        with self._lock:
            commands, hold.commands = hold.commands, deque()
        for command in commands:
            deliver(command.future.finish, None, hold.barred)


def _error_of(operation: operation_pb2.Operation) -> FiretitanError | None:
    """What a done operation failed with; that it has no result is no empty one."""
    if operation.HasField("error"):
        return from_status(operation.error)
    if operation.WhichOneof("result") is not None:
        return None
    return NotFound(
        f"{operation.name}: this {operation.method} was carried out, but the daemon does not have "
        "its result any more; what it did stands",
        reason="OPERATION_NOT_FOUND",
        metadata={"operation": operation.name},
    )


def _failed_itself(future: APIFuture[Any]) -> bool:
    if not future.done() or future.cancelled():
        return False
    error = future.exception(0)
    return error is not None and not isinstance(error, PrecedingFailed)


def _preceding(why: str) -> PrecedingFailed:
    return PrecedingFailed(f"not run: {why}; look at that error, then call this again")


def _as_error(error: BaseException) -> FiretitanError:
    return error if isinstance(error, FiretitanError) else PrecedingFailed(str(error))


_lanes: weakref.WeakSet[Lane] = weakref.WeakSet()


def _flush_at_exit() -> None:
    deadline = time.monotonic() + _EXIT_FLUSH_S
    for lane in list(_lanes):
        lane.wait_accepted(max(0.0, deadline - time.monotonic()))


transports.at_exit(_flush_at_exit)
