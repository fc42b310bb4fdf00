"""A lease: tells the daemon that a client is there and what it uses, for as long as it is.

Knows: HoldLease and ReleaseLease, when to renew. Must not know: how what is used came to be.

The daemon puts off what one client asks for, e.g. deleting a trainer on close, while others use it.
A client that dies renews no more, and its lease ends.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import sys
import uuid
import weakref
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from firetitan.v1 import lease_service_pb2

from firetitan_client import forking
from firetitan_client import transport as transports
from firetitan_client.errors import ClientClosed, FiretitanError, from_status
from firetitan_client.transport import Transport

logger = logging.getLogger("firetitan")

KEEP = lease_service_pb2.CLEANUP_UNSPECIFIED
STOP = lease_service_pb2.CLEANUP_STOP
DELETE = lease_service_pb2.CLEANUP_DELETE
Cleanup: TypeAlias = lease_service_pb2.Cleanup.ValueType

_RENEWALS = 3
"""Tries in the time a lease holds."""
_EXIT_S = 2.0


@dataclass(frozen=True)
class CleanupOutcome:
    """What became of a clean-up that was asked for."""

    name: str
    used_by: tuple[str, ...] = ()
    """Who else uses it, for people; it runs when they have left."""
    error: FiretitanError | None = None


class Lease:
    """What one client uses on one daemon; renewed in the background until it is given back.

    Its coroutines belong to the background loop. A forked child has a lease of its own under
    another id, and leaves nothing that its parent uses.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._uses: dict[str, Cleanup] = {}
        self._begin()
        forking.on_fork(self)
        _leases.add(self)

    def _begin(self) -> None:
        self.client_id = uuid.uuid4().hex
        self._pid = os.getpid()
        self._ended = False
        self._renewing: asyncio.Task[None] | None = None
        self._leaving = False
        self._num_creating = 0
        self._none_creating = asyncio.Event()
        self._none_creating.set()

    def _after_fork(self) -> None:
        """In a child: what the parent made is the parent's to clean up."""
        self._uses = dict.fromkeys(self._uses, KEEP)
        self._begin()

    @property
    def held(self) -> bool:
        """Whether the daemon was told of anything."""
        return self._renewing is not None or self._ended

    def part(self, kind: str) -> str:
        """A name for a lane or a pin that belongs to this client."""
        return f"{self.client_id}.{kind}-{uuid.uuid4().hex[:12]}"

    async def hold(self, name: str, cleanup: Cleanup = KEEP) -> None:
        """Say that a resource is used; before it is looked for, so that nobody removes it.

        Args:
            name: `trainers/..`, `trainers/../sessions/..` or `deployments/..`.
            cleanup: What to do with it when this client leaves or dies, unless others use it.
        """
        if self._ended or (self._uses.get(name) == cleanup and self._renewing is not None):
            return
        self._uses[name] = cleanup
        ttl_s = await self._hold()
        if self._renewing is None and not self._ended:
            self._renewing = transports.loop().create_task(
                _renew(weakref.ref(self), self._transport, self.client_id, ttl_s)
            )

    @contextlib.asynccontextmanager
    async def creating(self, what: str) -> AsyncIterator[None]:
        """Around a request that creates something, until what is created is noted.

        Args:
            what: For people.

        Raises:
            ClientClosed: This client is leaving, or has left when the answer comes: take back
                what was created.
        """
        if self._leaving:
            raise ClientClosed(f"closed before {what} was asked for; create a new service")
        self._num_creating += 1
        self._none_creating.clear()
        try:
            yield
            if self._ended:
                raise ClientClosed(f"closed while {what} was asked for")
        finally:
            self._num_creating -= 1
            if not self._num_creating:
                self._none_creating.set()

    async def settle(self) -> None:
        """Create nothing more, and wait until the daemon has answered what was asked of it."""
        self._leaving = True
        await self._none_creating.wait()

    async def release(
        self, uses: Mapping[str, Cleanup], *, everything: bool = False
    ) -> list[CleanupOutcome]:
        """Leave what is used, in order, each with what is to be done with it.

        Args:
            uses: Names of resources and their clean-ups; their parts, the sessions of a trainer,
                are left too.
            everything: Leave the rest too, and renew no more.

        Raises:
            FiretitanError: The daemon could not be asked.
        """
        above = tuple(f"{name}/" for name in uses)
        parts = [name for name in self._uses if name.startswith(above)]
        for name in (*parts, *uses):
            self._uses.pop(name, None)
        if everything:
            self.end()
        left = {**dict.fromkeys(parts, KEEP), **uses}
        answer = await _release(self._transport, self.client_id, left, everything=everything)
        return [
            CleanupOutcome(
                one.name,
                tuple(one.used_by),
                from_status(one.error) if one.HasField("error") else None,
            )
            for one in answer.outcomes
        ]

    def end(self) -> None:
        """Renew no more, create nothing more; the daemon is not told."""
        self._ended = self._leaving = True
        self._uses.clear()

    async def _hold(self, patience_s: float | None = None) -> float:
        answer = await self._transport.call(
            "LeaseService/HoldLease",
            lease_service_pb2.HoldLeaseRequest(
                client_id=self.client_id, label=label(), uses=_messages(self._uses)
            ),
            lease_service_pb2.HoldLeaseResponse,
            patience_s=patience_s,
        )
        if self._ended:  # given back while the daemon was being told
            await _release(self._transport, self.client_id, {}, patience_s=0.0)
        seconds: float = answer.ttl.ToNanoseconds() / 1e9
        return seconds

    def give_back(self) -> concurrent.futures.Future[object] | None:
        """At the end of the process: tell the daemon, if there is anything to tell."""
        if self._ended or self._renewing is None or self._pid != os.getpid():
            return None
        self.end()
        return transports.run(_release(self._transport, self.client_id, {}, patience_s=0.0))


async def _renew(
    lease: weakref.ref[Lease], transport: Transport, client_id: str, ttl_s: float
) -> None:
    """Renew a lease for as long as somebody has it; then give it back."""
    while True:
        await asyncio.sleep(ttl_s / _RENEWALS)
        held = lease()
        try:
            if held is not None and held._ended:
                return
            if held is None:
                await _release(transport, client_id, {}, patience_s=0.0)
                return
            ttl_s = await held._hold(patience_s=0.0)
        except FiretitanError as error:
            logger.debug("the lease could not be renewed, tried again: %s", error)
        del held


async def _release(
    transport: Transport,
    client_id: str,
    uses: Mapping[str, Cleanup],
    *,
    everything: bool = True,
    patience_s: float | None = None,
) -> lease_service_pb2.ReleaseLeaseResponse:
    answer: lease_service_pb2.ReleaseLeaseResponse = await transport.call(
        "LeaseService/ReleaseLease",
        lease_service_pb2.ReleaseLeaseRequest(
            client_id=client_id, uses=_messages(uses), all=everything
        ),
        lease_service_pb2.ReleaseLeaseResponse,
        timeout_s=None,
        patience_s=patience_s,
    )
    return answer


def _messages(uses: Mapping[str, Cleanup]) -> Sequence[lease_service_pb2.Use]:
    return [lease_service_pb2.Use(name=name, cleanup=cleanup) for name, cleanup in uses.items()]


def report(outcomes: Iterable[CleanupOutcome], what: str) -> None:
    """Log what was put off, and raise the first failure; further ones are logged.

    Args:
        outcomes: Of one request.
        what: The call, for people.

    Raises:
        FiretitanError: A clean-up failed.
    """
    first: FiretitanError | None = None
    for outcome in outcomes:
        if outcome.used_by:
            users = ", ".join(outcome.used_by)
            logger.warning("%s: clean-up of %s deferred: used by %s", what, outcome.name, users)
        if outcome.error is not None and first is not None:
            logger.warning("%s: %s: %s", what, outcome.name, outcome.error)
        first = first or outcome.error
    if first is not None:
        raise first


def label() -> str:
    """This process for people, e.g. `train.py (pid 4711)`."""
    program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] not in ("", "-c", "-m") else ""
    return f"{program or 'python'} (pid {os.getpid()})"


_leases: weakref.WeakSet[Lease] = weakref.WeakSet()


def _give_back_all() -> None:
    given_back = [one for one in map(Lease.give_back, list(_leases)) if one is not None]
    concurrent.futures.wait(given_back, _EXIT_S)


# After the calls that still wait to be sent.
transports.at_exit(_give_back_all, last=True)
