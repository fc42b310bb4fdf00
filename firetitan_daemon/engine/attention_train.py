"""Causal attention by matrix products, with an explicit backward; fused kernels on GPUs.

Knows: queries, keys and values of sequences packed in one row. Must not know: caches, models.

On CPUs the fused kernels' backward runs far below the matrix product's speed; ours is made of
matrix products alone. Queries go in blocks, each against the keys it can see only, so causality
saves work and no score matrix exceeds `_BLOCK` rows a head.

Shapes: T tokens of the row, L of one sequence, H query heads, K key/value heads, G = H / K, D head
size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

_BLOCK = 256
_KEEP_WEIGHTS = 1024
"""Sequences up to this length keep their attention weights for backward, longer ones recompute."""

Masks = dict[tuple[int, int], torch.Tensor]
"""[L, L] True where a query may look, by L and window."""


def attend_segments(
    query_HTD: torch.Tensor,
    key_KTD: torch.Tensor,
    value_KTD: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None,
    softcap: float | None,
    masks: Masks | None = None,
) -> torch.Tensor:
    """Attention inside each sequence of the packed row, differentiable.

    Args:
        query_HTD: [H, T, D].
        key_KTD: [K, T, D].
        value_KTD: [K, T, D].
        lengths: Tokens of each sequence; tokens behind them get zeros.
        scale: Factor on the scores.
        window: Keys a query sees, itself included; None is all.
        softcap: Scores s become softcap * tanh(s / softcap); None leaves them.
        masks: Of the pass; its layers share them.

    Returns:
        [T, H, D].
    """
    if query_HTD.is_cuda and softcap is None:
        return fused_segments(query_HTD, key_KTD, value_KTD, lengths, scale, window, masks)
    result: torch.Tensor = _PackedAttention.apply(
        query_HTD, key_KTD, value_KTD, lengths, scale, window, softcap
    )
    return result


def fused_segments(
    query_HTD: torch.Tensor,
    key_KTD: torch.Tensor,
    value_KTD: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None,
    masks: Masks | None = None,
) -> torch.Tensor:
    """As `attend_segments` without softcap, by torch's fused kernel, one call a sequence."""
    masks = {} if masks is None else masks
    outputs = []
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        start += length
        mask = None
        if window is not None and window < length:
            mask = masks.get((length, window))
            if mask is None:
                mask = ~_hidden(length, length, window, query_HTD.device)
                masks[length, window] = mask
        rows = scaled_dot_product_attention(
            query_HTD[None, :, part],
            key_KTD[None, :, part],
            value_KTD[None, :, part],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=True,
        )
        outputs.append(rows[0].transpose(0, 1))
    padding = query_HTD.shape[1] - start
    if padding:
        outputs.append(outputs[0].new_zeros(padding, *outputs[0].shape[1:]))
    return torch.cat(outputs)


def causal_attention(
    query_HLD: torch.Tensor,
    key_KSD: torch.Tensor,
    value_KSD: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One sequence whose L queries are the last of its S keys; [H, L, D], not differentiable."""
    return _forward(query_HLD, key_KSD, value_KSD, scale, window, softcap, None)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: tuple[int, ...],
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        needs_grad = any(ctx.needs_input_grad[:3])
        output = query.new_empty(query.shape[1], query.shape[0], value.shape[-1])
        kept: list[torch.Tensor] = []
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            start += length
            keep = kept if needs_grad and softcap is None and length <= _KEEP_WEIGHTS else None
            rows = _forward(
                query[:, part], key[:, part], value[:, part], scale, window, softcap, keep
            )
            output[part] = rows.transpose(0, 1)
        output[start:] = 0
        ctx.arguments = (lengths, scale, window, softcap)
        if needs_grad:
            ctx.save_for_backward(query, key, value, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, key, value, *kept = ctx.saved_tensors
        lengths, scale, window, softcap = ctx.arguments
        grad_THD = grads[0]
        grad_query = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
        grad_key = key.new_empty(key.shape[1], key.shape[0], key.shape[2])
        grad_value = value.new_empty(value.shape[1], value.shape[0], value.shape[2])
        weights = iter(kept)
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            start += length
            keep = weights if softcap is None and length <= _KEEP_WEIGHTS else None
            of_query, of_key, of_value = _backward(
                grad_THD[part].transpose(0, 1),
                query[:, part],
                key[:, part],
                value[:, part],
                (scale, window, softcap),
                keep,
            )
            grad_query[part] = of_query.transpose(0, 1)
            grad_key[part] = of_key.transpose(0, 1)
            grad_value[part] = of_value.transpose(0, 1)
        for tensor in (grad_query, grad_key, grad_value):
            tensor[start:] = 0
        return (
            grad_query.transpose(0, 1),
            grad_key.transpose(0, 1),
            grad_value.transpose(0, 1),
            None,
            None,
            None,
            None,
        )


def _blocks(queries: int, keys: int, window: int | None) -> Iterator[tuple[int, int, int, int]]:
    """(first query, end query, first key, end key) of each block; keys end with the queries."""
    offset = keys - queries
    for start in range(0, queries, _BLOCK):
        end = min(start + _BLOCK, queries)
        first = 0 if window is None else max(0, offset + start - window + 1)
        yield start, end, first, offset + end


def _hidden(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[L, S] True where a query must not look; the last query sits at the last key."""
    row = torch.arange(keys - queries, keys, device=device)[:, None]
    column = torch.arange(keys, device=device)[None, :]
    hidden = column > row
    if window is not None:
        hidden |= column <= row - window
    return hidden


_hidden_of_block = lru_cache(maxsize=64)(_hidden)
"""Kept for good: a block is small, and every layer of every pass asks for the same few."""


def _scores(
    query_KMD: torch.Tensor,
    key_KSD: torch.Tensor,
    queries: int,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Masked scores [K, G * L, S] of one block whose last query sits at the last key."""
    scores = torch.bmm(query_KMD, key_KSD.transpose(1, 2))
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    kv_heads, _, keys = scores.shape
    by_head = scores.view(kv_heads, -1, queries, keys)
    if window is None or window >= keys:
        by_head[..., keys - queries :].masked_fill_(
            _hidden_of_block(queries, queries, None, scores.device), float("-inf")
        )
    else:
        hidden = _hidden_of_block(queries, keys, window, scores.device)
        by_head.masked_fill_(hidden, float("-inf"))
    return scores


def _grouped(block_HLD: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[H, L, D] as [K, G * L, D]: the query heads that share a key head become its rows."""
    return block_HLD.reshape(kv_heads, -1, block_HLD.shape[-1])


def _forward(
    query_HLD: torch.Tensor,
    key_KSD: torch.Tensor,
    value_KSD: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    keep: list[torch.Tensor] | None,
) -> torch.Tensor:
    heads, queries, _ = query_HLD.shape
    kv_heads, keys, _ = key_KSD.shape
    outputs = []
    for start, end, first, last in _blocks(queries, keys, window):
        query = _grouped(query_HLD[:, start:end] * scale, kv_heads)
        scores = _scores(query, key_KSD[:, first:last], end - start, window, softcap)
        weights = torch.softmax(scores, -1)
        if keep is not None:
            keep.append(weights)
        output = torch.bmm(weights, value_KSD[:, first:last])
        outputs.append(output.view(heads, end - start, -1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _backward(
    grad_HLD: torch.Tensor,
    query_HLD: torch.Tensor,
    key_KSD: torch.Tensor,
    value_KSD: torch.Tensor,
    arguments: tuple[float, int | None, float | None],
    kept: Iterator[torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `_forward` for one sequence: [H, L, D], [K, S, D], [K, S, D]."""
    scale, window, softcap = arguments
    heads, queries, _ = query_HLD.shape
    kv_heads, keys, _ = key_KSD.shape
    single = queries <= _BLOCK
    total = key_KSD.dtype if single else torch.float32
    grad_key = torch.zeros(key_KSD.shape, dtype=total, device=key_KSD.device)
    grad_value = torch.zeros(value_KSD.shape, dtype=total, device=key_KSD.device)
    grad_queries = []
    for start, end, first, last in _blocks(queries, keys, window):
        query = _grouped(query_HLD[:, start:end] * scale, kv_heads)
        grad = _grouped(grad_HLD[:, start:end], kv_heads)
        key, value = key_KSD[:, first:last], value_KSD[:, first:last]
        scores = None
        if kept is None:
            scores = _scores(query, key, end - start, window, softcap)
            weights = torch.softmax(scores, -1)
        else:
            weights = next(kept)
        grad_weights = torch.bmm(grad, value.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        if softcap is not None and scores is not None:
            capped = scores.masked_fill_(scores == float("-inf"), 0.0).div_(softcap)
            grad_scores = grad_scores * (1 - capped * capped)
        of_value = torch.bmm(weights.transpose(1, 2), grad)
        of_key = torch.bmm(grad_scores.transpose(1, 2), query)
        if single:
            grad_key, grad_value = of_key, of_value
        else:
            grad_key[:, first:last] += of_key
            grad_value[:, first:last] += of_value
        grad_queries.append(torch.bmm(grad_scores, key).mul_(scale).view(heads, end - start, -1))
    grad_query = grad_queries[0] if len(grad_queries) == 1 else torch.cat(grad_queries, 1)
    return grad_query, grad_key, grad_value
