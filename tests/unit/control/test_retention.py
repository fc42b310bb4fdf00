"""What nobody asks for any more is forgotten; what a living client may ask for is not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
from firetitan.v1 import operation_pb2
from support.services import TurnedClock, services_in
from support.stubs import status_reason

from firetitan_daemon.control.retention import Retention
from firetitan_daemon.control.services import Services
from firetitan_daemon.core.ports import Change
from firetitan_daemon.core.records import Operation, OperationState
from firetitan_daemon.rpc.operations import OperationMessages
from firetitan_daemon.store.sqlite import SqliteStore

SESSION = "trainers/t/sessions/s"
HOUR, DAY = 3600.0, 86400.0


class Alive:
    """Knows one client."""

    def alive(self, client_id: str) -> bool:
        return client_id == "there"


class Bench:
    """Retention over a ledger on disk, on clocks that are turned by hand."""

    def __init__(self, root: Path) -> None:
        self.clock = TurnedClock(wall=1000.0 * DAY, running=DAY)
        self.store = SqliteStore(root / "state.db")
        self.services: Services = services_in(root, clock=self.clock, store=self.store)
        self.spooled = root / "spool"
        self.restart()

    def restart(self) -> None:
        """As after a start of the daemon: it looks at once."""
        self.retention = Retention(self.services, cast(Any, Alive()), DAY, 7 * DAY)

    async def end(self, number: int, client_id: str = "") -> Operation:
        """An operation that ends now; a client's has a result that is not taken."""
        result = operation_pb2.Operation()
        result.forward.metrics["loss:sum"] = 1.0
        row = Operation(
            id=f"op{number}",
            method="Forward" if client_id else "CreateTrainer",
            target=SESSION if client_id else "trainers/t",
            request_id=f"r{number}",
            payload_digest="d",
            state=OperationState.DONE,
            create_time=self.clock.wall,
            client_id=client_id,
            seq=number if client_id else 0,
            commit_seq=number if client_id else 0,
            result=(
                await self.services.spool.write(result.SerializeToString()) if client_id else None
            ),
            finish_time=self.clock.wall,
        )
        await self.services.operations.write(Change(operations=[row]))
        return row

    async def passes(self, seconds: float) -> None:
        """Time by every clock, and a look."""
        self.clock.wall += seconds
        self.clock.running += seconds
        await self.retention.expire()

    async def shown(self, operation: Operation) -> operation_pb2.Operation:
        """What GetOperation answers."""
        nobody = cast(Any, None)
        messages = OperationMessages(self.services, nobody, nobody, nobody)
        return await messages.build(await self.services.operations.get(operation.id))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    await bench.services.operations.close()
    await bench.store.close()
    await bench.services.spool.close()


async def test_results_of_clients_that_are_gone_are_forgotten(bench: Bench) -> None:
    there = await bench.end(1, "there.lane-1")
    gone = [await bench.end(2, "gone.lane-1"), await bench.end(3, "bare")]
    await bench.passes(DAY + 1)
    assert (await bench.shown(there)).HasField("forward")
    assert len(list(bench.spooled.iterdir())) == 1
    for operation in gone:
        shown = await bench.shown(operation)
        assert shown.done and shown.WhichOneof("result") == "error"
        assert status_reason(shown.error) == "OPERATION_NOT_FOUND"
        assert operation.name in shown.error.message and "forgotten" in shown.error.message


@pytest.mark.parametrize("jump", [HOUR, -HOUR, 10 * DAY, -10 * DAY])
async def test_a_jump_of_the_wall_clock_forgets_nothing_early_or_late(
    bench: Bench, jump: float
) -> None:
    untaken, creation = await bench.end(1, "bare"), await bench.end(2)
    await bench.passes(1.0)
    bench.clock.wall += jump
    await bench.passes(61.0)
    await bench.passes(DAY - 120.0)
    bench.restart()
    await bench.passes(1.0)
    assert (await bench.shown(untaken)).HasField("forward")
    assert await bench.store.operation(creation.id) is not None
    await bench.passes(120.0)
    assert (await bench.shown(untaken)).HasField("error")
    await bench.passes(6 * DAY - 120.0)
    assert await bench.store.operation(creation.id) is not None
    await bench.passes(120.0)
    assert await bench.store.operation(creation.id) is None


async def test_an_acknowledged_result_is_no_forgotten_one(bench: Bench) -> None:
    taken = await bench.end(1, "bare")
    await bench.services.operations.acknowledge(SESSION, "bare", 1)
    await bench.passes(2 * DAY)
    shown = await bench.shown(taken)
    assert shown.done and shown.WhichOneof("result") is None
