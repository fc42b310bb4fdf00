"""Losses over embeddings, in numpy for every engine: what they read, their value and gradient.

Knows: embeddings as arrays, the loss's settings. Must not know: models, pooling, parameters.

Two losses. `contrastive` is named by `loss_fn`. Without a name the loss is linear: the sum of
embedding * `embedding_grads`, whose gradient a caller computed of a loss of its own.

Shapes: S sequences, H hidden, Q queries, E extra negatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import Datum, Float32Array, LossConfig

EMBEDDING_GRADS = "embedding_grads"
CONTRASTIVE = "contrastive"

LossAndGradient = tuple[float, Float32Array]
EmbeddingLoss = Callable[[Float32Array], LossAndGradient]
"""Embeddings [S, H] to the loss and its gradient [S, H]."""

_LEAST_NORM = 1e-12
"""Below, an embedding counts as this long: its direction means nothing."""
_Float64Array = npt.NDArray[np.float64]


def choose_embedding_loss(name: str, config: LossConfig, count: int) -> EmbeddingLoss:
    """Look a loss over embeddings up and check its settings.

    Args:
        name: `contrastive`.
        config: `num_queries`, `temperature` and, if not 0, `num_extra_negatives`.
        count: Sequences of the call.

    Raises:
        FiretitanError: UNKNOWN_LOSS, or INVALID_ARGUMENT naming the setting.
    """
    if name != CONTRASTIVE:
        raise FiretitanError(
            Reason.UNKNOWN_LOSS,
            f'loss_fn="{name}" is no loss over embeddings; {CONTRASTIVE} is one',
            field="loss_fn",
        )
    known = ("num_queries", "temperature", "num_extra_negatives")
    for key in config:
        if key not in known:
            raise _refused(key, config[key], f"{name} knows {', '.join(known)}")
    queries = _whole_number(config, "num_queries", None, 1)
    negatives = _whole_number(config, "num_extra_negatives", 0, 0)
    temperature = _number(config, "temperature", None)
    if temperature <= 0:
        raise _refused("temperature", temperature, "above 0")
    wanted = 2 * queries + negatives
    if count != wanted:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"data: has {count} sequences; {queries} queries, as many documents and {negatives} "
            f"extra negatives are {wanted}",
            field="data",
        )
    return lambda embeddings: contrastive(embeddings, queries, temperature)


def contrastive(embeddings: Float32Array, queries: int, temperature: float) -> LossAndGradient:
    """Bidirectional InfoNCE with in-batch and extra negatives.

    Of unit vectors q_i, d_i and extra negatives n_k:
    loss = mean_i(CE(q_i . [d, n] / t, i) + CE(d_i . q / t, i)) / 2.

    Args:
        embeddings: [S, H]: Q queries, their Q documents in the same order, then the negatives.
        queries: Q.
        temperature: t, above 0.

    Returns:
        The loss, and its gradient by the embeddings [S, H].

    Source: van den Oord et al. 2018, Representation Learning with Contrastive Predictive Coding,
    equation 4; both directions as in Radford et al. 2021, figure 3.
    """
    vectors = embeddings.astype(np.float64)
    norms = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), _LEAST_NORM)
    unit = vectors / norms
    asking, answering = unit[:queries], unit[queries:]
    logits = asking @ answering.T / temperature
    forth, slope = _cross_entropy(logits)
    back, slope_back = _cross_entropy(logits[:, :queries].T)
    slope[:, :queries] += slope_back.T
    slope /= 2 * temperature
    grad_unit = np.concatenate([slope @ answering, slope.T @ asking])
    inward = (grad_unit * unit).sum(axis=1, keepdims=True)
    gradient = (grad_unit - inward * unit) / norms
    return (forth + back) / 2, gradient.astype(np.float32)


def given_gradients(data: Sequence[Datum], size: int) -> Float32Array:
    """What a loss that is linear in the embeddings reads: its gradients [S, H].

    Raises:
        FiretitanError: LOSS_INPUT_MISSING, INVALID_DATUM or NON_FINITE naming the field.
    """
    arrays = []
    for index, datum in enumerate(data):
        inputs = f"data[{index}].loss_fn_inputs"
        given = datum.loss_inputs.get(EMBEDDING_GRADS)
        if given is None:
            raise FiretitanError(
                Reason.LOSS_INPUT_MISSING,
                f"{inputs}: missing required field '{EMBEDDING_GRADS}': the gradient of the loss "
                "by the embedding",
                field=f'{inputs}["{EMBEDDING_GRADS}"]',
            )
        for name in sorted(datum.loss_inputs.keys() - {EMBEDDING_GRADS}):
            raise FiretitanError(
                Reason.INVALID_DATUM,
                f'{inputs}["{name}"]: is not read by a loss over embeddings; it reads '
                f"{EMBEDDING_GRADS}",
                field=f'{inputs}["{name}"]',
            )
        arrays.append(np.asarray(given, np.float32))
    names = [f'data[{index}].loss_fn_inputs["{EMBEDDING_GRADS}"]' for index in range(len(data))]
    return stack_vectors(arrays, names, size)


def output_gradients(arrays: Sequence[Float32Array], count: int, size: int) -> Float32Array:
    """`output_grads` of kept embeddings as rows [S, H].

    Args:
        arrays: One [H] a sequence.
        count: S.
        size: H.

    Raises:
        FiretitanError: INVALID_ARGUMENT or NON_FINITE naming the array.
    """
    if len(arrays) != count:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"output_grads: has {len(arrays)} arrays for {count} datums",
            field="output_grads",
        )
    return stack_vectors(arrays, [f"output_grads[{index}]" for index in range(count)], size)


def stack_vectors(arrays: Sequence[Float32Array], fields: Sequence[str], size: int) -> Float32Array:
    """Vectors [H] as rows [S, H].

    Args:
        arrays: The vectors.
        fields: What errors call each.
        size: H.

    Raises:
        FiretitanError: INVALID_ARGUMENT or NON_FINITE naming the vector.
    """
    for array, field in zip(arrays, fields, strict=True):
        if array.shape != (size,):
            raise FiretitanError(
                Reason.INVALID_ARGUMENT,
                f"{field}: has shape {list(array.shape)}, the embeddings have {[size]}",
                field=field,
            )
        if not np.isfinite(array).all():
            raise FiretitanError(
                Reason.NON_FINITE,
                f"{field}: holds NaN or infinity; give finite numbers",
                field=field,
            )
    return np.stack(arrays)


def count_sequences(gradients_SH: Float32Array) -> int:
    """Sequences with a gradient that is not zero."""
    return int((gradients_SH != 0).any(axis=1).sum())


def _cross_entropy(logits: _Float64Array) -> tuple[float, _Float64Array]:
    """Mean over rows i of -log softmax(row)[i], and its gradient by the logits."""
    rows = len(logits)
    own = np.arange(rows)
    shifted = logits - logits.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    totals = exponentials.sum(axis=1, keepdims=True)
    loss = float((np.log(totals[:, 0]) - shifted[own, own]).mean())
    slope = exponentials / totals
    slope[own, own] -= 1
    return loss, slope / rows


def _number(config: LossConfig, key: str, default: float | None) -> float:
    value = config.get(key, default)
    if value is None or isinstance(value, str | bool) or not math.isfinite(value):
        raise _refused(key, value, "give a finite number")
    return float(value)


def _whole_number(config: LossConfig, key: str, default: int | None, least: int) -> int:
    value = _number(config, key, default)
    if value != int(value) or value < least:
        raise _refused(key, value, f"give a whole number, at least {least}")
    return int(value)


def _refused(key: str, value: object, why: str) -> FiretitanError:
    field = f'loss_fn_config["{key}"]'
    return FiretitanError(Reason.INVALID_ARGUMENT, f"{field}={value!r}: {why}", field=field)
