"""A replay of a kept forward and its backward does not hang on what fits into its worker."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from firetitan.v1 import training_service_pb2
from support.commands import GOOD, SESSION, TRAINER_SPEC, CommandWriter

from firetitan_daemon.control.recovery import SessionRecovery
from firetitan_daemon.core.records import LoraSettings, Operation, OperationState, Session
from firetitan_daemon.core.recovery import RecoveryLimits
from firetitan_daemon.core.worker_ports import Command, Outcome, Worker
from firetitan_daemon.engine.api import ModelSpec
from firetitan_daemon.engine.graphs import GraphLimits
from firetitan_daemon.engine.hf_train import HfTrainEngine
from firetitan_daemon.launch.in_process import InProcessLauncher

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.timeout(120),
]
GRADS = [[0.5, -1.0, 0.25]]


def session_of(folder: Path) -> Session:
    return replace(SESSION, base_model=str(folder), lora=LoraSettings(rank=4, alpha=8.0))


async def start(run: Path, folder: Path, limits: GraphLimits | None) -> Worker:
    launcher = InProcessLauncher(run, train=lambda spec: HfTrainEngine(spec, limits))
    worker = await launcher.launch(replace(TRAINER_SPEC, base_model=str(folder)))
    await worker.load_model()
    return worker


def forward(write: CommandWriter, pooling: bool) -> Command:
    message = training_service_pb2.ForwardRequest(
        data=[GOOD],
        loss_fn="" if pooling else "cross_entropy",
        retain_graph=True,
        pooling=training_service_pb2.POOLING_MEAN if pooling else None,
    )
    return write._write("Forward", message, "a", 0)


def written(recovery: SessionRecovery, command: Command, outcome: Outcome) -> Operation:
    """The operation's row as the daemon writes it."""
    assert outcome.error is None, outcome.error
    running = Operation(
        id=f"o{command.commit_seq}",
        method=command.method,
        target=SESSION.name,
        request_id=command.request_id,
        payload_digest=command.payload.digest,
        state=OperationState.DISPATCHED,
        create_time=0.0,
        client_id=command.client_id,
        seq=command.seq,
        commit_seq=command.commit_seq,
        payload=command.payload,
    )
    ended = replace(running, state=OperationState.DONE, payload=None)
    return recovery.keep(running, ended, outcome)


@pytest.mark.parametrize("pooling", [False, True], ids=["logprobs", "embeddings"])
async def test_a_tighter_budget_replays_to_the_same_weights(
    tmp_path: Path, tiny_llama: Path, pooling: bool
) -> None:
    """What a token's graph takes is measured: a fresh worker may guess that none has room."""
    (tmp_path / "spool").mkdir()
    write = CommandWriter(tmp_path / "spool")
    session = session_of(tiny_llama)
    done: list[Operation] = []

    async def done_operations(name: str, after: int) -> list[Operation]:
        return [one for one in done if one.commit_seq > after]

    services = SimpleNamespace(
        recovery=RecoveryLimits(),
        store=SimpleNamespace(done_operations=done_operations),
        clock=SimpleNamespace(monotonic=time.monotonic),
    )
    recovery = SessionRecovery(session.name, services)  # type: ignore[arg-type]
    first = await start(tmp_path / "first", tiny_llama, None)
    await first.open_session(session)
    grads = [np.ones(32, np.float32).tolist()] if pooling else GRADS
    for step in range(2):
        for command in (
            forward(write, pooling),
            forward(write, pooling),
            write.backward(f"graph-{5 * step + 2}", grads),
            write.backward(f"graph-{5 * step + 1}", grads),
            write.optim_step(),
        ):
            outcome = await first.execute(command)
            done.append(written(recovery, command, outcome))
    digests = []
    second = await start(tmp_path / "second", tiny_llama, GraphLimits(max_count=1, max_bytes=1000))
    await recovery.rebuild(second, session, exact=True)
    for number, worker in enumerate((first, second)):
        save = write.save_state(tmp_path / f"state-{number}")
        outcome = await worker.execute(replace(save, commit_seq=11, seq=11))
        assert outcome.saved is not None
        weights = tmp_path / f"state-{number}" / "weights.safetensors"
        digests.append(weights.read_bytes())
        await worker.shutdown()
    assert digests[0] == digests[1]
    assert recovery.stats.replayed == len(done) == 10


def test_a_graph_that_a_replay_needs_is_not_evicted_by_a_session_beside(tiny_llama: Path) -> None:
    from firetitan_daemon.engine.api import Datum, LoraSpec, SessionSpec

    engine = HfTrainEngine(ModelSpec(str(tiny_llama)), GraphLimits(max_count=1))
    beside = engine.beside()
    for one in (engine, beside):
        one.open_session(SessionSpec(7, LoraSpec(2, 8.0)))
    data = [Datum(np.arange(3, dtype=np.int32), {"target_tokens": np.arange(3)})]
    needed = engine.forward(data, "cross_entropy", {}, retain_graph=True, over_budget=True).graph
    assert needed is not None
    assert beside.forward(data, "cross_entropy", {}, retain_graph=True).graph is None
    engine.backward(needed, [np.ones(3, np.float32)])
    assert beside.forward(data, "cross_entropy", {}, retain_graph=True).graph is not None
