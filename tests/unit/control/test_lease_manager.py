"""Clients that come, or come back, in the very moment that something is taken from them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from support.held_writes import HeldWrites
from support.managers import TOY, Managers, forward_backward, until
from support.services import TurnedClock, services_in

from firetitan_daemon.control.deployment_requests import DeploymentRequest
from firetitan_daemon.control.leases import LeaseManager, MayBegin
from firetitan_daemon.control.session_settings import Wanted
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.records import Cleanup, ResourceState

pytestmark = pytest.mark.timeout(30)
TRAINER, DEPLOYMENT = "trainers/t", "deployments/d"


class Deletion:
    """A deletion that asks whether it may begin, and ends, when it is told to."""

    def __init__(self) -> None:
        self.reached, self.asks = asyncio.Event(), asyncio.Event()
        self.asked, self.ends = asyncio.Event(), asyncio.Event()
        self.began: list[bool] = []
        self.asks.set()
        self.ends.set()

    async def clean_up(self, name: str, cleanup: Cleanup, may_begin: MayBegin) -> None:
        self.reached.set()
        await self.asks.wait()
        self.began.append(await may_begin())
        self.asked.set()
        await self.ends.wait()


async def keep_pins(alive: Callable[[str], bool]) -> None:
    """Releases none."""


async def test_a_client_that_comes_back_while_it_is_struck_off_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = TurnedClock()
    services = services_in(tmp_path, clock=clock)
    cleaned: list[str] = []
    pins_of: list[bool] = []

    async def clean_up(name: str, cleanup: Cleanup, may_begin: MayBegin) -> None:
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


@pytest.mark.parametrize("cleanup", [Cleanup.DELETE, Cleanup.STOP])
async def test_a_trainer_somebody_began_to_use_while_commands_ended_stays(
    managers: Managers, monkeypatch: pytest.MonkeyPatch, cleanup: Cleanup
) -> None:
    leases, operations = managers.leases, managers.services.operations
    trainer, worker = await managers.trainer()
    session, _ = await managers.sessions.create(trainer, worker, Wanted(), "s")
    await leases.hold("a", "a", {TRAINER: cleanup}, None)
    with monkeypatch.context() as patch:
        ends = HeldWrites(
            managers.store, patch, lambda change: any(one.done for one in change.operations)
        )
        running = await managers.sessions.submit(*forward_backward(session, seq=1))
        await ends.begun.wait()
        leaving = asyncio.create_task(leases.release("a", {TRAINER: cleanup}, everything=True))
        await until(lambda: running.id in operations._ended)
        await leases.hold("b", "b.py", {TRAINER: Cleanup.KEEP}, None)
        ends.going.set()
        (outcome,) = await leaving
    assert (outcome.cleanup, outcome.used_by, outcome.error) == (cleanup, ["b.py"], None)
    assert managers.trainers.get("t").state is ResourceState.ACTIVE
    assert [one.name for one in (await managers.store.load()).cleanups] == [TRAINER]
    await managers.done(await managers.sessions.submit(*forward_backward(session, seq=2)))
    # It waits for whoever came, and runs when they leave.
    assert await leases.release("b", {}, everything=True) == []
    assert not leases.cleanups() and not (await managers.store.load()).cleanups
    if cleanup is Cleanup.DELETE:
        assert managers.trainers.all() == []
    else:
        assert managers.trainers.get("t").state is ResourceState.STOPPED


@pytest.mark.parametrize("cleanup", [Cleanup.DELETE, Cleanup.STOP])
async def test_a_deployment_somebody_began_to_use_while_requests_ended_stays(
    managers: Managers, cleanup: Cleanup
) -> None:
    leases, activity = managers.leases, managers.services.activity
    await managers.deployment()
    with activity.using(DEPLOYMENT):
        leaving = asyncio.create_task(leases.release("a", {DEPLOYMENT: cleanup}, everything=True))
        await until(lambda: DEPLOYMENT in activity._ended)
        await leases.hold("b", "b.py", {DEPLOYMENT: Cleanup.KEEP}, None)
    (outcome,) = await leaving
    assert outcome.used_by == ["b.py"]
    assert managers.deployments.get("d").state is ResourceState.ACTIVE
    assert [one.name for one in leases.cleanups()] == [DEPLOYMENT]


async def test_whoever_was_told_that_it_holds_a_trainer_is_not_overlooked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deletion = Deletion()
    deletion.asks.clear()
    services = services_in(tmp_path)
    leases = LeaseManager(services, 60.0, deletion.clean_up, keep_pins)
    leaving = asyncio.create_task(leases.release("a", {TRAINER: Cleanup.DELETE}, everything=True))
    await deletion.reached.wait()
    holds = HeldWrites(services.store, monkeypatch, lambda change: bool(change.leases))
    holding = asyncio.create_task(leases.hold("b", "b", {TRAINER: Cleanup.KEEP}, None))
    await holds.begun.wait()
    deletion.asks.set()
    for _ in range(20):
        await asyncio.sleep(0)
    holds.going.set()
    await holding
    (outcome,) = await leaving
    assert deletion.began == [False] and outcome.used_by == ["b"]


async def test_nobody_begins_to_use_what_is_being_deleted(tmp_path: Path) -> None:
    deletion, clock = Deletion(), TurnedClock()
    deletion.ends.clear()
    leases = LeaseManager(services_in(tmp_path, clock=clock), 60.0, deletion.clean_up, keep_pins)
    await leases.hold("b", "b", {DEPLOYMENT: Cleanup.KEEP}, 10.0)
    leaving = asyncio.create_task(leases.release("a", {TRAINER: Cleanup.DELETE}, everything=True))
    await deletion.asked.wait()
    clock.running += 9
    uses = {DEPLOYMENT: Cleanup.KEEP, f"{TRAINER}/sessions/s": Cleanup.KEEP}
    with pytest.raises(FiretitanError, match=f"{TRAINER} is being deleted") as caught:
        await leases.hold("b", "b", uses, 10.0)
    assert caught.value.reason is Reason.RECOVERING
    clock.running += 9
    await leases.expire()
    assert leases.alive("b"), "refused, it is there all the same"
    deletion.ends.set()
    (outcome,) = await leaving
    assert deletion.began == [True] and not outcome.used_by
    await leases.hold("b", "b", uses, 10.0)
    assert leases.users(TRAINER) == ["b"]


async def test_what_is_asked_for_while_a_clean_up_ends_is_not_forgotten(tmp_path: Path) -> None:
    stop = Deletion()
    stop.ends.clear()
    services = services_in(tmp_path)
    leases = LeaseManager(services, 60.0, stop.clean_up, keep_pins)
    first = asyncio.create_task(leases.release("a", {TRAINER: Cleanup.STOP}, everything=True))
    await stop.asked.wait()
    await leases.hold("c", "c", {TRAINER: Cleanup.KEEP}, None)
    (deferred,) = await leases.release("b", {TRAINER: Cleanup.DELETE}, everything=True)
    assert deferred.used_by == ["c"]
    stop.ends.set()
    await first
    (row,) = (await services.store.load()).cleanups
    assert row.cleanup is Cleanup.DELETE and leases.cleanups() == [row]


async def test_who_leaves_waits_for_no_clean_up_that_ran_without_it(tmp_path: Path) -> None:
    deletion = Deletion()
    deletion.ends.clear()
    leases = LeaseManager(services_in(tmp_path), 60.0, deletion.clean_up, keep_pins)
    await leases.hold("b", "b", {DEPLOYMENT: Cleanup.KEEP}, None)
    first = asyncio.create_task(leases.release("a", {TRAINER: Cleanup.DELETE}, everything=True))
    await deletion.asked.wait()
    async with asyncio.timeout(1):
        assert await leases.release("b", {}, everything=True) == []
    assert not first.done()
    deletion.ends.set()
    await first


async def test_who_leaves_waits_for_what_only_it_was_in_the_way_of(tmp_path: Path) -> None:
    deletion = Deletion()
    deletion.ends.clear()
    leases = LeaseManager(services_in(tmp_path), 60.0, deletion.clean_up, keep_pins)
    await leases.hold("b", "b", {TRAINER: Cleanup.KEEP}, None)
    await leases.release("a", {TRAINER: Cleanup.DELETE}, everything=True)
    leaving = asyncio.create_task(leases.release("b", {}, everything=True))
    await deletion.asked.wait()
    await asyncio.sleep(0.05)
    assert not leaving.done()
    deletion.ends.set()
    assert await leaving == [] and not leases.cleanups()


async def test_a_clean_up_of_a_trainer_that_is_gone_is_not_for_the_next_of_its_name(
    managers: Managers,
) -> None:
    leases = managers.leases
    await managers.trainer()
    await leases.hold("a", "a", {TRAINER: Cleanup.DELETE}, None)
    await leases.hold("b", "b", {TRAINER: Cleanup.KEEP}, None)
    (deferred,) = await leases.release("a", {TRAINER: Cleanup.DELETE}, everything=True)
    assert deferred.used_by == ["b"]
    await managers.trainers.delete("t")
    await managers.trainer("make-another")
    assert not leases.cleanups() and not (await managers.store.load()).cleanups
    await leases.release("b", {}, everything=True)
    await leases.expire()
    await asyncio.sleep(0.05)
    assert managers.trainers.get("t").state is ResourceState.ACTIVE


async def test_a_clean_up_of_a_deployment_that_is_gone_is_not_for_the_next_of_its_name(
    managers: Managers,
) -> None:
    leases = managers.leases
    await managers.deployment()
    await leases.hold("b", "b", {DEPLOYMENT: Cleanup.KEEP}, None)
    await leases.release("a", {DEPLOYMENT: Cleanup.DELETE}, everything=True)
    await managers.deployments.delete("d")
    another = DeploymentRequest("d", TOY, 0, "", "auto", None, "make-another", "digest")
    assert (await managers.done(await managers.deployments.create(another))).error is None
    await leases.release("b", {}, everything=True)
    await leases.expire()
    await asyncio.sleep(0.05)
    assert managers.deployments.get("d").state is ResourceState.ACTIVE
    assert not leases.cleanups() and not (await managers.store.load()).cleanups


async def test_a_clean_up_that_waits_for_commands_leaves_the_next_of_that_name(
    tmp_path: Path,
) -> None:
    deletion = Deletion()
    deletion.asks.clear()
    leases = LeaseManager(services_in(tmp_path), 60.0, deletion.clean_up, keep_pins)
    leaving = asyncio.create_task(leases.release("a", {TRAINER: Cleanup.DELETE}, everything=True))
    await deletion.reached.wait()
    await leases.forget(TRAINER)
    await leases.hold("c", "c", {TRAINER: Cleanup.KEEP}, None)
    await leases.release("c", {TRAINER: Cleanup.KEEP}, everything=True)
    deletion.asks.set()
    (outcome,) = await leaving
    assert deletion.began == [False] and (outcome.used_by, outcome.error) == ((), None)


async def test_leases_have_a_limit_and_those_there_are_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firetitan_daemon.control.leases.MAX_LEASES", 2)
    services = services_in(tmp_path)
    leases = LeaseManager(services, 60.0, Deletion().clean_up, keep_pins)
    for client in ("one", "two", "one"):
        await leases.hold(client, client, {}, None)
    with pytest.raises(FiretitanError, match="2 clients hold leases") as caught:
        await leases.hold("three", "three", {}, None)
    assert caught.value.reason is Reason.QUEUE_FULL
    await leases.release("one", {}, everything=True)
    await leases.hold("three", "three", {}, None)
    assert [one.client_id for one, _ in leases.leases()] == ["three", "two"]


async def test_what_one_keeper_stumbles_over_keeps_no_other_from_its_work(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firetitan_daemon.control.supervisor._TICK_S", 0.01)
    looked: list[str] = []

    async def stumble() -> None:
        looked.append("stumbled")
        raise AssertionError("never expected")

    async def look() -> None:
        looked.append("looked")

    monkeypatch.setattr(managers.supervisor._cleaner, "expire", stumble)
    monkeypatch.setattr(managers.supervisor._remover, "expire", stumble)
    monkeypatch.setattr(managers.supervisor._retention, "expire", look)
    ticking = asyncio.create_task(managers.supervisor._tick())
    await until(lambda: looked.count("looked") > 1)
    assert not ticking.done()
    ticking.cancel()


async def test_who_waits_for_a_clean_up_as_the_daemon_ends_is_told(tmp_path: Path) -> None:
    deletion = Deletion()
    deletion.ends.clear()
    leases = LeaseManager(services_in(tmp_path), 60.0, deletion.clean_up, keep_pins)
    leaving = asyncio.create_task(leases.release("a", {TRAINER: Cleanup.DELETE}, everything=True))
    await deletion.asked.wait()
    await leases.close()
    with pytest.raises(FiretitanError) as caught:
        await leaving
    assert caught.value.reason is Reason.DAEMON_DRAINING
    assert [one.name for one in leases.cleanups()] == [TRAINER]
