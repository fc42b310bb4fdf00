"""Every session command is known wherever commands are listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from firetitan.v1 import checkpoint_service_pb2, training_service_pb2

from firetitan_daemon.core.recovery import NOT_REPLAYED, REPLAYED
from firetitan_daemon.rpc.binding import is_command
from firetitan_daemon.worker.commands import REQUESTS, CommandRunner

POLYGLOT = Path(__file__).resolve().parents[3] / "examples" / "polyglot"


def test_the_worker_knows_every_command_of_the_protocol() -> None:
    commands = {
        method.name: method.input_type.full_name
        for file in (training_service_pb2, checkpoint_service_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
        if is_command(method)
    }
    assert {name: kind.DESCRIPTOR.full_name for name, kind in REQUESTS.items()} == commands


def test_the_worker_runs_every_command_it_reads() -> None:
    runner = CommandRunner(cast(Any, None))
    assert list(runner._methods) == list(REQUESTS)


@pytest.mark.parametrize("method", REQUESTS)
def test_a_command_is_replayed_or_is_said_not_to_be(method: str) -> None:
    assert (method in REPLAYED) != (method in NOT_REPLAYED)


def test_replays_name_nothing_else() -> None:
    assert set(REQUESTS) == REPLAYED | NOT_REPLAYED


def test_the_judge_of_clients_knows_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(POLYGLOT))
    import rules

    assert set(rules.COMMANDS) == set(REQUESTS)
