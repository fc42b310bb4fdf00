"""ServerMetrics: what one sampling request cost, and how its answer came about.

Knows: the documented fields. Must not know: who measures them, who decides by them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerMetrics:
    """What one request cost; None where nobody measured it. Durations are in seconds."""

    num_concurrent_requests: int | None = None
    """Requests the server worked on at that time."""
    prefill_queue_duration: float | None = None
    """Waiting until the prompt's turn came; what concurrency is adapted to."""
    generation_queue_duration: float | None = None
    """Waiting between the prompt and the first token."""
    server_ttft: float | None = None
    """From the request's arrival to its first token."""
    cached_prompt_tokens: int | None = None
    """Tokens of the prompt that were not computed again."""
    prompt_tokens: int | None = None
    server_processing_time: float | None = None
    tokenizer_queue_duration: float | None = None
    tokenizer_duration: float | None = None
    prefill_duration: float | None = None
    generation_duration: float | None = None
    client_ttft: float | None = None
    """First token as the client saw it; streams only."""
    http_status_code: int | None = None
    """Outcome of the try, in HTTP's words."""
    transport_error: bool = False
    """Nobody answered."""
    retry_attempt: int | None = None
    """Which try this was, from 1."""
    response_request_id: str | None = None
    backend_host: str | None = None
    deployment: str | None = None
    completion_tokens: int | None = None
    """New tokens of all sequences together."""
