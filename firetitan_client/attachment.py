"""The commands of one client id in a session: numbered, sent until accepted, followed to their end.

Knows: headers, request ids, the watch stream and its acknowledgements. Must not know: calls that
are not sent yet, what the user has seen, what commands mean. Belongs to the background loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from firetitan.v1 import command_pb2, operation_pb2, operation_service_pb2

from firetitan_client import forking
from firetitan_client import transport as transports
from firetitan_client.errors import NotFound, Unavailable
from firetitan_client.futures import APIFuture
from firetitan_client.patience import Patience
from firetitan_client.transport import SLICE_S, Transport, iterate

logger = logging.getLogger("firetitan")

_WATCH = "/firetitan.v1.OperationService/WatchOperations"
_LARGE_BYTES = 1 << 20
"""Of a body; a larger one takes as long as the network needs, not one slice."""


@dataclass(frozen=True)
class Place:
    """Where an attached client's commands go."""

    session: str
    epoch: int
    next_seq: int = 1


@dataclass(eq=False)
class Command:
    """One command, from the user's call to its result."""

    method: str
    """`Service/Method`."""
    body: bytes
    """The request's bytes without its header."""
    response: type[Any]
    """Class of the RPC's answer."""
    convert: Callable[[operation_pb2.Operation], Any]
    """Makes the user's result of the finished operation."""
    future: APIFuture[Any]
    seen_failure: int = 0
    """What the user had seen when calling."""
    surfaces: bool = True
    """Whether a failure nobody looked at is raised by the next call."""
    seq: int = 0
    """Place in the lane; 0 until it is sent."""
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    accepted: asyncio.Task[None] | None = None

    @property
    def label(self) -> str:
        """The call, for people."""
        return call_name(self.method)


class Attachment:
    """One client id, attached to a session.

    Args:
        transport: The daemon.
        client_id: Names the lane.
        place: From attaching.
        settled: Told of each command whose operation is done.
        refused: Told of a command that was not accepted; nothing behind it will run.
        lost: Told of why the open commands cannot be followed any more, with them.
        moved: Told whenever there may be room for more.
    """

    def __init__(
        self,
        transport: Transport,
        client_id: str,
        place: Place,
        *,
        settled: Callable[[Attachment, Command, operation_pb2.Operation], None],
        refused: Callable[[Attachment, Command, BaseException], None],
        lost: Callable[[Attachment, list[Command], BaseException], None],
        moved: Callable[[], None],
    ) -> None:
        self.client_id = client_id
        self.place = place
        self._transport = transport
        self._settled, self._refused, self._lost, self._moved = settled, refused, lost, moved
        self._next_seq = place.next_seq
        self._taken_through = place.next_seq - 1
        self._taken: set[int] = set()
        self._open: dict[int, Command] = {}
        self._sending = 0
        self._reader: asyncio.Task[None] | None = None
        self._requests: queue.SimpleQueue[Any] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def num_open(self) -> int:
        """Commands sent and not done."""
        return len(self._open)

    @property
    def num_sending(self) -> int:
        """Commands on their way to the daemon."""
        return self._sending

    def send(self, command: Command) -> None:
        """Give a command the lane's next number and send it until it is accepted."""
        command.seq = self._next_seq
        self._next_seq += 1
        header = command_pb2.CommandHeader(
            session=self.place.session,
            epoch=self.place.epoch,
            client_id=self.client_id,
            seq=command.seq,
            request_id=command.request_id,
            seen_failure=command.seen_failure,
        )
        self._open[command.seq] = command
        self._sending += 1
        payload = _header_field(header.SerializeToString()) + command.body
        command.accepted = self._start(self._send(command, payload))
        command.accepted.add_done_callback(lambda task: self._after_send(command, task))
        if self._reader is None:
            self._reader = self._start(self._follow())

    async def cancel(self, command: Command) -> bool:
        """Cancel a sent command if it has not started."""
        assert command.accepted is not None
        await asyncio.wait([command.accepted])
        if command.future.operation is None or command.seq not in self._open:
            return False
        answer = await self._transport.call(
            "OperationService/CancelOperation",
            operation_service_pb2.CancelOperationRequest(name=command.future.operation),
            operation_service_pb2.CancelOperationResponse,
        )
        if not answer.operation.done:
            return False
        await self._take(answer.operation)
        return command.future.cancelled()

    def drop_behind(self, seq: int) -> list[Command]:
        """Take out the open commands behind a number; they will never run."""
        behind = [self._open.pop(number) for number in sorted(self._open) if number > seq]
        _send_no_more(behind)
        return behind

    def tell_what_may_run(self, error: BaseException, cause: BaseException) -> None:
        """Note in an error that, as nobody answered, what was sent may have arrived."""
        if isinstance(cause, Unavailable):
            error.add_note(
                f"what was sent to {self.place.session} may have been accepted, and then runs: "
                "look at the session's step before you call it again"
            )

    async def _send(self, command: Command, payload: bytes) -> None:
        timeout_s = SLICE_S if len(payload) <= _LARGE_BYTES else None
        answer = await self._transport.call(
            command.method, payload, command.response, timeout_s=timeout_s
        )
        command.future.operation = answer.operation.name
        command.body = b""  # accepted: it is the daemon's now
        if answer.operation.done:
            await self._take(answer.operation)

    def _after_send(self, command: Command, task: asyncio.Task[None]) -> None:
        self._sending -= 1
        error = None if task.cancelled() else task.exception()
        if error is not None and self._open.pop(command.seq, None) is not None:
            self._refused(self, command, error)
        self._moved()

    async def _take(self, operation: operation_pb2.Operation) -> None:
        if operation.seq not in self._open:
            return
        if operation.result_omitted:
            operation = await self._whole(operation)
        command = self._open.pop(operation.seq, None)
        if command is None:
            return
        command.future.operation = operation.name
        self._settled(self, command, operation)
        self._taken.add(operation.seq)
        while self._taken_through + 1 in self._taken:
            self._taken_through += 1
            self._taken.discard(self._taken_through)
        if self._requests is not None:
            self._requests.put(
                operation_service_pb2.WatchOperationsRequest(acked_through=self._taken_through)
            )
        self._moved()

    async def _whole(self, operation: operation_pb2.Operation) -> operation_pb2.Operation:
        """An operation with its result; as it is where the daemon has that no more."""
        try:
            answer = await self._transport.call(
                "OperationService/GetOperation",
                operation_service_pb2.GetOperationRequest(name=operation.name),
                operation_service_pb2.GetOperationResponse,
                timeout_s=None,
            )
        except NotFound:
            return operation
        whole: operation_pb2.Operation = answer.operation
        return whole

    async def _follow(self) -> None:
        """Read results while there are open commands; the stream is renewed every slice."""
        patience = Patience(self._transport)
        try:
            while self._open:
                try:
                    await self._read_stream(patience)
                except grpc.RpcError as error:
                    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                        patience.renew()
                    else:
                        await patience.after(error)
                else:
                    await asyncio.sleep(0.05)
        except Exception as error:  # whatever it is, those who wait have to hear of it
            commands = [self._open.pop(seq) for seq in sorted(self._open)]
            _send_no_more(commands)
            self._lost(self, commands, error)
        finally:
            self._reader = None
            if self._open:
                self._reader = self._start(self._follow())

    async def _read_stream(self, patience: Patience) -> None:
        """One stream to its end; whatever it brings proves that the daemon is there."""
        requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        requests.put(
            operation_service_pb2.WatchOperationsRequest(
                session=self.place.session,
                client_id=self.client_id,
                after_seq=self._taken_through,
                acked_through=self._taken_through,
            )
        )
        rpc = self._transport.channel.stream_stream(
            _WATCH,
            request_serializer=operation_service_pb2.WatchOperationsRequest.SerializeToString,
            response_deserializer=operation_service_pb2.WatchOperationsResponse.FromString,
        )
        call = forking.begin(lambda: rpc(iter(requests.get, None), timeout=SLICE_S))
        self._requests = requests
        try:
            async with contextlib.aclosing(iterate(call)) as responses:
                async for response in responses:
                    patience.renew()
                    await self._take(response.operation)
        finally:
            self._requests = None
            requests.put(None)

    def _start(self, work: Any) -> asyncio.Task[Any]:
        task = transports.loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _send_no_more(commands: list[Command]) -> None:
    """Whoever made them is told that they will not run."""
    for command in commands:
        if command.accepted is not None:
            command.accepted.cancel()


def call_name(method: str) -> str:
    """What users call an RPC: `TrainingService/OptimStep` is `optim_step`."""
    last = method.partition("/")[2]
    if last == "SaveSnapshot":
        return "save_weights_for_sampler"
    return "".join(f"_{one.lower()}" if one.isupper() else one for one in last).lstrip("_")


def _header_field(header: bytes) -> bytes:
    """A serialized CommandHeader as field 1 of any request."""
    length, encoded = len(header), bytearray()
    while length > 0x7F:
        encoded.append(length & 0x7F | 0x80)
        length >>= 7
    encoded.append(length)
    return b"\x0a" + bytes(encoded) + header
