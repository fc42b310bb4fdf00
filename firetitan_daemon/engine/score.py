"""What a model says of a prompt: logprobs of its own tokens, of the likeliest, of given ones.

Knows: rows of logits, how a request wants them read. Must not know: models, caches, batches. Rows
come one by one, so that no score depends on how many there are.

Shape legend: `P` prompt tokens, `V` vocabulary, `K` given tokens a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import Float32Array, Int32Array, Int64Array
from firetitan_daemon.engine.draw import (
    Distribution,
    DrawParams,
    normalizer,
    token_logprobs,
    top_tokens,
    uniform,
)
from firetitan_daemon.engine.sample_api import PromptScores, SampleRequest, TokenLogprobs

NOT_SCORED = -99999.0
_MOST_CELLS = 1 << 25
"""Tokens and logprobs of one kind that one answer may hold."""
_MOST_DRAWS = 1 << 18
"""Alternatives that one answer may hold: they are drawn one by one, while nobody else is served."""


@dataclass(frozen=True)
class Scoring:
    """What a request asks of its prompt; equal ones give equal scores of equal prompts."""

    logprobs: bool = False
    top_k: int = 0
    last_n: int = 0
    targets: bytes = b""
    """int64 [P - 1, K]."""
    alternatives: int = 0
    temperature: float = 1.0
    """Of the alternatives; 1 without any."""
    seed: int = 0
    """Of the alternatives; 0 without any."""

    def __bool__(self) -> bool:
        return bool(self.logprobs or self.top_k or self.targets or self.alternatives)


NOTHING = Scoring()


def scoring_of(request: SampleRequest) -> Scoring:
    """What a checked request asks of its prompt."""
    targets, draws = request.target_prompt_logprobs, request.prompt_alt_tokens_k
    return Scoring(
        logprobs=request.prompt_logprobs,
        top_k=request.topk_prompt_logprobs,
        last_n=request.prompt_logprobs_last_n,
        targets=b"" if targets is None else targets.tobytes(),
        alternatives=draws,
        temperature=request.temperature if draws else 1.0,
        seed=request.seed if draws else 0,
    )


def check_scoring(request: SampleRequest, vocab_size: int) -> None:
    """Refuse what cannot be scored.

    Raises:
        FiretitanError: INVALID_ARGUMENT naming the field.
    """
    length = len(request.prompt)
    for field, positions, most in (
        ("topk_prompt_logprobs", length, _MOST_CELLS),
        ("topk_sample_logprobs", request.num_samples * request.max_tokens, _MOST_CELLS),
        ("prompt_alt_tokens_k", length - 1, _MOST_DRAWS),
    ):
        value = getattr(request, field)
        if value < 0:
            raise _invalid(field, f"is {value}; 0 or more")
        if field != "prompt_alt_tokens_k" and value > vocab_size:
            raise _invalid(field, f"is {value}; at most {vocab_size}, the vocabulary")
        if value * positions > most:
            raise _invalid(
                field,
                f"is {value}, for {positions} positions; at most {most // positions} for so many",
            )
    last_n = request.prompt_logprobs_last_n
    if last_n:
        if not (request.prompt_logprobs or request.topk_prompt_logprobs):
            raise _invalid("prompt_logprobs_last_n", "needs prompt_logprobs; ask for them too")
        if not 1 <= last_n <= length - 1:
            raise _invalid(
                "prompt_logprobs_last_n",
                f"is {last_n}; 1 to {length - 1}, the prompt's tokens behind the first",
            )
    targets = request.target_prompt_logprobs
    if targets is not None:
        if targets.ndim != 2 or len(targets) != length - 1 or not targets.shape[1]:
            raise _invalid(
                "target_prompt_logprobs",
                f"has shape {list(targets.shape)}; give [{length - 1}, K], a row for each of the "
                "prompt's tokens but the first",
            )
        outside = np.argwhere((targets < -1) | (targets >= vocab_size))
        if len(outside):
            row, column = outside[0].tolist()
            raise _invalid(
                f"target_prompt_logprobs[{row}, {column}]",
                f"is {targets[row, column]}; the vocabulary has tokens 0 to {vocab_size - 1}, and "
                "-1 asks for nothing",
            )
    if request.max_tokens == 0 and not scoring_of(request):
        raise _invalid(
            "max_tokens", "is 0, which only scores the prompt; ask for its logprobs, or give 1"
        )


class PromptScorer:
    """Collects the scores of one prompt, position by position.

    Args:
        prompt: The prompt, shape [P].
        wanted: What to collect.
    """

    def __init__(self, prompt: Int32Array, wanted: Scoring) -> None:
        length = len(prompt)
        self._prompt = prompt
        self._wanted = wanted
        self._first = length - wanted.last_n if wanted.last_n else 1
        self._logprobs = np.full(length, np.nan, np.float32) if wanted.logprobs else None
        self._top = _unscored(length, wanted.top_k)
        self._alternatives = _unscored(length - 1, wanted.alternatives)
        columns = len(wanted.targets) // (8 * (length - 1)) if wanted.targets else 0
        self._target_ids = np.frombuffer(wanted.targets, np.int64).reshape(length - 1, columns)
        self._targets = np.zeros(self._target_ids.shape, np.float32)

    @property
    def first(self) -> int:
        """First position whose logits are needed; P where none are."""
        if not self._wanted:
            return len(self._prompt)
        return 1 if self._wanted.targets or self._wanted.alternatives else self._first

    def take(self, position: int, logits_V: Float32Array) -> None:
        """Score one position.

        Args:
            position: 1 to P - 1.
            logits_V: What the model says of it, from the positions before.
        """
        largest, log_mass = normalizer(logits_V)

        def raw(tokens: Int32Array | Int64Array | int) -> npt.NDArray[np.float64]:
            return np.asarray(logits_V[tokens] - largest, np.float64) - log_mass

        if position >= self._first:
            if self._logprobs is not None:
                self._logprobs[position] = raw(int(self._prompt[position]))
            if self._wanted.top_k:
                ids = top_tokens(logits_V, self._wanted.top_k)
                self._top.token_ids[position] = ids
                self._top.logprobs[position] = raw(ids)
        if self._wanted.targets:
            row = self._target_ids[position - 1]
            asked = row >= 0
            self._targets[position - 1, asked] = raw(row[asked])
        if self._wanted.alternatives:
            distribution = Distribution(logits_V, DrawParams(self._wanted.temperature))
            # Samples have streams from 0 up; these have the ones from the other end.
            numbers = (
                uniform(self._wanted.seed, -1 - index, position)
                for index in range(self._wanted.alternatives)
            )
            tokens = np.array([distribution.draw(one).token for one in numbers], np.int32)
            self._alternatives.token_ids[position - 1] = tokens
            self._alternatives.logprobs[position - 1] = raw(tokens)

    def scores(self) -> PromptScores:
        """What was collected."""
        return PromptScores(
            self._logprobs,
            self._top if self._wanted.top_k else None,
            self._targets if self._wanted.targets else None,
            self._alternatives if self._wanted.alternatives else None,
        )


def top_logprobs(logits_V: Float32Array, count: int) -> TokenLogprobs:
    """The likeliest tokens of one new position, [1, count].

    Args:
        logits_V: Its logits, shape [V].
        count: How many.
    """
    ids = top_tokens(logits_V, count)
    return TokenLogprobs(ids[None], token_logprobs(logits_V, ids).astype(np.float32)[None])


def joined(positions: Sequence[TokenLogprobs]) -> TokenLogprobs:
    """Several positions as one."""
    return TokenLogprobs(
        np.concatenate([one.token_ids for one in positions]),
        np.concatenate([one.logprobs for one in positions]),
    )


def _unscored(positions: int, count: int) -> TokenLogprobs:
    return TokenLogprobs(
        np.zeros((positions, count), np.int32),
        np.full((positions, count), NOT_SCORED, np.float32),
    )


def _invalid(field: str, what: str) -> FiretitanError:
    return FiretitanError(Reason.INVALID_ARGUMENT, f"{field}: {what}", field=field)
