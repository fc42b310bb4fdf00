"""From datums to tensors: check every field, then lay all positions out in rows.

Knows: datums and the names a loss reads. Must not know: models, formulas, gradients.

Shapes: N positions of a datum, T of all of them, K candidates a position (1 for targets [N]).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import Array, Datum, Float32Array, RoutingShape
from firetitan_daemon.engine.losses.base import TARGETS, Loss
from firetitan_daemon.engine.routing import experts_of

MOST_CELLS = 1 << 25
"""Targets, or likeliest tokens, that one call may have: each takes a few numbers more."""


@dataclass(frozen=True)
class Limits:
    """What the model can take."""

    vocab_size: int
    """Token ids it embeds."""
    target_size: int
    """Token ids it can predict."""
    max_context_length: int
    routing: RoutingShape | None = None
    """What its routers choose; None: routing matrices are ignored."""
    unroutable: str | None = None
    """Why routing matrices are refused; None where they are not."""


@dataclass(frozen=True)
class Sequences:
    """Checked token ids, and the experts they are sent to."""

    sequences: list[torch.Tensor]
    """Token ids, int64 [N] each."""
    experts: list[torch.Tensor | None]
    """To force, int64 [N, layers, experts a token] each; None: the routers choose."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions of each datum."""
        return tuple(len(tokens) for tokens in self.sequences)

    @property
    def num_tokens(self) -> int:
        """Positions of all datums, T."""
        return sum(self.lengths)

    def passes(self, max_tokens: int, *, padded: bool = False) -> Iterator[slice]:
        """Runs of datums with at most `max_tokens` positions in all (a longer one runs alone).

        Args:
            max_tokens: Positions of a run.
            padded: Count every datum as long as the longest one of its run: what a model that pads
                its sequences computes.
        """
        start, used, longest = 0, 0, 0
        for index, length in enumerate(self.lengths):
            longest = max(longest, length)
            used = (index - start + 1) * longest if padded else used + length
            if index > start and used > max_tokens:
                yield slice(start, index)
                start, used, longest = index, length, length
        yield slice(start, len(self.sequences))

    def row_range(self, part: slice) -> slice:
        """The rows that a run of datums covers."""
        first = sum(self.lengths[: part.start])
        return slice(first, first + sum(self.lengths[part]))


@dataclass(frozen=True)
class Batch(Sequences):
    """Checked data. Datums with fewer candidates than others are padded; padding weighs 0."""

    targets: torch.Tensor
    """int64 [T, K]."""
    inputs: dict[str, torch.Tensor]
    """The loss's other inputs, float32 [T, K]."""
    shapes: list[tuple[int, ...]]
    """Of each datum's targets: [N] or [N, K]."""

    def outputs(self, values_TK: torch.Tensor) -> list[Float32Array]:
        """Cut rows back into one array a datum, in the shape of its targets."""
        rows = values_TK.float().cpu().numpy()
        arrays, start = [], 0
        for shape in self.shapes:
            part = rows[start : start + shape[0]]
            start += shape[0]
            part = part[:, 0] if len(shape) == 1 else part[:, : shape[1]]
            arrays.append(np.ascontiguousarray(part))
        return arrays

    def rows(self, arrays: Sequence[Float32Array], what: str) -> torch.Tensor:
        """The inverse of `outputs`: float32 [T, K], padding 0.

        Raises:
            FiretitanError: INVALID_ARGUMENT or NON_FINITE naming `what[i]`.
        """
        if len(arrays) != len(self.shapes):
            raise _bad(
                what,
                f"has {len(arrays)} arrays for {len(self.shapes)} datums",
                Reason.INVALID_ARGUMENT,
            )
        for index, (array, shape) in enumerate(zip(arrays, self.shapes, strict=True)):
            if array.shape != shape:
                raise _bad(
                    f"{what}[{index}]",
                    f"has shape {list(array.shape)}, the logprobs have {list(shape)}",
                    Reason.INVALID_ARGUMENT,
                )
            _check_finite(f"{what}[{index}]", array)
        return _stack(list(arrays), self.targets.shape[1], 0.0)


def make_sequences(data: Sequence[Datum], limits: Limits) -> Sequences:
    """Check the tokens and the routing matrices; loss inputs are not looked at.

    Raises:
        FiretitanError: INVALID_DATUM naming the datum; UNSUPPORTED for routing matrices of a model
            whose routers are not known.
    """
    if not data:
        raise _bad("data", "is empty; give at least one datum")
    for index, datum in enumerate(data):
        _check_tokens_of(f"data[{index}].model_input", datum, limits)
    return Sequences(
        [torch.from_numpy(datum.token_ids.astype(np.int64)) for datum in data],
        [_experts(f"data[{index}].model_input", datum, limits) for index, datum in enumerate(data)],
    )


def make_batch(data: Sequence[Datum], loss: Loss, limits: Limits, *, strict: bool) -> Batch:
    """Check the data against the loss and the model.

    Args:
        data: One or more datums.
        loss: What will read them.
        limits: Of the model.
        strict: Refuse inputs the loss does not read; otherwise they are ignored.

    Raises:
        FiretitanError: INVALID_DATUM, LOSS_INPUT_MISSING or NON_FINITE naming the field;
            INVALID_ARGUMENT for more targets than `MOST_CELLS`.
    """
    sequences = make_sequences(data, limits)
    for index, datum in enumerate(data):
        _check_inputs(f"data[{index}]", datum, loss, limits, strict)
    targets = [datum.loss_inputs[TARGETS] for datum in data]
    widths = [1 if array.ndim == 1 else array.shape[1] for array in targets]
    candidates = max(widths)
    widest = f'data[{widths.index(candidates)}].loss_fn_inputs["{TARGETS}"]'
    check_cells(widest, candidates, sequences.num_tokens)
    inputs = {}
    for name in sorted((loss.required | loss.optional) - {TARGETS}):
        given = [datum.loss_inputs.get(name) for datum in data]
        missing = [index for index, array in enumerate(given) if array is None]
        if name != "weights" and missing and len(missing) < len(data):
            raise FiretitanError(
                Reason.LOSS_INPUT_MISSING,
                f"data[{missing[0]}].loss_fn_inputs: missing field '{name}', which other datums "
                "have; give it to all or to none",
                field=f'data[{missing[0]}].loss_fn_inputs["{name}"]',
            )
        if name == "weights":
            ones = [np.ones(array.shape, np.float32) for array in targets]
            given = [
                one if array is None else array for array, one in zip(given, ones, strict=True)
            ]
            missing = []
        if not missing:
            arrays = [np.asarray(array, np.float32) for array in given]
            inputs[name] = _stack(arrays, candidates, 0.0)
    stacked = _stack([np.asarray(array, np.int64) for array in targets], candidates, 0)
    return Batch(
        sequences.sequences,
        sequences.experts,
        stacked,
        inputs,
        [array.shape for array in targets],
    )


def check_cells(field: str, width: int, positions: int) -> None:
    """Refuse more numbers than a call may have.

    Args:
        field: What asks for them.
        width: How many a position; a single one is always fine.
        positions: Of all datums: a wide one makes room in the rows of all.

    Raises:
        FiretitanError: INVALID_ARGUMENT.
    """
    if width > 1 and width * positions > MOST_CELLS:
        raise _bad(
            field,
            f"has {width} a position, for the call's {positions} positions; at most "
            f"{max(1, MOST_CELLS // positions)} for so many: send fewer sequences a call",
            Reason.INVALID_ARGUMENT,
        )


def _experts(where: str, datum: Datum, limits: Limits) -> torch.Tensor | None:
    field = f"{where}.routing_matrices"
    if limits.routing is None:
        if limits.unroutable is not None and any(datum.routing):
            raise _bad(field, f"cannot be replayed: {limits.unroutable}", Reason.UNSUPPORTED)
        return None
    return experts_of(datum.routing, len(datum.token_ids), limits.routing, field)


def _stack(arrays: Sequence[np.ndarray], candidates: int, fill: float) -> torch.Tensor:
    total = sum(len(array) for array in arrays)
    rows = np.full((total, candidates), fill, arrays[0].dtype)
    start = 0
    for array in arrays:
        columns = array[:, None] if array.ndim == 1 else array
        rows[start : start + len(columns), : columns.shape[1]] = columns
        start += len(columns)
    return torch.from_numpy(rows)


def _check_tokens_of(where: str, datum: Datum, limits: Limits) -> None:
    tokens = datum.token_ids
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise _bad(where, "must be a flat list of integer tokens")
    if not 1 <= len(tokens) <= limits.max_context_length:
        raise _bad(
            where, f"has {len(tokens)} tokens; 1 to {limits.max_context_length} are possible"
        )
    _check_tokens(where, tokens, limits.vocab_size)


def _check_inputs(at: str, datum: Datum, loss: Loss, limits: Limits, strict: bool) -> None:
    inputs = datum.loss_inputs
    for name in sorted(loss.required - inputs.keys()):
        raise FiretitanError(
            Reason.LOSS_INPUT_MISSING,
            f"{at}.loss_fn_inputs: missing required field '{name}' of loss {loss.name}",
            field=f'{at}.loss_fn_inputs["{name}"]',
        )
    known = loss.required | loss.optional
    targets = inputs[TARGETS]
    for name in sorted(inputs.keys(), key=lambda name: (name != TARGETS, name)):
        where = f'{at}.loss_fn_inputs["{name}"]'
        if name in known:
            _check_input(where, name, inputs[name], targets, len(datum.token_ids), limits, loss)
        elif strict:
            raise _bad(where, f"is not read by {loss.name}; it reads {', '.join(sorted(known))}")


def _check_input(
    where: str,
    name: str,
    values: Array,
    targets: Array,
    length: int,
    limits: Limits,
    loss: Loss,
) -> None:
    if name == TARGETS:
        if values.ndim not in (1, 2) or values.shape[0] != length or 0 in values.shape:
            raise _bad(
                where,
                f"has shape {list(values.shape)}, model_input has {length} tokens; give [N] or "
                "[N, K], one row per token",
            )
        if values.ndim == 2 and values.shape[1] > 1 and not loss.candidates:
            raise _bad(where, f"has shape {list(values.shape)}; {loss.name} takes one per position")
        if not np.issubdtype(values.dtype, np.integer):
            raise _bad(where, f"has dtype {values.dtype}; tokens are integers")
        _check_tokens(where, values, limits.target_size)
        return
    if values.shape != targets.shape:
        unit = "values" if values.ndim == 1 else f"values in shape {list(values.shape)}"
        raise _bad(
            where,
            f"has {values.size} {unit}, target_tokens has {targets.size}; give one per target",
        )
    _check_finite(where, values)


def _check_tokens(where: str, tokens: Array, size: int) -> None:
    outside = (tokens < 0) | (tokens >= size)
    if outside.any():
        first = tuple(np.argwhere(outside)[0].tolist())
        place = "".join(f"[{index}]" for index in first)
        raise _bad(f"{where}{place}", f"is token {int(tokens[first])}; 0 to {size - 1} exist")


def _check_finite(where: str, values: Array) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        first = tuple(np.argwhere(~finite)[0].tolist())
        place = "".join(f"[{index}]" for index in first)
        raise _bad(
            f"{where}{place}",
            f"is {float(values[first])}; give finite numbers",
            Reason.NON_FINITE,
        )


def _bad(where: str, what: str, reason: Reason = Reason.INVALID_DATUM) -> FiretitanError:
    return FiretitanError(reason, f"{where}: {what}", field=where)
