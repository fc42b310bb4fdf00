"""Samples as they come: a stream that goes on behind a restart of the daemon or its worker.

Knows: SampleStream, what a broken stream has brought. Must not know: how a deployment is made or
brought to a snapshot.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from firetitan.v1 import sampling_service_pb2

from firetitan_client import forking, routing
from firetitan_client.errors import SnapshotNotActive
from firetitan_client.futures import APIFuture
from firetitan_client.patience import Patience
from firetitan_client.sample_requests import Target, follow, stop_reason
from firetitan_client.transport import iterate, run


@dataclass(frozen=True)
class SampleChunk:
    """New tokens of one sequence."""

    sequence: int
    """Which sequence, from 0."""
    first_token: int
    """Place of the first of these tokens in the sequence."""
    tokens: list[int]
    sampling_logprobs: list[float]
    """Of the distribution sampled from, one a token."""
    inference_logprobs: list[float]
    """The model's own, at temperature 1, one a token."""
    stop_reason: str | None
    """`stop` or `length` with the sequence's last token, None before."""
    snapshot: str
    """What made these tokens; empty: the base model."""
    routing_matrices: list[str] | None = None
    """As in `FiretitanSampledSequence`, one a token, where asked for."""


class SampleStream:
    """Chunks of a request's sequences as they are sampled: `for chunk in stream`, or `async for`.

    Sampling begins with the first chunk asked for. It ends where the stream is closed, left
    (`with`, `async with`) or dropped. Where the daemon or the worker restarts in between, it goes
    on with the same seed behind what was received.

    Args:
        ready: Done once the deployment serves what is to be sampled from.
        request: What to sample, its seed set.
        track: Told of a future that is done when the sampling has ended, once it has begun.
    """

    def __init__(
        self,
        ready: APIFuture[Target],
        request: sampling_service_pb2.SampleRequest,
        track: Callable[[APIFuture[None]], object] = lambda _: None,
    ) -> None:
        self._request = request
        self._answers = self._read(ready, track)
        self._arrived: deque[SampleChunk] = deque()
        self._pid = os.getpid()
        self._begun = False
        self._ended = False
        self._coming: APIFuture[bool] | None = None
        self._reading: asyncio.Task[Any] | None = None
        forking.on_fork(self)

    def _after_fork(self) -> None:
        """In a child: a stream that has begun goes on in the parent."""
        if self._begun:
            self._arrived.clear()
            self._coming = self._reading = None
            self._parents, self._answers = self._answers, self._left_behind()

    @property
    def seed(self) -> int:
        """Gives the same tokens again, from the same snapshot."""
        return self._request.params.seed

    def close(self) -> None:
        """End the sampling; chunks asked for afterwards are StopIteration."""
        run(self._end()).result()

    async def aclose(self) -> None:
        """As `close`, for coroutines."""
        await asyncio.wrap_future(run(self._end()))

    def __iter__(self) -> SampleStream:
        return self

    def __next__(self) -> SampleChunk:
        while not self._arrived:
            if not self._more().result():
                raise StopIteration
        return self._arrived.popleft()

    def __aiter__(self) -> SampleStream:
        return self

    async def __anext__(self) -> SampleChunk:
        while not self._arrived:
            if not await self._more():
                raise StopAsyncIteration
        return self._arrived.popleft()

    def __enter__(self) -> SampleStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> SampleStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _more(self) -> APIFuture[bool]:
        """Whether chunks have arrived; False at the end.

        Whoever stops waiting leaves them to the next that asks, and a failure too.
        """
        coming = self._coming
        if coming is None or (coming.done() and coming.exception(0) is None):
            self._begun = True
            coming = self._coming = APIFuture("sample_stream")
            follow(self._receive_more(), coming)
        return coming

    async def _receive_more(self) -> bool:
        self._reading = asyncio.current_task()
        try:
            chunks = await anext(self._answers, None)
        except asyncio.CancelledError:
            if not self._ended:
                raise
            chunks = None
        self._arrived.extend(chunks or ())
        return chunks is not None

    async def _end(self) -> None:
        self._ended = True
        if self._reading is not None and not self._reading.done():
            self._reading.cancel()
            await asyncio.wait((self._reading,))
        await self._answers.aclose()
        self._arrived.clear()
        self._coming = None

    async def _left_behind(self) -> AsyncGenerator[list[SampleChunk], None]:
        if self._pid != os.getpid():
            raise RuntimeError(
                f"sample_stream: this stream began in process {self._pid}, before the fork, and "
                "goes on there; begin one here"
            )
        yield []

    async def _read(
        self, ready: APIFuture[Target], track: Callable[[APIFuture[None]], object]
    ) -> AsyncGenerator[list[SampleChunk], None]:
        target = await ready
        if target.lease is not None:
            await target.lease.hold(target.deployment)
        running: APIFuture[None] = APIFuture("sample_stream")
        track(running)
        try:
            async with contextlib.aclosing(self._receive(target, running)) as received:
                async for chunks in received:
                    yield chunks
        finally:
            running.finish()

    async def _receive(
        self, target: Target, running: APIFuture[None]
    ) -> AsyncGenerator[list[SampleChunk], None]:
        self._request.deployment, self._request.snapshot = target.deployment, target.snapshot
        message = sampling_service_pb2.SampleStreamRequest(request=self._request)
        received = [0] * self._request.num_samples
        ended: set[int] = set()
        made_by: list[str] = []
        patience = Patience(target.transport)
        while True:
            if running.done():  # ended by whoever tracks it, between two calls
                running.result(0)
            try:
                rpc = target.transport.channel.unary_stream(
                    "/firetitan.v1.SamplingService/SampleStream",
                    request_serializer=sampling_service_pb2.SampleStreamRequest.SerializeToString,
                    response_deserializer=sampling_service_pb2.SampleStreamResponse.FromString,
                )
                call = forking.begin(functools.partial(rpc, message))
                running._canceller = functools.partial(_break_off, call)
                async with contextlib.aclosing(iterate(call)) as responses:
                    async for response in responses:
                        chunks = []
                        for tokens in response.tokens:
                            chunk = _chunk(tokens)
                            received[chunk.sequence] += len(chunk.tokens)
                            if chunk.sequence not in ended:  # a resumed stream tells ends again
                                chunks.append(chunk)
                            if chunk.stop_reason is not None:
                                ended.add(chunk.sequence)
                            if chunk.snapshot not in made_by:
                                made_by.append(chunk.snapshot)
                            message.resume.SetInParent()
                            message.resume.snapshot = tokens.snapshot
                        if chunks:
                            patience.renew()
                            yield chunks
                        if response.HasField("summary"):
                            return
            except grpc.RpcError as error:
                if running.done():
                    running.result(0)
                await patience.after(error)
                if len(made_by) > 1:
                    raise SnapshotNotActive(
                        f"the stream broke after it had gone over from {made_by[0]!r} to "
                        f"{made_by[-1]!r}: such a sequence cannot be made again; start over"
                    ) from error
            if message.HasField("resume"):
                message.resume.received[:] = received


def _break_off(call: Any) -> bool:
    forking.cancel(call)
    return True


def _chunk(tokens: sampling_service_pb2.SampledTokens) -> SampleChunk:
    ended = tokens.stop_reason != sampling_service_pb2.STOP_REASON_UNSPECIFIED
    return SampleChunk(
        sequence=tokens.sequence,
        first_token=tokens.first_token,
        tokens=np.frombuffer(tokens.token_ids, "<i4").tolist(),
        sampling_logprobs=np.frombuffer(tokens.sampling_logprobs, "<f4").tolist(),
        inference_logprobs=np.frombuffer(tokens.inference_logprobs, "<f4").tolist(),
        stop_reason=stop_reason(tokens) if ended else None,
        snapshot=tokens.snapshot.rpartition("/")[2],
        routing_matrices=routing.texts_of(tokens.routing_matrices),
    )
