"""Sampling: find the worker, pass the bytes.

Knows: deployments. Must not know: prompts or tokens. Nothing is kept: a request whose worker dies
goes to another, or is answered WORKER_UNAVAILABLE; with its seed it gives the same tokens again. Of
a stream the client says where it goes on.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from firetitan_daemon.control.deployments import DeploymentManager
from firetitan_daemon.core import names
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.worker_ports import Worker


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
        dead = ""
        while True:
            async with self._deployments.sampler(deployment, avoid=dead) as worker:
                try:
                    return await worker.generate(request)
                except FiretitanError as error:
                    # Once: a request that ends two workers is not given a third.
                    if dead or not self._another(deployment, worker, error):
                        raise _explained(deployment, error) from error
                    dead = worker.spec.worker_id

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
        async with self._deployments.sampler(deployment) as worker:
            try:
                async with contextlib.aclosing(worker.generate_stream(request)) as responses:
                    async for response in responses:
                        yield response
            except FiretitanError as error:
                raise _explained(deployment, error) from error

    def _another(self, deployment: str, worker: Worker, error: FiretitanError) -> bool:
        """Whether a request whose worker is gone can be given to another at once."""
        replicas = self._deployments.replica_set(names.parse_deployment(deployment))
        return error.reason is Reason.WORKER_UNAVAILABLE and any(
            one is not worker for one in replicas.workers
        )


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
