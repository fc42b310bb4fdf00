"""TrainerService.

Knows: messages, the manager. Must not know: rules.
"""

from __future__ import annotations

from blake3 import blake3
from firetitan.v1 import trainer_service_pb2

from firetitan_daemon.control.sessions import SessionManager
from firetitan_daemon.control.supervisor import Supervisor
from firetitan_daemon.control.trainer_requests import TrainerRequest
from firetitan_daemon.control.trainers import TrainerManager
from firetitan_daemon.rpc import convert
from firetitan_daemon.rpc.operations import OperationMessages
from firetitan_daemon.rpc.paging import page


class TrainerServicer:
    """Creates, shows and deletes trainers."""

    def __init__(
        self,
        trainers: TrainerManager,
        sessions: SessionManager,
        messages: OperationMessages,
        supervisor: Supervisor,
    ) -> None:
        self._trainers = trainers
        self._sessions = sessions
        self._messages = messages
        self._supervisor = supervisor

    async def CreateTrainer(
        self, request: trainer_service_pb2.CreateTrainerRequest
    ) -> trainer_service_pb2.CreateTrainerResponse:
        """Starts a worker and loads a base model."""
        self._supervisor.check_admitting()
        operation = await self._trainers.create(
            TrainerRequest(
                trainer_id=request.trainer_id,
                base_model=request.base_model,
                lora_rank=request.lora_rank,
                max_context_length=request.max_context_length,
                dtype=request.dtype or "auto",
                request_id=request.request_id,
                forward_only=request.forward_only,
                max_lora_rank=request.max_lora_rank,
                shape_name=request.training_shape,
                inactivity_s=(
                    convert.seconds(request.inactivity_timeout)
                    if request.HasField("inactivity_timeout")
                    else None
                ),
                payload_digest=blake3(request.SerializeToString(deterministic=True)).hexdigest(),
            )
        )
        return trainer_service_pb2.CreateTrainerResponse(
            operation=await self._messages.build(operation),
            created=self._trainers.made_by(operation.target, request.request_id),
        )

    async def GetTrainer(
        self, request: trainer_service_pb2.GetTrainerRequest
    ) -> trainer_service_pb2.GetTrainerResponse:
        """One trainer."""
        return trainer_service_pb2.GetTrainerResponse(
            trainer=self._messages.trainer(self._trainers.get(request.name))
        )

    async def ListTrainers(
        self, request: trainer_service_pb2.ListTrainersRequest
    ) -> trainer_service_pb2.ListTrainersResponse:
        """All trainers."""
        records, following = page(self._trainers.all(), request.page_size, request.page_token)
        return trainer_service_pb2.ListTrainersResponse(
            trainers=[self._messages.trainer(record) for record in records],
            next_page_token=following,
        )

    async def DeleteTrainer(
        self, request: trainer_service_pb2.DeleteTrainerRequest
    ) -> trainer_service_pb2.DeleteTrainerResponse:
        """Stops the worker, forgets the trainer."""
        self._supervisor.check_admitting()  # what it accepted would not be finished any more
        await self._trainers.delete(request.name)
        return trainer_service_pb2.DeleteTrainerResponse()
