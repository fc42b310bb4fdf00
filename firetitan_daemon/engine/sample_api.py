"""What a sampling engine is: the seam between a sampler's worker and the numbers.

Knows: numpy arrays, plain dataclasses, paths. Must not know: torch, protobuf, gRPC, the daemon.
`hf` and `toy` pass one contract suite, as the training engines of `engine/api.py` do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from firetitan_daemon.core.model_records import ModelInfo
from firetitan_daemon.core.records import HotloadTransition
from firetitan_daemon.engine.api import Float32Array, Int32Array, Int64Array, SnapshotLayer


class StopReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class SampleRequest:
    """A prompt and how to continue it `num_samples` times; sample j draws from stream (seed, j)."""

    prompt: Int32Array
    num_samples: int
    max_tokens: int
    """0 only scores the prompt."""
    seed: int
    temperature: float = 1.0
    """0 takes the most likely token."""
    top_k: int = 0
    """0 or less: off."""
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    use_eos: bool = True
    """Also stop at the model's end-of-sequence tokens."""
    prompt_logprobs: bool = False
    routing: bool = False
    """Also return the experts that tokens went to; dense models have none to return."""
    prompt_routing: bool = False
    """Also return those of the prompt's tokens."""
    topk_prompt_logprobs: int = 0
    """So many of the likeliest tokens of each position of the prompt."""
    target_prompt_logprobs: Int64Array | None = None
    """[P - 1, K]: tokens to score at position i + 1; -1 asks for nothing."""
    prompt_logprobs_last_n: int = 0
    """Only so many positions at the prompt's end, for the first two; 0: all."""
    topk_sample_logprobs: int = 0
    """So many of the likeliest tokens of each new position."""
    prompt_alt_tokens_k: int = 0
    """So many draws at the temperature beside each token of the prompt but the first."""
    snapshot: str | None = None
    """Run under this snapshot; None takes the active one when the first token is computed."""


@dataclass(frozen=True)
class TokenLogprobs:
    """k tokens and their raw logprobs at each of n positions."""

    token_ids: Int32Array
    """[n, k]; 0 where a position was not scored."""
    logprobs: Float32Array
    """[n, k]; -99999 where a position was not scored."""


@dataclass(frozen=True)
class PromptScores:
    """What the model says of a prompt of P tokens; None for what was not asked for."""

    logprobs: Float32Array | None = None
    """[P], raw; NaN at position 0 and where not scored."""
    top: TokenLogprobs | None = None
    """P positions, likeliest first."""
    targets: Float32Array | None = None
    """[P - 1, K], row i about position i + 1; 0 where nothing was asked for."""
    alternatives: TokenLogprobs | None = None
    """P - 1 positions, row i about position i + 1, in the order drawn."""

    @property
    def num_bytes(self) -> int:
        """Memory of the arrays."""
        tables = [each for each in (self.top, self.alternatives) if each is not None]
        arrays = [each for each in (self.logprobs, self.targets) if each is not None]
        return sum(each.nbytes for each in arrays) + sum(
            each.token_ids.nbytes + each.logprobs.nbytes for each in tables
        )


@dataclass(frozen=True)
class SnapshotRange:
    """The weights that made some tokens of a sequence, up to the next range."""

    snapshot: str
    """Empty: the base model's own weights."""
    first_token: int


@dataclass(frozen=True)
class SampledSequence:
    """The new tokens, the stop token or stop string included."""

    token_ids: Int32Array
    sampling_logprobs: Float32Array
    """Of the distribution sampled from: after temperature, renormalised over top-k and top-p."""
    inference_logprobs: Float32Array
    """The model's own, at temperature 1. Equal to the former where nothing truncates."""
    stop_reason: StopReason
    routing: Sequence[bytes] = ()
    """Where asked for: per new token the routing matrix of the position that it was drawn at, the
    first one that of the prompt's last token."""
    top_logprobs: TokenLogprobs | None = None
    """One position a token, likeliest first; None where not asked for."""
    made_by: tuple[SnapshotRange, ...] = ()
    """In order; more than one where the sequence went over to other weights."""


@dataclass(frozen=True)
class SampleTimes:
    """Where the time of a request went, in seconds."""

    queue_s: float
    """Until the prompt's turn came."""
    prefill_s: float
    first_token_s: float
    """From the beginning of `queue_s` to the first token."""
    generation_queue_s: float
    """From the first token to the last sequence's place in the batch."""
    generation_s: float
    """From the first token to the end."""


@dataclass(frozen=True)
class SampleResult:
    """Every answer names what made it."""

    sequences: list[SampledSequence]
    snapshot: str
    """What made the last token. Empty: the base model's own weights."""
    prompt: PromptScores
    times: SampleTimes
    cached_prompt_tokens: int
    """Tokens of the prompt that were not computed again."""
    num_concurrent: int
    """Requests in the engine when this one's turn came, itself included."""
    prompt_routing: Sequence[bytes] = ()
    """Where asked for: the routing matrix of each prompt token."""


@dataclass(frozen=True)
class NewTokens:
    """What one sequence of a running request has got since it was last told of."""

    sequence: int
    """Which sample of the request."""
    first_token: int
    """Place of the first of these tokens in the sequence."""
    token_ids: Int32Array
    sampling_logprobs: Float32Array
    inference_logprobs: Float32Array
    stop_reason: StopReason | None
    """Set with the sequence's last token."""
    snapshot: str
    """What made these tokens."""
    routing: Sequence[bytes] = ()
    """As in `SampledSequence`, one a token."""
    top_logprobs: TokenLogprobs | None = None


Progress = Callable[[Sequence[NewTokens]], None]
"""Told of new tokens as they come, in the engine's thread: hand them on and return."""


class SampleEngine(Protocol):
    """One model, several versions of its weights, many requests in one running batch."""

    @property
    def info(self) -> ModelInfo:
        """The loaded model."""

    @property
    def active(self) -> str:
        """Name of the snapshot new requests take; empty for the base model."""

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the snapshots a request can still name."""

    def apply(
        self,
        layers: Sequence[SnapshotLayer],
        *,
        keep: Sequence[str] = (),
        transition: HotloadTransition = HotloadTransition.FINISH,
        keep_prompts: bool = False,
    ) -> None:
        """Build the weights of the last layer beside the live ones, verify, then swap.

        Afterwards only the new snapshot, those in `keep` and those with running sequences stay
        loaded. On failure what was served before is served on.

        Args:
            layers: From a base, or a delta whose parent is loaded, to what is to be served.
            keep: Snapshots that requests may still name.
            transition: What becomes of running sequences; those of requests that name their
                snapshot end on it in any case.
            keep_prompts: Keep prompts computed under snapshots that can still be named.

        Raises:
            FiretitanError: CHECKSUM_MISMATCH, CHAIN_BROKEN.
        """

    def prepare(self, layers: Sequence[SnapshotLayer]) -> None:
        """Build the weights of the last layer and verify them; no request can run on them yet.

        An `apply` of the same snapshot takes them; anything else that changes what is loaded drops
        them.

        Raises:
            FiretitanError: As `apply`.
        """

    def retain(self, keep: Sequence[str]) -> None:
        """Drop the snapshots that are neither active nor in `keep`, nor have running sequences."""

    def submit(
        self, request: SampleRequest, progress: Progress | None = None
    ) -> Future[SampleResult]:
        """Queue a request; cancelling the future removes it from the batch.

        Args:
            request: What to sample.
            progress: Told of every token before the future ends.

        Raises:
            FiretitanError: INVALID_ARGUMENT, SNAPSHOT_NOT_ACTIVE.
        """

    def close(self) -> None:
        """Fail what is queued and free the memory."""
