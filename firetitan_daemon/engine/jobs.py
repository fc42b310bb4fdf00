"""One sample request on its way: its sequences, their tokens so far, what is told of them.

Knows: requests, drawing, stopping. Must not know: the queue, the batch, how a model computes.
Owner: the thread that runs the model.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from firetitan_daemon.engine.api import Float32Array
from firetitan_daemon.engine.decode import Branch, Prefill
from firetitan_daemon.engine.draw import Drawn, DrawParams, draw, uniform
from firetitan_daemon.engine.sample_api import (
    NewTokens,
    Progress,
    SampledSequence,
    SampleRequest,
    SampleResult,
    SampleTimes,
    SnapshotRange,
    StopReason,
    TokenLogprobs,
)
from firetitan_daemon.engine.score import joined, top_logprobs
from firetitan_daemon.engine.stops import Decode, StopStrings
from firetitan_daemon.engine.versions import Version


@dataclass
class Row:
    """One sample on its way."""

    index: int
    stops: StopStrings | None
    tokens: list[int] = field(default_factory=list)
    sampling: list[float] = field(default_factory=list)
    inference: list[float] = field(default_factory=list)
    routing: list[bytes] = field(default_factory=list)
    """Stays empty where it was not asked for, and in dense models."""
    top: list[TokenLogprobs] = field(default_factory=list)
    made_by: list[SnapshotRange] = field(default_factory=list)
    stop_reason: StopReason | None = None

    def sequence(self) -> SampledSequence:
        """What it came to; it has ended."""
        assert self.stop_reason is not None
        return SampledSequence(
            np.array(self.tokens, np.int32),
            np.array(self.sampling, np.float32),
            np.array(self.inference, np.float32),
            self.stop_reason,
            self.routing,
            joined(self.top) if self.top else None,
            tuple(self.made_by),
        )

    def add(self, drawn: Drawn, snapshot: str) -> None:
        """Add a token.

        Args:
            drawn: The token.
            snapshot: Whose logits it was drawn from.
        """
        if not self.made_by or self.made_by[-1].snapshot != snapshot:
            self.made_by.append(SnapshotRange(snapshot, len(self.tokens)))
        self.tokens.append(drawn.token)
        self.sampling.append(drawn.sampling_logprob)
        self.inference.append(drawn.inference_logprob)

    def news(self, snapshot: str) -> NewTokens:
        """Its last token; none where it ends without any."""
        return NewTokens(
            self.index,
            max(0, len(self.tokens) - 1),
            np.array(self.tokens[-1:], np.int32),
            np.array(self.sampling[-1:], np.float32),
            np.array(self.inference[-1:], np.float32),
            self.stop_reason,
            snapshot,
            self.routing[-1:],
            self.top[-1] if self.top else None,
        )


@dataclass(eq=False)
class Job:
    """One request."""

    request: SampleRequest
    future: Future[SampleResult]
    stop_ids: frozenset[int]
    submitted: float
    progress: Progress | None = None
    version: Version | None = None
    prefill: Prefill | None = None
    prefilled_by: str = ""
    """The snapshot that computed the prompt, and so the logits of every first token."""
    cached_prompt_tokens: int = 0
    num_concurrent: int = 1
    prefill_began: float = 0.0
    first_token: float = 0.0
    joined: float = 0.0
    rows: list[Row] = field(default_factory=list)

    @property
    def begun(self) -> bool:
        """Whether every sample has joined the batch."""
        return len(self.rows) == self.request.num_samples

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        return self.begun and all(row.stop_reason is not None for row in self.rows)

    def add_rows(self, count: int, decode_text: Decode | None) -> list[Row]:
        """Begin the next samples.

        Args:
            count: How many.
            decode_text: For stop strings; None where the request was checked to have none.
        """
        first = len(self.rows)
        rows = [Row(index, self._stops(decode_text)) for index in range(first, first + count)]
        self.rows.extend(rows)
        return rows

    def extend(
        self,
        rows: Sequence[Row],
        logits: Iterable[Float32Array],
        routing: Iterable[bytes],
        snapshot: str,
    ) -> None:
        """Draw the next token of some rows.

        Args:
            rows: Rows of this request.
            logits: For each its logits, shape [V].
            routing: For each the routing matrix of the position it is at; none in a dense model.
            snapshot: What computed them.
        """
        if self.request.routing and self.request.max_tokens:
            for row, matrix in zip(rows, routing, strict=False):
                row.routing.append(matrix)
        for row, row_logits in zip(rows, logits, strict=True):
            if self.request.max_tokens:
                self._draw(row, row_logits, snapshot)
            else:
                row.stop_reason = StopReason.LENGTH
        if self.progress is not None:
            self.progress([row.news(snapshot) for row in rows])

    def result(self) -> SampleResult:
        """The answer; every sample has ended."""
        assert self.version is not None and self.prefill is not None
        return SampleResult(
            sequences=[row.sequence() for row in self.rows],
            snapshot=max(self.rows, key=lambda row: len(row.made_by)).made_by[-1].snapshot
            if self.request.max_tokens
            else self.prefilled_by,
            prompt=self.prefill.scores,
            times=SampleTimes(
                queue_s=self.prefill_began - self.submitted,
                prefill_s=self.first_token - self.prefill_began,
                first_token_s=self.first_token - self.submitted,
                generation_queue_s=self.joined - self.first_token,
                generation_s=time.monotonic() - self.first_token,
            ),
            cached_prompt_tokens=self.cached_prompt_tokens,
            num_concurrent=self.num_concurrent,
            prompt_routing=self.prefill.routing if self.request.prompt_routing else (),
        )

    def _draw(self, row: Row, logits_V: Float32Array, snapshot: str) -> None:
        request = self.request
        params = DrawParams(request.temperature, request.top_k, request.top_p)
        drawn = draw(logits_V, params, uniform(request.seed, row.index, len(row.tokens)))
        row.add(drawn, snapshot)
        if request.topk_sample_logprobs:
            row.top.append(top_logprobs(logits_V, request.topk_sample_logprobs))
        if drawn.token in self.stop_ids or (row.stops and row.stops.push(drawn.token)):
            row.stop_reason = StopReason.STOP
        elif len(row.tokens) == request.max_tokens:
            row.stop_reason = StopReason.LENGTH

    def _stops(self, decode_text: Decode | None) -> StopStrings | None:
        if not self.request.stop:
            return None
        assert decode_text is not None, "checked when the request came"
        return StopStrings(self.request.stop, decode_text, self.request.prompt.tolist())


@dataclass(eq=False)
class Part:
    """A branch in the running batch."""

    job: Job
    branch: Branch
    rows: list[Row]
    reserved_bytes: int
