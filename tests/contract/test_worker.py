"""What every kind of worker promises the daemon: exactly once, in order, findable again."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
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

from firetitan_daemon import handshake
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.ports import Command, Outcome, SnapshotLayer, Worker, WorkerLauncher
from firetitan_daemon.core.records import LoraSettings
from firetitan_daemon.launch import convert
from firetitan_daemon.launch.bundle import Bundle
from firetitan_daemon.launch.in_process import InProcessLauncher
from firetitan_daemon.launch.local import LocalLauncher, start

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
def local(tmp_path: Path) -> LocalLauncher:
    return LocalLauncher(tmp_path / "workers", tmp_path / "run")


@pytest.fixture
def ends() -> list[Worker]:
    """Workers to end after the test."""
    return []


@pytest.fixture(autouse=True)
async def end_workers(ends: list[Worker]) -> AsyncIterator[None]:
    yield
    for worker in ends:
        await worker.shutdown()


@pytest.fixture
async def trainer(make_launcher: MakeLauncher, ends: list[Worker]) -> Worker:
    """A trainer with its session open."""
    worker = await make_launcher().launch(TRAINER_SPEC)
    ends.append(worker)
    await worker.load_model()
    await worker.open_session(SESSION)
    return worker


@pytest.fixture
def write(tmp_path: Path) -> CommandWriter:
    folder = tmp_path / "spool"
    folder.mkdir()
    return CommandWriter(folder)


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


async def test_death_by_kill_is_seen_and_told(
    local: LocalLauncher, write: CommandWriter, tmp_path: Path
) -> None:
    worker = await local.launch(TRAINER_SPEC)
    waiting = asyncio.create_task(worker.exited())
    os.kill(worker.pid, signal.SIGKILL)
    assert "killed by SIGKILL" in await asyncio.wait_for(waiting, 5)
    with pytest.raises(FiretitanError, match=r"(?s)killed by SIGKILL.*event=serving") as caught:
        await worker.describe()
    assert caught.value.reason is Reason.WORKER_UNAVAILABLE
    assert await local.adopt(TRAINER_SPEC) is None
    await local.discard(TRAINER_SPEC)
    left = [path.name for path in (tmp_path / "workers" / "trainer-1").iterdir()]
    assert left == [handshake.LOG] and list((tmp_path / "run").iterdir()) == []
    again = await local.launch(TRAINER_SPEC)
    await again.shutdown()


async def test_a_crash_in_native_code_leaves_its_stack_in_the_log(
    local: LocalLauncher, tmp_path: Path
) -> None:
    worker = await local.launch(TRAINER_SPEC)
    os.kill(worker.pid, signal.SIGSEGV)
    assert await asyncio.wait_for(worker.exited(), 10) == "killed by SIGSEGV"
    with pytest.raises(FiretitanError, match="Segmentation fault"):
        await worker.describe()


async def test_sigterm_ends_it_cleanly(local: LocalLauncher, tmp_path: Path) -> None:
    worker = await local.launch(TRAINER_SPEC)
    os.kill(worker.pid, signal.SIGTERM)
    assert await asyncio.wait_for(worker.exited(), 10) == "exited with code 0"
    word = json.loads((tmp_path / "workers" / "trainer-1" / handshake.EXIT).read_text())
    assert word["code"] == 0 and "SIGTERM" in word["cause"]


async def test_death_during_a_call_ends_the_call(
    local: LocalLauncher, write: CommandWriter, ends: list[Worker]
) -> None:
    worker = await local.launch(TRAINER_SPEC)
    ends.append(worker)
    await worker.load_model()
    await worker.open_session(SESSION)
    os.kill(worker.pid, signal.SIGSTOP)
    call = asyncio.create_task(worker.execute(write.forward_backward()))
    await asyncio.sleep(0.2)
    assert not call.done()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(FiretitanError) as caught:
        await asyncio.wait_for(call, 5)
    assert caught.value.reason is Reason.WORKER_UNAVAILABLE


async def test_a_start_that_fails_shows_the_log(
    local: LocalLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIRETITAN_LOG_LEVEL", "nonsense")
    with pytest.raises(FiretitanError, match="died at its start: exited with code 1") as caught:
        await local.launch(TRAINER_SPEC)
    assert caught.value.reason is Reason.WORKER_UNAVAILABLE
    assert "Unknown level: 'NONSENSE'" in caught.value.message
    await local.discard(TRAINER_SPEC)


async def test_the_worker_is_a_session_leader_with_a_scrubbed_environment(
    local: LocalLauncher, ends: list[Worker], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("HF_HOME", "/somewhere")
    worker = await local.launch(replace(TRAINER_SPEC, num_threads=3))
    ends.append(worker)
    proc = Path(f"/proc/{worker.pid}")
    variables = dict(
        entry.split("=", 1) for entry in (proc / "environ").read_text().split("\0") if entry
    )
    assert "AWS_SECRET_ACCESS_KEY" not in variables and variables["HF_HOME"] == "/somewhere"
    assert variables["OMP_NUM_THREADS"] == variables["MKL_NUM_THREADS"] == "3"
    assert variables["MALLOC_MMAP_MAX_"] == "0"
    assert os.getsid(worker.pid) == worker.pid
    assert "libtorch" not in (proc / "maps").read_text()
    (path,) = (tmp_path / "run").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(os.fsencode(path.name)) <= 24
    folder = tmp_path / "workers" / "trainer-1"
    assert folder.stat().st_mode & 0o077 == 0
    assert (folder / handshake.BOOTSTRAP).stat().st_mode & 0o077 == 0


async def test_a_worker_whose_launcher_died_right_after_exec_is_found(
    local: LocalLauncher, ends: list[Worker], tmp_path: Path
) -> None:
    bundle = Bundle(tmp_path / "workers", "trainer-1")
    lock = bundle.lock()
    assert lock is not None
    (tmp_path / "run").mkdir(mode=0o700)
    path = handshake.socket_path(tmp_path / "run", "trainer-1", "a" * 32)
    bundle.prepare(convert.spec_to_proto(TRAINER_SPEC, f"unix:{path}", "a" * 32))
    process = start(TRAINER_SPEC, bundle, lock)
    os.close(lock)
    assert not bundle.serves()
    with pytest.raises(FiretitanError) as caught:
        await local.launch(TRAINER_SPEC)
    assert caught.value.reason is Reason.ALREADY_EXISTS
    worker = await local.adopt(TRAINER_SPEC)
    assert worker is not None and worker.pid == process.pid
    ends.append(worker)


async def test_a_worker_of_the_protocol_before_is_adopted_an_older_one_is_not(
    local: LocalLauncher, ends: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await local.launch(TRAINER_SPEC)
    ends.append(worker)
    monkeypatch.setattr(handshake, "PROTOCOL_VERSION", 2)
    assert await local.adopt(TRAINER_SPEC) is not None
    monkeypatch.setattr(handshake, "OLDEST_PROTOCOL_VERSION", 2)
    assert await local.adopt(TRAINER_SPEC) is None


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process of this user that is nobody's worker."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    "forgery", ["pid", "start_ticks", "boot_id", "incarnation", "folder_mode", "link"]
)
async def test_a_forged_bundle_is_refused_and_nobody_is_hurt(
    forgery: str,
    local: LocalLauncher,
    ends: list[Worker],
    tmp_path: Path,
    bystander: subprocess.Popen[bytes],
) -> None:
    worker = await local.launch(TRAINER_SPEC)
    ends.append(worker)
    folder = tmp_path / "workers" / "trainer-1"
    bootstrap = folder / handshake.BOOTSTRAP
    word = json.loads(bootstrap.read_text())
    if forgery == "pid":
        word["pid"] = str(bystander.pid)
        word["startTicks"] = str(handshake.start_ticks(bystander.pid))
    elif forgery == "start_ticks":
        word["startTicks"] = str(int(word["startTicks"]) + 1)
    elif forgery == "boot_id":
        word["bootId"] = "00000000-0000-0000-0000-000000000000"
    elif forgery == "incarnation":
        word["incarnation"] = "f" * 32
    elif forgery == "folder_mode":
        folder.chmod(0o777)
    else:
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    bootstrap.write_text(json.dumps(word))
    assert await LocalLauncher(tmp_path / "workers", tmp_path / "run").adopt(TRAINER_SPEC) is None
    assert bystander.poll() is None
    assert (await worker.describe()).worker_id == "trainer-1"


async def test_a_foreign_listener_is_refused(
    local: LocalLauncher, ends: list[Worker], tmp_path: Path
) -> None:
    worker = await local.launch(TRAINER_SPEC)
    ends.append(worker)
    (path,) = (tmp_path / "run").iterdir()
    path.rename(tmp_path / "run" / "real")
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(path))
        foreign.listen()
        assert await local.adopt(TRAINER_SPEC) is None
    path.unlink()
    (tmp_path / "run" / "real").rename(path)


async def test_a_worker_that_does_not_answer_is_not_called_dead(
    local: LocalLauncher, ends: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firetitan_daemon.launch.remote.DESCRIBE_TIMEOUT_S", 0.5)
    worker = await local.launch(TRAINER_SPEC)
    ends.append(worker)
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        with pytest.raises(FiretitanError, match="lives but did not answer") as caught:
            await local.adopt(TRAINER_SPEC)
        assert caught.value.reason is Reason.WORKER_UNAVAILABLE
    finally:
        os.kill(worker.pid, signal.SIGCONT)
    assert (await worker.describe()).worker_id == "trainer-1"


@pytest.mark.parametrize("worker_id", ["", "..", "a/b", ".hidden", "x" * 129])
async def test_a_worker_id_is_a_plain_name(worker_id: str, local: LocalLauncher) -> None:
    with pytest.raises(FiretitanError) as caught:
        await local.launch(replace(TRAINER_SPEC, worker_id=worker_id))
    assert caught.value.reason is Reason.NAME_INVALID


async def test_a_run_folder_that_is_too_long_is_named(tmp_path: Path) -> None:
    launcher = LocalLauncher(tmp_path / "workers", tmp_path / ("r" * 100))
    with pytest.raises(FiretitanError, match="107 is the limit") as caught:
        await launcher.launch(TRAINER_SPEC)
    assert caught.value.field == "run"
