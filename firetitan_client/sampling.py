"""FiretitanSamplingClient: tinker's sampling calls, as requests to one deployment.

Knows: which call is which request, what users may pass. Must not know: how a deployment is made
or brought to a snapshot.
"""

from __future__ import annotations

import asyncio
import os
import uuid
import weakref
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from firetitan.v1 import sampling_service_pb2

from firetitan_client import transport, types
from firetitan_client.concurrency import SamplingConcurrencyController
from firetitan_client.credentials import access_of
from firetitan_client.deployment_sampler import DeploymentSampler
from firetitan_client.errors import Unsupported
from firetitan_client.futures import APIFuture, SelfFuture, completed
from firetitan_client.leases import Lease
from firetitan_client.limited_requests import send_within
from firetitan_client.prompt_scores import Scores
from firetitan_client.sample_requests import (
    Target,
    build_request,
    deployment_target,
    follow,
    load_tokenizer,
    release_pin,
    sample_response,
    send,
    set_pin,
)
from firetitan_client.sample_stream import SampleStream
from firetitan_client.sampler_handles import SamplerHandle
from firetitan_client.sdk_errors import SamplingClientClosedError
from firetitan_client.transport import Transport

_DRAIN_TIMEOUT_S = 3600.0
_DRAIN_POLL_S = 0.05


class FiretitanSamplingClient(SelfFuture[Target]):
    """Samples from a deployment, in tinker's shape.

    Follows what the deployment serves, or stays with the snapshot that `ready` names. Also the
    future of itself: `client.result(timeout)`, `await client`, `client.future()`.

    Args:
        ready: Done once the deployment serves what was asked for.
        tokenizer: A tokenizer, or what to load one from.
        label: What was asked for, for `repr`.
        concurrency_controller: Its `acquire` and `release` surround each request; None: all run at
            once, the daemon batches them.
    """

    def __init__(
        self,
        ready: APIFuture[Target],
        *,
        tokenizer: Any = None,
        label: str = "",
        concurrency_controller: SamplingConcurrencyController | None = None,
    ) -> None:
        self._ready = ready
        self._given_tokenizer = tokenizer
        self._tokenizer: Any = None
        self._label = label
        self._controller = concurrency_controller
        self._closed = False
        self._unpin: Any = None
        self._deployment_sampler: DeploymentSampler | None = None
        self._in_flight: set[APIFuture[Any]] = set()

    @classmethod
    def create(
        cls,
        inference_url: str | None = None,
        model: str | None = None,
        api_key: str | None = None,
        tokenizer: Any = None,
        concurrency_controller: SamplingConcurrencyController | None = None,
        **_: Any,
    ) -> FiretitanSamplingClient:
        """A client of a deployment that exists, by its id.

        Args:
            inference_url: Address of the daemon; None finds it.
            model: The deployment's id.
            api_key: The daemon's token, over TCP; ignored on a Unix socket.
            tokenizer: Tokenizer, folder or id.
            concurrency_controller: As in the constructor.
        """
        target = deployment_target(inference_url, model, tokenizer, api_key)
        return cls(
            completed(target),
            tokenizer=tokenizer,
            label=target.deployment,
            concurrency_controller=concurrency_controller,
        )

    # Elsewhere

    def get_sampler_handle(self) -> str:
        """A text that opens this sampler in another process; it holds no key."""
        return str(self._handle())

    def _handle(self) -> SamplerHandle:
        target = self._opened
        given = self._given_tokenizer if isinstance(self._given_tokenizer, str) else ""
        return SamplerHandle(
            target.transport.address,
            target.deployment,
            target.snapshot,
            target.base_model,
            given or target.tokenizer,
        )

    @classmethod
    def from_sampler_handle(
        cls, handle: str, *, api_key: str | None = None
    ) -> FiretitanSamplingClient:
        """The sampler that a handle names; one of a pinned client is pinned too.

        Args:
            handle: From `get_sampler_handle`.
            api_key: The daemon's token, over TCP; ignored on a Unix socket.

        Raises:
            ValueError: It is no handle.
        """
        parsed = SamplerHandle.parse(handle)
        return cls._reopened(parsed, transport.connect(parsed.address, access=access_of(api_key)))

    @classmethod
    def _reopened(cls, parsed: SamplerHandle, daemon: Transport) -> FiretitanSamplingClient:
        target = Target(
            daemon,
            parsed.deployment,
            parsed.snapshot,
            parsed.base_model,
            parsed.tokenizer,
            Lease(daemon),
        )
        if not target.snapshot:
            return cls(completed(target), tokenizer=parsed.tokenizer, label=target.deployment)
        ready: APIFuture[Target] = APIFuture("from_sampler_handle")
        client = cls(ready, tokenizer=parsed.tokenizer, label=target.deployment)

        async def hold() -> Target:
            await client.hold_snapshot(target)
            return target

        follow(hold(), ready)
        return client

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as its handle, and where the daemon's credentials are; without the key."""
        return FiretitanSamplingClient._reopened, (self._handle(), self._opened.transport)

    def __repr__(self) -> str:
        if not self._ready.done():
            return f"<FiretitanSamplingClient {self._label} opening>"
        if self._ready.exception(0) is not None:
            return f"<FiretitanSamplingClient {self._label} failed>"
        target = self._ready.result(0)
        bound = f"pinned to {target.snapshot}" if target.snapshot else "follows it"
        return f"<FiretitanSamplingClient {target.deployment} {bound}>"

    # Sampling

    def sample(
        self,
        prompt: Any,
        num_samples: int = 1,
        sampling_params: Any = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: Any = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
        *,
        images: Any = None,
    ) -> APIFuture[Any]:
        """Continue a prompt.

        Args:
            prompt: `tinker.ModelInput` or token ids.
            num_samples: Independent sequences; the prompt is computed once.
            sampling_params: `tinker.SamplingParams`; without max_tokens at most 1024 are made, or
                what the prompt leaves of the context, without a seed one is drawn.
            include_prompt_logprobs: Also the prompt's logprobs, at temperature 1.
            topk_prompt_logprobs: Also so many of the likeliest tokens of each prompt position.
            topk_sample_logprobs: Also so many of the likeliest tokens of each new position, at
                temperature 1.
            target_prompt_logprobs: Also the logprobs of these tokens: int64 [P - 1, K], dense or
                CSR; row i is about prompt position i + 1, -1 asks for nothing.
            prompt_alt_tokens_k: Also so many draws at the temperature beside each prompt token but
                the first; up to 262,144 in all.
            prompt_logprobs_last_n: Score the last so many prompt tokens only; 1 to P - 1, goes
                with the prompt's logprobs and its likeliest tokens.
            images: Not supported.

        Returns:
            A future of `SampleResponse`: `sequences[j].tokens`, `.logprobs` (of the distribution
            sampled from; `.inference_logprobs` are the model's own), and `.snapshot`.
        """
        if images:
            raise Unsupported("images are not supported; give text tokens only", field="images")
        self._check_open()
        scores = Scores(
            include_prompt_logprobs,
            topk_prompt_logprobs,
            topk_sample_logprobs,
            target_prompt_logprobs,
            prompt_alt_tokens_k,
            prompt_logprobs_last_n,
        )
        request = build_request(prompt, num_samples, sampling_params, scores)
        return self._submit("sample", self._sample(request, target_prompt_logprobs))

    def _submit(self, label: str, work: Coroutine[Any, Any, Any]) -> APIFuture[Any]:
        future: APIFuture[Any] = APIFuture(label)
        self._track(future)
        follow(work, future)
        return future

    def _track(self, future: APIFuture[Any]) -> None:
        """Have `close` wait for what ends with this future."""
        self._in_flight.add(future)
        future.add_done_callback(self._in_flight.discard)

    async def _sample(self, request: sampling_service_pb2.SampleRequest, targets: Any) -> Any:
        target = await self._ready
        if self._controller is None:
            response = await send(target, request)
        else:
            prompt_tokens = len(request.prompt.chunks[0].encoded_text.token_ids) // 4
            response, _ = await send_within(self._controller, target, request, prompt_tokens)
        return sample_response(response, request.params.seed, targets)

    async def sample_async(self, *args: Any, **kwargs: Any) -> Any:
        """As `sample`; awaiting it gives the response."""
        return await self.sample(*args, **kwargs)

    def sample_stream(
        self, prompt: Any, num_samples: int = 1, sampling_params: Any = None
    ) -> SampleStream:
        """As `sample`, tokens as they come.

        Args:
            prompt: `tinker.ModelInput` or token ids.
            num_samples: Independent sequences.
            sampling_params: As for `sample`.

        Returns:
            An iterator, also an asynchronous one, of `SampleChunk`.
        """
        self._check_open()
        request = build_request(prompt, num_samples, sampling_params)
        return SampleStream(self._ready, request, self._track)

    def compute_logprobs(
        self, prompt: Any, prompt_logprobs_last_n: int | None = None
    ) -> APIFuture[list[float | None]]:
        """Logprobs of a text's own tokens, at temperature 1; None at position 0.

        Args:
            prompt: `tinker.ModelInput` or token ids, up to as many as the context holds.
            prompt_logprobs_last_n: Of the last so many tokens only; None before them.
        """
        self._check_open()
        scores = Scores(True, prompt_logprobs_last_n=prompt_logprobs_last_n)
        params = types.SamplingParams(max_tokens=0)
        request = build_request(prompt, 1, params, scores, least_tokens=0)
        return self._submit("compute_logprobs", self._compute_logprobs(request))

    async def _compute_logprobs(
        self, request: sampling_service_pb2.SampleRequest
    ) -> list[float | None]:
        found: list[float | None] = (await self._sample(request, None)).prompt_logprobs
        return found

    async def compute_logprobs_async(self, *args: Any, **kwargs: Any) -> list[float | None]:
        """As `compute_logprobs`; awaiting it gives the list."""
        return await self.compute_logprobs(*args, **kwargs)

    # What it is

    def get_tokenizer(self) -> Any:
        """The Hugging Face tokenizer: what was given, else the base model's."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._given_tokenizer or self._opened.tokenizer)
        return self._tokenizer

    def get_base_model(self) -> str:
        """The base model's id or folder."""
        return self._opened.base_model

    async def get_base_model_async(self) -> str:
        """As `get_base_model`."""
        return (await self._ready).base_model

    def get_telemetry(self) -> None:
        """There is none."""

    @property
    def deployment_sampler(self) -> DeploymentSampler:
        """The same deployment in FireTitan's own shape; one object, with this client's window."""
        if self._deployment_sampler is None or self._deployment_sampler._closed:
            self._deployment_sampler = DeploymentSampler(
                ready=self._ready,
                tokenizer=self._given_tokenizer,
                concurrency_controller=self._controller,
            )
        return self._deployment_sampler

    # Pinning and closing

    async def hold_snapshot(self, target: Target) -> None:
        """Keep the snapshot loaded while this client lives; for whoever opens it."""
        holder = uuid.uuid4().hex
        if target.lease is not None:
            await target.lease.hold(target.deployment)
            holder = target.lease.part("pin")
        await set_pin(target, holder)
        self._unpin = weakref.finalize(self, release_pin, target, holder, os.getpid())
        self._unpin.atexit = False

    def close(self, drain_timeout_s: float | None = 3600) -> None:
        """Take no more calls; what runs still ends, in the background. Again is fine.

        Args:
            drain_timeout_s: Seconds after which what still runs ends with
                SamplingClientClosedError; None: 3600.
        """
        if self._closed:
            return
        self._closed = True
        limit_s = _DRAIN_TIMEOUT_S if drain_timeout_s is None else drain_timeout_s
        running = list(self._in_flight)
        if running:
            transport.run(_drain(running, limit_s, self._let_go))
        else:
            self._let_go()

    def _let_go(self) -> None:
        if self._unpin is not None:
            self._unpin()

    def _check_open(self) -> None:
        if self._closed:
            raise SamplingClientClosedError("this sampling client is closed; create a new one")

    def __enter__(self) -> FiretitanSamplingClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def _drain(
    running: Sequence[APIFuture[Any]], limit_s: float, then: Callable[[], None]
) -> None:
    """Wait for calls up to a limit, end the others, then let go of what they needed."""
    deadline = asyncio.get_running_loop().time() + limit_s
    while any(not future.done() for future in running):
        left_s = deadline - asyncio.get_running_loop().time()
        if left_s <= 0:
            break
        await asyncio.sleep(min(_DRAIN_POLL_S, left_s))
    for future in running:
        if not future.done():
            future.finish(
                None,
                SamplingClientClosedError(
                    f"the sampling client was closed and this call did not end within {limit_s:g} s"
                ),
            )
            if future._canceller is not None:
                future._canceller()
    then()
