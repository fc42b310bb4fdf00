"""Which sampler takes a request."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from firetitan_daemon.control.replica_set import ReplicaSet
from firetitan_daemon.core.errors import FiretitanError, Reason

pytestmark = pytest.mark.timeout(30)


def replicas(*names: str, silent: set[str] | None = None) -> ReplicaSet:
    replicas = ReplicaSet("deployments/d", lambda one: one not in (silent or ()))
    for name in names:
        worker: Any = SimpleNamespace(spec=SimpleNamespace(worker_id=name))
        replicas.add(worker)
    return replicas


async def take(stack: AsyncExitStack, replicas: ReplicaSet, **how: Any) -> str:
    worker = await stack.enter_async_context(replicas.using(**how))
    return worker.spec.worker_id


async def test_requests_go_to_the_one_with_the_fewest() -> None:
    three = replicas("a", "b", "c")
    async with AsyncExitStack() as stack:
        assert [await take(stack, three) for _ in range(7)] == [*"abcabc", "a"]
        async with AsyncExitStack() as short:
            assert await take(short, three) == "b"
        # It has ended: b and c have two each again.
        assert await take(stack, three) == "b"
        assert await take(stack, three, avoid="c") == "a"
    assert {one.running for one in map(three.find, "abc") if one is not None} == {0}


async def test_one_that_does_not_answer_is_left_alone_where_another_does() -> None:
    silent = {"a"}
    two = replicas("a", "b", silent=silent)
    async with AsyncExitStack() as stack:
        assert [await take(stack, two) for _ in range(3)] == ["b", "b", "b"]
        silent.add("b")
        assert await take(stack, two) == "a"
    with pytest.raises(FiretitanError) as caught:
        async with replicas("a").using(avoid="a"):
            pass
    assert caught.value.reason is Reason.RECOVERING and "deployments/d" in caught.value.message


async def test_one_that_is_taken_away_ends_what_it_has_begun() -> None:
    two = replicas("a", "b")
    async with AsyncExitStack() as stack:
        assert await take(stack, two) == "a"
        removed = two.remove("a")
        assert removed is not None and two.remove("a") is None
        idle = asyncio.create_task(removed.idle())
        await asyncio.sleep(0.01)
        assert not idle.done()
        assert await take(stack, two) == "b"
    await idle
