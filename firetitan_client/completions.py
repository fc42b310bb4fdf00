"""Completions as FireTitan documents them: options, the response dictionary, SampledCompletion.

Knows: their documented shapes, SampleResponse. Must not know: how requests are sent.

Shape legend: `P` prompt tokens, `C` completion tokens, `E` prompt tokens that are echoed.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from firetitan.v1 import sampling_service_pb2

from firetitan_client import routing, types
from firetitan_client.errors import Unsupported
from firetitan_client.prompt_scores import Scores, tables
from firetitan_client.sample_requests import build_request, snapshot_ranges, stop_reason
from firetitan_client.server_metrics import ServerMetrics

MAX_TOP_LOGPROBS = 5
_IGNORED = frozenset(
    {
        "additional_headers_snapshot",
        "hotload_max_retries",
        "hotload_retry_interval",
        "logical_request_id",
        "logprobs",
        "perf_metrics_in_response",
        "prompt_cache_key",
        "r3_ttl_seconds",
        "sampling_context",
        "stream",
        "timeout_diagnostic_context",
    }
)


@dataclass(frozen=True)
class CompletionOptions:
    """The documented keyword arguments of a completion."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: Any = None
    echo: bool = False
    echo_last: int | None = None
    top_logprobs: int | None = None
    raw_output: bool = False
    include_routing_matrix: bool = False
    http_timeout: float | None = 600

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> CompletionOptions:
        """Read keyword arguments.

        Raises:
            TypeError: An unknown one with a value.
            Unsupported: One that asks for what is not here.
            ValueError: A value out of range, by name.
        """
        known = {one.name for one in fields(cls)}
        if arguments.get("images"):
            raise Unsupported("images are not supported; give text tokens only", field="images")
        for name, value in arguments.items():
            if name not in {*known, *_IGNORED, "images"} and value is not None:
                raise TypeError(f"sampling got an unexpected keyword argument {name!r}")
        options = cls(**{name: value for name, value in arguments.items() if name in known})
        options._check()
        return options

    def _check(self) -> None:
        top, last = self.top_logprobs, self.echo_last
        if top is not None and not (_whole(top) and 0 <= top <= MAX_TOP_LOGPROBS):
            raise ValueError(f"top_logprobs: is {top!r}; give 0 to {MAX_TOP_LOGPROBS}")
        limit_s = self.http_timeout
        if limit_s is not None and not (isinstance(limit_s, int | float) and limit_s > 0):
            raise ValueError(f"http_timeout: is {limit_s!r}; give seconds above 0, or None")
        if last is not None and not (_whole(last) and last >= 0):
            raise ValueError(f"echo_last must be a nonnegative integer, is {last!r}")

    def echoed(self, prompt_tokens: int) -> int:
        """E: how many tokens of the prompt's end are echoed."""
        if self.echo_last is not None:
            return min(self.echo_last, prompt_tokens)
        return prompt_tokens if self.echo else 0

    def request(self, prompt: Sequence[int], n: int) -> sampling_service_pb2.SampleRequest:
        """The request for `n` completions.

        Raises:
            ValueError: A malformed argument, by name.
        """
        echoed, top = self.echoed(len(prompt)), self.top_logprobs or 0
        scores = Scores(
            include_prompt_logprobs=bool(echoed),
            topk_prompt_logprobs=top if echoed else 0,
            topk_sample_logprobs=top,
            prompt_logprobs_last_n=echoed if 0 < echoed < len(prompt) else None,
        )
        params = types.FiretitanSamplingParams(
            self.max_tokens,
            self.seed,
            self.stop,
            self.temperature,
            self.top_k or -1,
            self.top_p,
            include_routing_matrix=self.include_routing_matrix,
        )
        request = build_request(prompt, n, params, scores, least_tokens=0 if echoed else 1)
        request.prompt_routing_matrices = self.include_routing_matrix and echoed > 0
        return request


@dataclass(frozen=True)
class SampledCompletion:
    """One completion, prompt included in `full_tokens`.

    Where the prompt is echoed the logprobs begin with it: P + C - 1 entries, entry i about
    `full_tokens[i + 1]`; with `echo_last` those of the last tokens only.
    """

    text: str
    full_tokens: list[int]
    prompt_len: int
    finish_reason: str = "unknown"
    completion_len: int = 0
    inference_logprobs: list[float] | None = None
    """The model's own, at temperature 1."""
    sampling_logprobs: list[float | None] | None = None
    """Of the distribution sampled from; what importance ratios need. None for echoed tokens."""
    logprobs_echoed: bool = False
    routing_matrices: list[str] | None = None
    """Where asked for: entry j tells the experts of the position that the token of logprob j was
    drawn at. None for a dense model."""
    echoed_prompt_logprob_count: int = 0
    """How many entries of the logprobs are about the prompt."""
    inference_topk_token_ids: list[list[int]] | None = None
    inference_topk_logprobs: list[list[float]] | None = None
    """The model's own; entries as of `inference_logprobs`."""
    snapshot: str = ""
    """What made it; empty: the base model."""
    snapshots: tuple[tuple[str, int], ...] | None = None
    """(snapshot, first completion token) of each part, more than one after an ASYNC hotload."""


@dataclass(frozen=True)
class SampledRequestResult:
    """One completion and what its request cost."""

    completions: list[SampledCompletion] = field(default_factory=list)
    server_metrics: ServerMetrics = field(default_factory=ServerMetrics)
    logical_request_id: str = ""
    attempts: int = 1
    wall_seconds: float = 0.0
    upstream_response_id: str | None = None


@dataclass(frozen=True)
class _Position:
    token: int
    logprob: float
    sampling_logprob: float | None
    top: list[tuple[int, float]]
    routing: bytes
    """Of the position that the token was drawn at; empty where there is none."""


def completion(
    prompt: Sequence[int],
    response: sampling_service_pb2.SampleResponse,
    index: int,
    options: CompletionOptions,
    tokenizer: Any,
) -> SampledCompletion:
    """One sequence of an answer.

    Args:
        prompt: Its tokens.
        response: The answer.
        index: Which sequence.
        options: What was asked for.
        tokenizer: Decodes the text; None leaves it empty.
    """
    sequence = response.sequences[index]
    tokens = np.frombuffer(sequence.token_ids, "<i4").tolist()
    echoed = options.echoed(len(prompt))
    positions = list(_positions(prompt, response, index, options))
    # Of a whole echo the first position has nothing before it: no score.
    unconditional = int(0 < echoed == len(prompt))
    scored = positions[unconditional:]
    has_top = bool(options.top_logprobs)
    return SampledCompletion(
        text=tokenizer.decode(tokens) if tokenizer is not None else "",
        full_tokens=[*prompt, *tokens],
        prompt_len=len(prompt),
        finish_reason=stop_reason(sequence),
        completion_len=len(tokens),
        inference_logprobs=[one.logprob for one in scored],
        sampling_logprobs=[one.sampling_logprob for one in scored],
        logprobs_echoed=echoed > 0,
        routing_matrices=_routing(scored),
        echoed_prompt_logprob_count=echoed - unconditional,
        inference_topk_token_ids=[[t for t, _ in p.top] for p in scored] if has_top else None,
        inference_topk_logprobs=[[v for _, v in p.top] for p in scored] if has_top else None,
        snapshot=response.snapshot.rpartition("/")[2],
        snapshots=snapshot_ranges(sequence),
    )


def response_dict(
    prompt: Sequence[int],
    response: sampling_service_pb2.SampleResponse,
    options: CompletionOptions,
    tokenizer: Any,
    *,
    logprobs: bool,
) -> dict[str, Any]:
    """An answer of one sequence in the documented shape of a completions response.

    Args:
        prompt: Its tokens.
        response: The answer.
        options: What was asked for.
        tokenizer: Decodes texts; None leaves them empty.
        logprobs: Whether they are asked for.
    """
    sequence = response.sequences[0]
    made = np.frombuffer(sequence.token_ids, "<i4").tolist()
    echoed = options.echoed(len(prompt))
    shown = [*prompt[len(prompt) - echoed :], *made]

    def text(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens))) if tokenizer is not None else ""

    choice: dict[str, Any] = {
        "index": 0,
        "text": text(shown),
        "finish_reason": stop_reason(sequence),
    }
    if logprobs:
        choice["logprobs"] = {
            "content": [
                _entry(one, text([one.token]), options)
                for one in _positions(prompt, response, 0, options)
            ]
        }
    if options.raw_output:
        choice["raw_output"] = {
            "prompt_token_ids": list(prompt),
            "completion_token_ids": shown,
        }
    return {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "choices": [choice],
        "usage": {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(made),
            "total_tokens": len(prompt) + len(made),
        },
        "snapshot": response.snapshot.rpartition("/")[2],
    }


def metrics(
    response: sampling_service_pb2.SampleResponse, prompt_tokens: int, deployment: str
) -> ServerMetrics:
    """What an answer says of its own costs."""

    def seconds(duration: Any) -> float:
        return float(duration.ToNanoseconds()) / 1e9

    first_token_s = seconds(response.first_token_duration)
    generation_s = seconds(response.generation_duration)
    return ServerMetrics(
        num_concurrent_requests=response.num_concurrent_requests,
        prefill_queue_duration=seconds(response.queue_duration),
        generation_queue_duration=seconds(response.generation_queue_duration),
        server_ttft=first_token_s,
        cached_prompt_tokens=response.cached_prompt_tokens,
        prompt_tokens=prompt_tokens,
        server_processing_time=first_token_s + generation_s,
        prefill_duration=seconds(response.prefill_duration),
        generation_duration=generation_s,
        http_status_code=200,
        deployment=deployment,
        completion_tokens=sum(len(one.token_ids) // 4 for one in response.sequences),
    )


def _positions(
    prompt: Sequence[int],
    response: sampling_service_pb2.SampleResponse,
    index: int,
    options: CompletionOptions,
) -> Iterator[_Position]:
    """Echoed positions, then new ones."""
    first = len(prompt) - options.echoed(len(prompt))
    logprobs = np.frombuffer(response.prompt_logprobs, "<f4").tolist()
    top = _top(response, "prompt_top_logprobs")
    routes = response.prompt_routing_matrices
    for at in range(first, len(prompt)):
        if at == 0:
            # Nothing stands before it: it is what it is.
            given = [(prompt[0], 0.0)] if options.top_logprobs else []
            yield _Position(prompt[0], 0.0, None, given, b"")
        else:
            route = routes[at - 1] if routes else b""
            yield _Position(prompt[at], logprobs[at], None, top[at] if top else [], route)
    sequence = response.sequences[index]
    top, routes = _top(sequence, "top_logprobs"), sequence.routing_matrices
    for at, (token, inference, sampling) in enumerate(
        zip(
            np.frombuffer(sequence.token_ids, "<i4").tolist(),
            np.frombuffer(sequence.inference_logprobs, "<f4").tolist(),
            np.frombuffer(sequence.sampling_logprobs, "<f4").tolist(),
            strict=True,
        )
    ):
        route = routes[at] if routes else b""
        yield _Position(token, inference, sampling, top[at] if top else [], route)


def _top(message: Any, name: str) -> list[list[tuple[int, float]]]:
    if not message.HasField(name):
        return []
    ids, logprobs = tables(getattr(message, name))
    rows = zip(ids.tolist(), logprobs.tolist(), strict=True)
    return [list(zip(tokens, values, strict=True)) for tokens, values in rows]


def _entry(position: _Position, text: str, options: CompletionOptions) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "token_id": position.token,
        "token": text,
        "logprob": position.logprob,
        "sampling_logprob": position.sampling_logprob,
    }
    if options.include_routing_matrix:
        entry["routing_matrix"] = routing.text_of(position.routing)
    if options.top_logprobs:
        entry["top_logprobs"] = [
            {"token_id": token, "logprob": logprob} for token, logprob in position.top
        ]
    return entry


def _routing(positions: Sequence[_Position]) -> list[str] | None:
    if not any(one.routing for one in positions):
        return None
    return [routing.text_of(one.routing) for one in positions]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
