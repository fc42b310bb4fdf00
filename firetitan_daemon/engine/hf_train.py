"""The training engine for real models: sessions, accumulation, steps, states and snapshots.

Knows: the engine seam and the parts it is made of. Must not know: workers, the daemon, the wire.

Every public call computes first and changes the session last, so one that raises has changed
nothing. Whoever writes weights empties the table of kept graphs before.

Shapes: T rows of a batch, K targets a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.failpoints import failpoint
from firetitan_daemon.engine.adapter import base_reference, write_adapter
from firetitan_daemon.engine.api import (
    AdamParams,
    Datum,
    Float32Array,
    ForwardOutput,
    LossConfig,
    ModelInfo,
    ModelSpec,
    Normalization,
    SavedFiles,
    SavedSnapshot,
    SessionProgress,
    SessionSpec,
    SnapshotKind,
    WriteState,
    check_base_only,
)
from firetitan_daemon.engine.batch import Batch, Limits, make_batch
from firetitan_daemon.engine.export import SnapshotWriter
from firetitan_daemon.engine.graph_bytes import (
    SavedBytes,
    default_limits,
    estimate_bytes_per_token,
)
from firetitan_daemon.engine.graphs import GraphLimits, GraphTable
from firetitan_daemon.engine.head import Head
from firetitan_daemon.engine.losses import choose_loss
from firetitan_daemon.engine.models import load_model
from firetitan_daemon.engine.optim import AdamW, check_params
from firetitan_daemon.engine.passes import (
    Gradients,
    Pass,
    add_gradient,
    built_in_gradient,
    check_gradients,
    check_terms,
    count_loss,
    given_gradient,
    loss_terms,
    memory_errors,
    parameter_gradients,
    run_passes,
)
from firetitan_daemon.engine.state import (
    Counters,
    StateOrigin,
    TrainingState,
    load_state,
    save_state,
    state_writer,
)
from firetitan_daemon.engine.tensors import from_raw, to_raw
from firetitan_daemon.engine.trainables import (
    FullTrainables,
    LoraTrainables,
    NoTrainables,
    Trainables,
)


@dataclass(frozen=True)
class _KeptPasses:
    batch: Batch
    passes: list[Pass]


@dataclass
class _Session:
    spec: SessionSpec
    trainables: Trainables
    optimizer: AdamW
    writer: SnapshotWriter
    gradients: Gradients
    counters: Counters
    forward_passes: int = 0


class HfTrainEngine:
    """One transformers model, one session (see `TrainEngine`).

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
        self._graphs: GraphTable[_KeptPasses] = GraphTable(limits)
        self._graph_bytes_per_token = estimate_bytes_per_token(self._loaded.model)
        self._current: _Session | None = None

    @property
    def info(self) -> ModelInfo:
        """The loaded model."""
        return self._loaded.info

    @property
    def progress(self) -> SessionProgress:
        """Where the session stands."""
        session = self._current
        if session is None:
            return SessionProgress(0, 0, 0)
        counters = session.counters
        return SessionProgress(counters.step, counters.pending_backwards, session.forward_passes)

    def open_session(self, spec: SessionSpec) -> None:
        """Attach a fresh adapter, or make every parameter or none trainable; a fresh optimizer.

        Raises:
            FiretitanError: INVALID_ARGUMENT or UNSUPPORTED naming what of the adapter cannot be.
        """
        if self._current is not None:
            self._graphs.clear()
            was_full = isinstance(self._current.trainables, FullTrainables)
            self._current.trainables.detach()
            self._current = None
            if was_full:
                self._loaded = load_model(self._spec)
        trainables: Trainables
        with memory_errors():
            if spec.forward_only:
                trainables = NoTrainables(self._loaded)
            elif spec.lora is None:
                trainables = FullTrainables(self._loaded)
            else:
                trainables = LoraTrainables(self._loaded, spec.lora, spec.seed)
        self._current = _Session(
            spec=spec,
            trainables=trainables,
            optimizer=AdamW(trainables.masters),
            writer=SnapshotWriter(Path(self.info.path), self._spec.base_model),
            gradients={},
            counters=Counters(),
        )

    def forward(
        self,
        data: Sequence[Datum],
        loss_fn: str,
        config: LossConfig,
        *,
        retain_graph: bool = False,
        base_only: bool = False,
    ) -> ForwardOutput:
        """Logprobs and the loss, gradients and kept graphs untouched (see `TrainEngine`).

        Raises:
            FiretitanError: INVALID_DATUM, LOSS_INPUT_MISSING, UNKNOWN_LOSS, NON_FINITE,
                INVALID_ARGUMENT, each naming the field.
        """
        session = self._session()
        if base_only:
            check_base_only(session.spec, retain_graph)
            with session.trainables.left_out():
                return self._forward(session, data, loss_fn, config, retain_graph=False)
        return self._forward(session, data, loss_fn, config, retain_graph=retain_graph)

    def _forward(
        self,
        session: _Session,
        data: Sequence[Datum],
        loss_fn: str,
        config: LossConfig,
        *,
        retain_graph: bool,
    ) -> ForwardOutput:
        loss, settings = choose_loss(loss_fn, config)
        batch = make_batch(data, loss, self._limits(), strict=False)
        tokens = len(batch.targets)
        keep = retain_graph and self._graphs.make_room(tokens * self._graph_bytes_per_token)
        head = session.trainables.head()
        passes, logprobs, terms = [], [], []
        with memory_errors(), SavedBytes(self._loaded.model) as saved:
            for part in run_passes(self._loaded, batch, graph=keep):
                values = head.logprobs(
                    part.hidden.detach(), batch.targets[part.rows].to(part.hidden.device)
                )
                logprobs.append(values)
                terms.append(loss_terms(batch, loss, settings, part, values))
                check_terms(batch, part.rows, terms[-1])
                if keep:
                    passes.append(part)
        graph = None
        if keep:
            graph = self._graphs.put(_KeptPasses(batch, passes), saved.num_bytes)
            self._graph_bytes_per_token = max(1, -(-saved.num_bytes // tokens))
        session.forward_passes += 1
        return _output(batch, logprobs, terms, graph)

    def backward(self, graph: str, output_grads: Sequence[Float32Array]) -> ForwardOutput:
        """Accumulate gradients from dC/dlogprobs and release the graph.

        `loss:sum` is that of the surrogate, sum of dC/dlogprob * logprob.

        Raises:
            FiretitanError: GRAPH_EXPIRED where the graph is gone; INVALID_ARGUMENT or NON_FINITE
                naming the array (the graph is kept then).
        """
        session = self._session()
        kept = self._graphs.get(graph)
        batch = kept.batch
        slopes = batch.rows(output_grads, "output_grads").to(self._loaded.device)
        self._graphs.release(graph)
        head = session.trainables.head()
        logprobs: list[torch.Tensor] = []
        total: Gradients = {}
        with memory_errors():
            for part in kept.passes:
                values, gradients = parameter_gradients(
                    session.trainables, head, batch, part, given_gradient(slopes[part.rows])
                )
                logprobs.append(values)
                for name, grad in gradients.items():
                    add_gradient(total, name, grad)
        check_gradients(total)
        self._accumulate(session, total, count_loss(batch, slopes))
        output = _output(batch, logprobs, [slopes * torch.cat(logprobs)], None)
        output.metrics["response_tokens"] = _response_tokens(slopes)
        return output

    def release_graph(self, graph: str) -> None:
        """Drop a kept graph; unknown names are fine."""
        self._graphs.release(graph)

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: str, config: LossConfig
    ) -> ForwardOutput:
        """As forward, and accumulates gradients; unlike forward, rejects unknown loss inputs.

        Raises:
            FiretitanError: As `forward`.
        """
        session = self._session()
        loss, settings = choose_loss(loss_fn, config)
        batch = make_batch(data, loss, self._limits(), strict=True)
        head: Head = session.trainables.head()
        logprobs: list[torch.Tensor] = []
        terms: list[torch.Tensor] = []
        slopes: list[torch.Tensor] = []
        total: Gradients = {}
        with memory_errors():
            for part in run_passes(self._loaded, batch, graph=True):
                gradient = built_in_gradient(batch, loss, settings, part, head, terms, slopes)
                values, gradients = parameter_gradients(
                    session.trainables, head, batch, part, gradient
                )
                logprobs.append(values)
                for name, grad in gradients.items():
                    add_gradient(total, name, grad)
        check_gradients(total)
        self._accumulate(session, total, count_loss(batch, torch.cat(slopes)))
        session.forward_passes += 1
        output = _output(batch, logprobs, terms, None)
        if loss.name == "cross_entropy":
            output.metrics["response_tokens"] = _response_tokens(batch.inputs["weights"])
        return output

    def optim_step(
        self, params: AdamParams, normalization: Normalization, expected_step: int | None = None
    ) -> dict[str, float]:
        """Normalise, clip, AdamW, zero gradients.

        Returns:
            `step` after it, and `grad_norm`: normalised, before clipping.

        Raises:
            FiretitanError: NO_GRADIENTS, STEP_MISMATCH, NON_FINITE, INVALID_ARGUMENT.
        """
        session = self._session()
        counters = session.counters
        check_params(params)
        if expected_step is not None and expected_step != counters.step:
            raise FiretitanError(
                Reason.STEP_MISMATCH,
                f"expected_step={expected_step}: the session is at step {counters.step}",
                field="expected_step",
            )
        if counters.pending_backwards == 0:
            raise FiretitanError(
                Reason.NO_GRADIENTS,
                "no gradients accumulated since the last step; call forward_backward first",
            )
        denominator = {
            Normalization.NONE: 1,
            Normalization.NUM_LOSS_TOKENS: max(counters.loss_tokens, 1),
            Normalization.NUM_SEQUENCES: max(counters.loss_sequences, 1),
        }[normalization]
        masters = session.trainables.masters
        with memory_errors():
            gradients = {
                name: session.gradients.get(name, torch.zeros_like(master))
                for name, master in masters.items()
            }
            session.optimizer.prepare()
        norm = session.optimizer.norm(gradients, denominator)
        self._graphs.clear()
        session.optimizer.update(gradients, params, norm, denominator)
        failpoint("engine.step")
        session.trainables.refresh()
        session.gradients = {}
        session.counters = Counters(step=session.optimizer.step_count)
        return {"step": float(session.counters.step), "grad_norm": norm}

    def save_state(self, staging: Path) -> SavedFiles:
        """Weights, optimizer, pending gradients and counters into an empty folder."""
        session = self._session()
        return save_state(staging, self._state(session), self._origin(session))

    def capture_state(self, *, copy: bool) -> WriteState:
        """Writes, when called, what `save_state` would write now; of a copy, or at once.

        Raises:
            FiretitanError: DEVICE_OUT_OF_MEMORY where there is no room for a copy.
        """
        session = self._session()
        return state_writer(self._state(session), self._origin(session), copy=copy)

    @staticmethod
    def _state(session: _Session) -> TrainingState:
        return TrainingState(
            to_raw(session.trainables.masters),
            to_raw(session.optimizer.first),
            to_raw(session.optimizer.second),
            to_raw(session.gradients),
            session.counters,
        )

    def load_state(self, folder: Path, *, with_optimizer: bool) -> None:
        """Verify every checksum, then replace the weights; clears gradients and graphs.

        Raises:
            FiretitanError: CHECKSUM_MISMATCH, or INVALID_ARGUMENT for another model's or
                adapter's state.
        """
        session = self._session()
        masters = session.trainables.masters
        state = load_state(
            folder, self._origin(session), to_raw(masters), with_optimizer=with_optimizer
        )
        with memory_errors():
            moments = [
                {
                    name: tensor.to(self._loaded.device, copy=True)
                    for name, tensor in from_raw(raw).items()
                }
                for raw in (state.first_moment, state.second_moment)
            ]
        self._graphs.clear()
        with torch.no_grad():
            for name, tensor in from_raw(state.weights).items():
                masters[name].copy_(tensor)
        session.trainables.refresh()
        session.optimizer.restore(state.counters.step, *moments)
        session.gradients = {}
        session.counters = Counters(step=state.counters.step)
        session.writer.forget()

    def save_snapshot(
        self, staging: Path, name: str, kind: SnapshotKind, parent: str | None
    ) -> SavedSnapshot:
        """Weights to serve, into an empty folder: an adapter whole, full weights base or delta.

        Raises:
            FiretitanError: CHAIN_BROKEN where `parent` is not the last snapshot saved here.
        """
        session = self._session()
        trainables = session.trainables
        if isinstance(trainables, LoraTrainables):
            assert session.spec.lora is not None
            base_model, revision = base_reference(self._spec.base_model, self.info)
            return write_adapter(
                staging,
                name,
                {key: (pair.a, pair.b) for key, pair in trainables.adapter.items()},
                alpha=session.spec.lora.alpha,
                base_model=base_model,
                revision=revision,
                model_folder=Path(self.info.path),
            )
        parameters = dict(self._loaded.model.named_parameters(remove_duplicate=False))
        buffers = {
            key: tensor
            for key, tensor in self._loaded.model.state_dict().items()
            if key not in parameters
        }
        return session.writer.save(staging, name, kind, parent, buffers | trainables.masters)

    def forget_snapshot(self) -> None:
        """Drop what the next delta would stand on: the last snapshot was not published."""
        self._session().writer.forget()

    def close(self) -> None:
        """Free the memory."""
        self._graphs.clear()
        self._current = None
        self._loaded.model = None

    def _session(self) -> _Session:
        if self._current is None:
            raise FiretitanError(Reason.CLOSED, "no session is open on this engine")
        return self._current

    def _limits(self) -> Limits:
        return Limits(
            self.info.vocab_size,
            self._loaded.head_parts[0].shape[0],
            self.info.max_context_length,
        )

    def _origin(self, session: _Session) -> StateOrigin:
        return StateOrigin(
            base_fingerprint=self.info.fingerprint,
            lora=session.spec.lora,
            base_model=self._spec.base_model,
            seed=session.spec.seed,
            versions=self.info.versions,
        )

    def _accumulate(self, session: _Session, total: Gradients, counts: tuple[int, int]) -> None:
        """Add a call's gradients to the session's; the only place that does."""
        for name, grad in total.items():
            add_gradient(session.gradients, name, grad)
        counters = session.counters
        session.counters = replace(
            counters,
            pending_backwards=counters.pending_backwards + 1,
            loss_tokens=counters.loss_tokens + counts[0],
            loss_sequences=counters.loss_sequences + counts[1],
        )


def _output(
    batch: Batch, logprobs: list[torch.Tensor], terms: list[torch.Tensor], graph: str | None
) -> ForwardOutput:
    total = sum(float(part.double().sum()) for part in terms)
    arrays = batch.outputs(torch.cat(logprobs))
    return ForwardOutput([{"logprobs": array} for array in arrays], {"loss:sum": total}, graph)


def _response_tokens(weights_TK: torch.Tensor) -> float:
    return float((weights_TK != 0).sum())
