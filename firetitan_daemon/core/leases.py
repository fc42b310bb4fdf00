"""Who uses what, until when, and which clean-ups wait for the last to leave.

Knows: leases, names, seconds that never jump. Must not know: the ledger, what a clean-up does.

A lease holds for its `ttl_s` from each renewal. A clean-up is due once nobody uses its resource;
whoever uses a session uses its trainer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from firetitan_daemon.core.records import Cleanup, DeferredCleanup, Lease


def client_of(holder: str) -> str:
    """The client that a lane or a pin belongs to: its name up to the first dot; empty: nobody."""
    client_id, dot, _ = holder.partition(".")
    return client_id if dot else ""


class LeaseTable:
    """The leases that hold, and the clean-ups that wait."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}
        self._deadlines: dict[str, float] = {}
        self._cleanups: dict[str, DeferredCleanup] = {}

    def restore(
        self, leases: Iterable[Lease], cleanups: Iterable[DeferredCleanup], now: float
    ) -> None:
        """Take over a former daemon's; every lease holds anew, for its clients could not renew."""
        for lease in leases:
            uses = {name: Cleanup(cleanup) for name, cleanup in lease.uses.items()}
            self.hold(replace(lease, uses=uses), now)
        for cleanup in cleanups:
            self._cleanups[cleanup.name] = cleanup

    @property
    def leases(self) -> Collection[Lease]:
        """All that hold."""
        return self._leases.values()

    @property
    def cleanups(self) -> Collection[DeferredCleanup]:
        """All that wait."""
        return self._cleanups.values()

    def lease(self, client_id: str) -> Lease | None:
        """A client's lease."""
        return self._leases.get(client_id)

    def deadline(self, client_id: str) -> float:
        """When a lease ends unless it is renewed."""
        return self._deadlines[client_id]

    def hold(self, lease: Lease, now: float) -> None:
        """Begin or renew a lease."""
        self._leases[lease.client_id] = lease
        self._deadlines[lease.client_id] = now + lease.ttl_s

    def end(self, client_id: str) -> None:
        """Forget a lease."""
        self._leases.pop(client_id, None)
        self._deadlines.pop(client_id, None)

    def expired(self, now: float) -> list[Lease]:
        """Leases that were not renewed in time."""
        return [self._leases[one] for one, at in self._deadlines.items() if at <= now]

    def without(self, lease: Lease, names: Collection[str]) -> Lease:
        """The lease after its client left some of what it uses."""
        left = {name: cleanup for name, cleanup in lease.uses.items() if name not in names}
        return replace(lease, uses=left)

    def users(self, name: str) -> list[Lease]:
        """Who uses a resource, or a part of it."""
        return [lease for lease in self._leases.values() if self.uses(lease, name)]

    def uses(self, lease: Lease, name: str) -> bool:
        """Whether a lease, held or not, is of a resource or of a part of it."""
        below = f"{name}/"
        return any(used == name or used.startswith(below) for used in lease.uses)

    def wanted(
        self, uses: Mapping[str, Cleanup], asked_by: str, now: float
    ) -> list[DeferredCleanup]:
        """The clean-ups to note where a client leaves; of two for one resource deleting wins.

        Args:
            uses: What it leaves, with what is to be done.
            asked_by: Its label.
            now: Unix seconds.
        """
        found = []
        for name, cleanup in uses.items():
            former = self._cleanups.get(name)
            if cleanup is Cleanup.KEEP:
                continue
            if former is not None and former.cleanup is Cleanup.DELETE:
                found.append(former)
            else:
                found.append(DeferredCleanup(name, cleanup, asked_by, now))
        return found

    def defer(self, cleanups: Iterable[DeferredCleanup]) -> None:
        """Let clean-ups wait until they are due."""
        for cleanup in cleanups:
            self._cleanups[cleanup.name] = cleanup

    def waiting(self, name: str) -> DeferredCleanup | None:
        """The clean-up that waits for a resource."""
        return self._cleanups.get(name)

    def finish(self, cleanup: DeferredCleanup) -> None:
        """It was carried out; one that was asked for meanwhile goes on waiting."""
        if self._cleanups.get(cleanup.name) == cleanup:
            del self._cleanups[cleanup.name]

    def due(self) -> list[DeferredCleanup]:
        """Clean-ups of what nobody uses, in the order they were asked for."""
        return [one for one in self._cleanups.values() if not self.users(one.name)]
