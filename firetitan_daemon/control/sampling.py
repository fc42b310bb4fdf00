"""Sampling: find the worker, pass the bytes.

Knows: deployments. Must not know: prompts or tokens. Nothing is kept: a request whose worker dies
is answered WORKER_UNAVAILABLE, and the same request with its seed gives the same tokens again.
"""

from __future__ import annotations

from firetitan_daemon.control.deployments import DeploymentManager
from firetitan_daemon.core.errors import FiretitanError, Reason


class SamplingRouter:
    """Sends requests to the workers of deployments."""

    def __init__(self, deployments: DeploymentManager) -> None:
        self._deployments = deployments

    async def sample(self, deployment: str, request: bytes) -> bytes:
        """Continue a prompt.

        Args:
            deployment: Its name.
            request: A serialized SampleRequest with its seed set.

        Returns:
            A serialized SampleResponse.

        Raises:
            FiretitanError: DEPLOYMENT_NOT_FOUND, RECOVERING, WORKER_UNAVAILABLE,
                SNAPSHOT_NOT_ACTIVE, INVALID_ARGUMENT.
        """
        _, worker = await self._deployments.ready(deployment)
        try:
            return await worker.generate(request)
        except FiretitanError as error:
            if error.reason is not Reason.WORKER_UNAVAILABLE:
                raise
            raise FiretitanError(
                Reason.WORKER_UNAVAILABLE,
                f"{deployment}: its worker ended while it sampled ({error.message}); another is "
                "started, send the request again",
                retry_after_s="0.5",
                **error.metadata,
            ) from error
