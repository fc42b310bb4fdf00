from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from firetitan_daemon.store.lock import StateLock, StateOwned

HOLD = (
    "import sys, time; from pathlib import Path;"
    " from firetitan_daemon.store.lock import StateLock;"
    " lock = StateLock(Path(sys.argv[1]));"
    " import subprocess; subprocess.Popen(['sleep', '20'], start_new_session=True,"
    " close_fds=False, stdout=subprocess.DEVNULL) if sys.argv[2:] else 0;"
    " print('held', flush=True); time.sleep(20)"
)


def hold(path: Path, *extra: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(path), *extra]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    return owner


def end(owner: subprocess.Popen[str]) -> None:
    owner.kill()
    owner.wait()
    assert owner.stdout is not None
    owner.stdout.close()


@pytest.mark.timeout(20)
def test_the_owner_is_named_until_it_dies(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("999999999\n")
    owner = hold(path)
    try:
        with pytest.raises(StateOwned, match=f"process {owner.pid};") as caught:
            StateLock(path)
        assert caught.value.pid == owner.pid
        # As between taking the lock and writing the pid: the one before is not named.
        path.write_text("999999999\n")
        with pytest.raises(StateOwned, match="another process;") as caught:
            StateLock(path)
        assert caught.value.pid is None
    finally:
        end(owner)
    with StateLock(path):
        assert path.read_text() == f"{os.getpid()}\n"


@pytest.mark.timeout(20)
def test_a_child_does_not_keep_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    owner = hold(path, "child")
    children = Path(f"/proc/{owner.pid}/task/{owner.pid}/children").read_text().split()
    end(owner)
    try:
        StateLock(path).release()
    finally:
        for child in children:
            os.kill(int(child), signal.SIGKILL)


def test_one_process_holds_it_once(tmp_path: Path) -> None:
    lock = StateLock(tmp_path / "lock")
    with pytest.raises(StateOwned) as caught:
        StateLock(tmp_path / "lock")
    assert caught.value.pid == os.getpid()
    lock.release()
    lock.release()
    StateLock(tmp_path / "lock").release()
