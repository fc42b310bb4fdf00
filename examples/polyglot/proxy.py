"""A gRPC proxy in front of a daemon: records what a client says, and gets in its way.

It speaks bytes, so that a request can be compared with its retry bit for bit. Which faults it
injects is fixed, so that two runs of one client see the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import grpc
from firetitan.v1 import (
    checkpoint_service_pb2,
    deployment_service_pb2,
    operation_service_pb2,
    sampling_service_pb2,
    system_service_pb2,
    trainer_service_pb2,
    training_service_pb2,
)
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2

FILES = (
    checkpoint_service_pb2,
    deployment_service_pb2,
    operation_service_pb2,
    sampling_service_pb2,
    system_service_pb2,
    trainer_service_pb2,
    training_service_pb2,
)
BREAKS = {
    "broken_after_two": grpc.StatusCode.UNAVAILABLE,
    # What a daemon that ends leaves of a call it was in the middle of.
    "cancelled_after_two": grpc.StatusCode.CANCELLED,
}
"""How a stream ends behind its second message."""
QUEUE_PAUSE_S = 0.3
"""What the injected QUEUE_FULL asks a client to wait."""

Context = grpc.aio.ServicerContext[bytes, bytes]
UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


@dataclass
class Call:
    """One try of one RPC.

    Attributes:
        method: e.g. "OptimStep".
        at: When it began, seconds of a monotonic clock.
        requests: What the client sent, as bytes, in order.
        responses: What it was sent.
        fault: What the proxy did to it, or "".
        code: How it ended for the client; None while it runs.
    """

    method: str
    request_type: type[Message]
    response_type: type[Message]
    at: float = field(default_factory=time.monotonic)
    requests: list[bytes] = field(default_factory=list)
    responses: list[bytes] = field(default_factory=list)
    fault: str = ""
    code: grpc.StatusCode | None = None

    def sent(self) -> list[Any]:
        """The requests, parsed."""
        return [self.request_type.FromString(data) for data in self.requests]

    def received(self) -> list[Any]:
        """The responses, parsed."""
        return [self.response_type.FromString(data) for data in self.responses]


class Faults:
    """The faults of one run: (method, its how-manieth try) -> what happens."""

    PLAN: ClassVar[dict[tuple[str, int], str]] = {
        ("AttachSession", 1): "unreached",
        ("ForwardBackward", 1): "queue_full",
        ("ForwardBackward", 3): "answer_lost",
        ("OptimStep", 2): "unreached",
        ("OptimStep", 4): "cancelled",
        ("SaveSnapshot", 1): "answer_lost",
        ("HotloadSnapshot", 1): "answer_lost",
        ("WatchOperations", 1): "broken_after_two",
        ("WatchOperations", 2): "cancelled_after_two",
        ("SampleStream", 1): "broken_after_two",
        ("Sample", 1): "answer_lost",
    }

    def __init__(self) -> None:
        self._tries: dict[str, int] = {}

    def next(self, method: str) -> str:
        """What happens to the next try of `method`; "" for nothing."""
        self._tries[method] = self._tries.get(method, 0) + 1
        return self.PLAN.get((method, self._tries[method]), "")


class Proxy(grpc.GenericRpcHandler):
    """Forwards every RPC of the public protocol to `target`; `calls` is what it saw."""

    def __init__(self, target: str) -> None:
        self.calls: list[Call] = []
        self._faults = Faults()
        self._channel = grpc.aio.insecure_channel(target, options=UNLIMITED)
        self._methods = {
            f"/{service.full_name}/{method.name}": method
            for file in FILES
            for service in file.DESCRIPTOR.services_by_name.values()
            for method in service.methods
        }

    def service(self, details: Any) -> Any:
        """The handler of one RPC, by its path; None where the protocol has none."""
        method = self._methods.get(details.method)
        if method is None:
            return None
        path = details.method
        if method.server_streaming:
            return grpc.stream_stream_rpc_method_handler(self._stream(path, method))
        return grpc.unary_unary_rpc_method_handler(self._unary(path, method))

    def _record(self, method: Any) -> Call:
        call = Call(
            method.name, GetMessageClass(method.input_type), GetMessageClass(method.output_type)
        )
        call.fault = self._faults.next(method.name)
        self.calls.append(call)
        return call

    def _unary(self, path: str, method: Any) -> Callable[..., Any]:
        forward: Any = self._channel.unary_unary(path)

        async def handle(request: bytes, context: Context) -> bytes:
            call = self._record(method)
            call.requests.append(request)
            if call.fault == "unreached":
                await _fail(context, call, grpc.StatusCode.UNAVAILABLE)
            if call.fault == "queue_full":
                await _fail(context, call, grpc.StatusCode.RESOURCE_EXHAUSTED, _queue_full())
            try:
                response: bytes = await forward(request, timeout=context.time_remaining())
            except grpc.aio.AioRpcError as error:
                await _pass_on(context, call, error)
            call.responses.append(response)
            if call.fault == "answer_lost":
                await _fail(context, call, grpc.StatusCode.UNAVAILABLE)
            if call.fault == "cancelled":
                await _fail(context, call, grpc.StatusCode.CANCELLED)
            call.code = grpc.StatusCode.OK
            return response

        return handle

    def _stream(self, path: str, method: Any) -> Callable[..., Any]:
        forward: Any = self._channel.stream_stream(path)

        async def handle(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
            call = self._record(method)

            async def recorded() -> AsyncIterator[bytes]:
                async for request in requests:
                    call.requests.append(request)
                    yield request

            upstream = forward(recorded())
            try:
                async for response in upstream:
                    call.responses.append(response)
                    yield response
                    if call.fault in BREAKS and len(call.responses) == 2:
                        # Time for acknowledgements of what was just sent.
                        await asyncio.sleep(0.2)
                        await _fail(context, call, BREAKS[call.fault])
                call.code = grpc.StatusCode.OK
            except grpc.aio.AioRpcError as error:
                await _pass_on(context, call, error)
            finally:
                upstream.cancel()

        return handle


async def _fail(
    context: Context,
    call: Call,
    code: grpc.StatusCode,
    details: Iterable[tuple[str, bytes]] = (),
) -> None:
    call.code = code
    await context.abort(code, "injected", trailing_metadata=tuple(details))


async def _pass_on(context: Context, call: Call, error: grpc.aio.AioRpcError) -> None:
    call.code = error.code()
    trailing = tuple(error.trailing_metadata() or ())
    await context.abort(error.code(), error.details() or "", trailing_metadata=trailing)


def _queue_full() -> Iterable[tuple[str, bytes]]:
    status = status_pb2.Status(code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], message="injected")
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="firetitan.v1")
    )
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(int(QUEUE_PAUSE_S * 1000))
    status.details.add().Pack(retry)
    return [("grpc-status-details-bin", status.SerializeToString())]
