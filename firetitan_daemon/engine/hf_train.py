"""The training engine for real models: sessions, accumulation, steps, states and snapshots.

Knows: the engine seam and the parts it is made of. Must not know: workers, the daemon, the wire.

Every public call computes first and changes the session last, so one that raises has changed
nothing. Whoever writes weights empties the table of kept graphs before.

Shapes: T rows of a batch, K targets a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.failpoints import failpoint
from firetitan_daemon.engine.adapter import Pairs, base_reference, write_adapter
from firetitan_daemon.engine.api import (
    AdamParams,
    Datum,
    ExportPrecision,
    Float32Array,
    ForwardOutput,
    LoraSpec,
    LossConfig,
    Normalization,
    SavedFiles,
    SavedSnapshot,
    SessionSpec,
    SnapshotKind,
    WriteState,
)
from firetitan_daemon.engine.batch import Batch, make_batch
from firetitan_daemon.engine.checks import check_adapted
from firetitan_daemon.engine.embeddings import KeptEmbeddings
from firetitan_daemon.engine.export import SnapshotWriter
from firetitan_daemon.engine.grad_norms import GradNormMetrics, grad_norm_metrics
from firetitan_daemon.engine.graph_bytes import SavedBytes
from firetitan_daemon.engine.head import Head
from firetitan_daemon.engine.hf_core import KeptLogprobs, Session
from firetitan_daemon.engine.hf_embeddings import HfEmbeddings
from firetitan_daemon.engine.losses import choose_loss
from firetitan_daemon.engine.merge import merge_adapter, write_merged
from firetitan_daemon.engine.models import load_model
from firetitan_daemon.engine.optim import AdamW, check_params, tensor_norms
from firetitan_daemon.engine.passes import (
    Gradients,
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
from firetitan_daemon.engine.peft import PeftAdapter, read_adapter
from firetitan_daemon.engine.state import (
    Counters,
    StateOrigin,
    TrainingState,
    load_state,
    save_state,
    state_writer,
)
from firetitan_daemon.engine.tensors import from_raw, stored_dtypes, to_raw
from firetitan_daemon.engine.top_candidates import add_candidates, check_top_k, take_top_k
from firetitan_daemon.engine.trainables import (
    FullTrainables,
    LoraTrainables,
    NoTrainables,
    Trainables,
)


class HfTrainEngine(HfEmbeddings):
    """One transformers model, one session (see `TrainEngine`)."""

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
        self._current = Session(
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
        over_budget: bool = False,
    ) -> ForwardOutput:
        """Logprobs and the loss, gradients untouched (see `TrainEngine`).

        Raises:
            FiretitanError: INVALID_DATUM, LOSS_INPUT_MISSING, UNKNOWN_LOSS, NON_FINITE,
                INVALID_ARGUMENT, each naming the field.
        """
        session = self._session()
        with self._weights(session, base_only=base_only, retain_graph=retain_graph):
            return self._forward(
                session, data, loss_fn, config, retain_graph=retain_graph, needed=over_budget
            )

    def _forward(
        self,
        session: Session,
        data: Sequence[Datum],
        loss_fn: str,
        config: LossConfig,
        *,
        retain_graph: bool,
        needed: bool,
    ) -> ForwardOutput:
        top_k, config = take_top_k(loss_fn, config, self._limits().target_size)
        loss, settings = choose_loss(loss_fn, config)
        batch = make_batch(data, loss, self._limits(), strict=False)
        tokens = batch.num_tokens
        check_top_k(top_k, tokens)
        keep = retain_graph and self._room_for_graph(tokens, needed=needed)
        head = session.trainables.head()
        passes, logprobs, terms, candidates = [], [], [], []
        with memory_errors(), SavedBytes(self._loaded.model) as saved:
            for part in run_passes(self._loaded, batch, graph=keep):
                values = head.logprobs(
                    part.hidden.detach(), batch.targets[part.rows].to(part.hidden.device)
                )
                logprobs.append(values)
                if top_k:
                    candidates.append(head.top(part.hidden.detach(), top_k))
                terms.append(loss_terms(batch, loss, settings, part, values))
                check_terms(batch, part.rows, terms[-1])
                if keep:
                    passes.append(part)
        graph = None
        if keep:
            graph = self._keep(KeptLogprobs(batch, passes), saved, tokens, needed=needed)
        session.forward_passes += 1
        output = _output(batch, logprobs, terms, graph)
        if candidates:
            add_candidates(output.outputs, batch, candidates)
        return output

    def backward(self, graph: str, output_grads: Sequence[Float32Array]) -> ForwardOutput:
        """Accumulate gradients from dC/dlogprobs or dC/dembedding and release the graph.

        `loss:sum` is that of the surrogate, sum of dC/doutput * output.

        Raises:
            FiretitanError: GRAPH_EXPIRED where the graph is gone; INVALID_ARGUMENT or NON_FINITE
                naming the array (the graph is kept then); NON_FINITE naming a parameter or
                DEVICE_OUT_OF_MEMORY (it is gone then).
        """
        session = self._session()
        kept = self._graphs.get(graph)
        if isinstance(kept, KeptEmbeddings):
            return self._backward_embeddings(graph, kept, output_grads)
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
        tokens, sequences = count_loss(batch, slopes)
        session.accumulate(total, session.counters.add(tokens=tokens, sequences=sequences))
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
        tokens, sequences = count_loss(batch, torch.cat(slopes))
        session.accumulate(total, session.counters.add(tokens=tokens, sequences=sequences))
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
            `step` after it, and `grad_norm`: normalised, before clipping; more of the gradients
            where `params.grad_norm_metrics` asks for it.

        Raises:
            FiretitanError: NO_GRADIENTS, NO_LOSS_TOKENS, STEP_MISMATCH, NON_FINITE,
                INVALID_ARGUMENT.
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
        denominator = counters.denominator(normalization)
        with memory_errors():
            gradients = session.all_gradients()
            session.optimizer.prepare()
            norm = session.optimizer.norm(gradients, denominator)
            more = _grad_norms(params.grad_norm_metrics, gradients, denominator)
        self._graphs.clear()
        session.optimizer.update(gradients, params, norm, denominator)
        failpoint("engine.step")
        session.trainables.refresh()
        session.gradients = {}
        session.counters = Counters(step=session.optimizer.step_count)
        return {"step": float(session.counters.step), "grad_norm": norm, **more}

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
    def _state(session: Session) -> TrainingState:
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

    def load_adapter(self, folder: Path) -> None:
        """Verify every checksum, then take over a PEFT adapter's weights; moments and steps anew.

        Raises:
            FiretitanError: INVALID_ARGUMENT, UNSUPPORTED or NON_FINITE naming what does not fit;
                CHECKSUM_MISMATCH. Nothing was changed.
        """
        session = self._session()
        check_adapted(session.spec)
        assert isinstance(session.trainables, LoraTrainables)
        about = durable.verify_folder(folder)
        adapter = read_adapter(folder, about.get("source"))
        self._check_base_weights(adapter)
        with memory_errors():
            fitted = session.trainables.fit(adapter, session.spec.seed)
        self._graphs.clear()
        with torch.no_grad():
            for name, tensor in fitted.items():
                session.trainables.masters[name].copy_(tensor)
        session.trainables.refresh()
        session.optimizer.reset()
        session.gradients = {}
        session.counters = Counters()
        session.writer.forget()

    def _check_base_weights(self, adapter: PeftAdapter) -> None:
        """Refuse an adapter that brings other weights than the base's own."""
        parameters = dict(self._loaded.model.named_parameters(remove_duplicate=False))
        for module, tensor in from_raw(adapter.base_weights).items():
            own = parameters.get(f"{module}.weight")
            if own is None or own.shape != tensor.shape or not bool((own.cpu() == tensor).all()):
                raise adapter.refuse(
                    f'brings weights for "{module}" that are not the base model\'s; an adapter '
                    "alone can be loaded",
                    module,
                    Reason.UNSUPPORTED,
                )

    def save_snapshot(
        self,
        staging: Path,
        name: str,
        kind: SnapshotKind,
        parent: str | None,
        precision: ExportPrecision = ExportPrecision.SOURCE,
    ) -> SavedSnapshot:
        """Weights to serve, into an empty folder: an adapter whole, full weights base or delta.

        A merged base is the adapter's whole model, in the base's stored dtypes or in bfloat16.

        Raises:
            FiretitanError: CHAIN_BROKEN where `parent` is not the last snapshot saved here.
        """
        session = self._session()
        trainables = session.trainables
        if isinstance(trainables, LoraTrainables):
            assert session.spec.lora is not None
            pairs = {key: (pair.a, pair.b) for key, pair in trainables.adapter.items()}
            if kind is SnapshotKind.MERGED_BASE:
                return self._save_merged(staging, name, pairs, session.spec.lora, precision)
            base_model, revision = base_reference(self._spec.base_model, self.info)
            return write_adapter(
                staging,
                name,
                pairs,
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

    def _save_merged(
        self, staging: Path, name: str, pairs: Pairs, lora: LoraSpec, precision: ExportPrecision
    ) -> SavedSnapshot:
        folder = Path(self.info.path)
        with memory_errors():
            merged = merge_adapter(
                self._loaded.model,
                pairs,
                lora.alpha / lora.rank,
                stored_dtypes(folder),
                precision,
            )
        return write_merged(staging, name, merged, folder, self._spec.base_model, precision)

    def forget_snapshot(self) -> None:
        """Drop what the next delta would stand on: the last snapshot was not published."""
        self._session().writer.forget()

    def close(self) -> None:
        """Free the memory; of an engine beside another, its session's."""
        self._graphs.clear()
        if self._current is not None:
            self._current.trainables.detach()
            self._current = None
        if self._owns_model:
            self._loaded.model = None

    def _origin(self, session: Session) -> StateOrigin:
        return StateOrigin(
            base_fingerprint=self.info.fingerprint,
            lora=session.spec.lora,
            base_model=self._spec.base_model,
            seed=session.spec.seed,
            versions=self.info.versions,
        )


def _output(
    batch: Batch, logprobs: list[torch.Tensor], terms: list[torch.Tensor], graph: str | None
) -> ForwardOutput:
    total = sum(float(part.double().sum()) for part in terms)
    arrays = batch.outputs(torch.cat(logprobs))
    return ForwardOutput([{"logprobs": array} for array in arrays], {"loss:sum": total}, graph)


def _grad_norms(
    mode: GradNormMetrics, gradients: Gradients, denominator: float
) -> dict[str, float]:
    if mode is GradNormMetrics.OFF:
        return {}
    norms = {name: norm / denominator for name, norm in tensor_norms(gradients).items()}
    return grad_norm_metrics(mode, norms, {name: one.numel() for name, one in gradients.items()})


def _response_tokens(weights_TK: torch.Tensor) -> float:
    return float((weights_TK != 0).sum())
