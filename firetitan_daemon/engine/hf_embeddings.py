"""The training engine's calls on embeddings: forward, and gradients of losses over them.

Knows: the session, passes, pooling, losses over embeddings. Must not know: logprobs, steps, files.

A loss couples all sequences of a call, so its gradients need every embedding first. Where the
budget for kept graphs has room, the passes keep theirs meanwhile; where not, they run twice and the
memory of one pass is enough.

Shapes: S sequences, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from firetitan_daemon.engine.api import Datum, Float32Array, ForwardOutput, LossConfig, Pooling
from firetitan_daemon.engine.batch import Sequences, make_sequences
from firetitan_daemon.engine.embedding_loss import (
    choose_embedding_loss,
    count_sequences,
    given_gradients,
    output_gradients,
)
from firetitan_daemon.engine.embeddings import KeptEmbeddings, pool, pooled_gradients
from firetitan_daemon.engine.graph_bytes import SavedBytes
from firetitan_daemon.engine.hf_core import HfCore
from firetitan_daemon.engine.passes import (
    Pass,
    check_gradients,
    memory_errors,
    run_passes,
)


class HfEmbeddings(HfCore):
    """The part of the engine that works on embeddings."""

    def forward_embeddings(
        self,
        data: Sequence[Datum],
        pooling: Pooling,
        loss_fn: str,
        config: LossConfig,
        *,
        retain_graph: bool = False,
        base_only: bool = False,
        over_budget: bool = False,
    ) -> ForwardOutput:
        """Pooled last hidden states; loss inputs are not read, gradients stay as they are.

        Raises:
            FiretitanError: INVALID_DATUM, UNKNOWN_LOSS, INVALID_ARGUMENT, naming the field.
        """
        session = self._session()
        sequences = make_sequences(data, self._limits())
        loss = choose_embedding_loss(loss_fn, config, len(data)) if loss_fn else None
        with self._weights(session, base_only=base_only, retain_graph=retain_graph):
            keep = retain_graph and self._room_for_graph(sequences.num_tokens, needed=over_budget)
            vectors, passes, saved = self._embed(sequences, pooling, keep=keep)
        metrics = {} if loss is None else _metrics(loss(vectors)[0])
        graph = None
        if passes:
            kept = KeptEmbeddings(sequences, pooling, passes)
            graph = self._keep(kept, saved, sequences.num_tokens, needed=over_budget)
        session.forward_passes += 1
        return _output(vectors, metrics, graph)

    def forward_backward_embeddings(
        self, data: Sequence[Datum], pooling: Pooling, loss_fn: str, config: LossConfig
    ) -> ForwardOutput:
        """As `forward_embeddings`, and accumulates gradients.

        Raises:
            FiretitanError: As `forward_embeddings`; LOSS_INPUT_MISSING, NON_FINITE.
        """
        session = self._session()
        sequences = make_sequences(data, self._limits())
        if loss_fn:
            loss = choose_embedding_loss(loss_fn, config, len(data))
            keep = self._room_for_graph(sequences.num_tokens)
            vectors, passes, _ = self._embed(sequences, pooling, keep=keep)
            value, slopes = loss(vectors)
        else:
            passes = []
            slopes = given_gradients(data, self._hidden_size)
        output = self._accumulate_linear(sequences, pooling, slopes, passes)
        session.forward_passes += 2 if loss_fn and not passes else 1
        return replace(output, metrics=_metrics(value)) if loss_fn else output

    def _backward_embeddings(
        self, graph: str, kept: KeptEmbeddings, output_grads: Sequence[Float32Array]
    ) -> ForwardOutput:
        slopes = output_gradients(output_grads, len(kept.sequences.lengths), self._hidden_size)
        self._graphs.release(graph)
        return self._accumulate_linear(kept.sequences, kept.pooling, slopes, kept.passes)

    def _embed(
        self, sequences: Sequences, pooling: Pooling, *, keep: bool
    ) -> tuple[Float32Array, list[Pass], SavedBytes]:
        """Embeddings [S, H]; their passes, none where there is no room; what those take."""
        vectors, passes = [], []
        with memory_errors(), SavedBytes(self._loaded.model) as saved:
            for part in run_passes(self._loaded, sequences, graph=keep):
                vectors.append(pool(part.hidden, part.lengths, pooling))
                if keep:
                    passes.append(part)
        return torch.cat(vectors).cpu().numpy(), passes, saved

    def _accumulate_linear(
        self,
        sequences: Sequences,
        pooling: Pooling,
        slopes_SH: Float32Array,
        passes: list[Pass],
    ) -> ForwardOutput:
        """Accumulate the gradients of the linear loss sum(slopes * embeddings).

        Args:
            sequences: What the embeddings are of.
            pooling: How they are pooled.
            slopes_SH: Finite.
            passes: With their graphs; none: they are run here, one at a time.
        """
        session = self._session()
        grads = torch.from_numpy(slopes_SH).to(self._loaded.device)
        with memory_errors():
            running = passes or run_passes(self._loaded, sequences, graph=True)
            vectors, total = pooled_gradients(session.trainables, running, pooling, grads)
        check_gradients(total)
        count = count_sequences(slopes_SH)
        session.accumulate(total, session.counters.add(tokens=0, sequences=count, embeddings=True))
        loss = float((grads.double() * vectors.double()).sum())
        return _output(vectors.cpu().numpy(), {"loss:sum": loss})

    @property
    def _hidden_size(self) -> int:
        return int(self._loaded.head_parts[0].shape[1])


def _metrics(loss: float) -> dict[str, float]:
    return {"loss": loss, "loss:sum": loss}


def _output(
    vectors_SH: Float32Array, metrics: dict[str, float], graph: str | None = None
) -> ForwardOutput:
    return ForwardOutput([{"embedding": vector} for vector in vectors_SH], metrics, graph)
