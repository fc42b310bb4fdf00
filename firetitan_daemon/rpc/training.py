"""TrainingService: sessions. Its commands go through `Commands`.

Knows: messages, the managers. Must not know: rules.
"""

from __future__ import annotations

from dataclasses import replace

from firetitan.v1 import operation_pb2, session_pb2, training_service_pb2

from firetitan_daemon.control.sessions import SessionManager
from firetitan_daemon.control.supervisor import Supervisor
from firetitan_daemon.control.trainers import TrainerManager
from firetitan_daemon.rpc import convert
from firetitan_daemon.rpc.codec import read_header
from firetitan_daemon.rpc.operations import OperationMessages
from firetitan_daemon.rpc.paging import page


class Commands:
    """Every session command of every service: only the header is read here."""

    def __init__(self, sessions: SessionManager, messages: OperationMessages) -> None:
        self._sessions = sessions
        self._messages = messages

    async def submit(self, method: str, payload: bytes) -> operation_pb2.Operation:
        """Accept a command and answer with its operation."""
        operation = await self._sessions.submit(read_header(payload), method, payload)
        return await self._messages.build(operation)


class TrainingServicer:
    """Opens, joins and shows sessions."""

    def __init__(
        self, sessions: SessionManager, trainers: TrainerManager, supervisor: Supervisor
    ) -> None:
        self._sessions = sessions
        self._trainers = trainers
        self._supervisor = supervisor

    async def CreateSession(
        self, request: training_service_pb2.CreateSessionRequest
    ) -> training_service_pb2.CreateSessionResponse:
        """Opens the trainer's session."""
        self._supervisor.check_admitting()
        trainer, worker = await self._trainers.ready(request.trainer)
        wanted = convert.wanted(
            request.base_model,
            request.lora if request.HasField("lora") else None,
            request.seed if request.HasField("seed") else None,
            dict(request.user_metadata),
        )
        wanted = replace(wanted, forward_only=request.forward_only)
        session, created = await self._sessions.create(trainer, worker, wanted, request.request_id)
        return training_service_pb2.CreateSessionResponse(
            session=convert.session(session), created=created
        )

    async def CloseSession(
        self, request: training_service_pb2.CloseSessionRequest
    ) -> training_service_pb2.CloseSessionResponse:
        """Finishes and frees a session."""
        self._supervisor.check_admitting()  # what it accepted would not be finished any more
        await self._sessions.close(request.name)
        return training_service_pb2.CloseSessionResponse()

    async def AttachSession(
        self, request: training_service_pb2.AttachSessionRequest
    ) -> training_service_pb2.AttachSessionResponse:
        """Opens or resumes a lane."""
        wanted = convert.wanted(
            request.base_model,
            request.lora if request.HasField("lora") else None,
            request.seed if request.HasField("seed") else None,
            {},
        )
        session, lane = self._sessions.attach(request.name, request.client_id, wanted)
        return training_service_pb2.AttachSessionResponse(
            session=convert.session(session), next_seq=lane.next_seq
        )

    async def GetSession(
        self, request: training_service_pb2.GetSessionRequest
    ) -> training_service_pb2.GetSessionResponse:
        """One session."""
        session = self._sessions.get(request.name)
        return training_service_pb2.GetSessionResponse(session=convert.session(session))

    async def ListSessions(
        self, request: training_service_pb2.ListSessionsRequest
    ) -> training_service_pb2.ListSessionsResponse:
        """Sessions, all or of one trainer."""
        records, following = page(
            self._sessions.all(request.parent), request.page_size, request.page_token
        )
        messages: list[session_pb2.Session] = [convert.session(record) for record in records]
        return training_service_pb2.ListSessionsResponse(
            sessions=messages, next_page_token=following
        )
