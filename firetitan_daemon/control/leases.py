"""Leases: clients that are there, what they use, and what happens when the last one leaves.

Knows: the table of leases, how trainers and deployments are stopped and deleted. Must not know:
RPCs, what a client computes.

What is asked for is written down before it is begun, so that neither the death of the client nor
that of the daemon leaves it half done. After a restart every lease holds for its full time again:
its client could not renew it meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from firetitan_daemon.control.operations import draining
from firetitan_daemon.control.services import Services, internal_error
from firetitan_daemon.core import names
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.leases import LeaseTable
from firetitan_daemon.core.ports import Change, Ledger
from firetitan_daemon.core.records import Cleanup, DeferredCleanup, Lease
from firetitan_daemon.core.texts import check_text

logger = logging.getLogger("firetitan.leases")
MAX_USES = 1000
MAX_LEASES = 4096
_TTL_S = (0.5, 24 * 3600.0)
_RETRY_S = 5.0

MayBegin = Callable[[], Awaitable[bool]]
"""Asked right before stopping or deleting begins; False: somebody uses it again, leave it."""
CleanUp = Callable[[str, Cleanup, MayBegin], Awaitable[None]]
"""Stops or deletes a trainer or a deployment by name; one that is gone is fine."""
ReleasePins = Callable[[Callable[[str], bool]], Awaitable[None]]
"""Lets go of the pins whose client is not there any more, as the given test says of a holder."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Outcome:
    """What became of a clean-up that was asked for."""

    name: str
    cleanup: Cleanup
    used_by: Sequence[str] = ()
    """Labels of those it waits for; empty: it ran."""
    error: FiretitanError | None = None
    """Why it failed; it is tried again."""


class LeaseManager:
    """Every lease, and the clean-ups that wait.

    Args:
        services: The ports.
        ttl_s: How long a lease holds where its client names no time.
        clean_up: Carries a clean-up out.
        release_pins: Lets pins go when clients are gone.
    """

    def __init__(
        self, services: Services, ttl_s: float, clean_up: CleanUp, release_pins: ReleasePins
    ) -> None:
        self._services = services
        self._ttl_s = ttl_s
        self._clean_up = clean_up
        self._release_pins = release_pins
        self._table = LeaseTable()
        self._lock = asyncio.Lock()
        """Held while the table and its rows change together."""
        self._running: dict[str, asyncio.Task[Outcome]] = {}
        self._deleting: set[str] = set()
        """What is being deleted: nobody can begin to use it."""
        self._retry_at: dict[str, float] = {}
        self._failures: dict[str, FiretitanError] = {}
        """Why clean-ups that wait failed when they were last tried."""
        self._closed = False

    def restore(self, ledger: Ledger) -> None:
        """Take over a former daemon's leases and clean-ups."""
        self._table.restore(ledger.leases, ledger.cleanups, self._now())

    def leases(self) -> list[tuple[Lease, float]]:
        """Who is there, by label, with the seconds left until a renewal is due."""
        found = sorted(self._table.leases, key=lambda one: (one.label, one.client_id))
        return [(one, self._table.deadline(one.client_id) - self._now()) for one in found]

    def cleanups(self) -> list[DeferredCleanup]:
        """Clean-ups that wait, by name."""
        return sorted(self._table.cleanups, key=lambda one: one.name)

    def failure(self, name: str) -> FiretitanError | None:
        """Why the clean-up that waits for a name failed, if it did."""
        return self._failures.get(name)

    def users(self, name: str) -> list[str]:
        """Labels of those who use a resource or a part of it."""
        return sorted({lease.label for lease in self._table.users(name)})

    def alive(self, client_id: str) -> bool:
        """Whether a client is there."""
        return self._table.lease(client_id) is not None

    # -- what clients ask for ------------------------------------------------------------------

    async def hold(
        self, client_id: str, label: str, uses: Mapping[str, Cleanup], ttl_s: float | None
    ) -> float:
        """Begin or renew a lease; returns how long it holds.

        Args:
            client_id: The client.
            label: For people.
            uses: All that it uses, with what to do when it leaves.
            ttl_s: None: the setting.

        Raises:
            FiretitanError: INVALID_ARGUMENT, NAME_INVALID; QUEUE_FULL for one client too many;
                RECOVERING where it begins to use what is being deleted: what it held before is
                renewed all the same.
        """
        _check_client(client_id)
        check_text(label, "label")
        _check_uses(uses)
        ttl_s = self._ttl_s if ttl_s is None else ttl_s
        if not _TTL_S[0] <= ttl_s <= _TTL_S[1]:
            raise FiretitanError(
                Reason.INVALID_ARGUMENT,
                f"ttl: {ttl_s:g} s; use {_TTL_S[0]:g} s to {_TTL_S[1]:g} s",
                field="ttl",
            )
        lease = Lease(client_id, label or client_id, ttl_s, dict(uses))
        await _whole(self._hold(lease))
        return ttl_s

    async def _hold(self, lease: Lease) -> None:
        async with self._lock:
            former = self._table.lease(lease.client_id)
            if former is None and len(self._table.leases) >= MAX_LEASES:
                raise FiretitanError(
                    Reason.QUEUE_FULL,
                    f"client_id: {MAX_LEASES} clients hold leases; renew one under the client_id "
                    "it has, or wait until one ends",
                    limit="leases",
                    retry_after_s="1",
                )
            try:
                self._check_not_deleted(lease, former)
            except FiretitanError:
                if former is not None:
                    self._table.hold(former, self._now())
                raise
            if former != lease:
                await self._services.store.write(Change(leases=[lease]))
            self._table.hold(lease, self._now())

    def _check_not_deleted(self, lease: Lease, former: Lease | None) -> None:
        for name in self._deleting:
            if self._table.uses(lease, name) and not (former and self._table.uses(former, name)):
                raise FiretitanError(
                    Reason.RECOVERING,
                    f"{name} is being deleted, as nobody used it; try again when it is gone",
                    retry_after_s="0.2",
                )

    async def release(
        self, client_id: str, uses: Mapping[str, Cleanup], *, everything: bool
    ) -> list[Outcome]:
        """A client leaves; clean-ups nobody else stands in the way of run before this returns.

        Args:
            client_id: The client; one without a lease may ask for clean-ups too.
            uses: What it leaves, each with what to do, in order.
            everything: It leaves the rest too, as it said it would.

        Raises:
            FiretitanError: INVALID_ARGUMENT, NAME_INVALID; DAEMON_DRAINING where it left and the
                next daemon has to clean up.
        """
        _check_client(client_id)
        _check_uses(uses)
        return await _whole(self._release(client_id, uses, everything))

    async def _release(
        self, client_id: str, uses: Mapping[str, Cleanup], everything: bool
    ) -> list[Outcome]:
        async with self._lock:
            before = {one.name for one in self._table.due()}
            asked = await self._leave(client_id, uses, everything)
            freed = {one.name for one in self._table.due()} - before
        if everything:
            await self._release_pins(self.alive)
        outcomes = []
        for name, cleanup in asked.items():
            outcomes.append(replace(await self._run(name), cleanup=cleanup))
        # What others had asked for, and only this client was in the way of.
        for name in self._begin_due():
            if name in freed:
                await self._run(name)
        return outcomes

    async def _leave(
        self, client_id: str, uses: Mapping[str, Cleanup], everything: bool
    ) -> dict[str, Cleanup]:
        """Write down that a client left, and what it asks for; under the lock."""
        lease = self._table.lease(client_id)
        asked = dict(uses)
        if everything and lease is not None:
            asked.update((n, c) for n, c in lease.uses.items() if n not in uses)
        label = lease.label if lease is not None else client_id
        cleanups = self._table.wanted(asked, label, self._services.clock.now())
        left = None
        if lease is not None and not everything:
            left = self._table.without(lease, asked)
        gone = [client_id] if lease is not None and left is None else []
        await self._services.store.write(
            Change(
                leases=[left] if left is not None else [],
                deleted_leases=gone,
                cleanups=cleanups,
                durable=bool(cleanups),
            )
        )
        if left is not None:
            self._table.hold(left, self._now())
        else:
            self._table.end(client_id)
        self._table.defer(cleanups)
        return {name: cleanup for name, cleanup in asked.items() if cleanup is not Cleanup.KEEP}

    # -- what happens by itself ----------------------------------------------------------------

    async def expire(self) -> None:
        """End the leases that were not renewed; begin the clean-ups that are due."""
        async with self._lock:
            for lease in self._table.expired(self._now()):
                logger.warning("client is gone client=%s label=%s", lease.client_id, lease.label)
                await self._leave(lease.client_id, {}, everything=True)
        await self._release_pins(self.alive)
        self._begin_due()

    def _begin_due(self) -> list[str]:
        """Begin the clean-ups that nobody is in the way of; returns what is being cleaned up."""
        if self._closed:
            return []
        now = self._now()
        due = [one.name for one in self._table.due() if self._retry_at.get(one.name, now) <= now]
        for name in due:
            self._task(name)
        return due

    async def _run(self, name: str) -> Outcome:
        """Carry out the clean-up that waits for a name, unless somebody uses that."""
        cleanup = self._table.waiting(name)
        if cleanup is None:
            return Outcome(name, Cleanup.KEEP)
        if users := self.users(name):
            return self._deferred(cleanup, users)
        task = self._task(name)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if self._closed and task.cancelled():
                raise draining() from None  # who asked is there, and has to be told
            raise

    def _task(self, name: str) -> asyncio.Task[Outcome]:
        if self._closed:
            raise draining()
        task = self._running.get(name)
        if task is None:
            task = self._running[name] = asyncio.create_task(self._clean(name))
            task.add_done_callback(lambda _: self._running.pop(name, None))
        return task

    async def _clean(self, name: str) -> Outcome:
        cleanup = self._table.waiting(name)
        if cleanup is None:
            return Outcome(name, Cleanup.KEEP)
        users, wanted = self.users(name), True

        async def may_begin() -> bool:
            nonlocal users, wanted
            users, wanted = await self._last_look(cleanup)
            return wanted and not users

        try:
            if not users:
                logger.info("clean-up begins target=%s what=%s", name, cleanup.cleanup)
                await self._clean_up(name, cleanup.cleanup, may_begin)
            if users:
                return self._deferred(cleanup, users)
            if not wanted:
                return await self._clean(name)
            await self._finish(cleanup)
            return Outcome(name, cleanup.cleanup)
        except FiretitanError as error:
            failure = error
        except Exception as error:  # a supervisor: one clean-up's trouble stays its own
            failure = internal_error(f"cleaning up {name}", error)
        finally:
            self._deleting.discard(name)
        logger.error("clean-up failed, tried again later target=%s: %s", name, failure)
        self._retry_at[name] = self._now() + _RETRY_S
        self._failures[name] = failure
        return Outcome(name, cleanup.cleanup, error=failure)

    async def _last_look(self, cleanup: DeferredCleanup) -> tuple[list[str], bool]:
        """Who began to use it while what was accepted ended; if nobody, nobody can any more.

        And whether it still is what is asked for: under that name there may be another by now.
        Under the lock, so that whoever was told that it holds a lease is among them.
        """
        async with self._lock:
            users = self.users(cleanup.name)
            wanted = self._table.waiting(cleanup.name) == cleanup
            if wanted and not users and cleanup.cleanup is Cleanup.DELETE:
                self._deleting.add(cleanup.name)
            return users, wanted

    def _deferred(self, cleanup: DeferredCleanup, users: Sequence[str]) -> Outcome:
        logger.info("clean-up deferred target=%s used_by=%s", cleanup.name, ", ".join(users))
        return Outcome(cleanup.name, cleanup.cleanup, users)

    async def forget(self, name: str) -> None:
        """A trainer or deployment is about to be made: no clean-up of a former one is for it.

        Raises:
            FiretitanError: STATE_DISK_FULL, STATE_NOT_WRITABLE.
        """
        cleanup = self._table.waiting(name)
        if cleanup is not None:
            logger.info("clean-up dropped, what it was for is gone target=%s", name)
            await self._finish(cleanup)

    async def _finish(self, cleanup: DeferredCleanup) -> None:
        """It was carried out; one that was asked for meanwhile goes on waiting."""
        async with self._lock:
            if self._table.waiting(cleanup.name) == cleanup:
                await self._services.store.write(Change(deleted_cleanups=[cleanup.name]))
                self._table.finish(cleanup)
        self._retry_at.pop(cleanup.name, None)
        self._failures.pop(cleanup.name, None)

    async def close(self) -> None:
        """Stop, begin no more; clean-ups that wait are taken up again at the next start."""
        self._closed = True
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _now(self) -> float:
        return self._services.clock.monotonic()


async def _whole(work: Awaitable[_T]) -> _T:
    """Begun, it is finished, whatever becomes of the caller."""
    return await asyncio.shield(asyncio.ensure_future(work))


def _check_client(client_id: str) -> None:
    if not client_id or "." in client_id:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"client_id: {client_id[:80]!r}; use a text without dots, e.g. a random UUID",
            field="client_id",
        )
    check_text(client_id, "client_id")


def _check_uses(uses: Mapping[str, Cleanup]) -> None:
    if len(uses) > MAX_USES:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"uses: has {len(uses)} entries; a client may use up to {MAX_USES}",
            field="uses",
        )
    for index, (name, cleanup) in enumerate(uses.items()):
        field = f"uses[{index}].name"
        if "/sessions/" in name:
            names.parse_session(name, field)
            if cleanup is not Cleanup.KEEP:
                raise FiretitanError(
                    Reason.INVALID_ARGUMENT,
                    f"{field}: {name} is a session; clean-ups are for trainers and deployments",
                    field=field,
                )
        elif name.startswith("deployments/"):
            names.parse_deployment(name, field, bare=False)
        else:
            names.parse_trainer(name, field, bare=False)
