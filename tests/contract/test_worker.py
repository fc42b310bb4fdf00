"""What every kind of worker promises the daemon: exactly once, in order, findable again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from firetitan.v1 import operation_pb2, sampling_service_pb2
from support.commands import (
    BAD,
    SAMPLER_SPEC,
    SESSION,
    TRAINER_SPEC,
    CommandWriter,
    sample_request,
)

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.records import LoraSettings
from firetitan_daemon.core.worker_ports import (
    PREPARE,
    Command,
    Outcome,
    SnapshotLayer,
    Worker,
    WorkerLauncher,
)
from firetitan_daemon.launch.in_process import InProcessLauncher
from firetitan_daemon.launch.local import LocalLauncher

pytestmark = pytest.mark.timeout(60)

MakeLauncher = Callable[[], WorkerLauncher]


@pytest.fixture(params=["in_process", "local"])
def make_launcher(request: pytest.FixtureRequest, tmp_path: Path) -> MakeLauncher:
    """Makes launchers as restarted daemons would: over the same folders."""
    if request.param == "local":
        return lambda: LocalLauncher(tmp_path / "workers", tmp_path / "run")
    shared = InProcessLauncher(tmp_path / "run")
    return lambda: shared


@pytest.fixture
async def trainer(make_launcher: MakeLauncher, ends: list[Worker]) -> Worker:
    """A trainer with its session open."""
    worker = await make_launcher().launch(TRAINER_SPEC)
    ends.append(worker)
    await worker.load_model()
    await worker.open_session(SESSION)
    return worker


def staging(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    return folder


def damage(command: Command, content: bytes | None = None) -> None:
    """Overwrite a payload; without content, flip its last bit."""
    path = Path(command.payload.path)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw) if content is None else content)


def result(outcome: Outcome) -> operation_pb2.Operation:
    assert outcome.error is None and outcome.result is not None, outcome.error
    return operation_pb2.Operation.FromString(outcome.result)


def reason(outcome: Outcome) -> str:
    assert outcome.error is not None and outcome.result is None and outcome.saved is None
    return outcome.error.reason


async def test_says_who_it_is(make_launcher: MakeLauncher, ends: list[Worker]) -> None:
    worker = await make_launcher().launch(TRAINER_SPEC)
    ends.append(worker)
    before = await worker.describe()
    assert (before.worker_id, before.pid, before.model) == ("trainer-1", worker.pid, None)
    info = await worker.load_model()
    assert info.vocab_size == 64 and await worker.load_model() == info
    after = await worker.describe()
    assert after.model == info and after.incarnation == before.incarnation
    assert len(before.incarnation) == 32


async def test_a_session_opens_once(trainer: Worker) -> None:
    assert (await trainer.open_session(SESSION)).applied_commit_seq == 0
    for other in (
        replace(SESSION, seed=8),
        replace(SESSION, name="trainers/t/sessions/other"),
        replace(SESSION, lora=LoraSettings(rank=4)),
    ):
        with pytest.raises(FiretitanError) as caught:
            await trainer.open_session(other)
        assert caught.value.reason is Reason.ALREADY_EXISTS


async def test_a_forward_only_session_runs_forward_and_nothing_else(
    make_launcher: MakeLauncher, ends: list[Worker], write: CommandWriter, tmp_path: Path
) -> None:
    worker = await make_launcher().launch(TRAINER_SPEC)
    ends.append(worker)
    await worker.load_model()
    await worker.open_session(replace(SESSION, forward_only=True))
    first = await worker.execute(write.forward())
    assert result(first).forward.metrics["loss:sum"] > 0
    for command in (  # each in a lane of its own: none stands behind another's failure
        write.forward(retain_graph=True, lane="forward"),
        write.backward("graph", [[1.0, 1.0, 1.0]], lane="backward"),
        write.forward_backward(lane="forward_backward"),
        write.optim_step(lane="optim_step"),
        write.save_state(staging(tmp_path, "state"), lane="save_state"),
        write.load_state(tmp_path, "", lane="load_state"),
        write.save_snapshot(staging(tmp_path, "snapshot"), "s", "base", lane="save_snapshot"),
    ):
        outcome = await worker.execute(command)
        assert reason(outcome) == Reason.SESSION_FORWARD_ONLY, command.method
    (session,) = (await worker.describe()).sessions
    assert (session.step, session.pending_backwards) == (0, 0)


async def test_adapters_stand_beside_each_other(
    make_launcher: MakeLauncher, ends: list[Worker], tmp_path: Path
) -> None:
    worker = await make_launcher().launch(TRAINER_SPEC)
    ends.append(worker)
    await worker.load_model()
    norms = {}
    writers = {}
    for rank in (2, 4):
        session = replace(SESSION, name=f"{SESSION.name}{rank}", lora=LoraSettings(rank=rank))
        await worker.open_session(session)
        writers[rank] = CommandWriter(staging(tmp_path, f"spool{rank}"), session.name)
    for _ in range(2):
        for rank, write in writers.items():
            await worker.execute(write.forward_backward())
            outcome = result(await worker.execute(write.optim_step()))
            norms[rank] = outcome.optim_step.metrics["grad_norm"]
    assert norms[2] != norms[4]
    assert [one.step for one in (await worker.describe()).sessions] == [2, 2]
    with pytest.raises(FiretitanError) as caught:
        await worker.open_session(SESSION)
    assert caught.value.reason is Reason.ALREADY_EXISTS  # it would train the others' base
    for _ in range(2):
        await worker.close_session(f"{SESSION.name}2")
    assert [one.session for one in (await worker.describe()).sessions] == [f"{SESSION.name}4"]
    with pytest.raises(FiretitanError) as caught:
        await worker.execute(writers[2].forward_backward())
    assert caught.value.reason is Reason.SESSION_NOT_FOUND
    assert result(await worker.execute(writers[4].forward_backward())).forward.step == 2


async def test_a_step_moves_the_session(trainer: Worker, write: CommandWriter) -> None:
    forward = result(await trainer.execute(write.forward_backward())).forward
    assert forward.metrics["loss:sum"] > 0 and forward.step == 0
    assert list(forward.outputs[0].tensors["logprobs"].shape) == [3]
    outcome = await trainer.execute(write.optim_step())
    assert result(outcome).optim_step.metrics["step"] == 1
    assert (outcome.session.step, outcome.session.applied_commit_seq) == (1, 2)
    (session,) = (await trainer.describe()).sessions
    assert session == outcome.session


async def test_a_repeat_returns_the_first_outcome(trainer: Worker, write: CommandWriter) -> None:
    await trainer.execute(write.forward_backward())
    step = write.optim_step()
    first = await trainer.execute(step)
    again = await trainer.execute(step)
    assert again == first and again.session.step == 1
    assert await trainer.fetch_result(SESSION.name, step.commit_seq) == first
    assert (await trainer.describe()).sessions[0].step == 1


async def test_repeats_in_flight_join(trainer: Worker, write: CommandWriter) -> None:
    commands = [write.forward_backward(), write.optim_step()] * 5
    outcomes = await asyncio.gather(*(trainer.execute(command) for command in commands))
    assert outcomes[0::2] == [outcomes[0]] * 5 and outcomes[1::2] == [outcomes[1]] * 5
    assert (await trainer.describe()).sessions[0].step == 1


async def test_a_caller_that_goes_away_changes_nothing(
    trainer: Worker, write: CommandWriter
) -> None:
    await trainer.execute(write.forward_backward())
    step = write.optim_step()
    task = asyncio.create_task(trainer.execute(step))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (await trainer.execute(step)).session.step == 1


async def test_settled_outcomes_go(trainer: Worker, write: CommandWriter) -> None:
    first = write.forward_backward()
    await trainer.execute(first)
    await trainer.execute(replace(write.optim_step(), settled_through=first.commit_seq))
    assert await trainer.fetch_result(SESSION.name, first.commit_seq) is None
    with pytest.raises(FiretitanError, match="settled") as caught:
        await trainer.execute(first)
    assert caught.value.reason is Reason.OPERATION_NOT_FOUND
    assert (await trainer.describe()).sessions[0].step == 1


async def test_a_failure_takes_its_number_and_changes_nothing(
    trainer: Worker, write: CommandWriter
) -> None:
    bad = write.forward_backward(BAD)
    outcome = await trainer.execute(bad)
    assert reason(outcome) == Reason.INVALID_DATUM
    assert outcome.error is not None and outcome.error.metadata["field"].startswith("data[0]")
    assert (outcome.session.applied_commit_seq, outcome.session.pending_backwards) == (1, 0)
    assert await trainer.execute(bad) == outcome


async def test_commands_behind_a_failure_of_their_lane_fail(
    trainer: Worker, write: CommandWriter
) -> None:
    good = await trainer.execute(write.forward_backward(lane="a"))
    assert good.session.pending_backwards == 1
    bad = write.forward_backward(BAD, lane="a")
    assert reason(await trainer.execute(bad)) == Reason.INVALID_DATUM
    for _ in range(2):
        step = await trainer.execute(write.optim_step(lane="a", seen_failure=bad.seq - 1))
        assert reason(step) == Reason.PRECEDING_FAILED and step.session.step == 0
        assert step.error is not None
        assert step.error.metadata["failed_seq"] == str(bad.seq)
        assert step.error.metadata["failed_reason"] == Reason.INVALID_DATUM
    other = await trainer.execute(write.optim_step(lane="b"))
    assert other.session.step == 1
    seen = await trainer.execute(write.forward_backward(lane="a", seen_failure=bad.seq))
    assert seen.error is None
    assert (
        await trainer.execute(write.optim_step(lane="a", seen_failure=bad.seq))
    ).session.step == 2


async def test_a_damaged_spool_file_fails_its_command_and_its_lane(
    trainer: Worker, write: CommandWriter
) -> None:
    command = write.forward_backward()
    damage(command)
    assert reason(await trainer.execute(command)) == Reason.CHECKSUM_MISMATCH
    behind = await trainer.execute(write.optim_step())
    assert reason(behind) == Reason.PRECEDING_FAILED
    short = write.forward_backward(lane="b")
    damage(short, b"short")
    outcome = await trainer.execute(short)
    assert outcome.error is not None and outcome.error.metadata["found"] == "5"


async def test_an_unknown_session_and_an_unknown_method(
    trainer: Worker, write: CommandWriter
) -> None:
    with pytest.raises(FiretitanError) as caught:
        await trainer.execute(replace(write.forward(), session="trainers/t/sessions/none"))
    assert caught.value.reason is Reason.SESSION_NOT_FOUND
    outcome = await trainer.execute(replace(write.forward(), method="Dance"))
    assert reason(outcome) == Reason.UNSUPPORTED


async def test_a_kept_graph_serves_one_backward(trainer: Worker, write: CommandWriter) -> None:
    forward = result(await trainer.execute(write.forward(retain_graph=True))).forward
    outcome = await trainer.execute(write.backward(forward.graph, [[-1, -1, -1]]))
    assert (outcome.session.pending_backwards, outcome.session.forward_passes) == (1, 1)
    again = await trainer.execute(write.backward(forward.graph, [[-1, -1, -1]]))
    assert reason(again) == Reason.GRAPH_EXPIRED and again.session.pending_backwards == 1


async def test_a_backward_after_a_step_says_that_the_weights_moved(
    trainer: Worker, write: CommandWriter
) -> None:
    forward = result(await trainer.execute(write.forward(retain_graph=True))).forward
    await trainer.execute(write.forward_backward(lane="b"))
    await trainer.execute(write.optim_step(lane="b"))
    outcome = await trainer.execute(write.backward(forward.graph, [[-1, -1, -1]]))
    assert reason(outcome) == Reason.WEIGHTS_CHANGED
    assert outcome.session.pending_backwards == 0


async def test_a_backward_without_gradients_drops_the_graph(
    trainer: Worker, write: CommandWriter
) -> None:
    forward = result(await trainer.execute(write.forward(retain_graph=True))).forward
    outcome = await trainer.execute(write.backward(forward.graph, []))
    assert outcome.error is None and outcome.session.pending_backwards == 0
    gone = await trainer.execute(write.backward(forward.graph, [[-1, -1, -1]]))
    assert reason(gone) == Reason.GRAPH_EXPIRED


async def test_forward_backward_insists_on_a_step(trainer: Worker, write: CommandWriter) -> None:
    outcome = await trainer.execute(write.forward_backward(expected_step=3))
    assert reason(outcome) == Reason.WEIGHTS_CHANGED and outcome.session.pending_backwards == 0
    at_step = write.forward_backward(expected_step=0, seen_failure=1)
    assert (await trainer.execute(at_step)).session.pending_backwards == 1


async def test_a_checkpoint_brings_back_the_weights(
    trainer: Worker, write: CommandWriter, tmp_path: Path
) -> None:
    async def loss() -> float:
        outcome = await trainer.execute(write.forward())
        return result(outcome).forward.metrics["loss:sum"]

    await trainer.execute(write.forward_backward())
    await trainer.execute(write.optim_step())
    then = await loss()
    folder = staging(tmp_path, "checkpoint")
    saved = (await trainer.execute(write.save_state(folder))).saved
    assert saved is not None and saved.size_bytes > 0
    await trainer.execute(write.forward_backward())
    assert (await trainer.execute(write.optim_step())).session.step == 2
    assert await loss() < then
    wrong = await trainer.execute(write.load_state(folder, "0" * 64))
    assert reason(wrong) == Reason.CHECKSUM_MISMATCH and wrong.session.step == 2


async def test_loading_takes_the_session_back(
    trainer: Worker, write: CommandWriter, tmp_path: Path
) -> None:
    folder = staging(tmp_path, "checkpoint")
    saved = (await trainer.execute(write.save_state(folder))).saved
    assert saved is not None
    await trainer.execute(write.forward_backward())
    await trainer.execute(write.optim_step())
    forward = result(await trainer.execute(write.forward(retain_graph=True))).forward
    outcome = await trainer.execute(write.load_state(folder, saved.digest))
    assert result(outcome).load.step == 0 and outcome.session.step == 0
    stale = await trainer.execute(write.backward(forward.graph, [[-1, -1, -1]]))
    assert reason(stale) == Reason.WEIGHTS_CHANGED


async def test_a_snapshot_reaches_a_sampler(
    trainer: Worker,
    write: CommandWriter,
    make_launcher: MakeLauncher,
    ends: list[Worker],
    tmp_path: Path,
) -> None:
    sampler = await make_launcher().launch(SAMPLER_SPEC)
    ends.append(sampler)
    await sampler.load_model()
    layers = []
    for number, (kind, parent) in enumerate((("base", ""), ("delta", "s-0"))):
        await trainer.execute(write.forward_backward())
        await trainer.execute(write.optim_step())
        folder = staging(tmp_path, f"snapshot-{number}")
        outcome = await trainer.execute(write.save_snapshot(folder, f"s-{number}", kind, parent))
        saved = outcome.saved
        assert saved is not None and saved.kind == kind, outcome.error
        assert outcome.session.last_snapshot == f"s-{number}"
        layers.append(
            SnapshotLayer(
                name=f"s-{number}",
                kind=saved.kind,
                format=saved.format,
                path=str(folder),
                digest=saved.digest,
                result_digest=saved.result_digest,
            )
        )

    async def sample(snapshot: str = "") -> sampling_service_pb2.SampleResponse:
        raw = await sampler.generate(sample_request(snapshot=snapshot, num_samples=2))
        return sampling_service_pb2.SampleResponse.FromString(raw)

    base_model = await sample()
    assert base_model.snapshot == "" and len(base_model.sequences) == 2
    assert np.frombuffer(base_model.sequences[0].token_ids, "<i4").shape == (4,)
    assert await sampler.apply(layers[:1], []) == ("s-0",)
    assert await sampler.apply(layers[:1], []) == ("s-0",)
    assert (await sample()).snapshot == "snapshots/s-0"
    assert PREPARE in (await sampler.describe()).capabilities
    for _ in range(2):
        await sampler.prepare(layers[1:])
        status = await sampler.describe()
        assert (status.active_snapshot, status.loaded_snapshots) == ("s-0", ("s-0",))
    assert (await sample()).snapshot == "snapshots/s-0"
    # A repeat is fine though the delta's parent is gone.
    for _ in range(2):
        assert await sampler.apply(layers[1:], []) == ("s-1",)
    newest = await sample()
    assert newest.snapshot == "snapshots/s-1"
    assert newest.sequences[0].sampling_logprobs != base_model.sequences[0].sampling_logprobs
    assert (await sampler.describe()).active_snapshot == "s-1"
    assert set(await sampler.apply(layers[:1], ["s-1"])) == {"s-0", "s-1"}
    assert (await sample("snapshots/s-1")).sequences == newest.sequences
    with pytest.raises(FiretitanError) as caught:
        await sample("snapshots/s-9")
    assert caught.value.reason is Reason.SNAPSHOT_NOT_ACTIVE


async def test_a_model_that_cannot_be_loaded(
    make_launcher: MakeLauncher, ends: list[Worker]
) -> None:
    spec = replace(TRAINER_SPEC, max_context_length=1 << 30)
    worker = await make_launcher().launch(spec)
    ends.append(worker)
    with pytest.raises(FiretitanError) as caught:
        await worker.load_model()
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    assert caught.value.field == "max_context_length"
    with pytest.raises(FiretitanError) as caught:
        await worker.open_session(SESSION)
    assert caught.value.reason is Reason.WORKER_UNAVAILABLE


async def test_a_new_daemon_finds_its_worker(
    trainer: Worker, write: CommandWriter, make_launcher: MakeLauncher
) -> None:
    await trainer.execute(write.forward_backward())
    step = write.optim_step()
    first = await trainer.execute(step)
    launcher = make_launcher()
    with pytest.raises(FiretitanError) as caught:
        await launcher.launch(TRAINER_SPEC)
    assert caught.value.reason is Reason.ALREADY_EXISTS
    await launcher.discard(TRAINER_SPEC)
    found = await launcher.adopt(TRAINER_SPEC)
    assert found is not None and found.pid == trainer.pid
    assert await found.execute(step) == first
    assert (await found.execute(write.forward_backward())).session.step == 1
    assert await launcher.adopt(replace(TRAINER_SPEC, base_model="another")) is None
    assert await launcher.adopt(replace(TRAINER_SPEC, worker_id="nobody")) is None


async def test_shutdown_ends_it_and_every_call(
    trainer: Worker, write: CommandWriter, make_launcher: MakeLauncher
) -> None:
    await trainer.shutdown()
    assert "code 0" in await trainer.exited()
    with pytest.raises(FiretitanError) as caught:
        await trainer.execute(write.forward_backward())
    assert caught.value.reason is Reason.WORKER_UNAVAILABLE
    launcher = make_launcher()
    assert await launcher.adopt(TRAINER_SPEC) is None
    await launcher.discard(TRAINER_SPEC)
