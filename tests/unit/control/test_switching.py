"""All samplers of a deployment switch or none; what each of them may do on the way."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.commands import SESSION

from firetitan_daemon.control.pins import Pins
from firetitan_daemon.control.replica_set import ReplicaSet
from firetitan_daemon.control.switching import Switch, Switcher
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.ports import Change
from firetitan_daemon.core.records import Deployment, ResourceState, Snapshot
from firetitan_daemon.core.worker_ports import PREPARE, SnapshotLayer, Worker, WorkerStatus
from firetitan_daemon.store.memory import MemoryStore

pytestmark = pytest.mark.timeout(30)
OLD, NEW = "old-01234567", "new-01234567"
DEPLOYMENT = Deployment("d", "m", 0, "auto", ResourceState.ACTIVE, 0.0, active_snapshot=OLD)
SWITCH = Switch(NEW)


class Sampler:
    """A sampler that does what it is told, or fails where it is told to."""

    def __init__(self, name: str, *, fails: str = "", reason: Reason = Reason.INTERNAL) -> None:
        self.spec = SimpleNamespace(worker_id=name)
        self.active, self.prepared = OLD, ""
        self.loaded: list[str] = []
        self.capabilities: Sequence[str] = (PREPARE,)
        self.fails, self.reason = fails, reason
        self.ended = False
        self.hold = asyncio.Event()
        self.hold.set()
        self.applied = asyncio.Event()

    def _may(self, what: str) -> None:
        if what == self.fails:
            raise FiretitanError(self.reason, f"{self.spec.worker_id}: {what}")

    async def describe(self) -> WorkerStatus:
        self._may("describe")
        loaded = self.loaded or (self.active,)
        return WorkerStatus(
            self.spec.worker_id, "", 1, None, (), loaded, self.active, self.capabilities
        )

    async def prepare(self, layers: Sequence[SnapshotLayer]) -> None:
        self._may("prepare")
        self.prepared = layers[-1].name.rpartition("/")[2]

    async def apply(self, layers: Sequence[SnapshotLayer], *_: object, **__: object) -> None:
        await self.hold.wait()
        self._may("apply")
        name = layers[-1].name.rpartition("/")[2]
        assert self.prepared == name or not self.capabilities, "built while requests wait"
        self.active = name
        self.applied.set()

    async def shutdown(self) -> None:
        self.ended = True


async def switching(*samplers: Any) -> tuple[Switcher, ReplicaSet]:
    store = MemoryStore()
    rows = [
        Snapshot(
            one, SESSION.name, "m", 0, "base", "hf_full", None, 0, 1, "/nowhere", "d", "r", 1, 0.0
        )
        for one in (OLD, NEW)
    ]
    await store.write(Change(snapshots=rows))
    services: Any = SimpleNamespace(store=store, pins=Pins(store))
    replicas = ReplicaSet("deployments/d", lambda _: True)
    for one in samplers:
        replicas.add(one)
    return Switcher(services), replicas


@pytest.mark.parametrize("reason", [Reason.CHECKSUM_MISMATCH, Reason.WORKER_UNAVAILABLE])
async def test_where_one_cannot_load_it_none_serves_it(reason: Reason) -> None:
    samplers = Sampler("a"), Sampler("b", fails="prepare", reason=reason), Sampler("c")
    switcher, replicas = await switching(*samplers)
    with pytest.raises(FiretitanError, match="b: prepare"):
        await switcher.switch(DEPLOYMENT, replicas, SWITCH)
    assert {one.active for one in samplers} == {OLD}
    assert len(replicas.workers) == 3
    samplers[1].fails = ""
    await switcher.switch(DEPLOYMENT, replicas, SWITCH)
    assert {one.active for one in samplers} == {NEW}


async def test_why_it_cannot_be_loaded_is_told_rather_than_that_a_sampler_ended() -> None:
    switcher, replicas = await switching(
        Sampler("a", fails="prepare", reason=Reason.WORKER_UNAVAILABLE),
        Sampler("b", fails="prepare", reason=Reason.CHECKSUM_MISMATCH),
    )
    with pytest.raises(FiretitanError) as caught:
        await switcher.switch(DEPLOYMENT, replicas, SWITCH)
    assert caught.value.reason is Reason.CHECKSUM_MISMATCH


async def test_one_that_cannot_switch_any_more_answers_nothing_and_is_replaced() -> None:
    good, bad = Sampler("a"), Sampler("b", fails="apply")
    switcher, replicas = await switching(bad, good)
    await switcher.switch(DEPLOYMENT, replicas, SWITCH)
    assert replicas.workers == [good] and good.active == NEW
    assert bad.ended and not good.ended


async def test_where_none_can_switch_the_hotload_fails_and_all_stay() -> None:
    samplers = Sampler("a", fails="apply"), Sampler("b", fails="apply")
    switcher, replicas = await switching(*samplers)
    with pytest.raises(FiretitanError, match="apply"):
        await switcher.switch(DEPLOYMENT, replicas, SWITCH)
    assert replicas.workers == list(samplers) and not any(one.ended for one in samplers)


async def test_no_request_begins_while_some_have_switched_and_others_have_not() -> None:
    quick, slow = Sampler("a"), Sampler("b")
    slow.hold.clear()
    switcher, replicas = await switching(quick, slow)
    switch = asyncio.create_task(switcher.switch(DEPLOYMENT, replicas, SWITCH))
    await quick.applied.wait()

    async def ask() -> set[str]:
        async with replicas.using():
            return {quick.active, slow.active}

    asked = asyncio.create_task(ask())
    await asyncio.sleep(0.02)
    assert not asked.done() and not switch.done()
    slow.hold.set()
    await switch
    assert await asked == {NEW}


async def test_one_that_switched_though_the_base_model_is_served_is_not_taken_over() -> None:
    """As the first hotload of several leaves some of them where its daemon dies."""
    switched, not_yet = Sampler("a"), Sampler("b")
    not_yet.active = ""
    switcher, _ = await switching()
    base = replace(DEPLOYMENT, active_snapshot="")
    with pytest.raises(FiretitanError, match="another takes its place") as caught:
        await switcher.restore(base, cast(Worker, switched))
    assert caught.value.reason is Reason.WORKER_UNAVAILABLE
    await switcher.restore(base, cast(Worker, not_yet))


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_pinned_whole_model_is_loaded_though_a_try_ended_behind_an_adapter(
    hangs: bool,
) -> None:
    """As where it hangs in between; what was pinned and let go of since stays so."""
    sampler = Sampler("a")
    switcher, _ = await switching()
    store, pins = switcher._services.store, switcher._pins
    old = await store.snapshot(OLD)
    assert old is not None
    adapter = replace(old, id="ada-01234567", lora_rank=4, kind="adapter")
    third = replace(old, id="third-01234567")
    await store.write(Change(snapshots=[adapter, third]))
    await pins.add(("d", NEW, "c"))
    await pins.add(("d", adapter.id, "c"))

    async def apply(layers: Sequence[SnapshotLayer], *_: object, **__: object) -> None:
        sampler.active = layers[-1].name
        sampler.loaded.append(sampler.active)
        sampler.fails = "describe" if hangs and sampler.active == adapter.name else ""

    sampler.apply = apply  # type: ignore[method-assign]
    sampler.active = ""
    sampler.capabilities = ()
    if hangs:
        with pytest.raises(FiretitanError, match="describe"):
            await switcher.restore(DEPLOYMENT, cast(Worker, sampler))
        sampler.fails = ""
    await switcher.restore(DEPLOYMENT, cast(Worker, sampler))
    assert sampler.loaded == [adapter.name, f"snapshots/{NEW}", f"snapshots/{OLD}"]
    sampler.loaded = [adapter.name, old.name, third.name]
    await switcher.restore(DEPLOYMENT, cast(Worker, sampler))
    assert f"snapshots/{NEW}" not in sampler.loaded, "two whole models live"


async def test_a_sampler_of_the_release_before_switches_first() -> None:
    former, newer = Sampler("a"), Sampler("b")
    former.capabilities = ()
    former.fails = "apply"
    switcher, replicas = await switching(newer, former)
    with pytest.raises(FiretitanError, match="a: apply"):
        await switcher.switch(DEPLOYMENT, replicas, SWITCH)
    assert (former.active, newer.active) == (OLD, OLD)
    former.fails = ""
    await switcher.switch(DEPLOYMENT, replicas, SWITCH)
    assert (former.active, newer.active) == (NEW, NEW)
