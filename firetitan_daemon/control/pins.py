"""Pins: who keeps which snapshot loaded in which deployment.

Knows: the ledger's rows of pins. Must not know: how a snapshot is loaded. What is kept in memory
and what is written change together, whatever becomes of the caller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

from firetitan_daemon.core.leases import client_of
from firetitan_daemon.core.names import snapshot_name
from firetitan_daemon.core.ports import Change, Ledger, Store

Pin = tuple[str, str, str]
"""(deployment id, snapshot id, holder)."""


class Pins:
    """Every pin."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pins: set[Pin] = set()
        self._lock = asyncio.Lock()

    def restore(self, ledger: Ledger) -> None:
        """Take over a former daemon's."""
        self._pins = set(ledger.pins)

    def snapshots(self, deployment_id: str) -> list[str]:
        """Ids of the snapshots that clients keep loaded in a deployment."""
        return sorted({pin[1] for pin in self._pins if pin[0] == deployment_id})

    def names(self, deployment_id: str) -> list[str]:
        """The same, by their full names."""
        return [snapshot_name(one) for one in self.snapshots(deployment_id)]

    def of(self, deployment_id: str) -> list[Pin]:
        """A deployment's pins."""
        return [pin for pin in self._pins if pin[0] == deployment_id]

    async def add(self, pin: Pin) -> None:
        """Keep a snapshot loaded for a holder; again is fine."""
        await asyncio.shield(asyncio.create_task(self._write([pin], [])))

    async def remove(self, pins: Collection[Pin]) -> None:
        """Let snapshots go; those that are gone are fine."""
        await asyncio.shield(asyncio.create_task(self._write([], pins)))

    def forget(self, deployment_id: str) -> None:
        """A deployment's rows are gone."""
        self._pins.difference_update(self.of(deployment_id))

    def abandoned(self, alive: Callable[[str], bool]) -> list[Pin]:
        """Pins of clients that are not there any more; those that belong to no client stay.

        Args:
            alive: Whether a client is there, by its id.
        """
        return [pin for pin in self._pins if client_of(pin[2]) and not alive(client_of(pin[2]))]

    async def _write(self, added: Collection[Pin], removed: Collection[Pin]) -> None:
        async with self._lock:
            await self._store.write(Change(pins=list(added), deleted_pins=list(removed)))
            self._pins.update(added)
            self._pins.difference_update(removed)
