"""The toy model's training engine: exact gradients, AdamW, states and snapshots in numpy.

Knows: the toy model, its losses, the engine seam. Must not know: workers, the daemon. A step takes
less than a millisecond, and equal calls give equal bits whatever their split into batches.

Shape legend: `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import (
    AdamParams,
    Datum,
    ExportPrecision,
    Float32Array,
    ForwardOutput,
    LossConfig,
    ModelInfo,
    ModelSpec,
    Normalization,
    Pooling,
    SavedFiles,
    SavedSnapshot,
    SessionProgress,
    SessionSpec,
    SnapshotFormat,
    SnapshotKind,
    WriteState,
)
from firetitan_daemon.engine.checks import check_adapted, check_base_only
from firetitan_daemon.engine.embedding_loss import (
    choose_embedding_loss,
    count_sequences,
    given_gradients,
    output_gradients,
)
from firetitan_daemon.engine.grad_norms import grad_norm_metrics
from firetitan_daemon.engine.peft import fit_adapter, read_adapter
from firetitan_daemon.engine.raw import (
    RawTensor,
    RawTensors,
    result_digest,
    seal,
    write_safetensors,
)
from firetitan_daemon.engine.snapshots import ChainWriter, about_base
from firetitan_daemon.engine.state import (
    Counters,
    StateOrigin,
    TrainingState,
    load_state,
    save_state,
    state_writer,
)
from firetitan_daemon.engine.toy import model
from firetitan_daemon.engine.toy.gradients import PendingGradients, pooling_weights
from firetitan_daemon.engine.toy.losses import Loss, check, check_tokens
from firetitan_daemon.engine.toy.model import Float64Array, Weights
from firetitan_daemon.engine.toy.optim import adamw, check_adam

BASE_FILE = "model.safetensors"
MAX_GRAPHS = 64


@dataclass(frozen=True)
class _Graph:
    """Data of a kept forward pass; with a pooling it gave embeddings."""

    data: list[Datum]
    pooling: Pooling | None = None


class ToyTrainEngine:
    """One toy model, one session (see `TrainEngine`).

    Args:
        spec: `base_model` is the toy's name; `max_context_length` is honoured.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._asked = spec
        self._info = model.describe(spec)
        self._base = model.base_weights()
        self._spec: SessionSpec | None = None
        self._weights: Weights = {}
        self._first: dict[str, Float32Array] = {}
        self._second: dict[str, Float32Array] = {}
        self._pending = PendingGradients()
        self._counters = Counters()
        self._forwards = 0
        self._graphs: dict[str, _Graph] = {}
        self._next_graph = 0
        self._writer = ChainWriter(write_base)
        self._logprobs_VV: Float64Array | None = None

    def beside(self) -> ToyTrainEngine:
        """An engine for one more session (see `TrainEngine`)."""
        return type(self)(self._asked)

    @property
    def info(self) -> ModelInfo:
        """The toy model."""
        return self._info

    @property
    def progress(self) -> SessionProgress:
        """Where the session stands."""
        counters = self._counters
        state_bytes = 3 * sum(array.nbytes for array in self._weights.values())
        return SessionProgress(
            counters.step, counters.pending_backwards, self._forwards, state_bytes
        )

    def open_session(self, spec: SessionSpec) -> None:
        """Start anew with a fresh adapter or the base's own matrices.

        Raises:
            FiretitanError: INVALID_ARGUMENT for a rank below 1.
        """
        if spec.lora is not None and spec.lora.rank < 1:
            raise FiretitanError(
                Reason.INVALID_ARGUMENT,
                f"lora_rank={spec.lora.rank}: give 1 or more, or no adapter",
                field="lora_rank",
            )
        self._spec = spec
        self._forwards = 0
        if spec.lora is None:
            self._replace({name: array.copy() for name, array in self._base.items()})
        else:
            self._replace(model.lora_weights(spec.lora, spec.seed))

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
        """Logprobs and the loss; gradients and kept graphs stay as they are."""
        loss, settings = self._check(data, loss_fn, config, strict=False)
        if base_only:
            check_base_only(self._session(), retain_graph)
            table = model.logprob_table(model.logits_table(self._base))
            output, _ = self._evaluate(data, loss, settings, table)
            return output
        output, _ = self._evaluate(data, loss, settings)
        return replace(output, graph=self._keep(_Graph(list(data)))) if retain_graph else output

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
        """Pooled rows of the embedding matrix, which no adapter changes."""
        if base_only:
            check_base_only(self._session(), retain_graph)
        vectors = self._embed(data, pooling)
        metrics = {}
        if loss_fn:
            value, _ = choose_embedding_loss(loss_fn, config, len(data))(vectors)
            metrics = {"loss": value, "loss:sum": value}
        self._forwards += 1
        graph = self._keep(_Graph(list(data), pooling)) if retain_graph else None
        return ForwardOutput([{"embedding": vector} for vector in vectors], metrics, graph)

    def forward_backward_embeddings(
        self, data: Sequence[Datum], pooling: Pooling, loss_fn: str, config: LossConfig
    ) -> ForwardOutput:
        """As forward_embeddings, and accumulates gradients."""
        vectors = self._embed(data, pooling)
        if loss_fn:
            value, slopes = choose_embedding_loss(loss_fn, config, len(data))(vectors)
            metrics = {"loss": value, "loss:sum": value}
        else:
            slopes = given_gradients(data, model.HIDDEN)
            metrics = {"loss:sum": float((vectors * slopes).sum())}
        self._forwards += 1
        self._accumulate_embeddings(data, pooling, slopes)
        return ForwardOutput([{"embedding": vector} for vector in vectors], metrics)

    def backward(self, graph: str, output_grads: Sequence[Float32Array]) -> ForwardOutput:
        """Accumulate gradients from dC/dlogprobs or dC/dembedding and release the graph.

        Raises:
            FiretitanError: GRAPH_EXPIRED, INVALID_ARGUMENT, NON_FINITE.
        """
        kept = self._graphs.get(graph)
        if kept is None:
            raise FiretitanError(
                Reason.GRAPH_EXPIRED,
                f'graph "{graph}" is gone: weights changed, or newer graphs took its place; '
                "run forward again",
                field="graph",
            )
        data = kept.data
        if kept.pooling is not None:
            slopes = output_gradients(output_grads, len(data), model.HIDDEN)
            self._accumulate_embeddings(data, kept.pooling, slopes)
            del self._graphs[graph]
            vectors = self._embed(data, kept.pooling)
            loss = float((vectors * slopes).sum())
            return ForwardOutput([{"embedding": one} for one in vectors], {"loss:sum": loss})
        if len(output_grads) != len(data):
            raise FiretitanError(
                Reason.INVALID_ARGUMENT,
                f"output_grads: has {len(output_grads)} arrays, the forward had {len(data)} data",
                field="output_grads",
            )
        for index, (datum, grads) in enumerate(zip(data, output_grads, strict=True)):
            shape = datum.loss_inputs["target_tokens"].shape
            if grads.shape != shape:
                raise FiretitanError(
                    Reason.INVALID_ARGUMENT,
                    f"output_grads[{index}]: has shape {list(grads.shape)}, logprobs have "
                    f"{list(shape)}",
                    field=f"output_grads[{index}]",
                )
        gradients = [grads.astype(np.float64) for grads in output_grads]
        self._accumulate(data, gradients)
        del self._graphs[graph]
        table = self._table()
        outputs = [{"logprobs": _logprobs(table, d).astype(np.float32)} for d in data]
        return ForwardOutput(outputs, {"loss:sum": 0.0})

    def release_graph(self, graph: str) -> None:
        """Drop a kept graph; unknown names are fine."""
        self._graphs.pop(graph, None)

    def expire_graphs(self) -> None:
        """Here graphs have no age."""

    def forward_backward(
        self, data: Sequence[Datum], loss_fn: str, config: LossConfig
    ) -> ForwardOutput:
        """As forward, and accumulates gradients; rejects unknown loss inputs."""
        loss, settings = self._check(data, loss_fn, config, strict=True)
        forwards = self._forwards
        output, gradients = self._evaluate(data, loss, settings)
        try:
            self._accumulate(data, gradients)
        except FiretitanError:
            self._forwards = forwards
            raise
        return output

    def optim_step(
        self, params: AdamParams, normalization: Normalization, expected_step: int | None = None
    ) -> dict[str, float]:
        """Normalise, clip, AdamW with decoupled decay, zero gradients.

        Raises:
            FiretitanError: NO_GRADIENTS, NO_LOSS_TOKENS, STEP_MISMATCH, NON_FINITE,
                INVALID_ARGUMENT.
        """
        counters = self._counters
        check_adam(params)
        if expected_step is not None and expected_step != counters.step:
            raise FiretitanError(
                Reason.STEP_MISMATCH,
                f"expected_step={expected_step}: the session is at step {counters.step}",
                field="expected_step",
            )
        denominator = counters.denominator(normalization)
        gradients = self._pending.of_parameters(
            self._base, self._weights, self._session().lora, denominator
        )
        norm = float(np.sqrt(sum(float((g**2).sum()) for g in gradients.values())))
        if not np.isfinite(norm):
            raise FiretitanError(Reason.NON_FINITE, f"gradient norm is {norm}; nothing was changed")
        norms = {name: float(np.linalg.norm(g)) for name, g in gradients.items()}
        more = grad_norm_metrics(
            params.grad_norm_metrics, norms, {name: g.size for name, g in gradients.items()}
        )
        clip = params.grad_clip_norm
        scale = clip / norm if clip > 0 and norm > clip else 1.0
        step = counters.step + 1
        scaled = {name: gradient * scale for name, gradient in gradients.items()}
        adamw(self._weights, self._first, self._second, scaled, params, step)
        self._counters = Counters(step=step)
        self._moved()
        return {"step": float(step), "grad_norm": norm, **more}

    def save_state(self, staging: Path) -> SavedFiles:
        """Weights, moments, pending gradients and counters into an empty folder."""
        return save_state(staging, self._state(), self._origin())

    def capture_state(self, *, copy: bool) -> WriteState:
        """Writes, when called, what `save_state` would write now."""
        return state_writer(self._state(), self._origin(), copy=copy)

    def _state(self) -> TrainingState:
        return TrainingState(
            model.raw(self._weights),
            model.raw(self._first),
            model.raw(self._second),
            self._pending.raw() if self._counters.pending_backwards else {},
            self._counters,
        )

    def load_state(self, folder: Path, *, with_optimizer: bool) -> None:
        """Verify, then replace the weights; clears gradients and graphs."""
        state = load_state(
            folder, self._origin(), model.raw(self._weights), with_optimizer=with_optimizer
        )
        self._replace(model.arrays(state.weights))
        if with_optimizer:
            self._first |= model.arrays(state.first_moment)
            self._second |= model.arrays(state.second_moment)
            self._counters = Counters(step=state.counters.step)

    def load_adapter(self, folder: Path) -> None:
        """Verify, then take over a PEFT adapter of the layer `unembed`."""
        spec = self._session()
        check_adapted(spec)
        assert spec.lora is not None
        about = durable.verify_folder(folder)
        adapter = read_adapter(folder, about.get("source"))
        for module in adapter.base_weights:
            raise adapter.refuse(f'brings weights for "{module}"', module, Reason.UNSUPPORTED)
        own = model.lora_weights(spec.lora, spec.seed)
        fresh = {model.ADAPTED: (own[model.LORA_A], own[model.LORA_B])}
        fitted = fit_adapter(adapter, fresh, spec.lora.alpha / spec.lora.rank)
        a, b = fitted[model.ADAPTED]
        self._replace({model.LORA_A: a, model.LORA_B: b})

    def save_snapshot(
        self,
        staging: Path,
        name: str,
        kind: SnapshotKind,
        parent: str | None,
        precision: ExportPrecision = ExportPrecision.SOURCE,
    ) -> SavedSnapshot:
        """The two matrices; an adapter is merged and always makes a base."""
        lora = self._session().lora
        whole = model.raw(model.merged(self._base, self._weights, lora))
        own = {k: RawTensor(t.dtype, t.shape, t.data.copy()) for k, t in whole.items()}
        if lora is not None:
            saved = write_base(staging, name, own)
            merged = kind is SnapshotKind.MERGED_BASE
            return replace(saved, kind=kind) if merged else saved
        return self._writer.save(staging, name, kind, parent, own)

    def forget_snapshot(self) -> None:
        """Drop what the next delta would stand on: the last snapshot was not published."""
        self._writer.forget()

    def close(self) -> None:
        """Free the memory."""
        self._graphs.clear()
        self._writer.forget()

    def _session(self) -> SessionSpec:
        if self._spec is None:
            raise FiretitanError(Reason.CLOSED, "no session is open on this engine")
        return self._spec

    def _origin(self) -> StateOrigin:
        spec = self._session()
        return StateOrigin(
            base_fingerprint=self._info.fingerprint,
            lora=spec.lora,
            base_model=model.TOY_MODEL,
            seed=spec.seed,
            versions=self._info.versions,
        )

    def _replace(self, weights: Weights) -> None:
        self._weights = weights
        self._first = {name: np.zeros_like(array) for name, array in weights.items()}
        self._second = {name: np.zeros_like(array) for name, array in weights.items()}
        self._counters = Counters()
        self._writer.forget()
        self._moved()

    def _moved(self) -> None:
        """After any write to the weights: nothing computed before holds any longer."""
        self._pending = PendingGradients()
        self._graphs.clear()
        self._logprobs_VV = None

    def _table(self) -> Float64Array:
        if self._logprobs_VV is None:
            whole = model.merged(self._base, self._weights, self._session().lora)
            self._logprobs_VV = model.logprob_table(model.logits_table(whole))
        return self._logprobs_VV

    def _check(
        self, data: Sequence[Datum], loss_fn: str, config: LossConfig, *, strict: bool
    ) -> tuple[Loss, dict[str, float | None]]:
        self._session()
        context = self._info.max_context_length
        return check(data, loss_fn, config, model.VOCAB, context, strict)

    def _evaluate(
        self,
        data: Sequence[Datum],
        loss: Loss,
        settings: Mapping[str, float | None],
        table: Float64Array | None = None,
    ) -> tuple[ForwardOutput, list[Float64Array]]:
        table = self._table() if table is None else table
        outputs: list[dict[str, Float32Array]] = []
        gradients: list[Float64Array] = []
        total = 0.0
        for datum in data:
            logprobs = _logprobs(table, datum)
            with np.errstate(over="ignore", invalid="ignore"):
                value, gradient = loss.compute(logprobs, datum.loss_inputs, settings)
            total += value
            outputs.append({"logprobs": logprobs.astype(np.float32)})
            gradients.append(gradient)
        self._forwards += 1
        return ForwardOutput(outputs, {"loss:sum": total}), gradients

    def _accumulate(self, data: Sequence[Datum], gradients: Sequence[Float64Array]) -> None:
        tokens, sequences = self._pending.add_logprobs(data, gradients, self._table())
        self._counters = self._counters.add(tokens=tokens, sequences=sequences)

    def _keep(self, graph: _Graph) -> str:
        handle = f"graph-{self._next_graph}"
        self._next_graph += 1
        self._graphs[handle] = graph
        while len(self._graphs) > MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        return handle

    def _embed(self, data: Sequence[Datum], pooling: Pooling) -> Float32Array:
        """Embeddings [S, H]."""
        self._session()
        check_tokens(data, model.VOCAB, self._info.max_context_length)
        table_VH = model.merged(self._base, self._weights, self._session().lora)[model.EMBED]
        return np.stack([pooling_weights(datum, pooling) @ table_VH for datum in data])

    def _accumulate_embeddings(
        self, data: Sequence[Datum], pooling: Pooling, slopes_SH: Float32Array
    ) -> None:
        self._pending.add_embeddings(data, pooling, slopes_SH)
        self._counters = self._counters.add(
            tokens=0, sequences=count_sequences(slopes_SH), embeddings=True
        )


def write_base(staging: Path, name: str, tensors: RawTensors) -> SavedSnapshot:
    """Write a toy base snapshot: one safetensors file."""
    write_safetensors(staging / BASE_FILE, tensors)
    digest = result_digest(tensors)
    about = about_base(SnapshotFormat.HF_FULL, name, model.TOY_MODEL, digest)
    return SavedSnapshot(seal(staging, about), SnapshotKind.BASE, SnapshotFormat.HF_FULL, digest)


def _logprobs(table_VV: Float64Array, datum: Datum) -> Float64Array:
    targets = datum.loss_inputs["target_tokens"]
    inputs = datum.token_ids.reshape(-1, *[1] * (targets.ndim - 1))
    return table_VV[inputs, targets]
