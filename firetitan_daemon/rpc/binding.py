"""Binds a servicer's methods to its service: parsing, errors, commands as raw bytes.

Knows: descriptors, grpc.aio. Must not know: any single RPC. Requests come in as bytes and are
parsed here, so that malformed ones are answered INVALID_ARGUMENT; session commands, whose first
field is a CommandHeader, are handed over as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf import message
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass

from firetitan_daemon import status
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.rpc.errors import to_status
from firetitan_daemon.rpc.streams import OpenStreams

Context = grpc.aio.ServicerContext[bytes, bytes]
Call = Callable[[Any], Awaitable[message.Message]]
"""An ordinary RPC: request message in, response message out."""
CommandCall = Callable[[str, bytes], Awaitable[Any]]
"""A session command: the RPC's name and the request's bytes in, its Operation out."""
Check = Callable[[Any], None]
"""Raises where a request message may not be served."""
_BULK = ("data", "output_grads", "prompt")
"""Fields that make a request large."""


def is_command(method: MethodDescriptor) -> bool:
    """Whether an RPC is a session command."""
    first = method.input_type.fields_by_number.get(1)
    return (
        first is not None
        and first.message_type is not None
        and first.message_type.full_name == "firetitan.v1.CommandHeader"
    )


def bind(
    service: ServiceDescriptor,
    servicer: object,
    submit: CommandCall | None,
    max_message_bytes: int,
    streams: OpenStreams,
    check_of: Callable[[MethodDescriptor], Check | None] | None = None,
) -> grpc.GenericRpcHandler:
    """A handler for every RPC of a service.

    Args:
        service: Its descriptor.
        servicer: Has a coroutine for every unary RPC, an async generator for every stream.
        submit: Takes the session commands.
        max_message_bytes: Largest request; a larger one is refused with REQUEST_TOO_LARGE.
        streams: Has a place for every stream, or refuses it.
        check_of: What requests of a unary RPC must pass first, where there is something.
    """
    handlers = {}
    for method in service.methods:
        check = check_of(method) if check_of else None
        if is_command(method):
            assert submit is not None
            handlers[method.name] = _command(method, submit, max_message_bytes, check)
        elif method.server_streaming and not method.client_streaming:
            call = getattr(servicer, method.name)
            handlers[method.name] = _server_stream(method, call, max_message_bytes, streams)
        elif method.server_streaming:
            handlers[method.name] = _stream(method, getattr(servicer, method.name), streams)
        else:
            call = getattr(servicer, method.name)
            handlers[method.name] = _unary(method, call, max_message_bytes, check)
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def _unary(
    method: MethodDescriptor, call: Call, max_bytes: int, check: Check | None
) -> grpc.RpcMethodHandler[bytes, bytes]:
    async def handle(request: bytes, context: Context) -> bytes:
        try:
            _check_size(method, request, max_bytes)
            message = _parse(method, request)
            if check is not None:
                check(message)
            return (await call(message)).SerializeToString()
        except Exception as error:  # the outermost place: every failure leaves as a status
            await _abort(context, method, error)

    return grpc.unary_unary_rpc_method_handler(handle)


def _command(
    method: MethodDescriptor, submit: CommandCall, max_bytes: int, check: Check | None
) -> grpc.RpcMethodHandler[bytes, bytes]:
    response = GetMessageClass(method.output_type)

    async def handle(request: bytes, context: Context) -> bytes:
        try:
            _check_size(method, request, max_bytes)
            if check is not None:
                check(_parse(method, request))
            return response(operation=await submit(method.name, request)).SerializeToString()
        except Exception as error:  # the outermost place: every failure leaves as a status
            await _abort(context, method, error)

    return grpc.unary_unary_rpc_method_handler(handle)


def _stream(
    method: MethodDescriptor,
    call: Callable[[AsyncIterator[Any]], AsyncIterator[message.Message]],
    streams: OpenStreams,
) -> grpc.RpcMethodHandler[bytes, bytes]:
    async def handle(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        async def parsed() -> AsyncIterator[message.Message]:
            async for request in requests:
                yield _parse(method, request)

        try:
            with streams.place():
                async for response in call(parsed()):
                    yield response.SerializeToString()
        except Exception as error:  # the outermost place: every failure leaves as a status
            await _abort(context, method, error)

    return grpc.stream_stream_rpc_method_handler(handle)


def _server_stream(
    method: MethodDescriptor,
    call: Callable[[Any], AsyncGenerator[message.Message, None]],
    max_bytes: int,
    streams: OpenStreams,
) -> grpc.RpcMethodHandler[bytes, bytes]:
    async def handle(request: bytes, context: Context) -> AsyncIterator[bytes]:
        try:
            _check_size(method, request, max_bytes)
            # Closed at once where the caller goes away: what it started ends with it.
            with streams.place():
                async with contextlib.aclosing(call(_parse(method, request))) as responses:
                    async for response in responses:
                        yield response.SerializeToString()
        except Exception as error:  # the outermost place: every failure leaves as a status
            await _abort(context, method, error)

    return grpc.unary_stream_rpc_method_handler(handle)


def _check_size(method: MethodDescriptor, request: bytes, max_bytes: int) -> None:
    if len(request) <= max_bytes:
        return
    bulk = [name for name in _BULK if name in method.input_type.fields_by_name]
    raise FiretitanError(
        Reason.REQUEST_TOO_LARGE,
        f"{bulk[0] if bulk else method.name}: this call takes {len(request)} bytes, one call may "
        f"take {max_bytes}; send it in several calls, gradients add up",
        field=bulk[0] if bulk else None,
        limit="max_message_bytes",
        max_message_bytes=str(max_bytes),
        size_bytes=str(len(request)),
    )


def _parse(method: MethodDescriptor, request: bytes) -> message.Message:
    try:
        return GetMessageClass(method.input_type).FromString(request)
    except message.DecodeError as error:
        raise malformed(method.input_type.name) from error


def malformed(kind: str) -> FiretitanError:
    """Bytes that are no such message."""
    return FiretitanError(
        Reason.INVALID_ARGUMENT,
        f"the request's bytes are not a {kind}; is the client generated from the same protos?",
    )


async def _abort(context: Context, method: MethodDescriptor, error: Exception) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, FiretitanError):
        error = status.unforeseen(error, method.name, status.DAEMON_LOG)
    await context.abort(
        grpc.StatusCode[error.code],
        error.message,
        ((status.DETAILS_KEY, to_status(error).SerializeToString()),),
    )
