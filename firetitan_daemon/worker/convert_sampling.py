"""SampleRequest and its answers to and from the engine's plain values.

Knows: firetitan.v1's sampling messages, engine.sample_api. Must not know: how requests arrive or
what engines do with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import numpy as np
from firetitan.v1 import sampling_service_pb2, tensor_pb2

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import Int64Array
from firetitan_daemon.engine.sample_api import (
    NewTokens,
    SampleRequest,
    SampleResult,
    StopReason,
    TokenLogprobs,
)
from firetitan_daemon.worker.convert import (
    float_tensor_to_proto,
    tensor_from_proto,
    to_bytes,
    tokens_from_proto,
)

DEFAULT_MAX_TOKENS = 1024
_GOING_ON = sampling_service_pb2.STOP_REASON_UNSPECIFIED
MAX_SAMPLES = 4096
"""Sequences of one request; they come back in one answer."""
MAX_STOPS, MAX_STOP_LENGTH = 256, 4096
"""Texts that end a sequence, and characters of each: all are looked for after every token."""
SNAPSHOT_PREFIX = "snapshots/"

_STOP_REASONS = {
    StopReason.STOP: sampling_service_pb2.STOP_REASON_STOP,
    StopReason.LENGTH: sampling_service_pb2.STOP_REASON_LENGTH,
}


def sample_request_from_proto(
    request: sampling_service_pb2.SampleRequest, loaded: Sequence[str], context_length: int
) -> SampleRequest:
    """A prompt and how to continue it; absent settings take their documented defaults.

    Args:
        request: From the daemon, its seed set.
        loaded: Names of the snapshots the engine holds, to find the asked one among.
        context_length: Tokens the model takes; where no max_tokens is asked for, what the prompt
            leaves of them bounds the default.

    Raises:
        FiretitanError: INVALID_ARGUMENT naming the field.
    """
    params = request.params
    if not params.HasField("seed"):
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            "params.seed: missing; a worker never draws one",
            field="params.seed",
        )
    if request.num_samples > MAX_SAMPLES:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"num_samples: is {request.num_samples}; at most {MAX_SAMPLES}, send several requests",
            field="num_samples",
        )
    _check_stops(params)
    try:
        prompt = tokens_from_proto(request.prompt, "prompt")
    except FiretitanError as error:
        raise FiretitanError(Reason.INVALID_ARGUMENT, error.message, field=error.field) from error
    targets = None
    if request.HasField("target_prompt_logprobs"):
        targets = _int64(request.target_prompt_logprobs, "target_prompt_logprobs")
    default = max(1, min(DEFAULT_MAX_TOKENS, context_length - len(prompt)))
    return SampleRequest(
        prompt=prompt,
        num_samples=request.num_samples or 1,
        max_tokens=params.max_tokens if params.HasField("max_tokens") else default,
        seed=params.seed,
        temperature=params.temperature if params.HasField("temperature") else 1.0,
        top_k=params.top_k,
        top_p=params.top_p if params.HasField("top_p") else 1.0,
        stop=tuple(params.stop),
        stop_token_ids=tuple(params.stop_token_ids),
        use_eos=not params.ignore_eos,
        prompt_logprobs=request.prompt_logprobs,
        routing=request.routing_matrices,
        prompt_routing=request.prompt_routing_matrices,
        topk_prompt_logprobs=request.topk_prompt_logprobs,
        target_prompt_logprobs=targets,
        prompt_logprobs_last_n=request.prompt_logprobs_last_n,
        topk_sample_logprobs=request.topk_sample_logprobs,
        prompt_alt_tokens_k=request.prompt_alt_tokens_k,
        snapshot=_loaded_name(request.snapshot, loaded) if request.snapshot else None,
    )


def _check_stops(params: sampling_service_pb2.SamplingParams) -> None:
    for name, stops in (("stop", params.stop), ("stop_token_ids", params.stop_token_ids)):
        if len(stops) > MAX_STOPS:
            raise FiretitanError(
                Reason.INVALID_ARGUMENT,
                f"params.{name}: has {len(stops)} entries; at most {MAX_STOPS}",
                field=f"params.{name}",
            )
    for index, text in enumerate(params.stop):
        if len(text) > MAX_STOP_LENGTH:
            raise FiretitanError(
                Reason.INVALID_ARGUMENT,
                f"params.stop[{index}]: has {len(text)} characters; at most {MAX_STOP_LENGTH}",
                field=f"params.stop[{index}]",
            )


def sample_response_to_proto(result: SampleResult) -> sampling_service_pb2.SampleResponse:
    """The sequences, with the snapshot that made them by its full name."""
    prompt, times = result.prompt, result.times
    response = sampling_service_pb2.SampleResponse(
        snapshot=_snapshot_name(result.snapshot),
        prompt_logprobs=b"" if prompt.logprobs is None else to_bytes(prompt.logprobs, "<f4"),
        prompt_top_logprobs=_token_logprobs(prompt.top),
        target_prompt_logprobs=(
            None if prompt.targets is None else float_tensor_to_proto(prompt.targets)
        ),
        prompt_alt_tokens=_token_logprobs(prompt.alternatives),
        cached_prompt_tokens=result.cached_prompt_tokens,
        num_concurrent_requests=result.num_concurrent,
        prompt_routing_matrices=result.prompt_routing,
    )
    for sequence in result.sequences:
        response.sequences.add(
            token_ids=to_bytes(sequence.token_ids, "<i4"),
            sampling_logprobs=to_bytes(sequence.sampling_logprobs, "<f4"),
            inference_logprobs=to_bytes(sequence.inference_logprobs, "<f4"),
            stop_reason=_STOP_REASONS[sequence.stop_reason],
            routing_matrices=sequence.routing,
            top_logprobs=_token_logprobs(sequence.top_logprobs),
            made_by=[
                sampling_service_pb2.SnapshotRange(
                    snapshot=_snapshot_name(one.snapshot), first_token=one.first_token
                )
                for one in sequence.made_by
            ],
        )
    for duration, seconds in (
        (response.queue_duration, times.queue_s),
        (response.prefill_duration, times.prefill_s),
        (response.first_token_duration, times.first_token_s),
        (response.generation_queue_duration, times.generation_queue_s),
        (response.generation_duration, times.generation_s),
    ):
        duration.FromNanoseconds(round(seconds * 1e9))
    return response


def resumed(
    request: SampleRequest, cursor: sampling_service_pb2.SampleCursor, loaded: Sequence[str]
) -> tuple[SampleRequest, list[int]]:
    """A request that goes on where a broken stream ended.

    Args:
        request: The request, as at first.
        cursor: What the caller has.
        loaded: Names of the snapshots the engine holds.

    Returns:
        The request under the cursor's snapshot, and how many tokens of each sequence the caller
        has.

    Raises:
        FiretitanError: INVALID_ARGUMENT naming the field.
    """
    received = list(cursor.received)
    if len(received) != request.num_samples or min(received) < 0:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"resume.received: is {received}; give one number of tokens for each of the "
            f"{request.num_samples} sequences",
            field="resume.received",
        )
    return replace(request, snapshot=_loaded_name(cursor.snapshot, loaded)), received


def new_tokens_to_proto(
    news: Sequence[NewTokens], received: Sequence[int]
) -> list[sampling_service_pb2.SampledTokens]:
    """New tokens, without those the caller has; an end is told in any case.

    Args:
        news: From the engine.
        received: How many tokens of each sequence the caller has.
    """
    told = []
    for one in news:
        known = min(max(0, received[one.sequence] - one.first_token), len(one.token_ids))
        if known == len(one.token_ids) and one.stop_reason is None:
            continue
        told.append(
            sampling_service_pb2.SampledTokens(
                sequence=one.sequence,
                first_token=one.first_token + known,
                token_ids=to_bytes(one.token_ids[known:], "<i4"),
                sampling_logprobs=to_bytes(one.sampling_logprobs[known:], "<f4"),
                inference_logprobs=to_bytes(one.inference_logprobs[known:], "<f4"),
                stop_reason=_STOP_REASONS[one.stop_reason] if one.stop_reason else _GOING_ON,
                snapshot=_snapshot_name(one.snapshot),
                routing_matrices=one.routing[known:],
                top_logprobs=_token_logprobs(one.top_logprobs, known),
            )
        )
    return told


def _token_logprobs(
    table: TokenLogprobs | None, first: int = 0
) -> sampling_service_pb2.TokenLogprobs | None:
    if table is None:
        return None
    return sampling_service_pb2.TokenLogprobs(
        per_position=table.token_ids.shape[1],
        token_ids=to_bytes(table.token_ids[first:], "<i4"),
        logprobs=to_bytes(table.logprobs[first:], "<f4"),
    )


def _int64(tensor: tensor_pb2.Tensor, field: str) -> Int64Array:
    try:
        array = tensor_from_proto(tensor, field)
    except FiretitanError as error:
        raise FiretitanError(Reason.INVALID_ARGUMENT, error.message, field=field) from error
    if array.dtype != np.int64:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"{field}: is {array.dtype.name}; send it as int64",
            field=field,
        )
    return cast(Int64Array, array)


def _loaded_name(name: str, loaded: Sequence[str]) -> str:
    """A snapshot's name as the engine has it."""
    return name if name in loaded else name.removeprefix(SNAPSHOT_PREFIX)


def _snapshot_name(name: str) -> str:
    return name if not name or name.startswith(SNAPSHOT_PREFIX) else SNAPSHOT_PREFIX + name
