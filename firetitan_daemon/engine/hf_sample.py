"""Samples from a transformers model: base, LoRA adapters over it, or full-parameter snapshots.

Knows: what a request may ask for, how a snapshot comes into service. Must not know: protobuf, the
daemon, how rows are batched or tokens drawn (scheduler, decode, draw).
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import (
    HotloadTransition,
    ModelInfo,
    ModelSpec,
    SnapshotFormat,
    SnapshotLayer,
)
from firetitan_daemon.engine.decode import make_decoder
from firetitan_daemon.engine.models import load_model
from firetitan_daemon.engine.sample_api import Progress, SampleRequest, SampleResult
from firetitan_daemon.engine.scheduler import SamplerConfig, Scheduler
from firetitan_daemon.engine.score import check_scoring
from firetitan_daemon.engine.stops import eos_token_ids
from firetitan_daemon.engine.versions import Version, VersionTable
from firetitan_daemon.engine.weights import ModelWeights


class HfSampleEngine:
    """A `SampleEngine` over transformers and torch.

    Args:
        spec: The base model.
        config: Bounds of the running batch.

    Raises:
        FiretitanError: MODEL_NOT_FOUND, UNSUPPORTED, INVALID_ARGUMENT.
    """

    def __init__(self, spec: ModelSpec, config: SamplerConfig | None = None) -> None:
        config = config or SamplerConfig()
        self._loaded = load_model(spec)
        self._weights = ModelWeights(self._loaded)
        self._versions = VersionTable(self._weights.base())
        self._decoder = make_decoder(self._loaded, config.max_rows)
        tokenizer = self._loaded.tokenizer
        model = self._loaded.model
        self._eos = eos_token_ids(tokenizer, model.config, model.generation_config)
        self._applying = threading.Lock()
        self._scheduler = Scheduler(
            self._decoder,
            self._versions,
            self._weights.select,
            None if tokenizer is None else self._decode_text,
            self._decoder.bytes_per_token,
            config,
        )

    @property
    def info(self) -> ModelInfo:
        """See `SampleEngine`; the notes say how rows are kept apart."""
        info = self._loaded.info
        return replace(info, notes=(*info.notes, self._decoder.note))

    @property
    def active(self) -> str:
        """See `SampleEngine`."""
        return self._versions.active.name

    @property
    def loaded(self) -> tuple[str, ...]:
        """See `SampleEngine`."""
        return self._versions.names

    def apply(
        self,
        layers: Sequence[SnapshotLayer],
        *,
        keep: Sequence[str] = (),
        transition: HotloadTransition = HotloadTransition.FINISH,
        keep_prompts: bool = False,
    ) -> None:
        """See `SampleEngine`; returns when new requests take the new snapshot.

        Full-parameter weights: two versions live at most, so `keep` can hold one beside the new
        one until the next comes, and a third waits for the oldest to run out.
        """
        with self._applying:
            version = self._built(layers)
            swap = functools.partial(self._swap, version, keep, transition, keep_prompts)
            if transition is HotloadTransition.SYNC:
                self._scheduler.drain(swap)
            else:
                self._scheduler.call(swap)

    def prepare(self, layers: Sequence[SnapshotLayer]) -> None:
        """See `SampleEngine`; of full-parameter weights this waits for room as `apply` does."""
        with self._applying:
            self._versions.prepare(self._built(layers))

    def _swap(
        self,
        version: Version,
        keep: Sequence[str],
        transition: HotloadTransition,
        keep_prompts: bool,
    ) -> None:
        """On the model's thread: serve the version from now on."""
        self._versions.activate(version, keep)
        if transition is HotloadTransition.ASYNC:
            self._scheduler.move(version)
        if not keep_prompts:
            self._scheduler.forget_prompts()

    def retain(self, keep: Sequence[str]) -> None:
        """See `SampleEngine`."""
        with self._applying:
            self._versions.activate(self._versions.active, keep)

    def submit(
        self, request: SampleRequest, progress: Progress | None = None
    ) -> Future[SampleResult]:
        """See `SampleEngine`."""
        self._check(request)
        self._versions.check(request.snapshot)
        stop_ids = frozenset(request.stop_token_ids) | (
            self._eos if request.use_eos else frozenset()
        )
        return self._scheduler.submit(request, stop_ids, progress)

    def close(self) -> None:
        """See `SampleEngine`."""
        self._versions.close()
        self._scheduler.close()

    def _built(self, layers: Sequence[SnapshotLayer]) -> Version:
        """The last layer's version: the one in memory, or a new one."""
        if not layers:
            raise FiretitanError(
                Reason.INVALID_ARGUMENT, "layers is empty; name a snapshot", field="layers"
            )
        last = layers[-1]
        version = self._versions.find(last.name)
        if version is None:
            return self._build(layers)
        if version.result_digest != last.result_digest:
            raise FiretitanError(
                Reason.CHAIN_BROKEN,
                f"snapshot {last.name} is loaded with another content "
                f"({version.result_digest}, not {last.result_digest}); names are given once",
                snapshot=last.name,
            )
        return version

    def _build(self, layers: Sequence[SnapshotLayer]) -> Version:
        if layers[-1].format is not SnapshotFormat.PEFT_ADAPTER:
            self._versions.make_room()
            # Where nothing was sampled since the last swap the model still points at weights that
            # have left the table; they would be a third set beside the new ones.
            self._scheduler.call(lambda: self._weights.select(self._versions.active))
        version = self._weights.build(layers, self._versions.find)
        self._scheduler.call(lambda: self._prepare(version))
        return version

    def _prepare(self, version: Version) -> None:
        """On the model's thread: make the model able to run the version at a pointer's notice."""
        self._weights.wrap_for(version)
        self._decoder.measure(version.content.adapter)

    def _decode_text(self, tokens: Sequence[int]) -> str:
        text: str = self._loaded.tokenizer.decode(
            tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def _check(self, request: SampleRequest) -> None:
        """Refuse what cannot be sampled, naming the field and its value."""
        prompt, info = request.prompt, self._loaded.info
        if prompt.ndim != 1 or len(prompt) == 0:
            raise _invalid("prompt", f"has shape {list(prompt.shape)}; give at least one token")
        outside = np.flatnonzero((prompt < 0) | (prompt >= info.vocab_size))
        if len(outside):
            at = int(outside[0])
            raise _invalid(
                f"prompt[{at}]",
                f"is {int(prompt[at])}; the vocabulary has tokens 0 to {info.vocab_size - 1}",
            )
        if request.num_samples < 1:
            raise _invalid("num_samples", f"is {request.num_samples}; at least 1")
        if request.max_tokens < 0:
            raise _invalid("max_tokens", f"is {request.max_tokens}; at least 1")
        check_scoring(request, info.vocab_size)
        if len(prompt) + request.max_tokens > info.max_context_length:
            raise _invalid(
                "max_tokens",
                f"is {request.max_tokens}; with the prompt's {len(prompt)} tokens that is above "
                f"{info.max_context_length}, the model's context; shorten one of them",
            )
        if not (math.isfinite(request.temperature) and request.temperature >= 0.0):
            raise _invalid("temperature", f"is {request.temperature}; 0 or a positive number")
        if not 0.0 < request.top_p <= 1.0:
            raise _invalid("top_p", f"is {request.top_p}; above 0, at most 1")
        unroutable = self._loaded.routers.note
        if unroutable is not None and (request.routing or request.prompt_routing):
            raise FiretitanError(
                Reason.UNSUPPORTED,
                f"routing_matrices: {unroutable}; leave them out",
                field="routing_matrices",
            )
        if any(not text for text in request.stop):
            raise _invalid("stop", "holds an empty string; it would end every sequence at once")
        if request.stop and self._loaded.tokenizer is None:
            raise _invalid(
                "stop", f"{info.path} has no tokenizer to find strings with; use stop_token_ids"
            )


def _invalid(field: str, what: str) -> FiretitanError:
    return FiretitanError(Reason.INVALID_ARGUMENT, f"{field} {what}", field=field)
