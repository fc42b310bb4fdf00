"""Runs prompts and decode steps of one loaded model, so that a sequence never depends on others.

Knows: the model, its caches, how many rows a matrix product needs. Must not know: requests, seeds,
temperatures, snapshots.

A prompt runs alone. In a decode step the attention of a branch (some continuations of one prompt)
has shapes of its own; only matrix products see rows of several branches, and there the bits of a
row may depend on how many rows there are. So rows are padded to a multiple of a quantum, measured
for this model on this machine (`rows`). Where none keeps rows apart, as in mixtures of experts,
branches run alone.

Shapes: P prompt tokens, R rows of a step, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from firetitan_daemon.engine.api import Float32Array, Int32Array
from firetitan_daemon.engine.attention import KVCache, Segments
from firetitan_daemon.engine.lora import Adapter
from firetitan_daemon.engine.models import LoadedModel
from firetitan_daemon.engine.routing import routes_tokens
from firetitan_daemon.engine.rows import RowQuantum, linear_shapes
from firetitan_daemon.engine.sample_api import PromptScores
from firetitan_daemon.engine.score import NOTHING, PromptScorer, Scoring

_CHUNK = 512
"""Prompt tokens run at once; bounds the memory of a long prompt."""
_HEAD_ROWS = 256
"""Prompt rows whose logits exist at once."""
_PROBE_TOKENS = 5


@dataclass(frozen=True)
class Prefill:
    """A prompt after its forward pass."""

    state: Any
    """What `fork` continues from."""
    last_logits: Float32Array
    """[V], of the first new token."""
    scores: PromptScores
    """What was asked of it."""
    routing: list[bytes] = field(default_factory=list)
    """A routing matrix per prompt token; empty for a dense model."""


@dataclass(frozen=True)
class Stepped:
    """One branch after a decode step."""

    logits: Float32Array
    """[R, V], of the next token."""
    routing: list[bytes]
    """The routing matrix of each row's token; empty for a dense model."""


class Branch(Protocol):
    """Some continuations of one prompt; all have the same length and step together."""

    @property
    def num_bytes(self) -> int:
        """Memory it holds, that of the prompt included."""

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""


class Decoder(Protocol):
    """The model under the weights selected last; called from one thread."""

    def prefill(self, prompt: Int32Array, wanted: Scoring = NOTHING) -> Prefill:
        """Run a prompt of at least one token, alone, and score it as wanted."""

    def fork(self, prefill: Prefill, rows: int) -> Branch:
        """Begin `rows` continuations of the prompt."""

    def step(self, parts: Sequence[tuple[Any, Sequence[int]]]) -> list[Stepped]:
        """Feed one token to every row of every branch.

        Args:
            parts: Branches, and the last token of each of their rows.
        """


def make_decoder(loaded: LoadedModel, max_rows: int) -> PackedDecoder | CachedDecoder:
    """Choose the decoder for a model; measures the row quantum where rows are shared."""
    if not loaded.info.packed:
        return CachedDecoder(loaded)
    return PackedDecoder(loaded, max_rows)


class PackedDecoder:
    """All branches in one packed row.

    Attributes:
        bytes_per_token: Cache memory of one token of one row.
    """

    def __init__(self, loaded: LoadedModel, max_rows: int) -> None:
        self._loaded = loaded
        self._mixes = routes_tokens(loaded.model)
        self._rows = RowQuantum(loaded.dtype, loaded.device, max_rows)
        self.measure(None)
        probe = self.prefill(np.zeros(_PROBE_TOKENS, np.int32))
        self.bytes_per_token: int = self.fork(probe, 1).num_bytes // _PROBE_TOKENS

    @property
    def quantum(self) -> int | None:
        """Rows of a step are padded to a multiple of this; None runs every branch alone."""
        return None if self._mixes else self._rows.value

    @property
    def note(self) -> str:
        """How rows are kept from influencing each other, in words."""
        if self.quantum is None:
            return "rows of different branches mix in this model: branches decode one by one"
        return f"decode steps are padded to a multiple of {self.quantum} rows"

    @torch.no_grad()
    def prefill(self, prompt: Int32Array, wanted: Scoring = NOTHING) -> Prefill:
        """See `Decoder`."""
        cache = KVCache()
        tokens = torch.from_numpy(prompt.astype(np.int64)).to(self._loaded.device)
        scorer = PromptScorer(prompt, wanted)
        routing: list[bytes] = []
        hidden = torch.empty(0)
        for start in range(0, len(prompt), _CHUNK):
            part = tokens[start : start + _CHUNK]
            positions = torch.arange(start, start + len(part), device=self._loaded.device)
            with self._loaded.routers.recording() as recording:
                hidden = self._loaded.run_packed(part, positions, Segments((len(part),), (cache,)))
            routing.extend(recording.matrices)
            _score(self._loaded, hidden, start, len(prompt), scorer)
        last = self._loaded.logits(hidden[-1:])[0].cpu().numpy()
        return Prefill(cache, last, scorer.scores(), routing)

    def fork(self, prefill: Prefill, rows: int) -> KVCache:
        """See `Decoder`."""
        state: KVCache = prefill.state
        return state.fork(rows)

    def step(self, parts: Sequence[tuple[KVCache, Sequence[int]]]) -> list[Stepped]:
        """See `Decoder`."""
        if self.quantum is None:
            return [self._run([part], 1)[0] for part in parts]
        return self._run(parts, self.quantum)

    @torch.no_grad()
    def measure(self, adapter: Adapter | None) -> None:
        """Make sure rows stay apart with this adapter's shapes too; known shapes cost nothing."""
        self._rows.measure(linear_shapes(self._loaded.model, adapter))

    @torch.no_grad()
    def _run(self, parts: Sequence[tuple[KVCache, Sequence[int]]], quantum: int) -> list[Stepped]:
        tokens: list[int] = []
        positions: list[int] = []
        for cache, latest in parts:
            tokens.extend(latest)
            positions.extend([cache.length] * len(latest))
        padding = -len(tokens) % quantum
        device = self._loaded.device
        layout = Segments(tuple(len(latest) for _, latest in parts), tuple(c for c, _ in parts))
        with self._loaded.routers.recording() as recording:
            hidden = self._loaded.run_packed(
                torch.tensor(tokens + [0] * padding, device=device),
                torch.tensor(positions + [0] * padding, device=device),
                layout,
            )
        logits = self._loaded.logits(hidden).cpu().numpy()
        routing = recording.matrices
        ends = np.cumsum(layout.lengths).tolist()
        return [
            Stepped(logits[end - length : end], routing[end - length : end])
            for end, length in zip(ends, layout.lengths, strict=True)
        ]


class CachedDecoder:
    """One sequence at a time on the model's own cache, for models the packed attention cannot run.

    Right for every architecture, and slow: a row is a forward pass of its own.

    Attributes:
        bytes_per_token: 0: the memory of the model's own cache is not known.
    """

    bytes_per_token = 0
    note = "sequences decode one by one on the model's own cache: right, and slow"

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        # transformers 5.24 renamed it.
        parameters = inspect.signature(loaded.model.base_model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"

    @torch.no_grad()
    def prefill(self, prompt: Int32Array, wanted: Scoring = NOTHING) -> Prefill:
        """See `Decoder`."""
        hidden, cache, routing = self._forward(prompt.tolist(), None)
        scorer = PromptScorer(prompt, wanted)
        _score(self._loaded, hidden, 0, len(prompt), scorer)
        last = self._loaded.logits(hidden[-1:])[0].cpu().numpy()
        return Prefill((prompt.tolist(), cache), last, scorer.scores(), routing)

    def fork(self, prefill: Prefill, rows: int) -> _CachedBranch:
        """See `Decoder`."""
        tokens, cache = prefill.state
        return _CachedBranch([(list(tokens), copy.deepcopy(cache)) for _ in range(rows)])

    def measure(self, adapter: Adapter | None) -> None:
        """Nothing to find out: rows never meet."""

    @torch.no_grad()
    def step(self, parts: Sequence[tuple[_CachedBranch, Sequence[int]]]) -> list[Stepped]:
        """See `Decoder`."""
        return [self._step(branch, latest) for branch, latest in parts]

    def _step(self, branch: _CachedBranch, latest: Sequence[int]) -> Stepped:
        logits, routing = [], []
        for row, token in enumerate(latest):
            tokens, cache = branch.rows[row]
            tokens.append(token)
            hidden, cache, matrices = self._forward(tokens if cache is None else [token], cache)
            branch.rows[row] = (tokens, cache)
            logits.append(self._loaded.logits(hidden[-1:])[0].cpu().numpy())
            routing.extend(matrices[-1:])
        return Stepped(np.stack(logits), routing)

    def _forward(self, tokens: Sequence[int], cache: Any) -> tuple[torch.Tensor, Any, list[bytes]]:
        """Hidden states [L, H], the cache (None where the model has none), routing matrices."""
        with self._loaded.routers.recording() as recording:
            output = self._loaded.model.base_model(
                input_ids=torch.tensor([list(tokens)], device=self._loaded.device),
                use_cache=True,
                **{self._cache_name: cache},
            )
        hidden = output.last_hidden_state[0].to(self._loaded.dtype)
        return hidden, getattr(output, self._cache_name, None), recording.matrices


class _CachedBranch:
    def __init__(self, rows: list[tuple[list[int], Any]]) -> None:
        self.rows = rows

    @property
    def num_bytes(self) -> int:
        """Not known: the cache is the model's own."""
        return 0

    def keep(self, rows: Sequence[int]) -> None:
        """See `Branch`."""
        self.rows = [self.rows[row] for row in rows]


def _score(
    loaded: LoadedModel, hidden: torch.Tensor, start: int, length: int, scorer: PromptScorer
) -> None:
    """Score what some positions of a prompt say of the ones behind them.

    Args:
        loaded: The model.
        hidden: Hidden states of positions `start` and up, shape [L, H].
        start: Position of the first.
        length: Tokens of the prompt.
        scorer: Takes the scores.
    """
    count = min(len(hidden), length - 1 - start)
    for block in range(0, count, _HEAD_ROWS):
        end = min(block + _HEAD_ROWS, count)
        if start + end < scorer.first:
            continue
        # Whole blocks, also where only their end is asked for: bits depend on how many rows.
        logits = loaded.logits(hidden[block : block + _HEAD_ROWS]).cpu().numpy()
        for row in range(max(block, scorer.first - 1 - start), end):
            scorer.take(start + row + 1, logits[row - block])
