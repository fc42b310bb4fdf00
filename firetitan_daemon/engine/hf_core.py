"""One transformers model and its session: what every call of the training engine works with.

Knows: the loaded model, the session's parts, the table of kept graphs. Must not know: losses,
steps, files.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Self

import torch

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import ModelInfo, ModelSpec, SessionProgress, SessionSpec
from firetitan_daemon.engine.batch import Batch, Limits
from firetitan_daemon.engine.checks import check_base_only
from firetitan_daemon.engine.embeddings import KeptEmbeddings
from firetitan_daemon.engine.export import SnapshotWriter
from firetitan_daemon.engine.graph_bytes import (
    SavedBytes,
    default_limits,
    estimate_bytes_per_token,
)
from firetitan_daemon.engine.graphs import GraphLimits, GraphTable
from firetitan_daemon.engine.models import load_model
from firetitan_daemon.engine.optim import AdamW
from firetitan_daemon.engine.passes import Gradients, Pass, add_gradient
from firetitan_daemon.engine.state import Counters
from firetitan_daemon.engine.trainables import Trainables


@dataclass(frozen=True)
class KeptLogprobs:
    """Passes whose hidden states carry their graph, and the batch they are of."""

    batch: Batch
    passes: list[Pass]


@dataclass
class Session:
    """What is trained and where it stands."""

    spec: SessionSpec
    trainables: Trainables
    optimizer: AdamW
    writer: SnapshotWriter
    gradients: Gradients
    counters: Counters
    forward_passes: int = 0

    def accumulate(self, total: Gradients, counters: Counters) -> None:
        """Add a call's gradients; the only place that does.

        Args:
            total: By master name, finite.
            counters: The session's, the call counted.
        """
        for name, grad in total.items():
            add_gradient(self.gradients, name, grad)
        self.counters = counters

    def all_gradients(self) -> Gradients:
        """A gradient for every master, zeros where none came."""
        return {
            name: self.gradients[name] if name in self.gradients else torch.zeros_like(master)
            for name, master in self.trainables.masters.items()
        }


class HfCore:
    """A loaded model and at most one session.

    Args:
        spec: What to load; loading happens here.
        graph_limits: What kept forward passes may take; None is a quarter of the memory.

    Raises:
        FiretitanError: As `load_model`.
    """

    def __init__(self, spec: ModelSpec, graph_limits: GraphLimits | None = None) -> None:
        self._spec = spec
        self._loaded = load_model(spec)
        limits = graph_limits or default_limits(self._loaded.device)
        self._graphs: GraphTable[KeptLogprobs | KeptEmbeddings] = GraphTable(limits)
        self._graph_bytes_per_token = estimate_bytes_per_token(self._loaded.model)
        self._current: Session | None = None
        self._owns_model = True

    def beside(self) -> Self:
        """An engine for one more session over the same weights (see `TrainEngine`)."""
        other = copy.copy(self)
        other._graphs = self._graphs.beside()
        other._current = None
        other._owns_model = False
        return other

    @property
    def info(self) -> ModelInfo:
        """The loaded model."""
        return self._loaded.info

    @property
    def progress(self) -> SessionProgress:
        """Where the session stands."""
        session = self._current
        if session is None:
            return SessionProgress(0, 0, 0, 0)
        counters = session.counters
        return SessionProgress(
            counters.step,
            counters.pending_backwards,
            session.forward_passes,
            3 * sum(master.nbytes for master in session.trainables.masters.values()),
        )

    def expire_graphs(self) -> None:
        """Free kept graphs that are too old, whichever session's (see `TrainEngine`)."""
        self._graphs.expire()

    def _session(self) -> Session:
        if self._current is None:
            raise FiretitanError(Reason.CLOSED, "no session is open on this engine")
        self._current.trainables.activate()
        return self._current

    def _limits(self) -> Limits:
        return Limits(
            self.info.vocab_size,
            self._loaded.head_parts[0].shape[0],
            self.info.max_context_length,
            self.info.routing,
            self._loaded.routers.note,
        )

    def _weights(
        self, session: Session, *, base_only: bool, retain_graph: bool
    ) -> AbstractContextManager[None]:
        """Within it the model computes with the session's weights, or with the base's.

        Raises:
            FiretitanError: INVALID_ARGUMENT where the adapter cannot be left out.
        """
        if not base_only:
            return nullcontext()
        check_base_only(session.spec, retain_graph)
        return session.trainables.left_out()

    def _room_for_graph(self, tokens: int, *, needed: bool = False) -> bool:
        """Whether the graph of so many tokens may be kept; drops the oldest ones for it."""
        return self._graphs.make_room(tokens * self._graph_bytes_per_token, needed=needed)

    def _keep(
        self,
        kept: KeptLogprobs | KeptEmbeddings,
        saved: SavedBytes,
        tokens: int,
        *,
        needed: bool,
    ) -> str:
        """Keep passes under a handle, and learn what a token takes."""
        self._graph_bytes_per_token = max(1, -(-saved.num_bytes // tokens))
        return self._graphs.put(kept, saved.num_bytes, needed=needed)
