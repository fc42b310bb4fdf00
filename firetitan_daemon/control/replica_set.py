"""Which samplers of one deployment answer requests, and which of them takes the next.

Knows: workers, counts of running requests. Must not know: what is asked, how a sampler is started
or brought to a snapshot. Nothing here survives the daemon.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.worker_ports import Worker


class Replica:
    """A sampler that answers requests."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.running = 0
        """Requests it works on."""
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def counted(self) -> Iterator[Worker]:
        """Around a request."""
        self.running += 1
        self._idle.clear()
        try:
            yield self.worker
        finally:
            self.running -= 1
            if not self.running:
                self._idle.set()

    async def idle(self) -> None:
        """Wait until it works on nothing."""
        await self._idle.wait()


class ReplicaSet:
    """The samplers of one deployment that serve what it is recorded to serve.

    Args:
        name: The deployment's.
        answers: Whether a worker answers, as far as is known.
    """

    def __init__(self, name: str, answers: Callable[[str], bool]) -> None:
        self._name = name
        self._answers = answers
        self._replicas: dict[str, Replica] = {}
        self._open = asyncio.Event()
        self._open.set()

    @property
    def workers(self) -> list[Worker]:
        """Every one, in the order they came."""
        return [one.worker for one in self._replicas.values()]

    def find(self, worker_id: str) -> Replica | None:
        """One of them, by its worker's id."""
        return self._replicas.get(worker_id)

    def add(self, worker: Worker) -> None:
        """It serves what the others serve; requests may go to it."""
        self._replicas[worker.spec.worker_id] = Replica(worker)

    def remove(self, worker_id: str) -> Replica | None:
        """No request goes to it any more; those it works on are not touched."""
        return self._replicas.pop(worker_id, None)

    @asynccontextmanager
    async def using(self, avoid: str = "") -> AsyncIterator[Worker]:
        """The one with the fewest running requests, counted as running one more.

        Of equals the one that came first; one that does not answer only where none does.

        Args:
            avoid: Id of a worker that is not taken.

        Raises:
            FiretitanError: RECOVERING where there is none.
        """
        while not self._open.is_set():
            await self._open.wait()
        replicas = [one for key, one in self._replicas.items() if key != avoid]
        if not replicas:
            raise FiretitanError(
                Reason.RECOVERING,
                f"{self._name}: none of its workers serves now; try again",
                retry_after_s="0.2",
            )
        chosen = min(
            replicas, key=lambda one: (not self._answers(one.worker.spec.worker_id), one.running)
        )
        with chosen.counted() as worker:
            yield worker

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """No request begins meanwhile; those that come wait."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()
