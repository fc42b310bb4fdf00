"""Draws the next token from one row of logits.

Knows: numpy rows of float32 logits and how a request wants them cut. Must not know: models, torch,
batches. One row is one call, so a token cannot depend on what else runs; the only random number of
a token comes from a hash of (seed, sample, position), so it does not depend on order either.

Shape legend: `V` vocabulary, `K` kept tokens.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import Float32Array, Int32Array

_BLOCK = 256
"""Entries summed at once by the outer level of the inverse CDF."""
_HEAD = 1024
"""Candidates first tried for top-p; doubled fourfold until they hold the mass asked for."""
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class DrawParams:
    """How to cut the distribution; meanings as in `SampleRequest`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class Drawn:
    """A token and what the two distributions say of it."""

    token: int
    sampling_logprob: float
    inference_logprob: float


def uniform(seed: int, sample: int, position: int) -> float:
    """A number in [0, 1) that depends on its three arguments alone.

    Args:
        seed: Seed of the request, any integer of at most 64 bits.
        sample: Index of the sample in its request.
        position: Index of the new token in its sample.
    """
    mask = 0xFFFFFFFFFFFFFFFF
    key = struct.pack("<QQQ", seed & mask, sample & mask, position & mask)
    bits = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    return (bits >> 11) * 2.0**-53


class Distribution:
    """One row of logits, cut as a request wants it, to draw tokens from.

    Temperature, then top-k, then top-p. Ties are broken by the lower token id everywhere. At
    temperature 0 the most likely token is always drawn and both logprobs are the model's own.

    Args:
        logits_V: Logits of one position, shape [V].
        params: How to cut the distribution.

    Raises:
        FiretitanError: NON_FINITE where the row holds NaN, +inf or nothing finite.
    """

    def __init__(self, logits_V: Float32Array, params: DrawParams) -> None:
        top = logits_V.max()
        if not np.isfinite(top):
            raise FiretitanError(
                Reason.NON_FINITE,
                f"the model's logits hold {top}: the weights served are not usable; "
                "load another snapshot",
            )
        self._shifted_V = self._scaled_V = logits_V - top
        self._mass_V = np.exp(self._shifted_V)
        self._cumulative = np.cumsum(_block_sums(self._mass_V))
        self._log_total = self._log_kept = float(np.log(self._cumulative[-1]))
        self._greedy = int(np.argmax(logits_V)) if params.temperature == 0.0 else None
        self._kept_K: np.ndarray | None = None
        if self._greedy is not None:
            return
        if params.temperature != 1.0:
            scale = np.float32(min(1.0 / params.temperature, _LARGEST))
            with np.errstate(over="ignore"):
                self._scaled_V = self._shifted_V * scale
            self._mass_V = np.exp(self._scaled_V)
            self._cumulative = np.cumsum(_block_sums(self._mass_V))
        self._kept_K = _kept(self._scaled_V, self._mass_V, float(self._cumulative[-1]), params)
        if self._kept_K is not None:
            self._cumulative = np.cumsum(self._mass_V[self._kept_K], dtype=np.float64)
        self._log_kept = float(np.log(self._cumulative[-1]))

    def draw(self, number: float) -> Drawn:
        """Choose a token by one step of an inverse CDF.

        Args:
            number: Uniform in [0, 1), from `uniform`.
        """
        if self._greedy is not None:
            token = self._greedy
        elif self._kept_K is None:
            token = _inverse_cdf(self._mass_V, self._cumulative, number)
        else:
            token = int(self._kept_K[_first_above(self._cumulative, number * self._cumulative[-1])])
        return Drawn(
            token,
            float(self._scaled_V[token]) - self._log_kept,
            float(self._shifted_V[token]) - self._log_total,
        )


def draw(logits_V: Float32Array, params: DrawParams, number: float) -> Drawn:
    """Choose one token of a row; see `Distribution`."""
    return Distribution(logits_V, params).draw(number)


def normalizer(logits_V: Float32Array) -> tuple[np.float32, float]:
    """Largest logit, and the log of the summed mass beside it, by the same sums as `draw`.

    The raw logprob of a token is `float(logits_V[token] - largest) - log_mass`.

    Args:
        logits_V: Logits of one position, shape [V].
    """
    largest = logits_V.max()
    cumulative = np.cumsum(_block_sums(np.exp(logits_V - largest)))
    return largest, float(np.log(cumulative[-1]))


def token_logprobs(logits_V: Float32Array, tokens: Int32Array) -> npt.NDArray[np.float64]:
    """Raw logprobs of some tokens, by the same sums as `draw`; shape of `tokens`.

    Args:
        logits_V: Logits of one position, shape [V].
        tokens: Token ids.
    """
    largest, log_mass = normalizer(logits_V)
    return (logits_V[tokens] - largest).astype(np.float64) - log_mass


def top_tokens(logits_V: Float32Array, count: int) -> Int32Array:
    """The `count` likeliest tokens, likeliest first, ties by lower id."""
    return _largest(logits_V, count).astype(np.int32)


def _kept(
    scaled_V: Float32Array, mass_V: Float32Array, total: float, params: DrawParams
) -> np.ndarray | None:
    """Ids kept by top-k and then top-p, ascending; None keeps all.

    Top-p keeps the fewest likeliest tokens whose mass reaches `top_p` of what top-k left.
    """
    vocab = scaled_V.shape[0]
    limit = params.top_k if 0 < params.top_k < vocab else vocab
    if params.top_p >= 1.0:
        return None if limit == vocab else np.sort(_largest(scaled_V, limit))
    width = limit if limit < vocab else min(_HEAD, vocab)
    while True:
        order_K = _largest(scaled_V, width)
        cumulative_K = np.cumsum(mass_V[order_K], dtype=np.float64)
        goal = params.top_p * (total if limit == vocab else cumulative_K[-1])
        if width == limit or cumulative_K[-1] >= goal:
            count = int(np.searchsorted(cumulative_K, goal, side="left")) + 1
            return np.sort(order_K[:count])
        width = min(4 * width, vocab)


def _largest(values_V: Float32Array, count: int) -> np.ndarray:
    """Ids of the `count` largest values, largest first, ties by lower id."""
    vocab = values_V.shape[0]
    if count < vocab:
        threshold = np.partition(values_V, vocab - count)[vocab - count]
        candidates = np.flatnonzero(values_V >= threshold)
    else:
        candidates = np.arange(vocab)
    order = np.argsort(-values_V[candidates], kind="stable")
    return candidates[order][:count]


def _inverse_cdf(mass_V: Float32Array, cumulative: np.ndarray, number: float) -> int:
    """Token at `number` of the mass: first its block, then its place there."""
    goal = number * cumulative[-1]
    block = _first_above(cumulative, goal)
    before = cumulative[block - 1] if block else 0.0
    inner = np.cumsum(mass_V[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64)
    return block * _BLOCK + _first_above(inner, goal - before)


def _first_above(cumulative: np.ndarray, goal: float) -> int:
    """First index whose cumulative mass exceeds `goal`: never one without mass of its own."""
    index = int(np.searchsorted(cumulative, goal, side="right"))
    if index < len(cumulative):
        return index
    return int(np.searchsorted(cumulative, cumulative[-1], side="left"))


def _block_sums(mass_V: Float32Array) -> np.ndarray:
    """Sums of consecutive blocks in float64, shape [ceil(V / block)]."""
    vocab = mass_V.shape[0]
    whole = vocab - vocab % _BLOCK
    sums = mass_V[:whole].reshape(-1, _BLOCK).sum(axis=1).astype(np.float64)
    if whole < vocab:
        sums = np.append(sums, mass_V[whole:].sum(dtype=np.float64))
    return sums
