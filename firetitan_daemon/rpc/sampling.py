"""SamplingService.

Knows: messages, the router. Must not know: rules.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncGenerator

from firetitan.v1 import sampling_service_pb2

from firetitan_daemon.control.sampling import SamplingRouter
from firetitan_daemon.control.supervisor import Supervisor
from firetitan_daemon.core.errors import FiretitanError, Reason


class SamplingServicer:
    """Passes requests to samplers; draws the seed where the client has not."""

    def __init__(self, router: SamplingRouter, supervisor: Supervisor) -> None:
        self._router = router
        self._supervisor = supervisor

    async def Sample(
        self, request: sampling_service_pb2.SampleRequest
    ) -> sampling_service_pb2.SampleResponse:
        """Continues a prompt."""
        self._supervisor.check_admitting()
        _draw_seed(request)
        response = await self._router.sample(request.deployment, request.SerializeToString())
        return sampling_service_pb2.SampleResponse.FromString(response)

    async def SampleStream(
        self, request: sampling_service_pb2.SampleStreamRequest
    ) -> AsyncGenerator[sampling_service_pb2.SampleStreamResponse, None]:
        """Continues a prompt, tokens as they come."""
        self._supervisor.check_admitting()
        if not request.HasField("resume"):
            _draw_seed(request.request)
        elif not request.request.params.HasField("seed"):
            raise FiretitanError(
                Reason.INVALID_ARGUMENT,
                "request.params.seed: missing; a stream goes on with the seed it named",
                field="request.params.seed",
            )
        deployment = request.request.deployment
        responses = self._router.sample_stream(deployment, request.SerializeToString())
        async with contextlib.aclosing(responses):
            async for response in responses:
                yield sampling_service_pb2.SampleStreamResponse.FromString(response)


def _draw_seed(request: sampling_service_pb2.SampleRequest) -> None:
    if not request.params.HasField("seed"):
        request.params.seed = random.getrandbits(31)
