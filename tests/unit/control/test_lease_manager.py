"""Clients that come back in the very moment they are struck off."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from support.held_writes import HeldWrites
from support.services import TurnedClock, services_in

from firetitan_daemon.control.leases import LeaseManager
from firetitan_daemon.core.records import Cleanup

pytestmark = pytest.mark.timeout(30)
TRAINER = "trainers/t"


async def test_a_client_that_comes_back_while_it_is_struck_off_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = TurnedClock()
    services = services_in(tmp_path, clock=clock)
    cleaned: list[str] = []
    pins_of: list[bool] = []

    async def clean_up(name: str, cleanup: Cleanup) -> None:
        cleaned.append(name)

    async def release_pins(alive: Callable[[str], bool]) -> None:
        pins_of.append(alive("late"))

    leases = LeaseManager(services, 60.0, clean_up, release_pins)
    await leases.hold("late", "late", {TRAINER: Cleanup.DELETE}, 10.0)
    clock.running += 11
    others = HeldWrites(
        services.store, monkeypatch, lambda change: any(change.leases) and not cleaned
    )
    other = asyncio.create_task(leases.hold("other", "other", {}, None))
    await others.begun.wait()
    back = asyncio.create_task(leases.hold("late", "late", {TRAINER: Cleanup.DELETE}, 10.0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    striking = asyncio.create_task(leases.expire())
    await asyncio.sleep(0)
    others.going.set()
    await asyncio.gather(other, back, striking)
    assert leases.alive("late") and leases.users(TRAINER) == ["late"]
    assert pins_of == [True] and cleaned == []
    assert {one.client_id for one in (await services.store.load()).leases} == {"late", "other"}
    clock.running += 11
    await leases.expire()
    assert not leases.alive("late") and leases.alive("other")
    await asyncio.sleep(0.05)
    assert cleaned == [TRAINER]
