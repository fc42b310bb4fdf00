"""A worker behind its socket, as the daemon's rules see it (`core.worker_ports.Worker`).

Knows: the worker protocol, its process's end. Must not know: how the process was started. Asking
who it is and asking it to end have deadlines. Every other call is a part of an operation, or of a
request whose sender sets one: it ends with an answer, or with the process. A lost connection is
tried again for as long as the process lives, which is safe: the worker's journal runs each command
once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar, cast

import grpc
from firetitan.worker.v1 import worker_pb2, worker_pb2_grpc

from firetitan_daemon import handshake, status
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.model_records import ModelInfo
from firetitan_daemon.core.records import HotloadTransition, RecoveryPoint, Session, WorkerSpec
from firetitan_daemon.core.worker_ports import (
    SILENT,
    Command,
    Outcome,
    SnapshotLayer,
    WorkerSession,
    WorkerStatus,
    WrittenPoint,
)
from firetitan_daemon.launch import convert
from firetitan_daemon.launch.process import Process

ResponseT = TypeVar("ResponseT")

DESCRIBE_TIMEOUT_S = 5.0
SHUTDOWN_RPC_TIMEOUT_S = 5.0
SHUTDOWN_STEP_S = 5.0
"""How long each of asking, SIGTERM and SIGKILL is given to work."""
RETRY_PAUSE_S = 0.05
_WITH_RETAIN = 2
"""First protocol with that RPC."""
STREAM_END_S = 1.0
"""How long a broken stream waits for news of the process's end."""


class RemoteWorker:
    """One worker (see `core.worker_ports.Worker`).

    Args:
        spec: What it was started for.
        process: Its process; the end of it ends every call.
        address: Its socket, `unix:...`.
        tail: Reads the last lines of its log, for errors.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        process: Process,
        address: str,
        *,
        tail: Callable[[], str] = str,
    ) -> None:
        self._spec = spec
        self._process = process
        self._tail = tail
        self._protocol = handshake.PROTOCOL_VERSION
        """What it speaks, as it last said."""
        self._channel = grpc.aio.insecure_channel(
            address,
            options=(
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.enable_http_proxy", 0),
                ("grpc.initial_reconnect_backoff_ms", 50),
                # How long an attempt to connect may take: a machine that is busy answers late.
                ("grpc.min_reconnect_backoff_ms", 2_000),
                ("grpc.max_reconnect_backoff_ms", 250),
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
            ),
        )
        self._base = cast(
            "worker_pb2_grpc.WorkerServiceAsyncStub",
            worker_pb2_grpc.WorkerServiceStub(self._channel),
        )
        self._trainer = cast(
            "worker_pb2_grpc.TrainerWorkerServiceAsyncStub",
            worker_pb2_grpc.TrainerWorkerServiceStub(self._channel),
        )
        self._sampler = cast(
            "worker_pb2_grpc.SamplerWorkerServiceAsyncStub",
            worker_pb2_grpc.SamplerWorkerServiceStub(self._channel),
        )

    @property
    def spec(self) -> WorkerSpec:
        """What it was started for."""
        return self._spec

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether its process is there."""
        return self._process.alive

    async def describe(self) -> WorkerStatus:
        """Who it is and where it stands; within 5 s or WORKER_UNAVAILABLE."""
        return convert.status_from_proto(await self.describe_raw())

    async def describe_raw(self) -> worker_pb2.DescribeResponse:
        """The description as sent, protocol version included."""
        try:
            async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
                answer = await self._call(lambda: self._base.Describe(worker_pb2.DescribeRequest()))
        except TimeoutError:
            raise FiretitanError(
                Reason.WORKER_UNAVAILABLE,
                f"worker {self._spec.worker_id} (pid {self.pid}) lives but did not answer within "
                f"{DESCRIBE_TIMEOUT_S:g} s",
                worker=self._spec.worker_id,
                **{SILENT: f"{DESCRIBE_TIMEOUT_S:g}"},
            ) from None
        self._protocol = answer.protocol_version
        return answer

    async def load_model(self) -> ModelInfo:
        """Load the base model of its specification; again is fine.

        Raises:
            FiretitanError: MODEL_NOT_FOUND, UNSUPPORTED, DEVICE_OUT_OF_MEMORY.
        """
        request = convert.load_request(self._spec)
        response = await self._call(lambda: self._base.LoadModel(request))
        return convert.model_from_proto(response.model)

    async def open_session(self, session: Session) -> WorkerSession:
        """Open the training session; the same one again is fine."""
        request = convert.open_request(session)
        response = await self._call(lambda: self._trainer.OpenSession(request))
        return convert.session_from_proto(response.session)

    async def close_session(self, session: str) -> None:
        """Free what a session takes; one that is not open is fine."""
        request = worker_pb2.CloseSessionRequest(session=session)
        await self._call(lambda: self._trainer.CloseSession(request))

    async def execute(self, command: Command) -> Outcome:
        """Run a command once; a repeat waits for or returns the first outcome."""
        request = convert.execute_request(command)
        response = await self._call(lambda: self._trainer.Execute(request))
        return convert.outcome_from_proto(response)

    async def fetch_result(self, session: str, commit_seq: int) -> Outcome | None:
        """The stored outcome of a command."""
        request = worker_pb2.FetchResultRequest(session=session, commit_seq=commit_seq)
        answer = await self._call(lambda: self._trainer.FetchResult(request))
        return convert.outcome_from_proto(answer.response) if answer.HasField("response") else None

    async def save_point(self, session: str, commit_seq: int, staging: Path) -> tuple[int, float]:
        """Copy a session as it stands behind a command and begin to write the copy."""
        request = worker_pb2.SaveRecoveryPointRequest(
            session=session, commit_seq=commit_seq, staging=str(staging)
        )
        answer = await self._call(lambda: self._trainer.SaveRecoveryPoint(request))
        return answer.step, answer.blocked_s

    async def wait_point(self, session: str, staging: Path) -> WrittenPoint:
        """Wait until a copy that was begun is written."""
        request = worker_pb2.WaitRecoveryPointRequest(session=session, staging=str(staging))
        answer = await self._call(lambda: self._trainer.WaitRecoveryPoint(request))
        return convert.point_from_proto(answer)

    async def load_point(self, point: RecoveryPoint) -> WorkerSession:
        """Put a session that has run nothing yet where a recovery point was made."""
        request = convert.load_point_request(point)
        answer = await self._call(lambda: self._trainer.LoadRecoveryPoint(request))
        return convert.session_from_proto(answer.session)

    async def apply(
        self,
        layers: Sequence[SnapshotLayer],
        keep: Sequence[str],
        transition: HotloadTransition = HotloadTransition.FINISH,
        *,
        keep_prompt_cache: bool = False,
    ) -> Sequence[str]:
        """Serve the last layer's weights; returns what is loaded."""
        request = convert.apply_request(layers, keep, transition, keep_prompt_cache)
        response = await self._call(lambda: self._sampler.Apply(request))
        return tuple(response.loaded_snapshots)

    async def prepare(self, layers: Sequence[SnapshotLayer]) -> None:
        """Build and verify what `apply` of the same layers then serves at once."""
        request = convert.prepare_request(layers)
        await self._call(lambda: self._sampler.Prepare(request))

    async def retain(self, keep: Sequence[str]) -> Sequence[str]:
        """Drop the snapshots that are neither active nor named; returns what is loaded.

        A worker of protocol 1 drops them with the next `apply`.
        """
        if self._protocol < _WITH_RETAIN:
            return (await self.describe()).loaded_snapshots
        request = worker_pb2.RetainRequest(keep=keep)
        response = await self._call(lambda: self._sampler.Retain(request))
        return tuple(response.loaded_snapshots)

    async def generate(self, request: bytes) -> bytes:
        """A serialized SampleRequest in, a SampleResponse out; cancelling frees its place."""
        message = worker_pb2.GenerateRequest(request=request)
        response = await self._call(lambda: self._sampler.Generate(message))
        return response.response

    async def generate_stream(self, request: bytes) -> AsyncGenerator[bytes, None]:
        """A serialized SampleStreamRequest in, SampleStreamResponses out, as they come."""
        call = self._sampler.GenerateStream(worker_pb2.GenerateStreamRequest(request=request))
        try:
            async for response in call:
                yield response.response
        except grpc.aio.AioRpcError as error:
            if not _lost(error):
                raise status.from_rpc(error) from error
            # The connection breaks a moment before the process is known to be gone.
            await self._ended_within(STREAM_END_S)
            how = "the connection broke" if self._process.alive else await self._process.wait()
            raise self._gone(how) from error
        finally:
            call.cancel()

    async def exited(self) -> str:
        """Waits until the process is gone; says how it ended."""
        return await self._process.wait()

    async def shutdown(self) -> None:
        """Ask it to end, then make it; returns once the process is gone."""
        asked = True
        try:
            async with asyncio.timeout(SHUTDOWN_RPC_TIMEOUT_S):
                await self._call(lambda: self._base.Shutdown(worker_pb2.ShutdownRequest()))
        except (FiretitanError, TimeoutError):
            asked = False
        if not (asked and await self._ended_within(SHUTDOWN_STEP_S)):
            self._process.terminate()
            if not await self._ended_within(SHUTDOWN_STEP_S):
                self._process.kill()
        await self._process.wait()
        await self.close()

    async def close(self) -> None:
        """Drop the connection; the process lives on."""
        await self._channel.close()

    async def _ended_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._process.wait()
        except TimeoutError:
            return False
        return True

    async def _call(self, send: Callable[[], Awaitable[ResponseT]]) -> ResponseT:
        """Send until there is an answer or no process."""
        if not self._process.alive:
            raise self._gone(await self._process.wait())
        end = asyncio.ensure_future(self._process.wait())
        try:
            while True:
                answer = asyncio.ensure_future(send())
                try:
                    await asyncio.wait((answer, end), return_when=asyncio.FIRST_COMPLETED)
                    if not answer.done():
                        raise self._gone(await end)
                finally:
                    answer.cancel()
                if answer.cancelled():
                    # Whoever ended it has closed the connection; nobody cancelled the caller.
                    how = await end if end.done() else "its connection was closed"
                    raise self._gone(how)
                try:
                    return answer.result()
                except grpc.aio.AioRpcError as error:
                    if not _lost(error):
                        raise status.from_rpc(error) from error
                await asyncio.wait((end,), timeout=RETRY_PAUSE_S)
        finally:
            end.cancel()

    def _gone(self, how: str) -> FiretitanError:
        tail = self._tail()
        return FiretitanError(
            Reason.WORKER_UNAVAILABLE,
            f"worker {self._spec.worker_id} (pid {self.pid}) is gone: {how}"
            + (f"; its log ends with:\n{tail}" if tail else ""),
            worker=self._spec.worker_id,
            cause=how,
        )


def _lost(error: grpc.aio.AioRpcError) -> bool:
    """Whether the connection broke, rather than the worker having answered.

    A worker that ends in order, on SIGTERM say, cancels the calls it was in the middle of.
    """
    answered = any(key == status.DETAILS_KEY for key, _ in error.trailing_metadata() or ())
    broken = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    return error.code() in broken and not answered
