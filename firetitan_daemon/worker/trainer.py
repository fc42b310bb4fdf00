"""A worker that trains: its sessions, the commands of each exactly once and in order.

Knows: the journal, the compute thread. Must not know: numbers, sockets. A command runs in a task of
the worker's own: a caller that goes away changes nothing, one that comes back joins it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from firetitan.worker.v1 import worker_pb2, worker_pb2_grpc

from firetitan_daemon import status
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.failpoints import failpoint
from firetitan_daemon.engine.api import LoraSpec, SessionSpec, TrainEngine
from firetitan_daemon.worker.commands import CommandRunner, Parsed, parse
from firetitan_daemon.worker.journal import Journal, Verdict
from firetitan_daemon.worker.points import PointInWriting, begin, check_boundary
from firetitan_daemon.worker.servicer import EngineHost

log = logging.getLogger(__name__)
SPOOL_RETRY_S = 0.5


@dataclass
class HeldSession:
    """A session the worker holds."""

    engine: TrainEngine
    settings: worker_pb2.OpenSessionRequest
    runner: CommandRunner
    state: worker_pb2.SessionState
    """As of the last command that ended."""
    journal: Journal[worker_pb2.ExecuteResponse] = field(default_factory=Journal)
    running: dict[int, asyncio.Task[worker_pb2.ExecuteResponse]] = field(default_factory=dict)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the command that runs; first come, first served."""
    point: PointInWriting | None = None
    """The last recovery point that was begun."""
    computed_s: float = 0.0
    """What the last command took in the compute thread."""


class TrainerServicer(worker_pb2_grpc.TrainerWorkerServiceServicer):
    """OpenSession, Execute, FetchResult.

    Args:
        host: The engine.
    """

    def __init__(self, host: EngineHost[TrainEngine]) -> None:
        self._host = host
        self._sessions: dict[str, HeldSession] = {}
        self._opening = asyncio.Lock()
        self._tidying: asyncio.Future[None] | None = None

    def describe(self, response: worker_pb2.DescribeResponse) -> None:
        """Add the sessions to a description, as of the last command of each that ended."""
        response.sessions.extend(one.state for one in self._sessions.values())
        self._tidy()

    def _tidy(self) -> None:
        """Let old graphs go behind what computes; nobody waits for it.

        The daemon asks for a description every few seconds, also while nobody sends commands.
        """
        session = next(iter(self._sessions.values()), None)
        if session is not None and (self._tidying is None or self._tidying.done()):
            self._tidying = asyncio.ensure_future(self._host.run(session.engine.expire_graphs))

    async def OpenSession(
        self,
        request: worker_pb2.OpenSessionRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> worker_pb2.OpenSessionResponse:
        """Opens a session; the same one again is fine."""
        return worker_pb2.OpenSessionResponse(
            session=await asyncio.shield(asyncio.create_task(self._open(request)))
        )

    async def CloseSession(
        self,
        request: worker_pb2.CloseSessionRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> worker_pb2.CloseSessionResponse:
        """Frees what a session takes; one that is not open is fine."""
        async with self._opening:
            session = self._sessions.pop(request.session, None)
        if session is not None:
            async with session.turn:
                await asyncio.shield(self._host.run(session.engine.close))
        return worker_pb2.CloseSessionResponse()

    async def Execute(
        self,
        request: worker_pb2.ExecuteRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> worker_pb2.ExecuteResponse:
        """Runs one command; one that was run already returns its stored result."""
        session = self._find(request.session)
        session.journal.settle(request.settled_through)
        verdict = session.journal.admit(request.commit_seq, request.request_id)
        if verdict is Verdict.STORED:
            stored = session.journal.stored(request.commit_seq)
            assert stored is not None
            return stored
        if verdict is Verdict.RUN:
            session.running[request.commit_seq] = asyncio.create_task(self._run(session, request))
        return await asyncio.shield(session.running[request.commit_seq])

    async def SaveRecoveryPoint(
        self,
        request: worker_pb2.SaveRecoveryPointRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> worker_pb2.SaveRecoveryPointResponse:
        """Copies the session between two commands and begins to write the copy."""
        session = self._find(request.session)
        async with session.turn:
            if session.point is None or session.point.staging != request.staging:
                check_boundary(session, request)
                session.point = await begin(self._host, session, request)
        return session.point.copied

    async def WaitRecoveryPoint(
        self,
        request: worker_pb2.WaitRecoveryPointRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> worker_pb2.WaitRecoveryPointResponse:
        """Waits until a copy is written."""
        point = self._find(request.session).point
        if point is None or point.staging != request.staging:
            raise FiretitanError(
                Reason.OPERATION_NOT_FOUND, f"no recovery point is written to {request.staging}"
            )
        return await asyncio.shield(point.written)

    async def LoadRecoveryPoint(
        self,
        request: worker_pb2.LoadRecoveryPointRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> worker_pb2.LoadRecoveryPointResponse:
        """Puts a session that has run nothing yet where a recovery point was made."""
        state = await asyncio.shield(asyncio.create_task(self._load_point(request)))
        return worker_pb2.LoadRecoveryPointResponse(session=state)

    async def _load_point(
        self, request: worker_pb2.LoadRecoveryPointRequest
    ) -> worker_pb2.SessionState:
        session = self._find(request.session)
        folder, digest = Path(request.source.folder), request.source.digest
        async with session.turn:
            if session.journal.applied != request.commit_seq:
                session.journal.check_untouched()
                await self._host.run(
                    lambda: session.runner.load_point(folder, digest, request.commit_seq)
                )
                session.journal.restore(request.commit_seq)
                session.state = session.runner.state(request.session, request.commit_seq)
            return session.state

    async def FetchResult(
        self,
        request: worker_pb2.FetchResultRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> worker_pb2.FetchResultResponse:
        """The stored result of a command."""
        stored = self._find(request.session).journal.stored(request.commit_seq)
        return worker_pb2.FetchResultResponse(response=stored)

    def _find(self, name: str) -> HeldSession:
        session = self._sessions.get(name)
        if session is None:
            held = ", ".join(self._sessions) or "none"
            raise FiretitanError(
                Reason.SESSION_NOT_FOUND, f"{name} is not open in this worker, which holds {held}"
            )
        return session

    async def _open(self, request: worker_pb2.OpenSessionRequest) -> worker_pb2.SessionState:
        async with self._opening:
            held = self._sessions.get(request.session)
            if held is not None and held.settings == request:
                return held.state
            spec = session_spec(request)
            alone = spec.trains_all or any(
                session_spec(one.settings).trains_all for one in self._sessions.values()
            )
            if held is not None or (alone and self._sessions):
                raise FiretitanError(
                    Reason.ALREADY_EXISTS,
                    f"the worker holds {', '.join(self._sessions)} with settings of its own; "
                    f"{request.session} needs another worker",
                )
            engine = self._host.engine.beside()
            await self._host.run(lambda: engine.open_session(spec))
            runner = CommandRunner(engine, forward_only=request.forward_only)
            settings = worker_pb2.OpenSessionRequest()
            settings.CopyFrom(request)
            state = runner.state(request.session, applied=0)
            self._sessions[request.session] = HeldSession(engine, settings, runner, state)
            return state

    async def _run(
        self, session: HeldSession, request: worker_pb2.ExecuteRequest
    ) -> worker_pb2.ExecuteResponse:
        """Run an admitted command to its end; never raises."""
        journal = session.journal
        async with session.turn:
            client_id, seq = request.client_id, request.seq
            try:
                failpoint("worker.admitted")
                command = await self._parse(request)
                client_id, seq = command.header.client_id, command.header.seq
                response = await self._run_parsed(session, command)
            except Exception as error:  # whatever happens, the number is taken and answered
                failure = (
                    error
                    if isinstance(error, FiretitanError)
                    else status.unforeseen(error, request.method)
                )
                journal.fail(client_id, seq, request.method, failure.reason)
                response = worker_pb2.ExecuteResponse(error=status.to_status(failure))
            failpoint("worker.applied")
            response.commit_seq = request.commit_seq
            session.state = session.runner.state(
                request.session, applied=max(journal.applied, request.commit_seq)
            )
            response.session.CopyFrom(session.state)
            journal.finish(request.commit_seq, response)
            failpoint("worker.stored")
            del session.running[request.commit_seq]
            log.debug(
                "event=executed commit_seq=%d method=%s outcome=%s computed_s=%.4f",
                request.commit_seq,
                request.method,
                response.WhichOneof("outcome"),
                session.computed_s,
            )
            return response

    async def _parse(self, request: worker_pb2.ExecuteRequest) -> Parsed:
        """Read a command; one whose payload is only away, with its folder, waits for it."""
        while True:
            try:
                return await self._host.run(lambda: parse(request))
            except FiretitanError as error:
                if error.reason is not Reason.STATE_NOT_WRITABLE:
                    raise
                log.error("event=waiting commit_seq=%d: %s", request.commit_seq, error)
                await asyncio.sleep(SPOOL_RETRY_S)

    async def _run_parsed(
        self, session: HeldSession, command: Parsed
    ) -> worker_pb2.ExecuteResponse:
        header = command.header
        preceding = session.journal.preceding_failure(
            header.client_id, header.seq, header.seen_failure
        )
        if preceding is not None:
            raise preceding

        def compute() -> worker_pb2.ExecuteResponse:
            began = time.perf_counter()
            try:
                return session.runner.run(command)
            finally:
                session.computed_s = time.perf_counter() - began

        return await self._host.run(compute)


def session_spec(request: worker_pb2.OpenSessionRequest) -> SessionSpec:
    """The session's settings as the engine takes them."""
    if request.lora_rank == 0:
        return SessionSpec(seed=request.seed, lora=None, forward_only=request.forward_only)
    return SessionSpec(
        seed=request.seed,
        lora=LoraSpec(
            rank=request.lora_rank,
            alpha=request.lora_alpha,
            train_attn=request.train_attn,
            train_mlp=request.train_mlp,
            train_unembed=request.train_unembed,
        ),
    )
