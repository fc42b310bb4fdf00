"""Workers as processes: how they start, end, are found again, and whom a bundle may not name."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.commands import SESSION, TRAINER_SPEC, CommandWriter
from support.stopping import stopped

from firetitan_daemon import handshake
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.worker_ports import Worker
from firetitan_daemon.launch import convert
from firetitan_daemon.launch.bundle import Bundle
from firetitan_daemon.launch.local import LocalLauncher, start

pytestmark = pytest.mark.timeout(60)


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


async def test_a_connection_that_is_closed_ends_calls_and_cancels_no_caller(
    local: LocalLauncher,
) -> None:
    worker = await local.launch(TRAINER_SPEC)
    with stopped(worker.pid):
        call = asyncio.create_task(worker.load_model())
        await asyncio.sleep(0.2)
        await worker.close()
        with pytest.raises(FiretitanError) as caught:
            await asyncio.wait_for(call, 5)
        assert caught.value.reason is Reason.WORKER_UNAVAILABLE
    found = await local.adopt(TRAINER_SPEC)
    assert found is not None
    await found.shutdown()


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
    with bundle.log.open("ab") as log:
        process = start(TRAINER_SPEC, bundle, lock, log)
    os.close(lock)
    assert not bundle.serves()
    with pytest.raises(FiretitanError) as caught:
        await local.launch(TRAINER_SPEC)
    assert caught.value.reason is Reason.ALREADY_EXISTS
    worker = await local.adopt(TRAINER_SPEC)
    assert worker is not None and worker.pid == process.pid
    ends.append(worker)


@pytest.mark.parametrize("ahead", [-2, -1, 0, 1])
async def test_a_worker_of_this_protocol_or_the_one_before_is_adopted_another_is_left_alone(
    ahead: int, local: LocalLauncher, ends: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await local.launch(TRAINER_SPEC)
    ends.append(worker)
    spoken = handshake.PROTOCOL_VERSION
    monkeypatch.setattr(handshake, "PROTOCOL_VERSION", spoken - ahead)
    monkeypatch.setattr(handshake, "OLDEST_PROTOCOL_VERSION", spoken - ahead - 1)
    if ahead in (-1, 0):
        assert await local.adopt(TRAINER_SPEC) is not None
        return
    with pytest.raises(FiretitanError, match=f"speaks worker protocol {spoken}") as caught:
        await local.adopt(TRAINER_SPEC)
    assert caught.value.reason is Reason.UNSUPPORTED
    assert (await worker.describe()).worker_id == "trainer-1"


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
    worker = await local.launch(TRAINER_SPEC)
    ends.append(worker)
    with (
        stopped(worker.pid),
        monkeypatch.context() as impatient,
        pytest.raises(FiretitanError, match="lives but did not answer") as caught,
    ):
        impatient.setattr("firetitan_daemon.launch.remote.DESCRIBE_TIMEOUT_S", 0.5)
        await local.adopt(TRAINER_SPEC)
    assert caught.value.reason is Reason.WORKER_UNAVAILABLE
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


async def test_attempts_to_adopt_a_worker_that_does_not_answer_leave_nothing_open(
    local: LocalLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await local.launch(TRAINER_SPEC)

    async def silent(worker: Worker, incarnation: str) -> None:
        raise FiretitanError(Reason.WORKER_UNAVAILABLE, "does not answer")

    monkeypatch.setattr(local, "_check_answer", silent)

    def pidfds() -> int:
        links = [str(one.readlink()) for one in Path("/proc/self/fd").iterdir() if one.is_symlink()]
        return sum("pidfd" in link for link in links)

    before = pidfds()
    for _ in range(3):
        with pytest.raises(FiretitanError):
            await local.adopt(TRAINER_SPEC)
    assert pidfds() == before
    await worker.shutdown()
