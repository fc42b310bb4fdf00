"""A worker that samples: snapshots applied beside the live weights, prompts continued.

Knows: the sampling seam. Must not know: numbers, sockets, which deployment it serves.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
from firetitan.v1 import sampling_service_pb2
from firetitan.worker.v1 import worker_pb2, worker_pb2_grpc
from google.protobuf.message import DecodeError, Message

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.failpoints import failpoint
from firetitan_daemon.core.worker_ports import PREPARE
from firetitan_daemon.engine.api import (
    HotloadTransition,
    SnapshotFormat,
    SnapshotKind,
    SnapshotLayer,
)
from firetitan_daemon.engine.sample_api import NewTokens, SampleEngine, SampleRequest
from firetitan_daemon.worker import convert_sampling
from firetitan_daemon.worker.servicer import EngineHost

STREAMED_PARTS = 4096
"""Entries of one message to a reader that is slower than the engine."""
MessageT = TypeVar("MessageT", bound=Message)


class SamplerServicer(worker_pb2_grpc.SamplerWorkerServiceServicer):
    """Prepare, Apply, Retain, Generate, GenerateStream.

    Args:
        host: The engine.
    """

    def __init__(self, host: EngineHost[SampleEngine]) -> None:
        self._host = host
        self._applying = asyncio.Lock()

    def describe(self, response: worker_pb2.DescribeResponse) -> None:
        """Add the snapshots to a description."""
        engine = self._host.loaded
        if engine is not None:
            response.loaded_snapshots.extend(engine.loaded)
            response.active_snapshot = engine.active
        response.capabilities.append(PREPARE)

    async def Prepare(
        self,
        request: worker_pb2.PrepareRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> worker_pb2.PrepareResponse:
        """Builds a snapshot's weights and verifies them; what is served stays."""
        await asyncio.shield(asyncio.create_task(self._prepare(request)))
        return worker_pb2.PrepareResponse()

    async def Apply(
        self,
        request: worker_pb2.ApplyRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> worker_pb2.ApplyResponse:
        """Builds a snapshot's weights beside the live ones, verifies, swaps."""
        loaded = await asyncio.shield(asyncio.create_task(self._apply(request)))
        return worker_pb2.ApplyResponse(loaded_snapshots=loaded)

    async def Retain(
        self,
        request: worker_pb2.RetainRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> worker_pb2.RetainResponse:
        """Drops the snapshots that nobody keeps."""
        loaded = await asyncio.shield(asyncio.create_task(self._retain(list(request.keep))))
        return worker_pb2.RetainResponse(loaded_snapshots=loaded)

    async def Generate(
        self,
        request: worker_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> worker_pb2.GenerateResponse:
        """Continues a prompt; a caller that goes away frees its place in the batch."""
        message = _parse(sampling_service_pb2.SampleRequest, request.request)
        result = await asyncio.wrap_future(self._host.engine.submit(self._sample(message)))
        failpoint("sampler.generated")
        response = convert_sampling.sample_response_to_proto(result)
        return worker_pb2.GenerateResponse(response=response.SerializeToString())

    async def GenerateStream(
        self,
        request: worker_pb2.GenerateStreamRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[worker_pb2.GenerateStreamResponse]:
        """As Generate, tokens as they come."""
        message = _parse(sampling_service_pb2.SampleStreamRequest, request.request)
        async with contextlib.aclosing(self._stream(message)) as responses:
            async for response in responses:
                yield worker_pb2.GenerateStreamResponse(response=response.SerializeToString())

    async def _stream(
        self, message: sampling_service_pb2.SampleStreamRequest
    ) -> AsyncGenerator[sampling_service_pb2.SampleStreamResponse, None]:
        sample = self._sample(message.request)
        received = [0] * sample.num_samples
        if message.HasField("resume"):
            sample, received = convert_sampling.resumed(
                sample, message.resume, self._host.engine.loaded
            )
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Sequence[NewTokens] | None] = asyncio.Queue()

        def progress(news: Sequence[NewTokens]) -> None:
            loop.call_soon_threadsafe(arrived.put_nowait, news)

        running = asyncio.wrap_future(self._host.engine.submit(sample, progress))
        running.add_done_callback(lambda _: arrived.put_nowait(None))
        try:
            yield sampling_service_pb2.SampleStreamResponse(seed=sample.seed)
            while (news := await arrived.get()) is not None:
                told = convert_sampling.new_tokens_to_proto(news, received)
                while not arrived.empty() and len(told) < STREAMED_PARTS:
                    more = arrived.get_nowait()
                    if more is None:
                        arrived.put_nowait(None)
                        break
                    told += convert_sampling.new_tokens_to_proto(more, received)
                if told:
                    yield sampling_service_pb2.SampleStreamResponse(tokens=told)
            summary = convert_sampling.sample_response_to_proto(await running)
            del summary.sequences[:]
            yield sampling_service_pb2.SampleStreamResponse(summary=summary)
        finally:
            running.cancel()

    def _sample(self, message: sampling_service_pb2.SampleRequest) -> SampleRequest:
        engine = self._host.engine
        return convert_sampling.sample_request_from_proto(
            message, engine.loaded, engine.info.max_context_length
        )

    async def _prepare(self, request: worker_pb2.PrepareRequest) -> None:
        engine = self._host.engine
        layers = _layers(request.layers)
        async with self._applying:
            if engine.active != layers[-1].name:
                await self._host.run(lambda: engine.prepare(layers))
                failpoint("sampler.prepared")

    async def _apply(self, request: worker_pb2.ApplyRequest) -> tuple[str, ...]:
        engine = self._host.engine
        layers = _layers(request.layers)
        keep = list(request.keep)
        try:
            transition = HotloadTransition(request.transition or HotloadTransition.FINISH)
        except ValueError as error:
            raise FiretitanError(
                Reason.UNSUPPORTED, f"transition: {error}; this worker does not know it"
            ) from error
        async with self._applying:
            # A repeat after a lost answer: the parent of its first layer may be gone by now.
            if engine.active != layers[-1].name:
                failpoint("sampler.applying")
                await self._host.run(
                    lambda: engine.apply(
                        layers,
                        keep=keep,
                        transition=transition,
                        keep_prompts=request.keep_prompt_cache,
                    )
                )
                failpoint("sampler.applied")
            return engine.loaded

    async def _retain(self, keep: list[str]) -> tuple[str, ...]:
        engine = self._host.engine
        async with self._applying:
            await self._host.run(lambda: engine.retain(keep))
            return engine.loaded


def _parse(kind: type[MessageT], payload: bytes) -> MessageT:
    try:
        return kind.FromString(payload)
    except DecodeError as error:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT, f"the payload is not a {kind.__name__}: {error}"
        ) from error


def _layers(layers: Sequence[worker_pb2.SnapshotLayer]) -> list[SnapshotLayer]:
    if not layers:
        raise FiretitanError(Reason.INVALID_ARGUMENT, "layers: empty; name at least one")
    return [_layer(layer) for layer in layers]


def _layer(layer: worker_pb2.SnapshotLayer) -> SnapshotLayer:
    try:
        kind, form = SnapshotKind(layer.kind), SnapshotFormat(layer.format)
    except ValueError as error:
        raise FiretitanError(
            Reason.UNSUPPORTED, f"snapshot {layer.name}: {error}; this worker does not know it"
        ) from error
    return SnapshotLayer(
        name=layer.name,
        kind=kind,
        format=form,
        path=Path(layer.path),
        digest=layer.digest,
        result_digest=layer.result_digest,
    )
