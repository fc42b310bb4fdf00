"""DeploymentSampler: FireTitan's own sampler, tokens in, tokens and both kinds of logprobs out.

Knows: concurrency, chat templates, what failures become. Must not know: how a deployment is
made or brought to a snapshot, what a completion looks like (`completions`).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from firetitan.v1 import sampling_service_pb2

from firetitan_client import address as addresses
from firetitan_client import chat_templates, forking
from firetitan_client.completions import (
    CompletionOptions,
    SampledCompletion,
    SampledRequestResult,
    completion,
    response_dict,
)
from firetitan_client.concurrency import (
    AdaptiveConcurrencyController,
    FixedConcurrencyController,
    SamplingConcurrencyController,
)
from firetitan_client.convert import token_list
from firetitan_client.errors import (
    Busy,
    ClientClosed,
    DaemonNotRunning,
    FiretitanError,
    Unavailable,
)
from firetitan_client.futures import APIFuture, SelfFuture, completed
from firetitan_client.limited_requests import send_within
from firetitan_client.sample_requests import (
    Target,
    deployment_target,
    load_tokenizer,
)
from firetitan_client.sdk_errors import DeploymentSamplerTimeoutError, SamplingRequestError
from firetitan_client.server_metrics import ServerMetrics

logger = logging.getLogger("firetitan")


class DeploymentSampler(SelfFuture[Target]):
    """A deployment in FireTitan's own shape: tokens, both kinds of logprobs, metrics.

    Args:
        inference_url: Address of the daemon; None finds it.
        model: The deployment's id.
        api_key: The daemon's token, over TCP; ignored on a Unix socket.
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
        self._ready = ready or completed(
            deployment_target(inference_url, model, tokenizer, api_key)
        )
        self._source = tokenizer
        self._loaded: Any = None
        self._has_texts = True
        self._after_fork()
        forking.on_fork(self)
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

    def _after_fork(self) -> None:
        """In a child: a thread of the parent may be loading."""
        self._loading = threading.Lock()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a DeploymentSampler cannot be pickled: its concurrency controller counts the requests "
            "of one process; make one there: "
            "DeploymentSampler(inference_url=sampler.base_url, model=sampler.model)"
        )

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
        with self._loading:
            if self._loaded is None and source:
                self._loaded = load_tokenizer(source)
        return self._loaded

    async def _decoder(self) -> Any:
        """What makes texts of tokens; None, said once, where only tokens can be had.

        A tokenizer that nobody named is the model's own, and only taken from a folder that is here:
        whoever gives and takes tokens needs none, so nothing is fetched and nothing fails for it.
        """
        if self._loaded is None and self._has_texts:
            await self._load_decoder()
        return self._loaded

    async def _load_decoder(self) -> None:
        folder = (await self._ready).tokenizer
        if not self._source and not _is_folder(folder):
            self._go_without_texts(f"no folder {folder!r} on this machine")
            return
        try:
            await asyncio.to_thread(lambda: self.tokenizer)
        except (ImportError, ValueError) as error:
            if self._source:
                raise
            self._go_without_texts(str(error))

    def _go_without_texts(self, why: str) -> None:
        if self._has_texts:
            self._has_texts = False
            logger.warning(
                "%s: completions have tokens and no text: %s; pass tokenizer=", self.model, why
            )

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
            ValueError: No tokenizer, or a chat template that does not end.
            Unsupported: `images`.
        """
        CompletionOptions.of(options)
        await self._ready
        tokenizer = await asyncio.to_thread(lambda: self.tokenizer)
        if tokenizer is None:
            raise ValueError("sample_with_tokens needs a tokenizer; pass tokenizer=")
        prompt = await chat_templates.apply(tokenizer, messages)
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
        **options: Any,
    ) -> list[SampledCompletion]:
        """Continue a prompt, tokens in, tokens out.

        Args:
            prompt_token_ids: The prompt.
            n: Completions; the prompt is computed once. Completion j draws from stream (seed, j).
            max_tokens: New tokens at most; None: 1024, or what the prompt leaves of the context;
                0 with `echo`: the prompt is only scored.
            temperature: 0 takes the most likely token.
            max_seq_len: Prompts this long give nothing, longer completions are dropped.
            stop: Texts or token ids.
            prompt_cache_key: Ignored: equal prompts are found by themselves.
            options: `top_p`, `top_k` (0: all), `seed`; `echo`: the prompt's logprobs too,
                `echo_last`: those of its last tokens; `top_logprobs`: so many of the likeliest
                tokens of each position, at most 5; `http_timeout`: seconds for one try.
                `logprobs` changes nothing: both kinds are always there. `images` are refused.

        Raises:
            DeploymentSamplerTimeoutError: No try ended within `http_timeout`; a TimeoutError.
            SamplingRequestError: The daemon or the worker did not answer in all tries.
            FiretitanError: What another try would not change, by reason.
        """
        prompt = token_list(prompt_token_ids, "prompt_token_ids")
        asked = CompletionOptions.of(
            {**options, "max_tokens": max_tokens, "temperature": temperature, "stop": stop}
        )
        if max_seq_len is not None and len(prompt) >= max_seq_len:
            return []
        decoder = await self._decoder()
        response, _ = await self._complete(prompt, n, asked)
        made = [
            completion(prompt, response, index, asked, decoder)
            for index in range(len(response.sequences))
        ]
        return [one for one in made if max_seq_len is None or len(one.full_tokens) <= max_seq_len]

    async def sample_with_prompt_tokens_result(
        self,
        prompt_token_ids: Sequence[int],
        max_tokens: int | None = None,
        temperature: float = 1.0,
        max_seq_len: int | None = None,
        stop: Any = None,
        prompt_cache_key: str | None = None,
        **options: Any,
    ) -> SampledRequestResult:
        """As `sample_with_prompt_tokens` for one completion, with what its request cost.

        Raises:
            ValueError: The prompt has `max_seq_len` tokens or more.
        """
        if options.pop("n", 1) != 1:
            raise ValueError("sample_with_prompt_tokens_result makes one completion; leave out n")
        prompt = token_list(prompt_token_ids, "prompt_token_ids")
        asked = CompletionOptions.of(
            {**options, "max_tokens": max_tokens, "temperature": temperature, "stop": stop}
        )
        if max_seq_len is not None and len(prompt) >= max_seq_len:
            raise ValueError(f"prompt: has {len(prompt)} tokens, max_seq_len is {max_seq_len}")
        decoder = await self._decoder()
        began = time.monotonic()
        response, cost = await self._complete(prompt, 1, asked)
        one = completion(prompt, response, 0, asked, decoder)
        fits = max_seq_len is None or len(one.full_tokens) <= max_seq_len
        return SampledRequestResult(
            completions=[one] if fits else [],
            server_metrics=cost,
            logical_request_id=options.get("logical_request_id") or uuid.uuid4().hex,
            attempts=cost.retry_attempt or 1,
            wall_seconds=time.monotonic() - began,
        )

    async def async_completions_stream(
        self,
        prompt: Sequence[int],
        max_tokens: int | None = 1024,
        temperature: float = 1.0,
        **options: Any,
    ) -> tuple[dict[str, Any], ServerMetrics]:
        """One completion in the shape of a completions response.

        Args:
            prompt: Its tokens.
            max_tokens: New tokens at most; 0 with `echo`: the prompt is only scored.
            temperature: 0 takes the most likely token.
            options: As `sample_with_prompt_tokens`; `logprobs`: with
                `choices[0]["logprobs"]["content"]`, one entry a token of `token_id`, `token`,
                `logprob`, `sampling_logprob` (None for echoed tokens) and, with `top_logprobs`,
                those; element 0 of a whole echo is the first token, with logprob 0.
                `raw_output`: with `choices[0]["raw_output"]["completion_token_ids"]`, echoed
                tokens included.

        Returns:
            The response (`choices`, `usage`, `id`, `snapshot`) and what the request cost.

        Raises:
            FiretitanError: As `sample_with_prompt_tokens`.
        """
        if options.pop("n", 1) != 1:
            raise ValueError("async_completions_stream makes one completion; leave out n")
        tokens = token_list(prompt, "prompt")
        asked = CompletionOptions.of(
            {**options, "max_tokens": max_tokens, "temperature": temperature}
        )
        decoder = await self._decoder()
        response, cost = await self._complete(tokens, 1, asked)
        shown = response_dict(
            tokens, response, asked, decoder, logprobs=bool(options.get("logprobs"))
        )
        return shown, cost

    async def _complete(
        self, prompt: list[int], n: int, options: CompletionOptions
    ) -> tuple[sampling_service_pb2.SampleResponse, ServerMetrics]:
        """Send one request, in a place of the controller's window."""
        if self._closed:
            raise ClientClosed("this sampler is closed; create a new one")
        request = options.request(prompt, n)
        target = await self._ready
        try:
            response, cost = await send_within(
                self.concurrency_controller, target, request, len(prompt), options.http_timeout
            )
        except FiretitanError as error:
            failure = _failure(error, self.model)
            if failure is None:
                raise
            raise failure from error
        self._metrics.append(cost)
        return response, cost

    def drain_metrics(self) -> list[ServerMetrics]:
        """What the requests since the last call cost."""
        drained, self._metrics = self._metrics, []
        return drained

    def close(self) -> None:
        """Refuse further calls."""
        self._closed = True

    def __repr__(self) -> str:
        if not self._ready.done() or self._ready.exception(0) is not None:
            return "<DeploymentSampler not ready>"
        return f"<DeploymentSampler {self.model} at {self._opened.transport.address}>"


def _is_folder(path: str) -> bool:
    return bool(path) and Path(path).is_dir()


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
