"""Sampling: find the worker, pass the bytes.

Knows: deployments. Must not know: prompts or tokens. Nothing is kept: a request whose worker dies
is answered WORKER_UNAVAILABLE, and the same request with its seed gives the same tokens again.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from firetitan_daemon.control.deployments import DeploymentManager
from firetitan_daemon.control.services import Services
from firetitan_daemon.core.errors import FiretitanError, Reason


class SamplingRouter:
    """Sends requests to the workers of deployments."""

    def __init__(self, services: Services, deployments: DeploymentManager) -> None:
        self._services = services
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
        record, worker = await self._deployments.ready(deployment)
        try:
            with self._services.activity.using(record.name):
                return await worker.generate(request)
        except FiretitanError as error:
            raise _explained(deployment, error) from error

    async def sample_stream(self, deployment: str, request: bytes) -> AsyncGenerator[bytes, None]:
        """Continue a prompt, tokens as they come; closing it ends the sampling.

        Args:
            deployment: Its name.
            request: A serialized SampleStreamRequest with its seed set.

        Yields:
            Serialized SampleStreamResponses.

        Raises:
            FiretitanError: As `sample`.
        """
        record, worker = await self._deployments.ready(deployment)
        try:
            with self._services.activity.using(record.name):
                async with contextlib.aclosing(worker.generate_stream(request)) as responses:
                    async for response in responses:
                        yield response
        except FiretitanError as error:
            raise _explained(deployment, error) from error


def _explained(deployment: str, error: FiretitanError) -> FiretitanError:
    """The error, with what to do where the worker is gone."""
    if error.reason is not Reason.WORKER_UNAVAILABLE:
        return error
    return FiretitanError(
        Reason.WORKER_UNAVAILABLE,
        f"{deployment}: its worker ended while it sampled ({error.message}); another is "
        "started, send the request again",
        retry_after_s="0.5",
        **error.metadata,
    )
