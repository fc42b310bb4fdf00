"""DeploymentService.

Knows: messages, the managers. Must not know: rules.
"""

from __future__ import annotations

from blake3 import blake3
from firetitan.v1 import deployment_service_pb2

from firetitan_daemon.control.codec import HotloadArguments
from firetitan_daemon.control.deployment_requests import DeploymentRequest
from firetitan_daemon.control.deployments import DeploymentManager
from firetitan_daemon.control.supervisor import Supervisor
from firetitan_daemon.control.weight_sync import WeightSyncer
from firetitan_daemon.rpc import convert
from firetitan_daemon.rpc.operations import OperationMessages
from firetitan_daemon.rpc.paging import page


class DeploymentServicer:
    """Creates, shows, scales, hotloads and deletes deployments."""

    def __init__(
        self,
        deployments: DeploymentManager,
        syncer: WeightSyncer,
        messages: OperationMessages,
        supervisor: Supervisor,
    ) -> None:
        self._deployments = deployments
        self._syncer = syncer
        self._messages = messages
        self._supervisor = supervisor

    async def CreateDeployment(
        self, request: deployment_service_pb2.CreateDeploymentRequest
    ) -> deployment_service_pb2.CreateDeploymentResponse:
        """Starts its sampler workers."""
        self._supervisor.check_admitting()
        operation = await self._deployments.create(
            DeploymentRequest(
                deployment_id=request.deployment_id,
                base_model=request.base_model,
                max_context_length=request.max_context_length,
                trainer=request.trainer,
                dtype=request.dtype or "auto",
                transition=convert.transition(request.transition),
                request_id=request.request_id,
                shape_name=request.deployment_shape,
                replicas=request.replicas,
                inactivity_s=(
                    convert.seconds(request.inactivity_timeout)
                    if request.HasField("inactivity_timeout")
                    else None
                ),
                payload_digest=blake3(request.SerializeToString(deterministic=True)).hexdigest(),
            )
        )
        return deployment_service_pb2.CreateDeploymentResponse(
            operation=await self._messages.build(operation),
            created=self._deployments.made_by(operation.target, request.request_id),
        )

    async def GetDeployment(
        self, request: deployment_service_pb2.GetDeploymentRequest
    ) -> deployment_service_pb2.GetDeploymentResponse:
        """One deployment."""
        return deployment_service_pb2.GetDeploymentResponse(
            deployment=self._messages.deployment(self._deployments.get(request.name))
        )

    async def ListDeployments(
        self, request: deployment_service_pb2.ListDeploymentsRequest
    ) -> deployment_service_pb2.ListDeploymentsResponse:
        """All deployments."""
        records, following = page(self._deployments.all(), request.page_size, request.page_token)
        return deployment_service_pb2.ListDeploymentsResponse(
            deployments=[self._messages.deployment(record) for record in records],
            next_page_token=following,
        )

    async def DeleteDeployment(
        self, request: deployment_service_pb2.DeleteDeploymentRequest
    ) -> deployment_service_pb2.DeleteDeploymentResponse:
        """Stops the workers, forgets the deployment."""
        await self._deployments.delete(request.name)
        return deployment_service_pb2.DeleteDeploymentResponse()

    async def ScaleDeployment(
        self, request: deployment_service_pb2.ScaleDeploymentRequest
    ) -> deployment_service_pb2.ScaleDeploymentResponse:
        """Changes how many workers there are."""
        self._supervisor.check_admitting()
        record = await self._deployments.scale(request.name, request.replicas)
        return deployment_service_pb2.ScaleDeploymentResponse(
            deployment=self._messages.deployment(record)
        )

    async def HotloadSnapshot(
        self, request: deployment_service_pb2.HotloadSnapshotRequest
    ) -> deployment_service_pb2.HotloadSnapshotResponse:
        """Loads a snapshot and serves it."""
        self._supervisor.check_admitting()
        operation = await self._syncer.hotload(
            HotloadArguments(
                request.deployment,
                request.snapshot,
                request.etag,
                convert.transition(request.transition),
                request.keep_prompt_cache,
            ),
            request.request_id,
            request.SerializeToString(deterministic=True),
        )
        return deployment_service_pb2.HotloadSnapshotResponse(
            operation=await self._messages.build(operation)
        )

    async def PinSnapshot(
        self, request: deployment_service_pb2.PinSnapshotRequest
    ) -> deployment_service_pb2.PinSnapshotResponse:
        """Keeps a snapshot loaded for a holder, or lets it go."""
        await self._syncer.pin(
            request.deployment, request.snapshot, request.holder, request.release
        )
        return deployment_service_pb2.PinSnapshotResponse()
