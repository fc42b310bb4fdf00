"""DeploymentSampler: FireTitan's own sampler, tokens in, tokens and both kinds of logprobs out.

Knows: completions, chat templates, metrics. Must not know: how a deployment is made or brought to
a snapshot.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from firetitan.v1 import sampling_service_pb2

from firetitan_client import address as addresses
from firetitan_client import routing, types
from firetitan_client.concurrency import (
    AdaptiveConcurrencyController,
    FixedConcurrencyController,
    SamplingConcurrencyController,
)
from firetitan_client.errors import (
    Busy,
    ClientClosed,
    DaemonNotRunning,
    FiretitanError,
    Unavailable,
    Unsupported,
)
from firetitan_client.futures import APIFuture, SelfFuture, completed
from firetitan_client.sample_requests import (
    Target,
    build_request,
    deployment_target,
    follow,
    load_tokenizer,
    send,
    stop_reason,
)
from firetitan_client.sdk_errors import DeploymentSamplerTimeoutError, SamplingRequestError
from firetitan_client.server_metrics import ServerMetrics


@dataclass(frozen=True)
class SampledCompletion:
    """One completion, prompt included in `full_tokens`."""

    text: str
    full_tokens: list[int]
    prompt_len: int
    finish_reason: str = "unknown"
    completion_len: int = 0
    inference_logprobs: list[float] | None = None
    """The model's own, at temperature 1, one a completion token."""
    sampling_logprobs: list[float] | None = None
    """Of the distribution sampled from; what importance ratios need."""
    logprobs_echoed: bool = False
    routing_matrices: list[str] | None = None
    """Where asked for: entry j tells the experts of position `prompt_len - 1 + j`, which drew
    completion token j. None for a dense model."""
    snapshot: str = ""
    """What made it; empty: the base model."""


@dataclass(frozen=True)
class SampledRequestResult:
    """What `sample_with_prompt_tokens_result` gives."""

    completions: list[SampledCompletion] = field(default_factory=list)
    metrics: ServerMetrics = field(default_factory=ServerMetrics)


class DeploymentSampler(SelfFuture[Target]):
    """A deployment in FireTitan's own shape: tokens, both kinds of logprobs, metrics.

    Args:
        inference_url: Address of the daemon; None finds it.
        model: The deployment's id.
        api_key: Ignored on a Unix socket.
        tokenizer: Tokenizer, folder or id; for texts.
        concurrency_controller: Its `acquire` and `release` surround each request; None: a new
            AdaptiveConcurrencyController.
        max_concurrency: Deprecated: a FixedConcurrencyController of this size, where no controller
            is given.
        additional_headers: Ignored.
        ready: Instead of an address and an id: done once the deployment serves.
    """

    def __init__(
        self,
        inference_url: str | None = None,
        model: str | None = None,
        api_key: str | None = None,
        tokenizer: Any = None,
        concurrency_controller: Any = None,
        max_concurrency: int | None = None,
        additional_headers: Any = None,
        *,
        ready: APIFuture[Target] | None = None,
        request_context: Any = None,
    ) -> None:
        self._ready = ready or completed(deployment_target(inference_url, model, tokenizer))
        self._source = tokenizer
        self._loaded: Any = None
        if max_concurrency is not None:
            warnings.warn(
                "max_concurrency is deprecated; pass "
                "concurrency_controller=FixedConcurrencyController(n)",
                DeprecationWarning,
                stacklevel=2,
            )
        self.concurrency_controller: SamplingConcurrencyController = (
            concurrency_controller or _controller(max_concurrency)
        )
        self._metrics: list[ServerMetrics] = []
        self._closed = False

    @property
    def model(self) -> str:
        """The deployment's id."""
        return self._opened.deployment.rpartition("/")[2]

    @property
    def base_url(self) -> str:
        """The daemon's address, for another process's `DeploymentSampler(inference_url=...)`."""
        return addresses.Endpoint(self._opened.transport.address).base_url

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; None where there is nothing to load one from."""
        source = self._source or self._opened.tokenizer
        if self._loaded is None and source:
            self._loaded = load_tokenizer(source)
        return self._loaded

    async def sample_with_tokens(
        self,
        messages: Sequence[Any],
        n: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        max_seq_len: int | None = None,
        **options: Any,
    ) -> list[SampledCompletion]:
        """Continue a conversation; the chat template is applied here.

        Args:
            messages: `{"role": ..., "content": ...}`.
            n: Completions.
            max_tokens: New tokens at most; None: 1024, or what the prompt leaves of the context.
            temperature: 0 takes the most likely token.
            max_seq_len: Prompts this long give nothing, longer completions are dropped.
            options: As `sample_with_prompt_tokens`.

        Raises:
            ValueError: No tokenizer.
        """
        await self._ready
        if self.tokenizer is None:
            raise ValueError("sample_with_tokens needs a tokenizer; pass tokenizer=")
        prompt = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return await self.sample_with_prompt_tokens(
            prompt,
            n,
            max_tokens=max_tokens,
            temperature=temperature,
            max_seq_len=max_seq_len,
            **options,
        )

    async def sample_with_prompt_tokens(
        self,
        prompt_token_ids: Sequence[int],
        n: int = 1,
        max_tokens: int | None = None,
        temperature: float = 1.0,
        max_seq_len: int | None = None,
        stop: Any = None,
        prompt_cache_key: str | None = None,
        *,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        http_timeout: float | None = 600,
        logprobs: Any = None,
        include_routing_matrix: bool = False,
        **options: Any,
    ) -> list[SampledCompletion]:
        """Continue a prompt, tokens in, tokens out.

        Args:
            prompt_token_ids: The prompt.
            n: Completions; the prompt is computed once.
            max_tokens: New tokens at most; None: 1024, or what the prompt leaves of the context.
            temperature: 0 takes the most likely token.
            max_seq_len: Prompts this long give nothing, longer completions are dropped.
            stop: Texts or token ids.
            prompt_cache_key: Ignored.
            top_p: Nucleus.
            top_k: Candidates; 0: all.
            seed: Completion j draws from stream (seed, j).
            http_timeout: Seconds for one try.
            logprobs: Ignored: both kinds are always there.
            include_routing_matrix: Also return which experts each token went to.
            options: `echo`, `top_logprobs`, `images` and their kin are refused where they ask for
                something.

        Raises:
            DeploymentSamplerTimeoutError: No try ended within `http_timeout`; a TimeoutError.
            SamplingRequestError: The daemon or the worker did not answer in all tries.
            FiretitanError: What another try would not change, by reason.
        """
        _refuse(options)
        if self._closed:
            raise ClientClosed("this sampler is closed; create a new one")
        prompt = [int(token) for token in prompt_token_ids]
        if max_seq_len is not None and len(prompt) >= max_seq_len:
            return []
        params = types.FiretitanSamplingParams(
            max_tokens,
            seed,
            stop,
            temperature,
            top_k if top_k else -1,
            top_p,
            include_routing_matrix=include_routing_matrix,
        )
        request = build_request(prompt, n, params)
        target = await self._ready
        await self.concurrency_controller.acquire()
        metrics: ServerMetrics | None = None
        try:
            future: APIFuture[sampling_service_pb2.SampleResponse] = APIFuture("sample")
            follow(send(target, request, http_timeout), future)
            response = await future
            metrics = _metrics(response, len(prompt))
        except FiretitanError as error:
            metrics = ServerMetrics(
                http_status_code=error.status_code, transport_error=isinstance(error, Unavailable)
            )
            self._given_up(metrics)
            failure = _failure(error, self.model)
            if failure is None:
                raise
            raise failure from error
        finally:
            self.concurrency_controller.release(metrics)
        self._metrics.append(metrics)
        made = [self._completion(prompt, one, response.snapshot) for one in response.sequences]
        return [one for one in made if max_seq_len is None or len(one.full_tokens) <= max_seq_len]

    async def sample_with_prompt_tokens_result(
        self, prompt_token_ids: Sequence[int], **options: Any
    ) -> SampledRequestResult:
        """As `sample_with_prompt_tokens` with n=1, with its metrics.

        Raises:
            ValueError: n other than 1, or a prompt of `max_seq_len` tokens or more.
        """
        if options.pop("n", 1) != 1:
            raise ValueError("sample_with_prompt_tokens_result makes one completion; leave out n")
        limit = options.get("max_seq_len")
        if limit is not None and len(prompt_token_ids) >= limit:
            raise ValueError(f"prompt: has {len(prompt_token_ids)} tokens, max_seq_len is {limit}")
        completions = await self.sample_with_prompt_tokens(prompt_token_ids, 1, **options)
        return SampledRequestResult(completions, self._metrics[-1])

    def _given_up(self, metrics: ServerMetrics) -> None:
        note = getattr(self.concurrency_controller, "note_retry_exhausted", None)
        if note is not None:
            note(metrics)

    def drain_metrics(self) -> list[ServerMetrics]:
        """What the requests since the last call cost."""
        drained, self._metrics = self._metrics, []
        return drained

    def close(self) -> None:
        """Refuse further calls."""
        self._closed = True

    def _completion(
        self, prompt: list[int], sequence: sampling_service_pb2.SampledSequence, snapshot: str
    ) -> SampledCompletion:
        tokens = np.frombuffer(sequence.token_ids, "<i4").tolist()
        text = self.tokenizer.decode(tokens) if self.tokenizer is not None else ""
        return SampledCompletion(
            text=text,
            full_tokens=prompt + tokens,
            prompt_len=len(prompt),
            finish_reason=stop_reason(sequence),
            completion_len=len(tokens),
            inference_logprobs=np.frombuffer(sequence.inference_logprobs, "<f4").tolist(),
            sampling_logprobs=np.frombuffer(sequence.sampling_logprobs, "<f4").tolist(),
            routing_matrices=routing.texts_of(sequence.routing_matrices),
            snapshot=snapshot.rpartition("/")[2],
        )

    def __repr__(self) -> str:
        if not self._ready.done() or self._ready.exception(0) is not None:
            return "<DeploymentSampler not ready>"
        return f"<DeploymentSampler {self.model} at {self._opened.transport.address}>"


def _controller(max_concurrency: int | None) -> SamplingConcurrencyController:
    if max_concurrency is None:
        return AdaptiveConcurrencyController()
    return FixedConcurrencyController(max_concurrency)


def _failure(error: FiretitanError, model: str) -> SamplingRequestError | None:
    """The documented error of a request that all tries did not help; None: it is its own."""
    if isinstance(error, DaemonNotRunning) or not isinstance(error, Unavailable | Busy):
        return None
    late = error.reason == "DEADLINE_EXCEEDED"
    kind = DeploymentSamplerTimeoutError if late else SamplingRequestError
    failure = kind(
        f"Sampling from {model!r} failed after all tries: {error}",
        model=model,
        final_status=504 if late else error.status_code,
        final_error_kind=error.reason,
        context=error.metadata,
    )
    failure.reason, failure.retry_after_s = error.reason, error.retry_after_s
    return failure


def _metrics(response: sampling_service_pb2.SampleResponse, prompt_tokens: int) -> ServerMetrics:
    return ServerMetrics(
        prefill_queue_duration=response.queue_duration.ToTimedelta().total_seconds(),
        prefill_duration=response.prefill_duration.ToTimedelta().total_seconds(),
        prompt_tokens=prompt_tokens,
        completion_tokens=sum(len(one.token_ids) // 4 for one in response.sequences),
    )


_LATER = ("echo", "echo_last", "top_logprobs", "images", "raw_output")
_IGNORED = ("sampling_context", "timeout_diagnostic_context")


def _refuse(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name in _LATER and value:
            raise Unsupported(f"{name}={value!r} is not supported yet; leave it out", field=name)
        if name not in _LATER and name not in _IGNORED and value is not None:
            raise TypeError(f"sampling got an unexpected keyword argument {name!r}")
