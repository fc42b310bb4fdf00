"""One attention function for packed training, prefill and decode of any transformers model.

Knows: one packed row [1, T] of several sequences, their key/value caches, sliding window, softcap,
grouped heads. Must not know: which architecture runs, losses, sampling, snapshots.

The models call it through transformers' `AttentionInterface`; the layout of the row reaches it
through a context variable (`segments`). No padding and no mask tensor: sequences are cut at their
bounds. Positions are the caller's business: `position_ids` restart at every sequence.

Shapes: T tokens of the row, H query heads, K key/value heads, G = H / K, D head size, P cached
prompt tokens, S cached new tokens, R rows of a cache, L tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.attention_train import Masks, attend_segments, causal_attention

ATTENTION = "firetitan"
"""Name under which transformers finds `packed_attention`."""

_FIRST_SUFFIX = 32


class KVCache:
    """Keys and values of one request: a prompt, and R continuations of it.

    While `rows` is 1 and nothing was forked, tokens extend the prompt (prefill, in one or several
    chunks). A fork shares the prompt among its rows and gives every row a suffix of its own. All
    rows of a cache have the same length: they step together, one token each.

    The shapes attention sees depend on this request alone, never on what else runs, so neither do
    the bits of its results.
    """

    def __init__(self) -> None:
        self.rows = 1
        self.prompt_length = 0
        self.suffix_length = 0
        self._forked = False
        self._prompt: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._suffix: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def length(self) -> int:
        """Tokens a row has behind it; also the position of its next token."""
        return self.prompt_length + self.suffix_length

    @property
    def forked(self) -> bool:
        """Whether tokens go to the rows' suffixes (decode) rather than to the prompt (prefill)."""
        return self._forked

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors, the shared prompt counted in full."""
        pairs = (*self._prompt.values(), *self._suffix.values())
        return sum(tensor.numel() * tensor.element_size() for pair in pairs for tensor in pair)

    def fork(self, rows: int) -> KVCache:
        """A cache with `rows` continuations of this prompt; shares its tensors where dtypes allow.

        Continuations keep keys and values in the dtype of `decode_dtype`.
        """
        assert not self._forked, "only a prompt can be forked"
        child = KVCache()
        child.rows, child.prompt_length, child._forked = rows, self.prompt_length, True
        for layer, (keys, values) in self._prompt.items():
            dtype = decode_dtype(keys)
            child._prompt[layer] = (keys.to(dtype), values.to(dtype))
        return child

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, in this order."""
        index = torch.tensor(list(rows), dtype=torch.long)
        for layer, (keys, values) in self._suffix.items():
            on_device = index.to(keys.device)
            self._suffix[layer] = (keys[on_device], values[on_device])
        self.rows = len(rows)

    def prompt(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values of the prompt, each [K, P, D]; None before the first chunk."""
        return self._prompt.get(layer)

    def extend_prompt(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add [K, L, D] to the prompt of one layer; returns all of it, [K, P + L, D]."""
        before = self._prompt.get(layer)
        if before is None:
            pair = (keys.contiguous(), values.contiguous())
        else:
            pair = (torch.cat((before[0], keys), 1), torch.cat((before[1], values), 1))
        self._prompt[layer] = pair
        return pair

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add one token a row, [R, K, D]; returns the suffixes with it, views [R, K, S + 1, D]."""
        position = self.suffix_length
        pair = self._suffix.get(layer)
        if pair is None or pair[0].shape[2] <= position:
            pair = (
                _grown(pair and pair[0], keys, position),
                _grown(pair and pair[1], values, position),
            )
            self._suffix[layer] = pair
        pair[0][:, :, position] = keys
        pair[1][:, :, position] = values
        return pair[0][:, :, : position + 1], pair[1][:, :, : position + 1]

    def advance(self, tokens: int) -> None:
        """Count `tokens` more tokens a row, after every layer has stored them."""
        if self._forked:
            self.suffix_length += tokens
        else:
            self.prompt_length += tokens


@dataclass(frozen=True)
class Segments:
    """How the packed row splits into sequences.

    Part i is `lengths[i]` tokens of one sequence, or, where `caches[i]` is a forked cache, one
    token of each of its rows (`lengths[i]` = rows). Tokens behind the last part are padding: they
    get zeros (callers pad so that every matrix product has a fixed least number of rows).
    """

    lengths: tuple[int, ...]
    caches: tuple[KVCache, ...] | None = None
    masks: Masks = field(default_factory=dict, compare=False)
    """Of whole sequences, made by the first layer that needs them."""


_current: ContextVar[Segments | None] = ContextVar("firetitan_segments", default=None)
_windows: ContextVar[set[int] | None] = ContextVar("firetitan_windows", default=None)


@contextmanager
def segments(layout: Segments) -> Iterator[None]:
    """Run one model call under this layout; afterwards the caches count the new tokens."""
    token = _current.set(layout)
    try:
        yield
    finally:
        _current.reset(token)
    for length, cache in zip(layout.lengths, layout.caches or (), strict=False):
        cache.advance(1 if cache.forked else length)


@contextmanager
def noting_windows() -> Iterator[set[int]]:
    """Collect the sliding windows that layers hand to the packed attention.

    Some architectures put theirs into the mask alone, which that attention does not read.
    """
    found: set[int] = set()
    token = _windows.set(found)
    try:
        yield found
    finally:
        _windows.reset(token)


def decode_dtype(tensor: torch.Tensor) -> torch.dtype:
    """In which decode steps attend: a CPU takes half the time for its small products in float32."""
    return torch.float32 if tensor.device.type == "cpu" else tensor.dtype


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each sequence of the packed row.

    Args:
        module: The attention layer; `layer_idx` names its place in the caches.
        query: [1, H, T, D].
        key: [1, K, T, D].
        value: [1, K, T, D].
        attention_mask: Unused; the layout says who sees whom.
        scaling: Factor on the scores; None is D ** -0.5.
        sliding_window: Keys a query sees, itself included; None is all.
        softcap: Scores s become softcap * tanh(s / softcap).
        kwargs: What architectures pass besides; attention sinks are refused.

    Returns:
        The output [1, T, H, D], and None for the weights.

    Raises:
        FiretitanError: UNSUPPORTED for attention sinks.
    """
    layout = _current.get()
    assert layout is not None, "a packed model ran outside of `segments`"
    assert query.shape[0] == 1, "a packed batch is one row"
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise FiretitanError(
            Reason.UNSUPPORTED, "packed attention has no attention sinks and no position bias"
        )
    noted = _windows.get()
    if noted is not None and sliding_window is not None:
        noted.add(sliding_window)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layout.caches is None:
        output = attend_segments(
            query[0], key[0], value[0], layout.lengths, scale, sliding_window, softcap, layout.masks
        )
        return output.unsqueeze(0), None
    layer: int = module.layer_idx
    tokens = query.shape[2]
    output = query.new_zeros(tokens, query.shape[1], value.shape[-1])
    if any(cache.forked for cache in layout.caches):
        dtype = decode_dtype(query)
        query_THD, key_TKD, value_TKD = (
            tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value)
        )
        query_THD = query_THD * scale
    start = 0
    for length, cache in zip(layout.lengths, layout.caches, strict=True):
        part = slice(start, start + length)
        start += length
        if cache.forked:
            suffix = cache.append(layer, key_TKD[part], value_TKD[part])
            output[part] = _decode(
                query_THD[part], *suffix, cache.prompt(layer), sliding_window, softcap
            )
        else:
            keys, values = cache.extend_prompt(layer, key[0, :, part], value[0, :, part])
            rows = causal_attention(query[0, :, part], keys, values, scale, sliding_window, softcap)
            output[part] = rows.transpose(0, 1)
    return output.unsqueeze(0), None


def _decode(
    query_RHD: torch.Tensor,
    keys_RKSD: torch.Tensor,
    values_RKSD: torch.Tensor,
    prompt: tuple[torch.Tensor, torch.Tensor] | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One new token a row, its query scaled, against shared prompt and own suffix; [R, H, D]."""
    rows, heads, size = query_RHD.shape
    kv_heads, suffix = keys_RKSD.shape[1:3]
    group = heads // kv_heads
    prompt_length = 0 if prompt is None else prompt[0].shape[1]
    first = 0 if window is None else max(0, prompt_length + suffix - window)
    skip = max(0, first - prompt_length)
    query = query_RHD.reshape(rows, kv_heads, group, size)
    flat = query.reshape(rows * kv_heads, group, size)
    keys = keys_RKSD.reshape(rows * kv_heads, suffix, size)[:, skip:]
    values = values_RKSD.reshape(rows * kv_heads, suffix, -1)[:, skip:]
    scores = torch.bmm(flat, keys.transpose(1, 2)).view(rows, kv_heads, group, -1)
    if prompt is None or first >= prompt_length:
        weights = _weights(scores, softcap)
        output = torch.bmm(weights.view(rows * kv_heads, group, -1), values)
        return output.view(rows, heads, -1)
    prompt_keys, prompt_values = prompt[0][:, first:], prompt[1][:, first:]
    shared = query.transpose(0, 1).reshape(kv_heads, rows * group, size)
    shared_scores = torch.bmm(shared, prompt_keys.transpose(1, 2))
    seen = shared_scores.shape[-1]
    shared_scores = shared_scores.view(kv_heads, rows, group, seen).transpose(0, 1)
    weights = _weights(torch.cat((shared_scores, scores), -1), softcap)
    of_prompt = weights[..., :seen].transpose(0, 1).reshape(kv_heads, rows * group, seen)
    output = torch.bmm(of_prompt, prompt_values)
    output = output.view(kv_heads, rows, group, -1).transpose(0, 1)
    output = output.reshape(rows * kv_heads, group, -1)
    of_suffix = weights[..., seen:].reshape(rows * kv_heads, group, -1)
    return torch.baddbmm(output, of_suffix, values).view(rows, heads, -1)


def _weights(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return torch.softmax(scores, -1)


def _grown(old: torch.Tensor | None, like_RKD: torch.Tensor, used: int) -> torch.Tensor:
    rows, heads, size = like_RKD.shape
    capacity = _FIRST_SUFFIX if old is None else 2 * old.shape[2]
    new = like_RKD.new_empty(rows, heads, max(capacity, used + 1), size)
    if old is not None:
        new[:, :, :used] = old[:, :, :used]
    return new


AttentionInterface.register(ATTENTION, packed_attention)
