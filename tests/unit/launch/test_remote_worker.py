"""A worker that ends in order, on SIGTERM say: it cancels the calls it is in the middle of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from firetitan.worker.v1 import worker_pb2, worker_pb2_grpc
from support.commands import TRAINER_SPEC

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.records import WorkerKind
from firetitan_daemon.launch.remote import RemoteWorker

pytestmark = pytest.mark.timeout(30)


class EndingProcess:
    """Is gone a moment after it was asked for."""

    pid = 4711
    alive = True

    async def wait(self) -> str:
        await asyncio.sleep(0.2)
        self.alive = False
        return "exited with code 0"

    def terminate(self) -> None:
        raise AssertionError("never asked")

    kill = terminate


class EndingSampler(worker_pb2_grpc.SamplerWorkerServiceServicer):
    """Cancels what it is asked, as a server that stops does."""

    async def Generate(  # noqa: N802
        self, request: worker_pb2.GenerateRequest, context: Any
    ) -> None:
        await context.abort(grpc.StatusCode.CANCELLED, "CANCELLED")

    async def GenerateStream(  # noqa: N802
        self, request: worker_pb2.GenerateStreamRequest, context: Any
    ) -> AsyncIterator[worker_pb2.GenerateStreamResponse]:
        yield worker_pb2.GenerateStreamResponse(response=b"first")
        await context.abort(grpc.StatusCode.CANCELLED, "CANCELLED")


@pytest.mark.parametrize("call", ["unary", "stream"])
async def test_what_it_was_asked_is_told_as_its_end(tmp_path: Path, call: str) -> None:
    server = grpc.aio.server()
    worker_pb2_grpc.add_SamplerWorkerServiceServicer_to_server(EndingSampler(), server)
    server.add_insecure_port(f"unix:{tmp_path}/s")
    await server.start()
    spec = replace(TRAINER_SPEC, worker_id="sampler-1", kind=WorkerKind.SAMPLER)
    worker = RemoteWorker(spec, EndingProcess(), f"unix:{tmp_path}/s")
    got = []
    with pytest.raises(FiretitanError, match="is gone: exited with code 0") as caught:
        if call == "unary":
            await worker.generate(b"")
        else:
            async for part in worker.generate_stream(b""):
                got.append(part)
    assert caught.value.reason is Reason.WORKER_UNAVAILABLE
    assert got == ([] if call == "unary" else [b"first"])
    await worker.close()
    await server.stop(0)
