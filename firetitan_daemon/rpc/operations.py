"""OperationService, and operations with their results.

Knows: messages, the registry, the spool. Must not know: rules.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from functools import partial

from firetitan.v1 import deployment_pb2, operation_pb2, operation_service_pb2, trainer_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from firetitan_daemon.control import (
    deployment_workers,
    deployments,
    trainer_workers,
    trainers,
    weight_sync,
)
from firetitan_daemon.control.operations import OperationRegistry
from firetitan_daemon.control.services import Services
from firetitan_daemon.control.sessions import SessionManager
from firetitan_daemon.control.shared_reads import SharedReads
from firetitan_daemon.core import names
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.records import Deployment, Operation, OperationState, Trainer
from firetitan_daemon.rpc import convert
from firetitan_daemon.rpc.errors import to_status
from firetitan_daemon.rpc.paging import page_limit

logger = logging.getLogger("firetitan.rpc")
MAX_STREAMED_BYTES = 1024 * 1024
"""Larger results are left out of a stream; GetOperation has them."""
MAX_WAIT_S = 30.0


class OperationMessages:
    """Operations as messages, results included."""

    def __init__(
        self,
        services: Services,
        trainer_manager: trainers.TrainerManager,
        deployment_manager: deployments.DeploymentManager,
        sessions: SessionManager,
    ) -> None:
        self._services = services
        self._trainers = trainer_manager
        self._deployments = deployment_manager
        self._sessions = sessions

    async def build(
        self, operation: Operation, max_result_bytes: int | None = None
    ) -> operation_pb2.Operation:
        """An operation with its result, where it has one and it is not too large."""
        message = convert.operation(operation)
        if operation.state is not OperationState.DONE:
            return message
        if operation.forgotten:
            message.error.CopyFrom(to_status(_forgotten(operation)))
            return message
        if operation.result is not None and max_result_bytes is not None:
            if operation.result.size_bytes > max_result_bytes:
                message.result_omitted = True
                return message
        try:
            if operation.result is not None:
                message.MergeFromString(await self._services.spool.read(operation.result))
            elif operation.method == trainer_workers.METHOD:
                message.trainer.CopyFrom(self.trainer(self._trainers.get(operation.target)))
            elif operation.method in (deployment_workers.METHOD, weight_sync.METHOD):
                record = self._deployments.get(operation.target)
                message.deployment.CopyFrom(self.deployment(record))
        except FiretitanError as error:
            if error.reason is Reason.RECOVERING:
                # It has a result, which cannot be read just now.
                raise
            message.error.CopyFrom(to_status(error))
        return message

    def trainer(self, record: Trainer) -> trainer_pb2.Trainer:
        """A trainer as it stands."""
        session = self._sessions.of_trainer(record)
        message = convert.trainer(
            record, self._trainers.pid(record), session.name if session else ""
        )
        message.last_use_time.CopyFrom(self._last_use(record.name))
        problem = self._trainers.problem(record)
        if problem is not None:
            message.error.CopyFrom(to_status(problem))
        return message

    def deployment(self, record: Deployment) -> deployment_pb2.Deployment:
        """A deployment as it stands."""
        message = convert.deployment(record, self._deployments.replicas(record))
        message.last_use_time.CopyFrom(self._last_use(record.name))
        problem = self._deployments.problem(record)
        if problem is not None:
            message.error.CopyFrom(to_status(problem))
        return message

    def _last_use(self, name: str) -> Timestamp:
        services = self._services
        return convert.timestamp(services.clock.now() - services.activity.idle_s(name))


class OperationServicer:
    """Shows, awaits, cancels and streams operations."""

    def __init__(
        self,
        operations: OperationRegistry,
        sessions: SessionManager,
        messages: OperationMessages,
    ) -> None:
        self._operations = operations
        self._sessions = sessions
        self._messages = messages
        self._streamed: SharedReads[operation_pb2.Operation] = SharedReads()

    async def GetOperation(
        self, request: operation_service_pb2.GetOperationRequest
    ) -> operation_service_pb2.GetOperationResponse:
        """One operation."""
        operation = await self._operations.get(names.parse_operation(request.name))
        return operation_service_pb2.GetOperationResponse(
            operation=await self._messages.build(operation)
        )

    async def ListOperations(
        self, request: operation_service_pb2.ListOperationsRequest
    ) -> operation_service_pb2.ListOperationsResponse:
        """Operations of a session, without results."""
        limit = page_limit(request.page_size)
        records = await self._operations.page(
            self._sessions.get(request.parent).name,
            pending_only=request.pending_only,
            after_id=request.page_token,
            limit=limit,
        )
        return operation_service_pb2.ListOperationsResponse(
            operations=[convert.operation(record) for record in records],
            next_page_token=records[-1].id if len(records) == limit else "",
        )

    async def WaitOperation(
        self, request: operation_service_pb2.WaitOperationRequest
    ) -> operation_service_pb2.WaitOperationResponse:
        """Waits until an operation is done or the time is over."""
        asked_s = request.timeout.ToNanoseconds() / 1e9 if request.HasField("timeout") else 0.0
        operation = await self._operations.wait(
            names.parse_operation(request.name), max(0.0, min(asked_s or MAX_WAIT_S, MAX_WAIT_S))
        )
        return operation_service_pb2.WaitOperationResponse(
            operation=await self._messages.build(operation)
        )

    async def CancelOperation(
        self, request: operation_service_pb2.CancelOperationRequest
    ) -> operation_service_pb2.CancelOperationResponse:
        """Cancels an operation that has not started."""
        operation = await self._operations.get(names.parse_operation(request.name))
        operation = await self._sessions.cancel(operation)
        return operation_service_pb2.CancelOperationResponse(
            operation=await self._messages.build(operation)
        )

    async def WatchOperations(
        self, requests: AsyncIterator[operation_service_pb2.WatchOperationsRequest]
    ) -> AsyncIterator[operation_service_pb2.WatchOperationsResponse]:
        """A lane's operations as they end; later requests acknowledge."""
        first = await anext(requests, None)
        if first is None:
            return
        session = self._sessions.get(first.session).name
        acknowledging = asyncio.create_task(self._acknowledge(session, first, requests))
        try:
            async for operation in self._operations.watch(
                session, first.client_id, first.after_seq
            ):
                build = partial(self._messages.build, operation, MAX_STREAMED_BYTES)
                message = await self._streamed.read(operation.id, build)
                yield operation_service_pb2.WatchOperationsResponse(operation=message)
        finally:
            acknowledging.cancel()
            await asyncio.wait([acknowledging])

    async def _acknowledge(
        self,
        session: str,
        first: operation_service_pb2.WatchOperationsRequest,
        requests: AsyncIterator[operation_service_pb2.WatchOperationsRequest],
    ) -> None:
        taken = 0

        async def acknowledge(through: int) -> None:
            nonlocal taken
            if through <= taken:
                return
            try:
                await self._operations.acknowledge(session, first.client_id, through)
                taken = through
            except FiretitanError as error:
                # The results stay; a later acknowledgement covers this one too.
                logger.warning("not acknowledged session=%s: %s", session, error)

        await acknowledge(first.acked_through)
        async for request in requests:
            await acknowledge(request.acked_through)


def _forgotten(operation: Operation) -> FiretitanError:
    return FiretitanError(
        Reason.OPERATION_NOT_FOUND,
        f"{operation.name}: this {operation.method} was carried out, but nobody took its result "
        "within retention.results_s, and it is forgotten; what it did stands",
        operation=operation.name,
    )
