"""SamplingService.

Knows: messages, the router. Must not know: rules.
"""

from __future__ import annotations

import random

from firetitan.v1 import sampling_service_pb2

from firetitan_daemon.control.sampling import SamplingRouter
from firetitan_daemon.control.supervisor import Supervisor


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
        if not request.params.HasField("seed"):
            request.params.seed = random.getrandbits(31)
        response = await self._router.sample(request.deployment, request.SerializeToString())
        return sampling_service_pb2.SampleResponse.FromString(response)
