"""Forgetting what nobody asks for any more: results not taken, rows of ended operations.

Knows: the ledger, the spool, which clients are there. Must not know: what an operation did. Rows of
a session's commands stay as long as the session: they are what a repeat is known by, and what a
replay is planned from. Age is measured as `core.expiry` does.
"""

from __future__ import annotations

import logging

from firetitan_daemon.control.leases import LeaseManager
from firetitan_daemon.control.services import Services
from firetitan_daemon.core.expiry import ago
from firetitan_daemon.core.leases import client_of

logger = logging.getLogger("firetitan.retention")
_LOOK_S = 60.0


class Retention:
    """Forgets what is too old.

    Args:
        services: The ports.
        leases: Whose clients' results stay, however old.
        results_s: How long a result stays that was not taken.
        operations_s: How long the row of an ended creation or hotload stays.
    """

    def __init__(
        self, services: Services, leases: LeaseManager, results_s: float, operations_s: float
    ) -> None:
        self._services = services
        self._leases = leases
        self._results_s = results_s
        self._operations_s = operations_s
        self._next = 0.0

    async def expire(self) -> None:
        """Forget what is too old; looks once in a while, however often it is called."""
        clock = self._services.clock
        if clock.monotonic() < self._next:
            return
        self._next = clock.monotonic() + min(_LOOK_S, self._results_s, self._operations_s)
        store = self._services.store
        old = [
            operation
            for operation in await store.untaken_results(ago(self._results_s, clock))
            if not self._leases.alive(client_of(operation.client_id))
        ]
        refs = await store.forget_results([operation.id for operation in old])
        if refs:
            await self._services.spool.remove(refs)
            logger.info("results nobody took are forgotten count=%d", len(refs))
        rows = await store.delete_operations(ago(self._operations_s, clock))
        if rows:
            logger.info("rows of ended operations are forgotten count=%d", rows)
