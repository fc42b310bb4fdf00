"""Workers found again though their socket is elsewhere, hard to reach or gone; none is doubled."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.commands import TRAINER_SPEC

from firetitan_daemon import handshake
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.worker_ports import Worker
from firetitan_daemon.launch.bundle import Bundle
from firetitan_daemon.launch.local import LocalLauncher

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def bystander(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of this user that is nobody's worker and listens on a socket."""
    code = (
        "import socket, sys, time; one = socket.socket(socket.AF_UNIX); one.bind(sys.argv[1]);"
        "one.listen(); print(flush=True); time.sleep(60)"
    )
    path = tmp_path / "bystander" / "w.sock"
    path.parent.mkdir(mode=0o700)
    process = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def bundle_file(tmp_path: Path, name: str) -> Path:
    return tmp_path / "workers" / TRAINER_SPEC.worker_id / name


async def refusal(launcher: LocalLauncher) -> str:
    """Why a live worker is to be asked for again."""
    with pytest.raises(FiretitanError) as caught:
        await launcher.adopt(TRAINER_SPEC)
    assert caught.value.reason is Reason.WORKER_UNAVAILABLE
    return caught.value.message


@pytest.mark.parametrize(
    "elsewhere", ["another temporary directory", "the home by another name", "a moved home"]
)
async def test_a_worker_is_found_wherever_its_socket_is(
    elsewhere: str, ends: list[Worker], tmp_path: Path
) -> None:
    home, run = tmp_path / "home", tmp_path / "home" / "run"
    home.mkdir(mode=0o700)
    worker = await LocalLauncher(home / "workers", run).launch(TRAINER_SPEC)
    ends.append(worker)
    told = Path(
        json.loads((home / "workers" / "trainer-1" / handshake.SPEC).read_text())["address"]
    )
    if elsewhere == "another temporary directory":
        run = tmp_path / "tmp"
    elif elsewhere == "the home by another name":
        link = tmp_path / ("a_long_name" * 10)  # no socket could be reached by it
        link.symlink_to(tmp_path)
        home, run = link / "home", link / "home" / "run"
    else:
        home = home.rename(tmp_path / "moved")
        run = home / "run"
    launcher = LocalLauncher(home / "workers", run)
    found = await launcher.adopt(TRAINER_SPEC)
    assert found is not None and found.pid == worker.pid
    await found.load_model()
    os.kill(found.pid, signal.SIGKILL)
    await found.exited()
    # What a crash leaves is removed where it is.
    left = (run if elsewhere == "a moved home" else tmp_path / "home" / "run") / told.name
    assert left.is_socket()
    await launcher.discard(TRAINER_SPEC)
    assert not left.exists()


async def test_what_a_newer_release_wrote_beside_is_passed_over(
    local: LocalLauncher, ends: list[Worker], tmp_path: Path
) -> None:
    worker = await local.launch(TRAINER_SPEC)
    ends.append(worker)
    for name in (handshake.SPEC, handshake.BOOTSTRAP):
        change(bundle_file(tmp_path, name), heldBack=True)
    found = await local.adopt(TRAINER_SPEC)
    assert found is not None and found.pid == worker.pid


@pytest.mark.parametrize(
    "forgery", ["another's socket", "a folder open to others", "abstract", "tcp", "no path", "long"]
)
async def test_a_forged_address_is_refused_and_nobody_is_hurt(
    forgery: str,
    local: LocalLauncher,
    ends: list[Worker],
    tmp_path: Path,
    bystander: subprocess.Popen[bytes],
) -> None:
    worker = await local.launch(TRAINER_SPEC)
    ends.append(worker)
    addresses = {
        "another's socket": f"unix:{tmp_path / 'bystander' / 'w.sock'}",
        "abstract": "unix-abstract:worker",
        "tcp": "127.0.0.1:1",
        "no path": "unix:w.sock",
        "long": "unix:/" + "x" * 200,
    }
    if forgery in addresses:
        change(bundle_file(tmp_path, handshake.SPEC), address=addresses[forgery])
    else:
        (tmp_path / "run").chmod(0o777)
    launcher = LocalLauncher(tmp_path / "workers", tmp_path / "run")
    assert await launcher.adopt(TRAINER_SPEC) is None
    # Nor is a forged address a way to have files removed.
    await launcher.discard(TRAINER_SPEC)
    assert (tmp_path / "bystander" / "w.sock").exists()
    assert bystander.poll() is None
    assert (await worker.describe()).worker_id == TRAINER_SPEC.worker_id


async def test_a_forged_address_removes_nothing(local: LocalLauncher, tmp_path: Path) -> None:
    worker = await local.launch(TRAINER_SPEC)
    await worker.shutdown()
    (tmp_path / "precious").write_text("mine")
    change(bundle_file(tmp_path, handshake.SPEC), address=f"unix:{tmp_path / 'precious'}")
    await local.discard(TRAINER_SPEC)
    assert (tmp_path / "precious").exists()


def of_connecting(number: int) -> Callable[..., Any]:
    def refused(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return refused


@pytest.mark.parametrize(
    "number", [errno.EAGAIN, errno.ETIMEDOUT, errno.EMFILE, errno.ENOMEM, errno.EACCES]
)
async def test_a_worker_that_cannot_be_connected_to_for_the_moment_is_asked_again(
    number: int,
    local: LocalLauncher,
    ends: list[Worker],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = await local.launch(TRAINER_SPEC)
    ends.append(worker)
    launcher = LocalLauncher(tmp_path / "workers", tmp_path / "run", lost_socket_s=0)
    with monkeypatch.context() as patch:
        patch.setattr(handshake, "socket_owner", of_connecting(number))
        for _ in range(2):
            assert os.strerror(number) in await refusal(launcher)
    found = await launcher.adopt(TRAINER_SPEC)
    assert found is not None and found.pid == worker.pid


async def test_a_full_queue_is_waited_for(
    local: LocalLauncher, ends: list[Worker], tmp_path: Path
) -> None:
    """By the kernel's word, not a stand-in's: who listens is too busy to accept."""
    worker = await local.launch(TRAINER_SPEC)
    ends.append(worker)
    (path,) = (tmp_path / "run").iterdir()
    path.rename(tmp_path / "run" / "real")
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as first:
        busy.bind(str(path))
        busy.listen(0)
        first.connect(str(path))
        assert os.strerror(errno.EAGAIN) in await refusal(local)
    path.unlink()
    (tmp_path / "run" / "real").rename(path)
    assert await local.adopt(TRAINER_SPEC) is not None


@pytest.mark.parametrize("name", [handshake.SPEC, handshake.BOOTSTRAP])
async def test_a_bundle_that_cannot_be_read_for_the_moment_is_looked_at_again(
    name: str,
    local: LocalLauncher,
    ends: list[Worker],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = await local.launch(TRAINER_SPEC)
    ends.append(worker)
    read = Path.read_text

    def read_text(path: Path, *arguments: Any, **options: Any) -> str:
        if path.name == name:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return read(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", read_text)
        assert os.strerror(errno.EMFILE) in await refusal(local)
    found = await local.adopt(TRAINER_SPEC)
    assert found is not None and found.pid == worker.pid


async def test_a_worker_that_hangs_at_its_start_is_not_called_dead(
    local: LocalLauncher, ends: list[Worker], tmp_path: Path
) -> None:
    worker = await local.launch(TRAINER_SPEC)
    ends.append(worker)
    bootstrap = bundle_file(tmp_path, handshake.BOOTSTRAP)
    written = bootstrap.read_text()
    bootstrap.unlink()
    launcher = LocalLauncher(tmp_path / "workers", tmp_path / "run", start_timeout_s=0.1)
    assert "does not serve yet" in await refusal(launcher)
    bootstrap.write_text(written)
    assert await launcher.adopt(TRAINER_SPEC) is not None


@pytest.mark.parametrize("then", ["reached", "busy"])
async def test_a_socket_that_comes_back_is_waited_for_each_time_anew(
    then: str,
    local: LocalLauncher,
    ends: list[Worker],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = await local.launch(TRAINER_SPEC)
    ends.append(worker)
    launcher = LocalLauncher(tmp_path / "workers", tmp_path / "run", lost_socket_s=0.5)
    for _ in range(2):
        (tmp_path / "run").rename(tmp_path / "away")
        assert "nobody listens" in await refusal(launcher)
        assert "nobody listens" in await refusal(launcher)
        (tmp_path / "away").rename(tmp_path / "run")
        with monkeypatch.context() as patch:
            if then == "busy":
                patch.setattr(handshake, "socket_owner", of_connecting(errno.EAGAIN))
                await refusal(launcher)
            else:
                assert await launcher.adopt(TRAINER_SPEC) is not None
        await asyncio.sleep(0.5)
    found = await launcher.adopt(TRAINER_SPEC)
    assert found is not None and found.pid == worker.pid


@pytest.mark.parametrize("how", ["deleted", "replaced by one that nobody listens on"])
async def test_a_worker_whose_socket_stays_gone_is_ended_and_can_be_replaced(
    how: str, local: LocalLauncher, ends: list[Worker], tmp_path: Path
) -> None:
    worker = await local.launch(TRAINER_SPEC)
    ends.append(worker)
    (path,) = (tmp_path / "run").iterdir()
    path.unlink()
    if how != "deleted":
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(path))
    launcher = LocalLauncher(tmp_path / "workers", tmp_path / "run", lost_socket_s=0.2)
    assert f"process {worker.pid}" in await refusal(launcher)
    assert Bundle(tmp_path / "workers", TRAINER_SPEC.worker_id).locked()
    await asyncio.sleep(0.2)
    assert await launcher.adopt(TRAINER_SPEC) is None
    assert "SIGKILL" in await worker.exited()
    await launcher.discard(TRAINER_SPEC)
    assert list((tmp_path / "run").iterdir()) == []
    again = await launcher.launch(TRAINER_SPEC)
    ends.append(again)


async def test_nobody_is_ended_on_the_word_of_a_forged_bundle(
    local: LocalLauncher,
    ends: list[Worker],
    tmp_path: Path,
    bystander: subprocess.Popen[bytes],
) -> None:
    worker = await local.launch(TRAINER_SPEC)
    ends.append(worker)
    change(
        bundle_file(tmp_path, handshake.BOOTSTRAP),
        pid=str(bystander.pid),
        startTicks=str(handshake.start_ticks(bystander.pid)),
    )
    for path in (tmp_path / "run").iterdir():
        path.unlink()
    launcher = LocalLauncher(tmp_path / "workers", tmp_path / "run", lost_socket_s=0)
    for _ in range(2):
        assert await launcher.adopt(TRAINER_SPEC) is None
    assert bystander.poll() is None
    assert (await worker.describe()).worker_id == TRAINER_SPEC.worker_id
