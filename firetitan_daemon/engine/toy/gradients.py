"""Pending gradients of the toy model, as sums that stay linear in the parameters' own.

Knows: the toy model, datums. Must not know: losses, steps, files.

Shape legend: `V` vocabulary, `H` hidden, `N` positions, `K` candidates a position, `S` sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import Datum, Float32Array, LoraSpec, Pooling
from firetitan_daemon.engine.raw import RawTensor
from firetitan_daemon.engine.toy import model
from firetitan_daemon.engine.toy.model import Float64Array


class PendingGradients:
    """What has accumulated since the last write to the weights."""

    def __init__(self) -> None:
        self._by_logit_VV: Float64Array = np.zeros((model.VOCAB, model.VOCAB))
        """dL/dlogits, for losses over logprobs."""
        self._by_embedding_VH: Float64Array = np.zeros((model.VOCAB, model.HIDDEN))
        """dL/dembedding matrix, for losses over embeddings."""

    def add_logprobs(
        self, data: Sequence[Datum], gradients: Sequence[Float64Array], logprobs_VV: Float64Array
    ) -> tuple[int, int]:
        """Add dL/dlogprobs, datum by datum: the sum does not depend on the split into batches.

        Args:
            data: The batch.
            gradients: Of each datum, in the shape of its targets.
            logprobs_VV: Of every token after every token.

        Returns:
            Positions with a gradient that is not zero, and sequences with one.

        Raises:
            FiretitanError: NON_FINITE naming the datum; nothing was added.
        """
        for index, gradient in enumerate(gradients):
            if not np.isfinite(gradient).all():
                raise FiretitanError(
                    Reason.NON_FINITE,
                    f"data[{index}]: the gradient of the loss is not finite; nothing was changed",
                    field=f"data[{index}]",
                )
        probabilities = np.exp(logprobs_VV)
        tokens = sequences = 0
        for datum, gradient in zip(data, gradients, strict=True):
            grads_NK = gradient.reshape(gradient.shape[0], -1)
            targets = datum.loss_inputs["target_tokens"].astype(np.int64)
            targets_NK = targets.reshape(grads_NK.shape)
            inputs_N = datum.token_ids
            own_VV = np.zeros_like(self._by_logit_VV)
            np.add.at(own_VV, (inputs_N[:, None], targets_NK), grads_NK)
            row_V = np.zeros(model.VOCAB)
            np.add.at(row_V, inputs_N, grads_NK.sum(axis=1))
            self._by_logit_VV += own_VV - row_V[:, None] * probabilities
            counted = int((grads_NK != 0).any(axis=1).sum())
            tokens += counted
            sequences += counted > 0
        return tokens, sequences

    def add_embeddings(
        self, data: Sequence[Datum], pooling: Pooling, gradients_SH: Float32Array
    ) -> None:
        """Add dL/dembedding of each sequence."""
        for datum, gradient in zip(data, gradients_SH, strict=True):
            self._by_embedding_VH += np.outer(pooling_weights(datum, pooling), gradient)

    def of_parameters(
        self,
        base: Mapping[str, Float32Array],
        weights: model.Weights,
        lora: LoraSpec | None,
        denominator: float,
    ) -> dict[str, Float64Array]:
        """Gradients of the trained matrices.

        Args:
            base: The base model's.
            weights: What is trained.
            lora: Its adapter, or None.
            denominator: What the sums are divided by.
        """
        whole = model.merged(dict(base), weights, lora)
        by_logit_VV = self._by_logit_VV / denominator
        unembed = by_logit_VV.T @ whole[model.EMBED]
        if lora is None:
            embed = by_logit_VV @ whole[model.UNEMBED] + self._by_embedding_VH / denominator
            return {model.EMBED: embed, model.UNEMBED: unembed}
        scaled = unembed * (lora.alpha / lora.rank)
        return {
            model.LORA_A: weights[model.LORA_B].T @ scaled,
            model.LORA_B: scaled @ weights[model.LORA_A].T,
        }

    def raw(self) -> dict[str, RawTensor]:
        """The sums as bytes."""
        return {
            "logits": RawTensor.of_array(self._by_logit_VV),
            "embed": RawTensor.of_array(self._by_embedding_VH),
        }


def pooling_weights(datum: Datum, pooling: Pooling) -> Float32Array:
    """How much each token's embedding counts in the pooled one, [V]."""
    if pooling is Pooling.LAST:
        return np.eye(model.VOCAB, dtype=np.float32)[datum.token_ids[-1]]
    counts = np.bincount(datum.token_ids, minlength=model.VOCAB)
    return (counts / len(datum.token_ids)).astype(np.float32)
