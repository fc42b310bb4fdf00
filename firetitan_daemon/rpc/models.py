"""ModelService.

Knows: messages, the registry. Must not know: rules.
"""

from __future__ import annotations

from firetitan.v1 import model_pb2, model_service_pb2

from firetitan_daemon.control.exports import ExportManager
from firetitan_daemon.control.models import ModelRegistry, Promotion
from firetitan_daemon.control.supervisor import Supervisor
from firetitan_daemon.core.model_names import NamedModel
from firetitan_daemon.core.model_records import Model
from firetitan_daemon.rpc import convert
from firetitan_daemon.rpc.paging import page


class ModelServicer:
    """Promotes, shows, deletes and exports models."""

    def __init__(
        self, models: ModelRegistry, exports: ExportManager, supervisor: Supervisor
    ) -> None:
        self._models = models
        self._exports = exports
        self._supervisor = supervisor

    async def PromoteCheckpoint(
        self, request: model_service_pb2.PromoteCheckpointRequest
    ) -> model_service_pb2.PromoteCheckpointResponse:
        """Makes a model of a snapshot."""
        self._supervisor.check_admitting()
        promotion = Promotion(request.checkpoint, request.model_id, request.base_model)
        return model_service_pb2.PromoteCheckpointResponse(
            model=convert.model(await self._models.promote(promotion))
        )

    async def GetModel(
        self, request: model_service_pb2.GetModelRequest
    ) -> model_service_pb2.GetModelResponse:
        """What a name stands for."""
        found = self._models.find(request.name)
        return model_service_pb2.GetModelResponse(model=_message(request.name, found))

    async def ListModels(
        self, request: model_service_pb2.ListModelsRequest
    ) -> model_service_pb2.ListModelsResponse:
        """Promoted models, then configured ones."""
        found: list[tuple[str, Model | NamedModel]] = [
            *((one.full_name, one) for one in self._models.all()),
            *sorted(self._models.configured.items()),
        ]
        entries, following = page(found, request.page_size, request.page_token)
        return model_service_pb2.ListModelsResponse(
            models=[_message(name, one) for name, one in entries], next_page_token=following
        )

    async def DeleteModel(
        self, request: model_service_pb2.DeleteModelRequest
    ) -> model_service_pb2.DeleteModelResponse:
        """Removes a promoted model."""
        await self._models.delete(request.name)
        return model_service_pb2.DeleteModelResponse()

    async def ExportCheckpoint(
        self, request: model_service_pb2.ExportCheckpointRequest
    ) -> model_service_pb2.ExportCheckpointResponse:
        """Writes what was saved to a folder."""
        self._supervisor.check_admitting()
        folder = await self._exports.export(request.checkpoint, request.folder)
        return model_service_pb2.ExportCheckpointResponse(folder=str(folder))


def _message(name: str, found: Model | NamedModel) -> model_pb2.Model:
    if isinstance(found, Model):
        return convert.model(found)
    return model_pb2.Model(name=name, location=found.location, revision=found.revision)
