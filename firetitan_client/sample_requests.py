"""Sampling requests and answers: what both sampling clients share.

Knows: tinker's sampling types, SampleRequest, seeds, pins. Must not know: how a deployment is made
or brought to a snapshot.
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from firetitan.v1 import deployment_service_pb2, sampling_service_pb2

from firetitan_client import address as addresses
from firetitan_client import convert, routing, transport, types
from firetitan_client.credentials import access_of
from firetitan_client.errors import Unsupported
from firetitan_client.futures import APIFuture
from firetitan_client.leases import Lease
from firetitan_client.prompt_scores import (
    Scores,
    alternatives,
    target_logprobs,
    top_lists,
    top_logprobs,
)
from firetitan_client.transport import Transport

logger = logging.getLogger("firetitan")

MAX_SAMPLES = 4096
LATE_TRIES = 7
_RELEASE_PATIENCE_S = 5.0
_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Target:
    """What to sample from."""

    transport: Transport
    deployment: str
    """`deployments/{deployment}`."""
    snapshot: str = ""
    """`snapshots/{snapshot}` to be answered by; empty: whatever is served."""
    base_model: str = ""
    tokenizer: str = ""
    """Folder or id the tokenizer is loaded from."""
    lease: Lease | None = field(default=None, compare=False, repr=False)
    """Says that the deployment is used, for as long as somebody has this."""


def build_request(
    tokens: Any,
    num_samples: int,
    params: Any,
    scores: Scores | None = None,
    *,
    least_tokens: int = 1,
) -> sampling_service_pb2.SampleRequest:
    """One request, its seed drawn here so that sending it again gives the same tokens.

    Args:
        tokens: `tinker.ModelInput` or token ids.
        num_samples: Sequences; sample j draws from stream (seed, j).
        params: `tinker.SamplingParams`, or anything with its attributes.
        scores: What to return beside the samples.
        least_tokens: Smallest max_tokens; 0 lets a prompt be scored alone.

    Raises:
        ValueError: A malformed argument, by name.
    """
    num_samples = convert.whole_number(num_samples, "num_samples", 1, MAX_SAMPLES)
    prompt = convert.model_input_to_proto(tokens, "prompt")
    if not prompt.chunks[0].encoded_text.token_ids:
        raise convert.invalid("prompt", "has no tokens; give at least one")
    if isinstance(params, Mapping | str | int | float):
        raise convert.invalid(
            "sampling_params", f"is a {type(params).__name__}; give tinker.SamplingParams(...)"
        )
    if getattr(params, "sampling_mask", None):
        raise Unsupported("sampling_mask is not supported; leave it out", field="sampling_mask")
    max_tokens = getattr(params, "max_tokens", None)
    seed = getattr(params, "seed", None)
    message = sampling_service_pb2.SamplingParams(
        max_tokens=(
            None
            if max_tokens is None
            else convert.whole_number(max_tokens, "max_tokens", least_tokens, _INT32)
        ),
        temperature=convert.real_number(getattr(params, "temperature", 1.0), "temperature"),
        top_p=convert.real_number(getattr(params, "top_p", 1.0), "top_p"),
        top_k=max(0, convert.whole_number(getattr(params, "top_k", 0), "top_k", -1, _INT32)),
        seed=(
            secrets.randbits(62)
            if seed is None
            else convert.whole_number(seed, "seed", -(2**63), 2**63 - 1)
        ),
    )
    _set_stop(message, getattr(params, "stop", None))
    request = sampling_service_pb2.SampleRequest(
        prompt=prompt,
        num_samples=num_samples,
        params=message,
        routing_matrices=bool(getattr(params, "include_routing_matrix", False)),
    )
    (scores or Scores()).ask(request)
    top = getattr(params, "top_sampling_logprobs", 0) or 0
    request.topk_sample_logprobs = max(
        request.topk_sample_logprobs,
        convert.whole_number(top, "top_sampling_logprobs", 0, _INT32),
    )
    if top and (message.temperature != 1.0 or message.top_p != 1.0 or message.top_k > 0):
        raise Unsupported(
            "top_sampling_logprobs needs temperature 1 without top_k and top_p: only the model's "
            "own distribution is reported; use topk_sample_logprobs for that one",
            field="top_sampling_logprobs",
        )
    return request


def _set_stop(message: sampling_service_pb2.SamplingParams, stop: Any) -> None:
    if stop is None:
        return
    given = [stop] if isinstance(stop, str | int) else list(stop)
    if not given:
        message.ignore_eos = True
    for index, one in enumerate(given):
        if isinstance(one, str) and one:
            message.stop.append(one)
        elif isinstance(one, int | np.integer) and not isinstance(one, bool):
            token = convert.whole_number(one, f"stop[{index}]", 0, _INT32)
            message.stop_token_ids.append(token)
        else:
            raise convert.invalid(f"stop[{index}]", f"is {one!r}; give texts or token ids")


async def send(
    target: Target, request: sampling_service_pb2.SampleRequest, timeout_s: float | None = None
) -> sampling_service_pb2.SampleResponse:
    """Sample; a daemon or worker that comes back is asked again with the same seed.

    Args:
        target: What to sample from.
        request: What to sample.
        timeout_s: Seconds for one try, of which `LATE_TRIES` may run into it; None: no limit.
    """
    if target.lease is not None:
        await target.lease.hold(target.deployment)
    request.deployment, request.snapshot = target.deployment, target.snapshot
    answer: sampling_service_pb2.SampleResponse = await target.transport.call(
        "SamplingService/Sample",
        request,
        sampling_service_pb2.SampleResponse,
        timeout_s=timeout_s,
        late_tries=LATE_TRIES,
    )
    return answer


def sample_response(
    response: sampling_service_pb2.SampleResponse, seed: int, targets: Any = None
) -> Any:
    """A `tinker.SampleResponse` that also names its snapshot.

    Args:
        response: The answer.
        seed: What its tokens were drawn with.
        targets: `target_prompt_logprobs` as they were asked for.
    """
    kind = types.sample_response_type()
    facts: dict[str, Any] = {
        "sequences": [_sequence(one) for one in response.sequences],
        "snapshot": response.snapshot.rpartition("/")[2],
        "seed": seed,
        "prompt_cache_hit_tokens": response.cached_prompt_tokens,
    }
    if response.HasField("prompt_top_logprobs"):
        table = response.prompt_top_logprobs
        if "topk_prompt_logprobs_np" in types.accepted_fields(kind):
            facts["topk_prompt_logprobs_np"] = top_logprobs(table)
        else:
            facts["topk_prompt_logprobs"] = top_lists(table)
    if response.HasField("target_prompt_logprobs"):
        facts["target_prompt_logprobs"] = target_logprobs(response, targets)
    if response.HasField("prompt_alt_tokens"):
        facts["prompt_alt_tokens"] = alternatives(response.prompt_alt_tokens)
    if response.prompt_logprobs:
        array = np.frombuffer(response.prompt_logprobs, "<f4")
        if "prompt_logprobs_np" in types.accepted_fields(kind):
            facts["prompt_logprobs_np"] = array.copy()
        else:
            facts["prompt_logprobs"] = _optional(array)
    return kind(**facts)


def _sequence(sequence: sampling_service_pb2.SampledSequence) -> Any:
    kind = types.sampled_sequence_type()
    accepted = types.accepted_fields(kind)
    tokens = np.frombuffer(sequence.token_ids, "<i4")
    sampling = np.frombuffer(sequence.sampling_logprobs, "<f4")
    facts: dict[str, Any] = {
        "stop_reason": stop_reason(sequence),
        "sampling_logprobs": sampling.tolist(),
        "inference_logprobs": np.frombuffer(sequence.inference_logprobs, "<f4").tolist(),
        "routing_matrices": routing.texts_of(sequence.routing_matrices),
    }
    if "tokens_np" in accepted:
        facts |= {"tokens_np": tokens.copy(), "logprobs_np": sampling.copy()}
    else:
        facts |= {"tokens": tokens.tolist(), "logprobs": sampling.tolist()}
    facts["snapshots"] = snapshot_ranges(sequence)
    if sequence.HasField("top_logprobs"):
        if "topk_logprobs_np" in accepted:
            facts["topk_logprobs_np"] = top_logprobs(sequence.top_logprobs)
        else:
            facts["topk_logprobs"] = top_lists(sequence.top_logprobs)
    if "sequence_id" in accepted:
        facts["sequence_id"] = uuid.uuid4().hex
    return kind(**facts)


def snapshot_ranges(
    sequence: sampling_service_pb2.SampledSequence,
) -> tuple[tuple[str, int], ...]:
    """What made a sequence: (snapshot, its first token), more than one after an ASYNC hotload."""
    return tuple((one.snapshot.rpartition("/")[2], one.first_token) for one in sequence.made_by)


def stop_reason(
    sequence: sampling_service_pb2.SampledSequence | sampling_service_pb2.SampledTokens,
) -> str:
    """Tinker's word for why a sequence ended."""
    length = sequence.stop_reason == sampling_service_pb2.STOP_REASON_LENGTH
    return "length" if length else "stop"


def _optional(array: Any) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in array]


def load_tokenizer(source: Any) -> Any:
    """A Hugging Face tokenizer from a folder or id; a tokenizer object is returned as it is.

    Raises:
        ValueError: There is no source, or no tokenizer in it.
    """
    if source is None or source == "":
        raise ValueError("no tokenizer: pass tokenizer=, or tokenizer_model= to the service")
    if not isinstance(source, str):
        return source
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ImportError(
            "tokenizers are loaded by transformers, which is not installed; install it, or pass "
            "a tokenizer object as tokenizer="
        ) from None
    try:
        _check_folder(Path(source))
        # Without this transformers would ask at the terminal whether to run the folder's code.
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # the folder's files decide what is raised
        raise ValueError(
            f"no tokenizer in {source!r}; pass tokenizer=, or tokenizer_model= to the service: "
            f"{str(error).partition(chr(10))[0]}"
        ) from error


def _check_folder(folder: Path) -> None:
    """Refuse a folder with a pipe or a device in it: whoever reads one waits."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError(f"{path.name} is no regular file")


async def set_pin(
    target: Target, holder: str, *, release: bool = False, patience_s: float | None = None
) -> None:
    """Keep a snapshot loaded, or let it go."""
    await target.transport.call(
        "DeploymentService/PinSnapshot",
        deployment_service_pb2.PinSnapshotRequest(
            deployment=target.deployment, snapshot=target.snapshot, holder=holder, release=release
        ),
        deployment_service_pb2.PinSnapshotResponse,
        patience_s=patience_s,
    )


def release_pin(target: Target, holder: str, pid: int) -> None:
    """Let a pinned snapshot go, in the background; only in the process that pinned it."""
    if pid != os.getpid():
        return

    def log(done: concurrent.futures.Future[None]) -> None:
        if done.exception() is not None:
            logger.info("pin on %s not released: %s", target.snapshot, done.exception())

    released = set_pin(target, holder, release=True, patience_s=_RELEASE_PATIENCE_S)
    transport.run(released).add_done_callback(log)


def follow(work: Any, future: APIFuture[Any]) -> None:
    """Run a coroutine in the background; its end becomes the future's."""
    running = transport.run(work)

    def finish(done: concurrent.futures.Future[Any]) -> None:
        if done.cancelled():
            transport.deliver(future.finish_cancelled)
            return
        error = done.exception()
        outcome = done.result() if error is None else None
        transport.deliver(future.finish, outcome, error)

    running.add_done_callback(finish)

    def cancel() -> bool:
        running.cancel()
        return future.finish_cancelled()

    future._canceller = cancel


def deployment_target(
    inference_url: str | None, model: str | None, tokenizer: Any, api_key: str | None = None
) -> Target:
    """A deployment by the id, name or resource path users know it by."""
    if not model:
        raise ValueError("model: give the deployment's id")
    endpoint = addresses.resolve(inference_url)
    return target_on(
        transport.connect(endpoint.address, access=access_of(api_key)), model, tokenizer
    )


def target_on(daemon: Transport, model: str, tokenizer: Any) -> Target:
    """A deployment of a daemon, by the id, name or resource path users know it by."""
    name = model.rpartition("#")[2]
    name = name if name.startswith("deployments/") else f"deployments/{name.rpartition('/')[2]}"
    source = tokenizer if isinstance(tokenizer, str) else ""
    return Target(daemon, name, tokenizer=source, lease=Lease(daemon))
