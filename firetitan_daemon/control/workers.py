"""Worker processes: starting, finding again, watching and ending them.

Knows: specifications and the launcher. Must not know: what a worker computes.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from firetitan_daemon.control.services import Services, internal_error, when_there_is_space
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.model_records import ModelInfo, Shape
from firetitan_daemon.core.ports import Change, Ledger
from firetitan_daemon.core.records import WorkerKind, WorkerSpec
from firetitan_daemon.core.worker_ports import Worker

logger = logging.getLogger("firetitan.workers")
_ADOPT_RETRY_S = 1.0
_PULSE_S = 3.0
"""Between an answer of a worker and the next question whether it still answers."""

_ENDS_KEPT = 20

Exited = Callable[[str], Awaitable[None]]
"""Called with how a worker ended, once."""


@dataclass(frozen=True)
class WorkerEnd:
    """A worker that ended though nobody asked it to."""

    spec: WorkerSpec
    cause: str
    time: float


class WorkerPool:
    """Every worker this daemon is responsible for.

    Owns the specifications and the handles. A specification's row is written before its process
    is started and removed after it ended, so that no process is ever forgotten.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._specs: dict[str, WorkerSpec] = {}
        self._live: dict[str, Worker] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._pulses: dict[str, asyncio.Task[None]] = {}
        self._silent: dict[str, float] = {}
        """Workers that live and did not answer when they were last asked, and since when."""
        self._unspoken: dict[str, FiretitanError] = {}
        """Workers that live and speak a protocol this daemon does not, with what that means."""
        self._adopted: set[str] = set()
        self.ends: deque[WorkerEnd] = deque(maxlen=_ENDS_KEPT)
        self._gone: set[str] = set()
        """Workers that ended by themselves and are not forgotten yet."""

    def restore(self, ledger: Ledger) -> None:
        """Take over what a former daemon started."""
        self._specs = {spec.worker_id: spec for spec in ledger.workers}

    def spec(self, worker_id: str | None) -> WorkerSpec | None:
        """What a worker was started for."""
        return self._specs.get(worker_id or "")

    def specs(self) -> list[WorkerSpec]:
        """Every worker's specification."""
        return list(self._specs.values())

    def live(self, worker_id: str | None) -> Worker | None:
        """A worker that is reached; None where it is not (yet, or any more)."""
        return self._live.get(worker_id or "")

    def pid(self, worker_id: str | None) -> int:
        """Process id of a live worker, else 0."""
        worker = self.live(worker_id)
        return worker.pid if worker is not None else 0

    def answers(self, worker_id: str | None) -> bool:
        """False for a worker that lives, as far as is known, but hangs."""
        return (worker_id or "") not in self._silent

    def silent_s(self, worker_id: str) -> float | None:
        """How long a worker that lives, as far as is known, has hung; None where it answers."""
        since = self._silent.get(worker_id)
        return None if since is None else self._services.clock.monotonic() - since

    def problem(self, worker_id: str | None) -> FiretitanError | None:
        """Why a worker that lives is left alone."""
        return self._unspoken.get(worker_id or "")

    def adopted(self, worker_id: str) -> bool:
        """Whether a former daemon started it, so that it may hold something."""
        return worker_id in self._adopted

    def ended(self, worker_id: str) -> bool:
        """Whether a worker ended by itself and nothing was done about it yet."""
        return worker_id in self._gone

    def new_spec(
        self,
        kind: WorkerKind,
        target: str,
        base_model: str,
        dtype: str,
        max_context_length: int,
        shape: Shape | None = None,
    ) -> WorkerSpec:
        """A specification under a fresh id; once its row is written, `remember` it or `start`."""
        return WorkerSpec(
            worker_id=f"{kind}-{uuid.uuid4().hex[:12]}",
            kind=kind,
            target=target,
            base_model=self._reference(base_model),
            dtype=dtype,
            max_context_length=max_context_length,
            num_threads=self._services.num_threads,
            device=shape.device if shape is not None else "auto",
        )

    def remember(self, specs: Iterable[WorkerSpec]) -> None:
        """Take up specifications whose rows are written; their workers are started by and by."""
        self._specs.update((spec.worker_id, spec) for spec in specs)

    def _reference(self, base_model: str) -> str:
        try:
            return self._services.models.reference(base_model)
        except FiretitanError:
            return base_model  # the worker says that there is no such model

    async def start(self, spec: WorkerSpec) -> tuple[Worker, ModelInfo]:
        """Launch a worker, or find the one that runs already, and load its model.

        Raises:
            FiretitanError: MODEL_NOT_FOUND, UNSUPPORTED, DEVICE_OUT_OF_MEMORY,
                WORKER_UNAVAILABLE, STATE_DISK_FULL, STATE_NOT_WRITABLE; the process is gone then.
        """
        self._specs[spec.worker_id] = spec
        try:
            worker = self._live.get(spec.worker_id) or await self.adopt(spec)
            if worker is None:
                worker = await self._services.launcher.launch(spec)
                logger.info(
                    "worker started worker=%s target=%s pid=%d",
                    spec.worker_id,
                    spec.target,
                    worker.pid,
                )
            self._live[spec.worker_id] = worker
            return worker, await worker.load_model()
        except Exception:
            # Not where this is cancelled: then the next start of the daemon goes on with it.
            await self.stop(spec.worker_id)
            raise

    async def adopt(self, spec: WorkerSpec) -> Worker | None:
        """The live worker a former daemon left, or None where it is dead.

        One that lives but does not answer is waited for, and so is one that speaks another
        protocol: it holds weights that a daemon of its own release will go on with.
        """
        clock = self._services.clock
        while True:
            began = clock.monotonic()
            try:
                async with asyncio.timeout(self._services.adopt_timeout_s):
                    worker = await self._services.launcher.adopt(spec)
                break
            except TimeoutError:
                self.hangs(spec.worker_id)
            except FiretitanError as error:
                if error.reason is Reason.UNSUPPORTED:
                    if spec.worker_id not in self._unspoken:
                        logger.error("worker is left alone worker=%s: %s", spec.worker_id, error)
                    self._unspoken[spec.worker_id] = error
                elif error.reason is Reason.WORKER_UNAVAILABLE:
                    self._silent.setdefault(spec.worker_id, self._services.clock.monotonic())
                    logger.warning("worker cannot be reached worker=%s: %s", spec.worker_id, error)
                else:
                    raise
            await asyncio.sleep(_ADOPT_RETRY_S)
        self._silent.pop(spec.worker_id, None)
        self._unspoken.pop(spec.worker_id, None)
        if spec.worker_id not in self._specs:
            return None  # `stop` ended it meanwhile
        if worker is not None:
            logger.info(
                "worker adopted worker=%s pid=%d seconds=%.4f",
                spec.worker_id,
                worker.pid,
                clock.monotonic() - began,
            )
            self._live[spec.worker_id] = worker
            self._adopted.add(spec.worker_id)
        return worker

    def watch(self, worker: Worker, exited: Exited) -> None:
        """Call back once when a worker ends by itself; not where `stop` ended it."""
        worker_id = worker.spec.worker_id

        async def wait() -> None:
            cause = await worker.exited()
            self._live.pop(worker_id, None)
            self._watches.pop(worker_id, None)
            self._end_pulse(worker_id)
            self._gone.add(worker_id)
            self.ends.append(WorkerEnd(worker.spec, cause, self._services.clock.now()))
            logger.error("worker ended worker=%s cause=%s", worker_id, cause)
            try:
                await exited(cause)
            except Exception as error:  # a supervisor: the daemon goes on
                internal_error(f"handling the end of worker {worker_id}", error)

        self._watches[worker_id] = asyncio.create_task(wait())
        self._pulses[worker_id] = asyncio.create_task(self._feel_pulse(worker))

    async def _feel_pulse(self, worker: Worker) -> None:
        """Ask a worker again and again whether it answers; one that hangs is never ended for it."""
        worker_id = worker.spec.worker_id
        while True:
            try:
                await worker.describe()
            except FiretitanError:
                self.hangs(worker_id)
            else:
                if worker_id in self._silent:
                    del self._silent[worker_id]
                    logger.info("worker answers again worker=%s", worker_id)
            await asyncio.sleep(_PULSE_S)

    def hangs(self, worker_id: str) -> None:
        """A worker lives and did not answer; shown until it does, told once."""
        if worker_id not in self._silent:
            self._silent[worker_id] = self._services.clock.monotonic()
            logger.warning("worker does not answer worker=%s", worker_id)

    def _end_pulse(self, worker_id: str) -> None:
        pulse = self._pulses.pop(worker_id, None)
        if pulse is not None:
            pulse.cancel()
        self._silent.pop(worker_id, None)

    async def stop(self, worker_id: str | None) -> None:
        """End a worker, found or not, and forget it.

        Raises:
            FiretitanError: WORKER_UNAVAILABLE where it lives and does not answer, UNSUPPORTED where
                it speaks another protocol: it is left alone.
        """
        spec = self._specs.get(worker_id or "")
        if spec is None:
            return
        watch = self._watches.pop(spec.worker_id, None)
        if watch is not None:
            watch.cancel()
        self._end_pulse(spec.worker_id)
        worker = self._live.pop(spec.worker_id, None)
        if worker is None:
            worker = await self._services.launcher.adopt(spec)
        if worker is not None:
            await worker.shutdown()
        # Half of it would be a worker that is gone and that nobody misses.
        forget = functools.partial(self.forget, spec.worker_id)
        await when_there_is_space(f"the end of worker {spec.worker_id}", forget)

    async def forget(self, worker_id: str | None) -> None:
        """Remove what is left of a worker whose process is gone; again is fine.

        Files that cannot be removed stay for the next start, which finds them by the row.

        Raises:
            FiretitanError: STATE_DISK_FULL, STATE_NOT_WRITABLE; it is not forgotten then.
        """
        spec = self._specs.get(worker_id or "")
        if spec is not None:
            try:
                await self._services.launcher.discard(spec)
            except FiretitanError as error:
                logger.warning(
                    "left for the next start to remove worker=%s: %s", spec.worker_id, error
                )
            else:
                await self._services.store.write(Change(deleted_workers=[spec.worker_id]))
            self._specs.pop(spec.worker_id, None)
        self._gone.discard(worker_id or "")
        self._adopted.discard(worker_id or "")

    async def close(self) -> None:
        """Let go of every worker; the processes stay."""
        tasks = [*self._watches.values(), *self._pulses.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
