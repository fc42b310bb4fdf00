"""One thread that owns the model and runs many sample requests in one running batch.

Knows: requests, when a prompt runs, which rows step together, when they end. Must not know: how a
model computes, how weights are loaded, protobuf.

A request waits in one first-in-first-out queue. Its prompt runs once, alone; its samples then join
the running batch in branches of bounded size between two decode steps. What a request gets depends
on its snapshot, itself and its seed, not on the others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.decode import Decoder, Prefill, Stepped
from firetitan_daemon.engine.jobs import Job, Part
from firetitan_daemon.engine.prompts import PromptCache
from firetitan_daemon.engine.sample_api import Progress, SampleRequest, SampleResult
from firetitan_daemon.engine.score import scoring_of
from firetitan_daemon.engine.stops import Decode
from firetitan_daemon.engine.versions import Version, VersionTable

_LOG = logging.getLogger(__name__)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class SamplerConfig:
    """Bounds of the running batch."""

    max_rows: int = 64
    """Sequences that step together."""
    branch_rows: int = 16
    """Samples of one request whose attention runs in one call."""
    max_waiting: int = 4096
    """Requests in the queue; more are refused."""
    cache_bytes: int = 4 << 30
    """Keys and values of everything that runs; one branch always may."""
    prefill_tokens: int = 2048
    """Prompt tokens between two decode steps; one prompt always may."""
    prompt_bytes: int = 256 << 20
    """Keys and values of finished prompts, kept for requests with the same prompt; 0 is off."""


class Scheduler:
    """Queue, running batch and the thread that steps it.

    Args:
        decoder: The model.
        versions: The loaded versions; requests count themselves in and out.
        select: Makes the decoder compute with a version's weights; called on the thread.
        decode_text: Tokens to text, for stop strings; None where the model has no tokenizer.
        bytes_per_token: Cache memory of one token of one row.
        config: Bounds.
    """

    def __init__(
        self,
        decoder: Decoder,
        versions: VersionTable,
        select: Callable[[Version], None],
        decode_text: Decode | None,
        bytes_per_token: int,
        config: SamplerConfig,
    ) -> None:
        self._decoder = decoder
        self._versions = versions
        self._select = select
        self._decode_text = decode_text
        self._bytes_per_token = bytes_per_token
        self._config = config
        self._wake = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._drains: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closed = False
        self._parts: list[Part] = []
        self._prompts = PromptCache(config.prompt_bytes)
        self._thread = threading.Thread(target=self._run, name="firetitan-sampler", daemon=True)
        self._thread.start()

    def submit(
        self,
        request: SampleRequest,
        stop_ids: frozenset[int],
        progress: Progress | None = None,
    ) -> Future[SampleResult]:
        """Queue a checked request; `stop_ids` end a sequence, those of the model included.

        Raises:
            FiretitanError: QUEUE_FULL, CLOSED.
        """
        job = Job(request, Future(), stop_ids, time.monotonic(), progress)
        with self._wake:
            self._check_open()
            if len(self._waiting) >= self._config.max_waiting:
                raise FiretitanError(
                    Reason.QUEUE_FULL,
                    f"{len(self._waiting)} sample requests are waiting; try again later or send "
                    "fewer at once",
                )
            self._waiting.append(job)
            self._wake.notify()
        return job.future

    def call(self, function: Callable[[], _Result]) -> _Result:
        """Run `function` on the thread, between two decode steps; returns what it returns."""
        future: Future[_Result] = Future()
        with self._wake:
            self._check_open()
            self._calls.append((function, future))
            self._wake.notify()
        return future.result()

    def drain(self, function: Callable[[], _Result]) -> _Result:
        """Run `function` on the thread once nothing runs; what has not begun waits until then."""
        future: Future[_Result] = Future()
        with self._wake:
            self._check_open()
            self._drains.append((function, future))
            self._wake.notify()
        return future.result()

    def move(self, version: Version) -> None:
        """On the thread: let every request that names no snapshot go on under `version`."""
        for job in self._jobs():
            if job.version is not None and job.version is not version:
                if job.request.snapshot is None:
                    self._versions.move(job.version, version)
                    job.version = version

    def forget_prompts(self) -> None:
        """On the thread: drop the prompts that were kept."""
        self._prompts.clear()

    def close(self) -> None:
        """Fail whatever waits or runs with CLOSED, and end the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _check_open(self) -> None:
        if self._closed:
            raise _closed()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(self._has_work)
                if self._closed:
                    break
                calls, self._calls = list(self._calls), deque()
            for function, future in calls:
                _resolve(future, function)
            self._drop_cancelled()
            self._admit()
            self._step()
            self._end_drains()
        self._end_all()

    def _has_work(self) -> bool:
        waiting = self._waiting and (not self._drains or self._waiting[0].version is not None)
        return bool(
            self._closed
            or self._calls
            or self._parts
            or waiting
            or (self._drains and not self._running())
        )

    def _running(self) -> bool:
        """Whether a request has begun and not ended; under the lock."""
        return bool(self._parts) or any(job.version is not None for job in self._waiting)

    def _end_drains(self) -> None:
        with self._wake:
            if self._running():
                return
            ended, self._drains = list(self._drains), deque()
        for function, future in ended:
            _resolve(future, function)

    def _jobs(self) -> list[Job]:
        """Every request that waits or runs."""
        with self._wake:
            waiting = list(self._waiting)
        return list(dict.fromkeys([*waiting, *(part.job for part in self._parts)]))

    def _end_all(self) -> None:
        jobs = self._jobs()
        with self._wake:
            calls = [*self._calls, *self._drains]
            self._waiting.clear()
            self._calls.clear()
            self._drains.clear()
        for job in jobs:
            self._fail(job, _closed())
        for _, future in calls:
            future.set_exception(_closed())

    def _drop_cancelled(self) -> None:
        for job in self._jobs():
            if job.future.cancelled():
                self._remove(job)

    def _admit(self) -> None:
        """Let waiting samples join, oldest request first, while there is room."""
        budget = self._config.prefill_tokens
        while True:
            with self._wake:
                job = self._waiting[0] if self._waiting else None
                draining = bool(self._drains)
            if job is None or not self._has_room(job) or (draining and job.version is None):
                return
            length = len(job.request.prompt)
            if job.prefill is None:
                if budget < length and budget < self._config.prefill_tokens:
                    return
                budget -= length
            self._guard(job, self._begin, job)
            if job.future.done():
                self._remove(job)
            elif job.begun:
                with self._wake:
                    self._waiting.remove(job)

    def _has_room(self, job: Job) -> bool:
        if not self._parts:
            return True
        rows = sum(len(part.rows) for part in self._parts)
        used = sum(part.reserved_bytes for part in self._parts)
        wanted = self._next_rows(job)
        return (
            rows + wanted <= self._config.max_rows
            and used + self._reserve(job, wanted) <= self._config.cache_bytes
        )

    def _next_rows(self, job: Job) -> int:
        """Size of the request's next branch: given by the request alone."""
        limit = min(self._config.branch_rows, self._config.max_rows)
        return min(limit, job.request.num_samples - len(job.rows))

    def _reserve(self, job: Job, rows: int) -> int:
        tokens = len(job.request.prompt) + rows * job.request.max_tokens
        return tokens * self._bytes_per_token

    def _begin(self, job: Job) -> None:
        """Run the prompt where that is still to be done, and start the next branch."""
        request = job.request
        if job.version is None:
            job.version = self._versions.begin(request.snapshot)
        if job.prefill is None:
            job.prefill_began = time.monotonic()
            job.num_concurrent = len(self._jobs())
            self._select(job.version)
            job.prefill = self._prefill(job, job.version)
            job.prefilled_by = job.version.name
        rows = job.add_rows(self._next_rows(job), self._decode_text)
        prefill = job.prefill
        logits, routing = [prefill.last_logits] * len(rows), prefill.routing[-1:] * len(rows)
        job.extend(rows, logits, routing, job.prefilled_by)
        job.joined = time.monotonic()
        job.first_token = job.first_token or job.joined
        running = [row for row in rows if row.stop_reason is None]
        if running:
            branch = self._decoder.fork(job.prefill, len(running))
            reserved = self._reserve(job, len(running))
            self._parts.append(Part(job, branch, running, reserved))
        if job.finished:
            self._finish(job)

    def _prefill(self, job: Job, version: Version) -> Prefill:
        """Run the prompt, unless the very same one ran under this version a moment ago."""
        self._prompts.keep_versions(self._versions.names)
        prompt, wanted = job.request.prompt, scoring_of(job.request)
        prefill = self._prompts.find(version.name, prompt, wanted)
        if prefill is not None:
            job.cached_prompt_tokens = len(prompt)
            return prefill
        prefill = self._decoder.prefill(prompt, wanted)
        if self._bytes_per_token:
            num_bytes = len(prompt) * self._bytes_per_token + prefill.last_logits.nbytes
            num_bytes += prefill.scores.num_bytes
            self._prompts.add(version.name, prompt, prefill, num_bytes, wanted)
        return prefill

    def _step(self) -> None:
        """One decode step for everything that runs, version by version."""
        for version in dict.fromkeys(part.job.version for part in self._parts):
            assert version is not None
            parts = [part for part in self._parts if part.job.version is version]
            try:
                self._select(version)
                stepped = self._decoder.step(
                    [(part.branch, [row.tokens[-1] for row in part.rows]) for part in parts]
                )
            except Exception:
                _LOG.exception("decode step failed rows=%d", sum(len(p.rows) for p in parts))
                for part in parts:
                    self._guard(part.job, self._step_alone, part)
                continue
            for part, made in zip(parts, stepped, strict=True):
                self._guard(part.job, self._take, part, made)

    def _step_alone(self, part: Part) -> None:
        """Find out which request a failed step failed for: caches count a step only when done."""
        (made,) = self._decoder.step([(part.branch, [row.tokens[-1] for row in part.rows])])
        self._take(part, made)

    def _take(self, part: Part, made: Stepped) -> None:
        """Draw every row's token; rows that ended leave the branch."""
        assert part.job.version is not None
        part.job.extend(part.rows, made.logits, made.routing, part.job.version.name)
        going = [at for at, row in enumerate(part.rows) if row.stop_reason is None]
        if len(going) == len(part.rows):
            return
        if going:
            part.branch.keep(going)
            part.rows = [part.rows[at] for at in going]
        else:
            self._parts.remove(part)
        if part.job.finished:
            self._finish(part.job)

    def _finish(self, job: Job) -> None:
        result = job.result()
        self._remove(job)
        if job.future.set_running_or_notify_cancel():
            job.future.set_result(result)

    def _guard(self, job: Job, function: Callable[..., None], *arguments: object) -> None:
        """Run one request's share of the work; what goes wrong there ends that request alone."""
        if job.future.done():
            return
        try:
            function(*arguments)
        except FiretitanError as error:
            self._fail(job, error)
        except Exception as error:
            _LOG.exception("sample request failed")
            self._fail(job, _internal(error))

    def _fail(self, job: Job, error: FiretitanError) -> None:
        self._remove(job)
        if not job.future.done() and job.future.set_running_or_notify_cancel():
            job.future.set_exception(error)

    def _remove(self, job: Job) -> None:
        """Take a request out of queue and batch, and count it out of its version."""
        self._parts = [part for part in self._parts if part.job is not job]
        with self._wake:
            if job in self._waiting:
                self._waiting.remove(job)
        if job.version is not None:
            version, job.version = job.version, None
            self._versions.end(version)


def _resolve(future: Future[Any], function: Callable[[], Any]) -> None:
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)


def _closed() -> FiretitanError:
    return FiretitanError(Reason.CLOSED, "the sampling engine is closed")


def _internal(error: Exception) -> FiretitanError:
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return FiretitanError(
            Reason.DEVICE_OUT_OF_MEMORY,
            f"not enough memory for this request: {error}; send a shorter prompt, fewer samples "
            "or fewer tokens",
        )
    return FiretitanError(Reason.INTERNAL, f"sampling failed: {type(error).__name__}: {error}")
