"""Sampling requests that take their place in a controller's window.

Knows: concurrency controllers, what an answer or a failure tells them. Must not know: who asks.
"""

from __future__ import annotations

from firetitan.v1 import sampling_service_pb2

from firetitan_client.completions import metrics
from firetitan_client.concurrency import SamplingConcurrencyController
from firetitan_client.errors import FiretitanError, Unavailable
from firetitan_client.futures import APIFuture
from firetitan_client.sample_requests import Target, follow, send
from firetitan_client.server_metrics import ServerMetrics


async def send_within(
    controller: SamplingConcurrencyController,
    target: Target,
    request: sampling_service_pb2.SampleRequest,
    prompt_tokens: int,
    timeout_s: float | None = None,
) -> tuple[sampling_service_pb2.SampleResponse, ServerMetrics]:
    """Sample, in a place of the controller's window; in any event loop.

    Args:
        controller: Is asked before and told after.
        target: What to sample from.
        request: What to sample.
        prompt_tokens: Tokens of its prompt.
        timeout_s: Seconds for one try; None: no limit.

    Raises:
        FiretitanError: By reason; the controller knows of it.
    """
    await controller.acquire()
    cost: ServerMetrics | None = None
    try:
        future: APIFuture[sampling_service_pb2.SampleResponse] = APIFuture("sample")
        follow(send(target, request, timeout_s), future)
        response = await future
        cost = metrics(response, prompt_tokens, target.deployment.rpartition("/")[2])
    except FiretitanError as error:
        cost = ServerMetrics(
            http_status_code=error.status_code, transport_error=isinstance(error, Unavailable)
        )
        note = getattr(controller, "note_retry_exhausted", None)
        if note is not None:
            note(cost)
        raise
    finally:
        controller.release(cost)
    return response, cost
