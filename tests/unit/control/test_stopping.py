"""The end of a daemon: it ends, and in time, whatever clients ask for meanwhile; what it leaves."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from support.held_writes import HeldWrites
from support.managers import Managers, forward_backward, until

from firetitan_daemon.control import supervisor
from firetitan_daemon.control.session_settings import Wanted
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.ports import Change
from firetitan_daemon.core.records import Cleanup, Operation, Session, WorkerKind, WorkerSpec
from firetitan_daemon.core.worker_ports import Worker

pytestmark = pytest.mark.timeout(60)
TRAINER = "trainers/t"


async def held_up(managers: Managers, patch: pytest.MonkeyPatch) -> tuple[Session, Operation]:
    """A session whose running command cannot be settled, and one that waits behind it."""
    trainer, worker = await managers.trainer()
    session, _ = await managers.sessions.create(trainer, worker, Wanted(), "s")
    settles = HeldWrites(
        managers.store, patch, lambda change: any(one.done for one in change.operations)
    )
    await managers.sessions.submit(*forward_backward(session, seq=1))
    queued = await managers.sessions.submit(*forward_backward(session, seq=2))
    await settles.begun.wait()
    return session, queued


async def stop_while_a_client_leaves(root: Path, run: Path) -> None:
    """A client asks for a clean-up when it is too late for any, with a command still queued."""
    managers, patch = Managers(root, run), pytest.MonkeyPatch()
    _, queued = await held_up(managers, patch)
    pausing, pause = asyncio.Event(), managers.sessions.pause

    async def told(timeout_s: float) -> None:
        pausing.set()
        await pause(timeout_s)

    patch.setattr(managers.sessions, "pause", told)
    stopping = asyncio.create_task(managers.supervisor.stop(0.3))
    await pausing.wait()
    leaving = asyncio.create_task(
        managers.leases.release("a", {TRAINER: Cleanup.DELETE}, everything=True)
    )
    await stopping
    try:
        await leaving
    except FiretitanError as error:
        print(error.reason)
    # The next daemon goes on with both.
    assert [one.name for one in (await managers.store.load()).cleanups] == [TRAINER]
    assert managers.services.operations.current(queued.id) is not None
    print("stopped", flush=True)
    os._exit(0)


def test_a_clean_up_asked_for_at_the_end_keeps_no_daemon_from_ending(tmp_path: Path) -> None:
    # A process of its own: nothing inside it could end a loop that spins.
    with tempfile.TemporaryDirectory() as run:
        ended = subprocess.run(
            [sys.executable, __file__, str(tmp_path), run],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            timeout=20,
        )
    assert ended.stdout.split() == ["DAEMON_DRAINING", "stopped"], ended.stderr


async def test_it_ends_in_the_time_it_was_given_whatever_it_waits_for(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        session, _ = await held_up(managers, patch)
        # Behind the row that cannot be written.
        late = asyncio.create_task(managers.sessions.submit(*forward_backward(session, seq=3)))
        await until(lambda: bool(managers.sessions._pipelines[session.name]._admissions))
        managers.supervisor._cleaner._begin("deployments/d", asyncio.sleep(0.5))
        began = time.monotonic()
        await managers.supervisor.stop(1.0)
        assert time.monotonic() - began < 1.35
    with pytest.raises(FiretitanError) as caught:
        await late
    assert caught.value.reason is Reason.DAEMON_DRAINING


async def test_a_stop_that_hangs_lets_the_running_command_end_and_no_other_begin(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, worker = await managers.trainer()
    session, _ = await managers.sessions.create(trainer, worker, Wanted(), "s")
    settles = HeldWrites(
        managers.store, monkeypatch, lambda change: any(one.done for one in change.operations)
    )
    running = await managers.sessions.submit(*forward_backward(session, seq=1))
    queued = await managers.sessions.submit(*forward_backward(session, seq=2))
    await settles.begun.wait()
    managers.supervisor._cleaner._begin("deployments/d", asyncio.sleep(1.5))
    asyncio.get_running_loop().call_later(0.2, settles.going.set)
    await managers.supervisor.stop(1.0)
    assert managers.services.operations.current(running.id) is None
    # Or the last to begin would be cut off.
    assert managers.services.operations.current(queued.id) is not None


def silent(times: int, then: Callable[[WorkerSpec], Awaitable[Worker | None]]) -> object:
    """A launcher's `adopt`: the worker lives and does not answer so many times."""
    left = times

    async def adopt(spec: WorkerSpec) -> Worker | None:
        nonlocal left
        if left:
            left -= 1
            raise FiretitanError(Reason.WORKER_UNAVAILABLE, f"{spec.worker_id} did not answer")
        return await then(spec)

    return adopt


@pytest.mark.parametrize("owner", ["nobody", "a trainer", "a deployment"])
async def test_a_worker_that_nobody_needs_is_ended_once_it_answers(
    managers: Managers, monkeypatch: pytest.MonkeyPatch, owner: str
) -> None:
    """Or a hang of seconds at the start would leave it there for as long as the daemon runs."""
    monkeypatch.setattr(supervisor, "_END_RETRY_S", 0.01)
    if owner == "nobody":
        spec = managers.pool.new_spec(WorkerKind.SAMPLER, "deployments/d", "m", "auto", 0)
        await managers.store.write(Change(workers=[spec]))
    else:
        await (managers.trainer() if owner == "a trainer" else managers.deployment())
        with monkeypatch.context() as patch:
            hangs = silent(100, managers.services.launcher.adopt)
            patch.setattr(managers.services.launcher, "adopt", hangs)
            managers.pool._live.clear()
            with pytest.raises(FiretitanError, match="did not answer"):
                await managers.trainers.delete("t")
                await managers.deployments.delete("d")
    ledger = await managers.store.load()
    assert len(ledger.workers) == 1
    managers.pool.restore(ledger)
    hangs = silent(3, managers.services.launcher.adopt)
    monkeypatch.setattr(managers.services.launcher, "adopt", hangs)
    managers.supervisor.begin(ledger)
    await until(lambda: not managers.pool.specs())
    await until(lambda: not managers.trainers.all() and not managers.deployments.all())
    after = await managers.store.load()
    assert not after.workers and not after.deployments
    await until(lambda: len(managers.supervisor._tasks) == 1)  # the tick
    assert not (await managers.store.load()).trainers


async def test_a_deletion_that_is_tried_again_leaves_the_next_of_that_name(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_END_RETRY_S", 0.05)
    await managers.trainer()
    adopt, recover = managers.services.launcher.adopt, managers.trainers.recover
    tries: list[str] = []

    async def told(trainer_id: str) -> None:
        tries.append(trainer_id)
        await recover(trainer_id)

    monkeypatch.setattr(managers.trainers, "recover", told)
    with monkeypatch.context() as patch:
        patch.setattr(managers.services.launcher, "adopt", silent(100, adopt))
        managers.pool._live.clear()
        with pytest.raises(FiretitanError, match="did not answer"):
            await managers.trainers.delete("t")
        managers.supervisor.begin(await managers.store.load())
        await until(lambda: bool(tries))
    await managers.trainers.delete("t")
    await managers.trainer("make-another")
    await until(lambda: len(managers.supervisor._tasks) == 1)  # the tick
    assert managers.trainers.get("t").made_by == "make-another" and tries == ["t"]


if __name__ == "__main__":
    asyncio.run(stop_while_a_client_leaves(*map(Path, sys.argv[1:])))
