"""Packed attention against the textbook, forward, backward and in decode."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine import attention_train
from firetitan_daemon.engine.attention import KVCache, Segments, packed_attention, segments
from firetitan_daemon.engine.attention_train import attend_segments, fused_segments

HEADS, KV_HEADS, SIZE = 6, 2, 8
LAYER = SimpleNamespace(layer_idx=0)
SETTINGS = [(None, None), (5, None), (None, 3.0), (4, 2.0)]


def textbook(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One score matrix over the whole row with a block-diagonal mask; [T, H, D]."""
    tokens = query.shape[1]
    repeat = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(repeat, 0), value.repeat_interleave(repeat, 0)
    scores = query @ key.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    owner = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    place = torch.arange(tokens)
    seen = (owner[:, None] == owner[None, :]) & (place[:, None] >= place[None, :])
    if window is not None:
        seen &= place[:, None] - place[None, :] < window
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1)
    return (weights @ value).transpose(0, 1)


def random_row(tokens: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(heads, tokens, SIZE, generator=generator).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


@pytest.mark.parametrize(("window", "softcap"), SETTINGS)
@pytest.mark.parametrize(("block", "keep"), [(256, 1024), (4, 1024), (4, 0), (256, 0)])
def test_packed_rows_equal_the_textbook(
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    keep: int,
    window: int | None,
    softcap: float | None,
) -> None:
    monkeypatch.setattr(attention_train, "_BLOCK", block)
    monkeypatch.setattr(attention_train, "_KEEP_WEIGHTS", keep)
    lengths = (1, 11, 4)
    row = random_row(sum(lengths))
    probe = torch.randn(sum(lengths), HEADS, SIZE)
    results = []
    for attend in (attend_segments, textbook):
        output = attend(*row, lengths, 0.3, window, softcap)
        results.append([output, *torch.autograd.grad((output * probe).sum(), row)])
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, atol=2e-6, rtol=1e-5)


def test_a_mask_of_a_whole_sequence_goes_with_its_pass() -> None:
    """It has a number for each two tokens of it; the layers of a pass share one."""
    length, window = 37, 5
    row = [tensor.detach() for tensor in random_row(2 * length)]

    def masks() -> int:
        gc.collect()
        tensors = (one for one in gc.get_objects() if issubclass(type(one), torch.Tensor))
        return sum(one.dtype == torch.bool and one.numel() == length**2 for one in tensors)

    before = masks()  # other tests' may be left
    layout = Segments((length, length))
    for _ in range(3):
        fused_segments(*row, layout.lengths, 0.3, window, layout.masks)
        assert masks() == before + 1
    del layout
    assert masks() == before
    fused_segments(*row, (length,), 0.3, window)
    assert masks() == before


@pytest.mark.parametrize("window", [None, 5])
def test_the_fused_kernel_equals_the_textbook(window: int | None) -> None:
    lengths = (1, 11, 4)
    row = random_row(sum(lengths) + 2)
    probe = torch.randn(sum(lengths), HEADS, SIZE)
    found = fused_segments(*row, lengths, 0.3, window)
    assert found[-2:].abs().max() == 0
    short = [tensor[:, :-2] for tensor in row]
    wanted = textbook(*short, lengths, 0.3, window, None)
    torch.testing.assert_close(found[:-2], wanted, atol=2e-6, rtol=1e-5)
    mine = torch.autograd.grad((found[:-2] * probe).sum(), row)
    theirs = torch.autograd.grad((wanted * probe).sum(), row)
    for left, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(left, right, atol=2e-6, rtol=1e-5)


def test_padding_behind_the_last_sequence_gets_zeros() -> None:
    row = random_row(9)
    output = attend_segments(*row, (6,), 0.3, None, None)
    assert output[6:].abs().max() == 0
    grads = torch.autograd.grad(output.sum(), row)
    assert all(grad[:, 6:].abs().max() == 0 for grad in grads)


@pytest.mark.parametrize(("window", "softcap"), SETTINGS)
def test_decode_on_a_forked_prompt_equals_the_whole_sequence(
    window: int | None, softcap: float | None
) -> None:
    prompt, new, rows = 7, 40, 3
    parts = [[t.detach() for t in random_row(prompt + new, seed)] for seed in range(rows)]
    for part in parts[1:]:
        for tensor, first in zip(part, parts[0], strict=True):
            tensor[:, :prompt] = first[:, :prompt]
    cache = KVCache()

    def call(query, key, value, layout):  # type: ignore[no-untyped-def]
        with segments(layout):
            return packed_attention(
                LAYER, query[None], key[None], value[None], None, 0.3, window, softcap
            )[0][0]

    for start, end in ((0, 4), (4, prompt)):
        chunk = [tensor[:, start:end] for tensor in parts[0]]
        call(*chunk, Segments((end - start,), (cache,)))
    branch = cache.fork(rows)
    assert (cache.length, branch.length, branch.rows) == (prompt, prompt, rows)
    wanted = [textbook(*part, (prompt + new,), 0.3, window, softcap) for part in parts]
    alive = list(range(rows))
    for step in range(new):
        if step == 20:
            branch.keep([2, 0])
            alive = [2, 0]
        at = prompt + step
        token = [torch.stack([parts[row][which][:, at] for row in alive], 1) for which in range(3)]
        padded = [torch.cat((tensor, torch.ones(tensor.shape[0], 2, SIZE)), 1) for tensor in token]
        found = call(*padded, Segments((len(alive),), (branch,)))
        assert found[len(alive) :].abs().max() == 0
        for place, row in enumerate(alive):
            torch.testing.assert_close(found[place], wanted[row][at], atol=2e-6, rtol=1e-5)
    assert branch.length == prompt + new and cache.length == prompt


def test_a_failed_call_does_not_count_tokens() -> None:
    cache = KVCache()
    with pytest.raises(RuntimeError, match="stop"), segments(Segments((3,), (cache,))):
        raise RuntimeError("stop")
    assert cache.length == 0


def test_attention_sinks_are_refused() -> None:
    row = [tensor[None] for tensor in random_row(3)]
    with segments(Segments((3,))), pytest.raises(FiretitanError) as caught:
        packed_attention(LAYER, *row, None, s_aux=torch.zeros(HEADS))
    assert caught.value.reason is Reason.UNSUPPORTED
