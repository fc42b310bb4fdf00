"""One batch through the model: hidden states, logprobs, loss terms and parameter gradients.

Knows: the model, the head, one loss, what is trained. Must not know: accumulation, steps, files.

A large batch goes in passes of whole sequences; the split depends on the data alone, so the same
call gives the same bits wherever and whenever it runs.

Shapes: T rows of a pass, C of a chunk, K targets a row, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.batch import Batch, Sequences
from firetitan_daemon.engine.head import Head, RowGradient
from firetitan_daemon.engine.losses.base import Loss, Settings
from firetitan_daemon.engine.models import LoadedModel
from firetitan_daemon.engine.trainables import Trainables

MAX_PASS_TOKENS = 4096
"""Tokens that go through the model together, padding included; bounds the memory of a step."""

Gradients = dict[str, torch.Tensor]


@dataclass
class Pass:
    """Some of a batch's datums on their way through the model."""

    rows: slice
    """Of the batch's rows."""
    lengths: tuple[int, ...]
    hidden: torch.Tensor
    """[T, H]; carries the autograd graph where one was asked for."""


def run_passes(loaded: LoadedModel, batch: Sequences, *, graph: bool) -> Iterator[Pass]:
    """Hidden states of a batch, pass by pass."""
    for part in batch.passes(MAX_PASS_TOKENS, padded=not loaded.info.packed):
        with torch.set_grad_enabled(graph):
            hidden = loaded.hidden_states(batch.sequences[part], batch.experts[part])
        yield Pass(batch.row_range(part), batch.lengths[part], hidden)


def loss_terms(
    batch: Batch, loss: Loss, settings: Settings, part: Pass, logprobs: torch.Tensor
) -> torch.Tensor:
    """The loss per target [T, K] of one pass, without gradient."""
    inputs = _inputs(batch, part.rows, logprobs.device)
    with torch.no_grad():
        return loss.formula(logprobs, inputs, settings, part.lengths)


def built_in_gradient(
    batch: Batch,
    loss: Loss,
    settings: Settings,
    part: Pass,
    head: Head,
    terms: list[torch.Tensor],
    slopes: list[torch.Tensor],
) -> RowGradient:
    """dL/dlogprob of a built-in loss, for the head to ask chunk by chunk.

    Args:
        batch: All data.
        loss: The loss.
        settings: Its settings.
        part: The pass.
        head: Computes all logprobs first where the loss needs them.
        terms: Gets the loss per target, chunk by chunk.
        slopes: Gets the gradient per target, chunk by chunk.

    Raises:
        FiretitanError: NON_FINITE naming the datum, from the returned function.
    """
    first = part.rows.start
    whole: torch.Tensor | None = None
    if not loss.positionwise:
        targets = batch.targets[part.rows].to(part.hidden.device)
        logprobs = head.logprobs(part.hidden.detach(), targets)
        value, whole = _differentiate(batch, loss, settings, part.rows, part.lengths, logprobs)
        terms.append(value)
        slopes.append(whole)

    def gradient(rows: slice, logprobs: torch.Tensor) -> torch.Tensor:
        if whole is not None:
            return whole[rows]
        absolute = slice(first + rows.start, first + rows.start + len(logprobs))
        value, slope = _differentiate(batch, loss, settings, absolute, (len(logprobs),), logprobs)
        terms.append(value)
        slopes.append(slope)
        return slope

    return gradient


def given_gradient(slopes: torch.Tensor) -> RowGradient:
    """dL/dlogprob [T, K] of a pass as the head asks for it."""

    def gradient(rows: slice, logprobs: torch.Tensor) -> torch.Tensor:
        return slopes[rows]

    return gradient


def parameter_gradients(
    trainables: Trainables, head: Head, batch: Batch, part: Pass, gradient: RowGradient
) -> tuple[torch.Tensor, Gradients]:
    """Logprobs [T, K] of one pass, and dL/dparameter by master name (absent: zero).

    Frees the pass's autograd graph.
    """
    targets = batch.targets[part.rows].to(part.hidden.device)
    logprobs, of_head = head.gradients(part.hidden.detach(), targets, gradient)
    total = trainables.head_gradients(of_head)
    for name, grad in hidden_gradients(trainables, part, of_head.hidden).items():
        add_gradient(total, name, grad)
    return logprobs, total


def hidden_gradients(trainables: Trainables, part: Pass, grad_hidden: torch.Tensor) -> Gradients:
    """dL/dparameter by master name (absent: zero) of dL/dhidden [T, H]; frees the pass's graph.

    No two of them share memory: whoever gets them adds in place.
    """
    if not part.hidden.requires_grad:
        return {}
    below = torch.autograd.grad(
        part.hidden, list(trainables.leaves.values()), grad_hidden, allow_unused=True
    )
    gradients: Gradients = {}
    storages: set[int] = set()
    for name, grad in zip(trainables.leaves, below, strict=True):
        if grad is None:
            continue
        # Of a sum, autograd hands the same tensor to both of its terms.
        storage = grad.untyped_storage().data_ptr()
        gradients[name] = grad.clone() if storage in storages else grad
        storages.add(storage)
    return gradients


def add_gradient(total: Gradients, name: str, grad: torch.Tensor) -> None:
    """Add one gradient to a float32 sum; takes the tensor over where it is the first."""
    if name in total:
        total[name].add_(grad)
    else:
        # Autograd lays some out transposed; the fused step reads memory from front to back.
        total[name] = grad.detach().to(torch.float32).contiguous()


def check_gradients(gradients: Gradients) -> None:
    """Refuse gradients that are not finite.

    Raises:
        FiretitanError: NON_FINITE naming a parameter.
    """
    if not gradients:
        return
    norms = torch._foreach_norm(list(gradients.values()), float("inf"))
    for name, norm in zip(gradients, norms, strict=True):
        if not torch.isfinite(norm):
            raise FiretitanError(
                Reason.NON_FINITE,
                f"the gradient of {name} is not finite; nothing was changed",
                field="data",
            )


def count_loss(batch: Batch, slopes_TK: torch.Tensor) -> tuple[int, int]:
    """Positions with a non-zero loss gradient, and sequences with at least one."""
    active = (slopes_TK != 0).any(1).cpu()
    sequences = sum(bool(rows.any()) for rows in active.split(batch.lengths))
    return int(active.sum()), sequences


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn a failed allocation into DEVICE_OUT_OF_MEMORY.

    Raises:
        FiretitanError: DEVICE_OUT_OF_MEMORY.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(error) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise _out_of_memory(error) from error


def _out_of_memory(error: BaseException) -> FiretitanError:
    return FiretitanError(
        Reason.DEVICE_OUT_OF_MEMORY,
        f"out of memory: {error}; nothing was changed, send fewer or shorter sequences a call",
    )


def _inputs(batch: Batch, rows: slice, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: values[rows].to(device) for name, values in batch.inputs.items()}


def _differentiate(
    batch: Batch,
    loss: Loss,
    settings: Settings,
    rows: slice,
    lengths: tuple[int, ...],
    logprobs: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss terms and dL/dlogprob [C, K] of some rows."""
    inputs = _inputs(batch, rows, logprobs.device)
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        terms = loss.formula(leaf, inputs, settings, lengths)
        (slope,) = torch.autograd.grad(terms.sum(), leaf)
    check_terms(batch, rows, terms.detach(), slope)
    return terms.detach(), slope


def check_terms(
    batch: Batch, rows: slice, terms: torch.Tensor, slope: torch.Tensor | None = None
) -> None:
    """Refuse a loss that is not finite.

    Raises:
        FiretitanError: NON_FINITE naming datum and position.
    """
    good = torch.isfinite(terms)
    if slope is not None:
        good &= torch.isfinite(slope)
    if bool(good.all()):
        return
    row = rows.start + int((~good).any(1).nonzero()[0, 0])
    for index, length in enumerate(batch.lengths):
        if row < length:
            raise FiretitanError(
                Reason.NON_FINITE,
                f"data[{index}]: the loss at position {row} is not finite (an importance ratio "
                "overflows?); nothing was changed",
                field=f"data[{index}]",
            )
        row -= length
