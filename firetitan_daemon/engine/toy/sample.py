"""The toy model's sampling engine: a running batch, several weights alive, swaps in between.

Knows: the toy model, snapshot folders, the engine seam. Must not know: workers, the daemon.

Shape legend: `V` vocabulary.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import (
    Float32Array,
    HotloadTransition,
    ModelInfo,
    ModelSpec,
    SnapshotKind,
    SnapshotLayer,
)
from firetitan_daemon.engine.delta import apply_delta
from firetitan_daemon.engine.draw import DrawParams, draw, uniform
from firetitan_daemon.engine.raw import RawTensors, read_safetensors, result_digest
from firetitan_daemon.engine.sample_api import (
    NewTokens,
    Progress,
    SampledSequence,
    SampleRequest,
    SampleResult,
    SampleTimes,
    SnapshotRange,
    StopReason,
    TokenLogprobs,
)
from firetitan_daemon.engine.score import (
    PromptScorer,
    check_scoring,
    joined,
    scoring_of,
    top_logprobs,
)
from firetitan_daemon.engine.stops import StopStrings
from firetitan_daemon.engine.toy import model
from firetitan_daemon.engine.toy.train import BASE_FILE


@dataclass
class _Version:
    """One set of weights and its logits table [V, V]; `users` counts running requests."""

    name: str
    tensors: RawTensors
    logits: Float32Array
    users: int = 0


@dataclass
class _Sequence:
    stops: StopStrings
    token_ids: list[int] = field(default_factory=list)
    sampling: list[float] = field(default_factory=list)
    inference: list[float] = field(default_factory=list)
    top: list[TokenLogprobs] = field(default_factory=list)
    made_by: list[SnapshotRange] = field(default_factory=list)
    reason: StopReason | None = None


@dataclass(eq=False)
class _Request:
    spec: SampleRequest
    future: Future[SampleResult]
    submitted_s: float
    progress: Progress | None = None
    version: _Version | None = None
    prompt_version: _Version | None = None
    """What the prompt ran under; the first tokens are drawn from it."""
    begun_s: float = 0.0
    num_concurrent: int = 1
    sequences: list[_Sequence] = field(default_factory=list)
    error: FiretitanError | None = None


class ToySampleEngine:
    """One toy model in several versions (see `SampleEngine`).

    A thread of its own computes one token of every running sequence at a time; the lock guards
    everything and is never held between tokens.

    Args:
        spec: `base_model` is the toy's name; `max_context_length` is honoured.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._info = model.describe(spec)
        self._base = _version("", model.raw(model.base_weights()))
        self._versions: dict[str, _Version] = {}
        self._active = self._base
        self._keep: frozenset[str] = frozenset()
        self._prepared: _Version | None = None
        self._requests: list[_Request] = []
        self._closed = False
        self._draining = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="toy-sampler", daemon=True)
        self._thread.start()

    @property
    def info(self) -> ModelInfo:
        """The toy model."""
        return self._info

    @property
    def active(self) -> str:
        """Name of the snapshot new requests take; empty for the base model."""
        return self._active.name

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the snapshots a request can still name."""
        with self._changed:
            return tuple(self._versions)

    def apply(
        self,
        layers: Sequence[SnapshotLayer],
        *,
        keep: Sequence[str] = (),
        transition: HotloadTransition = HotloadTransition.FINISH,
        keep_prompts: bool = False,
    ) -> None:
        """Build the last layer's weights, verify, swap.

        Raises:
            FiretitanError: CHECKSUM_MISMATCH, CHAIN_BROKEN.
        """
        prepared = self._prepared
        built = (
            prepared if prepared and prepared.name == _last(layers).name else self._build(layers)
        )
        with self._changed:
            self._prepared = None
            if transition is HotloadTransition.SYNC:
                self._drain()
            self._versions[built.name] = built
            self._active = built
            self._keep = frozenset(keep)
            if transition is HotloadTransition.ASYNC:
                self._move(built)
            self._drop_unused()
            self._changed.notify_all()

    def prepare(self, layers: Sequence[SnapshotLayer]) -> None:
        """Build the last layer's weights and verify them, for the `apply` that follows.

        Raises:
            FiretitanError: CHECKSUM_MISMATCH, CHAIN_BROKEN.
        """
        self._prepared = None
        self._prepared = self._build(layers)

    def retain(self, keep: Sequence[str]) -> None:
        """Drop the snapshots that are neither active nor in `keep`."""
        self._prepared = None
        with self._changed:
            self._keep = frozenset(keep)
            self._drop_unused()

    def submit(
        self, request: SampleRequest, progress: Progress | None = None
    ) -> Future[SampleResult]:
        """Queue a request; cancelling the future removes it from the batch.

        Raises:
            FiretitanError: INVALID_ARGUMENT, SNAPSHOT_NOT_ACTIVE, CLOSED.
        """
        _check(request, self._info)
        future: Future[SampleResult] = Future()
        with self._changed:
            if self._closed:
                raise FiretitanError(Reason.CLOSED, "the sampling engine is closed")
            queued = _Request(request, future, time.monotonic(), progress)
            if request.snapshot is not None:
                queued.version = self._find(request.snapshot)
                queued.version.users += 1
            self._requests.append(queued)
            self._changed.notify()
        return future

    def close(self) -> None:
        """Fail what is queued and free the memory."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        for request in self._requests:
            if request.future.set_running_or_notify_cancel():
                request.future.set_exception(
                    FiretitanError(Reason.CLOSED, "the sampling engine was closed")
                )
        self._requests.clear()
        self._versions.clear()

    def _drain(self) -> None:
        """Under the lock: wait until nothing runs; nothing begins meanwhile."""
        self._draining += 1
        try:
            self._changed.wait_for(lambda: self._closed or not self._begun())
        finally:
            self._draining -= 1

    def _begun(self) -> list[_Request]:
        return [request for request in self._requests if request.sequences]

    def _move(self, version: _Version) -> None:
        """Under the lock: let every running request that names no snapshot go on under it."""
        for request in self._begun():
            if request.spec.snapshot is None and request.version is not None:
                request.version.users -= 1
                request.version = version
                version.users += 1

    def _build(self, layers: Sequence[SnapshotLayer]) -> _Version:
        tensors: RawTensors = {}
        parent_digest: str | None = None
        for index, layer in enumerate(layers):
            manifest = durable.verify_folder(layer.path, layer.digest)
            if layer.kind is SnapshotKind.BASE:
                tensors = read_safetensors(layer.path / BASE_FILE)
            else:
                if index == 0:
                    tensors = self._parent(layer, manifest["parent"])
                tensors = apply_delta(
                    layer.path, tensors, digest=layer.digest, parent_digest=parent_digest
                )
            parent_digest = layer.digest
            found = result_digest(tensors)
            if found != layer.result_digest:
                raise FiretitanError(
                    Reason.CHECKSUM_MISMATCH,
                    f"snapshot {layer.name}: expected {layer.result_digest}, found {found}; "
                    f"{self.active or 'the base model'} is served on",
                    expected=layer.result_digest,
                    found=found,
                )
        return _version(_last(layers).name, tensors)

    def _parent(self, layer: SnapshotLayer, parent: str) -> RawTensors:
        with self._changed:
            if parent not in self._versions:
                raise FiretitanError(
                    Reason.CHAIN_BROKEN,
                    f"snapshot {layer.name} stands on {parent}, which is not loaded; start at a "
                    "base",
                    parent=parent,
                )
            return self._versions[parent].tensors

    def _find(self, name: str) -> _Version:
        if name == "":
            return self._base
        if name not in self._versions:
            raise FiretitanError(
                Reason.SNAPSHOT_NOT_ACTIVE,
                f'snapshot="{name[:200]}": not loaded; loaded are {sorted(self._versions)}',
                field="snapshot",
            )
        return self._versions[name]

    def _drop_unused(self) -> None:
        for name, version in list(self._versions.items()):
            if version is not self._active and not version.users and name not in self._keep:
                del self._versions[name]

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                if self._closed:
                    return
                running = self._begun() if self._draining else list(self._requests)
                ended = [each for each in running if self._advance(each)]
                self._changed.notify_all()
            for request in ended:
                _answer(request)

    def _has_work(self) -> bool:
        return bool(self._closed or (self._begun() if self._draining else self._requests))

    def _advance(self, request: _Request) -> bool:
        """Start a request or compute one token of each of its sequences; True where it ended."""
        if request.future.cancelled():
            self._leave(request)
            return False
        if not request.sequences:
            self._start(request)
        assert request.version is not None, "set by _start"
        running = [n for n, each in enumerate(request.sequences) if each.reason is None]
        try:
            for index in running:
                _extend(request.version, request.spec, index, request.sequences[index])
            if request.progress is not None:
                name = request.version.name
                request.progress([_news(n, request.sequences[n], name) for n in running])
        except FiretitanError as error:
            request.error = error
        if request.error is None and any(each.reason is None for each in request.sequences):
            return False
        self._leave(request)
        return True

    def _start(self, request: _Request) -> None:
        spec = request.spec
        request.begun_s = time.monotonic()
        request.num_concurrent = len(self._requests)
        if request.version is None:
            request.version = self._active
            request.version.users += 1
        request.prompt_version = request.version
        prompt = [int(token) for token in spec.prompt]
        request.sequences = [
            _Sequence(StopStrings(spec.stop, model.decode, prompt)) for _ in range(spec.num_samples)
        ]

    def _leave(self, request: _Request) -> None:
        self._requests.remove(request)
        if request.version is not None:
            request.version.users -= 1
            self._drop_unused()


def _last(layers: Sequence[SnapshotLayer]) -> SnapshotLayer:
    if not layers:
        raise FiretitanError(Reason.INVALID_ARGUMENT, "layers: is empty", field="layers")
    return layers[-1]


def _version(name: str, tensors: RawTensors) -> _Version:
    return _Version(name, tensors, model.logits_table(model.arrays(tensors)))


def _extend(version: _Version, spec: SampleRequest, index: int, sequence: _Sequence) -> None:
    if not spec.max_tokens:
        sequence.reason = StopReason.LENGTH
        return
    if not sequence.made_by or sequence.made_by[-1].snapshot != version.name:
        sequence.made_by.append(SnapshotRange(version.name, len(sequence.token_ids)))
    last = sequence.token_ids[-1] if sequence.token_ids else int(spec.prompt[-1])
    params = DrawParams(spec.temperature, spec.top_k, spec.top_p)
    number = uniform(spec.seed, index, len(sequence.token_ids))
    drawn = draw(version.logits[last], params, number)
    sequence.token_ids.append(drawn.token)
    sequence.sampling.append(drawn.sampling_logprob)
    sequence.inference.append(drawn.inference_logprob)
    if spec.topk_sample_logprobs:
        sequence.top.append(top_logprobs(version.logits[last], spec.topk_sample_logprobs))
    ended = drawn.token in spec.stop_token_ids or (spec.use_eos and drawn.token == model.EOS)
    if ended or (spec.stop and sequence.stops.push(drawn.token)):
        sequence.reason = StopReason.STOP
    elif len(sequence.token_ids) == spec.max_tokens:
        sequence.reason = StopReason.LENGTH


def _news(index: int, sequence: _Sequence, snapshot: str) -> NewTokens:
    return NewTokens(
        index,
        max(0, len(sequence.token_ids) - 1),
        np.array(sequence.token_ids[-1:], np.int32),
        np.array(sequence.sampling[-1:], np.float32),
        np.array(sequence.inference[-1:], np.float32),
        sequence.reason,
        snapshot,
        top_logprobs=sequence.top[-1] if sequence.top else None,
    )


def _answer(request: _Request) -> None:
    """Resolve the future; outside the lock, for it may run callbacks."""
    if not request.future.set_running_or_notify_cancel():
        return
    if request.error is not None:
        request.future.set_exception(request.error)
    elif request.version is not None and request.prompt_version is not None:
        request.future.set_result(_result(request, request.version, request.prompt_version))


def _result(request: _Request, version: _Version, prompt_version: _Version) -> SampleResult:
    sequences = [
        SampledSequence(
            np.array(each.token_ids, np.int32),
            np.array(each.sampling, np.float32),
            np.array(each.inference, np.float32),
            each.reason or StopReason.LENGTH,
            top_logprobs=joined(each.top) if each.top else None,
            made_by=tuple(each.made_by),
        )
        for each in request.sequences
    ]
    scorer = PromptScorer(request.spec.prompt, scoring_of(request.spec))
    for at in range(scorer.first, len(request.spec.prompt)):
        scorer.take(at, prompt_version.logits[int(request.spec.prompt[at - 1])])
    times = SampleTimes(
        queue_s=request.begun_s - request.submitted_s,
        prefill_s=0.0,
        first_token_s=request.begun_s - request.submitted_s,
        generation_queue_s=0.0,
        generation_s=time.monotonic() - request.begun_s,
    )
    return SampleResult(sequences, version.name, scorer.scores(), times, 0, request.num_concurrent)


def _check(request: SampleRequest, info: ModelInfo) -> None:
    prompt = request.prompt
    outside = np.flatnonzero((prompt < 0) | (prompt >= info.vocab_size))
    limits = (
        ("prompt", len(prompt) > 0, "is empty; give at least one token"),
        (
            "prompt",
            outside.size == 0,
            f"holds a token out of vocabulary at {outside[:1].tolist()}; "
            f"0 to {info.vocab_size - 1} exist",
        ),
        ("num_samples", request.num_samples >= 1, f"is {request.num_samples}; give 1 or more"),
        ("max_tokens", request.max_tokens >= 0, f"is {request.max_tokens}; give 1 or more"),
        (
            "temperature",
            np.isfinite(request.temperature) and request.temperature >= 0,
            f"is {request.temperature}; give a finite number, 0 or more",
        ),
        ("top_p", 0 < request.top_p <= 1, f"is {request.top_p}; give 0 < top_p <= 1"),
        (
            "max_tokens",
            len(prompt) + request.max_tokens <= info.max_context_length,
            f"prompt has {len(prompt)} tokens + max_tokens {request.max_tokens} > "
            f"{info.max_context_length}",
        ),
    )
    for name, good, what in limits:
        if not good:
            raise FiretitanError(Reason.INVALID_ARGUMENT, f"{name}: {what}", field=name)
    check_scoring(request, info.vocab_size)
