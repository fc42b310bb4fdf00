"""Starts that the disk or the system refuses: how they are told, what is left of them."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import TRAINER_SPEC

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.launch.bundle import Bundle
from firetitan_daemon.launch.local import LocalLauncher

DISK = {
    errno.ENOSPC: Reason.STATE_DISK_FULL,
    errno.EDQUOT: Reason.STATE_DISK_FULL,
    errno.EROFS: Reason.STATE_NOT_WRITABLE,
    errno.EIO: Reason.STATE_NOT_WRITABLE,
}
SYSTEM = dict.fromkeys(
    [errno.EMFILE, errno.ENOMEM, errno.EAGAIN, errno.EACCES, errno.EPERM],
    Reason.WORKER_UNAVAILABLE,
)
PLACES = [(durable, "make_folder"), (durable, "publish_file"), (Path, "open"), (os, "open")]
STARTS = [(subprocess, "Popen"), (os, "pidfd_open")]


def refuse(number: int) -> Callable[..., Any]:
    def refused(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return refused


@pytest.fixture
def local(tmp_path: Path) -> LocalLauncher:
    (tmp_path / "workers").mkdir(mode=0o700)  # as a daemon has it
    return LocalLauncher(tmp_path / "workers", tmp_path / "run")


@pytest.mark.parametrize(
    ("place", "number", "reason"),
    [(place, *one) for place in PLACES for one in DISK.items()]
    + [(place, *one) for place in STARTS for one in SYSTEM.items()],
)
async def test_a_start_that_is_refused_is_told_and_leaves_nothing(
    local: LocalLauncher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: tuple[Any, str],
    number: int,
    reason: Reason,
) -> None:
    children: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def started(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        children.append(popen(*arguments, **options))
        return children[-1]

    monkeypatch.setattr(subprocess, "Popen", started)
    with monkeypatch.context() as patch:
        patch.setattr(*place, refuse(number))
        with pytest.raises(FiretitanError) as caught:
            await local.launch(TRAINER_SPEC)
    assert caught.value.reason is reason
    assert all(child.poll() is not None for child in children)
    assert await local.adopt(TRAINER_SPEC) is None
    await local.discard(TRAINER_SPEC)
    assert list((tmp_path / "workers").iterdir()) == []


async def test_a_run_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to("/proc/1/nothing")
    local = LocalLauncher(tmp_path / "workers", tmp_path / "run" / "below")
    with pytest.raises(FiretitanError) as caught:
        await local.launch(TRAINER_SPEC)
    assert caught.value.reason in (Reason.STATE_NOT_WRITABLE, Reason.WORKER_UNAVAILABLE)
    assert str(tmp_path / "run") in caught.value.message
    assert str(tmp_path / "workers") not in caught.value.message


@pytest.mark.parametrize("away", ["workers", "run"])
async def test_a_home_that_is_away_is_waited_for_and_not_made_anew(
    tmp_path: Path, away: str
) -> None:
    home, there = tmp_path / "home", tmp_path / "there"
    there.mkdir(mode=0o700)
    places = {"workers": there / "workers", "run": there / "run", away: home / away}
    with pytest.raises(FiretitanError) as caught:
        await LocalLauncher(places["workers"], places["run"]).launch(TRAINER_SPEC)
    assert caught.value.reason is Reason.STATE_NOT_WRITABLE
    assert str(home) in caught.value.message and not home.exists()


async def test_what_cannot_be_removed_is_told(
    local: LocalLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = Bundle(tmp_path / "workers", TRAINER_SPEC.worker_id).lock()
    assert lock is not None
    os.close(lock)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse(errno.EROFS))
        with pytest.raises(FiretitanError) as caught:
            await local.discard(TRAINER_SPEC)
    assert caught.value.reason is Reason.STATE_NOT_WRITABLE


async def test_a_worker_that_cannot_be_looked_for_is_not_called_dead(
    local: LocalLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = Bundle(tmp_path / "workers", TRAINER_SPEC.worker_id).lock()
    assert lock is not None
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse(errno.EMFILE))
        with pytest.raises(FiretitanError) as caught:
            await local.adopt(TRAINER_SPEC)
    assert caught.value.reason is Reason.WORKER_UNAVAILABLE
    os.close(lock)


async def test_a_folder_that_cannot_be_written_can_be_asked_for_its_worker(
    local: LocalLauncher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle(tmp_path / "workers", TRAINER_SPEC.worker_id)
    lock = bundle.lock()
    assert lock is not None
    opened = os.open

    def read_only(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            refuse(errno.EROFS)()
        return opened(path, flags, mode)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        assert bundle.locked()
        os.close(lock)
        assert not bundle.locked()
