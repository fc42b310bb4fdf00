"""What nobody asks for any more is forgotten; what a living client may ask for is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from support.services import services_in

from firetitan_daemon.control.retention import Retention
from firetitan_daemon.core.ports import Change
from firetitan_daemon.core.records import Operation, OperationState


class Alive:
    """Knows one client."""

    def alive(self, client_id: str) -> bool:
        return client_id == "there"


async def test_results_of_clients_that_are_gone_are_forgotten(tmp_path: Path) -> None:
    services = services_in(tmp_path)
    store, spool = services.store, services.spool
    rows = [
        Operation(
            id=client,
            method="Forward",
            target="trainers/t/sessions/s",
            request_id=client,
            payload_digest="d",
            state=OperationState.DONE,
            create_time=0.0,
            client_id=client,
            seq=1,
            commit_seq=number,
            result=await spool.write(client.encode()),
            finish_time=1.0,
        )
        for number, client in enumerate(("there.lane-1", "gone.lane-1", "bare"), 1)
    ]
    await store.write(Change(operations=rows))
    await Retention(services, cast(Any, Alive()), 60.0, 60.0).expire()
    assert [one.id for one in await store.untaken_results(2.0)] == ["there.lane-1"]
    assert len(list((tmp_path / "spool").iterdir())) == 1
    await spool.close()
