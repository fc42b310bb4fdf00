"""R25: another user of the machine neither reaches the daemon nor stands in for it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemon import DaemonProcess
from support.stubs import LaneClient, Stubs

from firetitan_client import FireworksClient, Unauthenticated
from firetitan_daemon.places import PlaceError, Places

pytestmark = pytest.mark.timeout(120)

OTHER = 65534
PYTHON = shutil.which("python3", path="/usr/bin:/bin:/usr/local/bin") or sys.executable
"""One that another user may start; the project's own may be in a home."""

TRY = """
import json, os, socket, sys
told = {}
for path in sys.argv[1:]:
    try:
        if path.endswith(".sock"):
            with socket.socket(socket.AF_UNIX) as one:
                one.connect(path)
        elif path.endswith("/"):
            os.listdir(path)
        else:
            open(path, "rb").close()
        told[path] = "done"
    except OSError as error:
        told[path] = type(error).__name__
print(json.dumps(told))
"""
LISTEN = """
import os, socket, sys
with socket.socket(socket.AF_UNIX) as one:
    one.bind(sys.argv[1])
    os.chmod(sys.argv[1], 0o777)
    one.listen()
    print("listening", flush=True)
    while True:
        caller, _ = one.accept()
        caller.settimeout(2)
        received = b""
        try:
            caller.sendall(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))  # as a gRPC server begins
            while data := caller.recv(1000):
                received += data
        except OSError:
            pass
        print(received.hex() or "nothing", flush=True)
        caller.close()
"""


def as_other(script: str, *arguments: str) -> list[str]:
    return [PYTHON, "-I", "-c", script, *arguments]


def run_as_other(*paths: str) -> dict[str, str]:
    done = subprocess.run(
        as_other(TRY, *paths),
        user=OTHER,
        group=OTHER,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    told: dict[str, str] = json.loads(done.stdout)
    return told


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody can enter and write in; pytest's own are closed to others."""
    if os.geteuid() != 0:
        pytest.skip("becoming another user needs root")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o777)
    try:
        if subprocess.run([PYTHON, "-I", "-c", ""], user=OTHER, cwd="/", check=False).returncode:
            pytest.skip(f"user {OTHER} cannot start {PYTHON}")
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_they_cannot_connect_and_cannot_read(open_folder: Path, umask: int) -> None:
    daemon = DaemonProcess(open_folder / "home", {"FIRETITAN_TCP_ADDRESS": "127.0.0.1:0"})
    before = os.umask(umask)
    try:
        daemon.launch()
    finally:
        os.umask(before)
    try:
        stubs = Stubs(daemon.until_serving())
        stubs.create_trainer()
        lane = LaneClient(stubs, stubs.session())
        lane.step()
        stubs.done(lane.save_state("kept"))
        stubs.channel.close()
        places = Places(daemon.home)
        folders = [places.home, places.run, places.store, places.spool, places.workers]
        folders.append(places.credentials)
        sockets = list(places.run.glob("*.sock"))
        assert len(sockets) == 2
        for path in [*folders, *sockets]:
            assert not stat.S_IMODE(path.lstat().st_mode) & 0o077, path
        kept = [one for one in (*places.home.rglob("*"), places.ca_key) if one.is_file()]
        assert any("kept" in str(one) for one in kept)
        tried = [*map(str, sockets), *(f"{one}/" for one in folders), *map(str, kept)]
        assert set(run_as_other(*tried).values()) == {"PermissionError"}
        # The same with the modes opened: what was refused is what they keep out.
        for folder in folders:
            folder.chmod(0o755)
        sockets[0].chmod(0o666)
        reached = run_as_other(str(sockets[0]), f"{places.store}/")
        assert set(reached.values()) == {"done"}
        for folder in folders:
            folder.chmod(0o700)
    finally:
        daemon.stop()


def serve(home: Path) -> str:
    """What a daemon says that must not start."""
    served = subprocess.run(
        [sys.executable, "-m", "firetitan_daemon", "serve", "--tcp", "127.0.0.1:0"],
        env={**os.environ, "FIRETITAN_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert served.returncode == 1, served
    assert "Traceback" not in served.stderr
    return served.stderr


def test_what_they_planted_is_refused_at_the_start(open_folder: Path) -> None:
    def refusal(home: Path) -> str:
        with pytest.raises(PlaceError) as refused:
            Places(home).make()
        return str(refused.value)

    theirs, link, file = (open_folder / name for name in ("theirs", "link", "file"))
    theirs.mkdir(mode=0o700)
    link.symlink_to(theirs)
    file.touch()
    for one in (theirs, link, file):
        os.chown(one, OTHER, OTHER, follow_symlinks=False)
    assert f"{theirs} belongs to user {OTHER}" in refusal(theirs)
    assert f"{theirs} belongs to user {OTHER}" in serve(theirs)
    assert f"{link} is not a folder (or a link to one)" in refusal(link)
    assert f"{file} is not a folder" in refusal(file)
    assert f"{file / 'home'} cannot be used" in refusal(file / "home")
    # Sockets of a home with a long path are in the temporary directory, where anyone may be first.
    long = Places(open_folder / ("h" * 100))
    for plant in (long.run.mkdir, lambda: long.run.symlink_to(theirs)):
        plant()
        os.chown(long.run, OTHER, OTHER, follow_symlinks=False)
        assert str(long.run) in refusal(long.home)
        long.run.unlink() if long.run.is_symlink() else long.run.rmdir()
    # In a home that others could write once.
    for name in ("run", "store", "spool", "workers"):
        home = open_folder / f"home-{name}"
        home.mkdir(mode=0o700)
        (home / name).symlink_to(theirs)
        assert f"{home / name} is not a folder" in refusal(home)
    places = Places(open_folder / "home")
    places.make()
    places.socket.symlink_to(theirs)
    assert f"{places.socket} is there and is no socket" in serve(places.home)
    assert places.socket.is_symlink()
    places.socket.unlink()
    shutil.rmtree(places.credentials)
    places.credentials.symlink_to(theirs)
    assert f"{places.credentials} is not a folder" in serve(places.home)


def listen(path: Path, user: int) -> subprocess.Popen[str]:
    started = subprocess.Popen(
        as_other(LISTEN, str(path)),
        user=user,
        group=user,
        extra_groups=[],
        cwd="/",
        stdout=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None and started.stdout.readline() == "listening\n"
    return started


def end(started: subprocess.Popen[str], path: Path) -> list[str]:
    """What each caller before this one had said to it."""
    assert started.stdout is not None
    received = []
    try:
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(path))
            last.sendall(b"last")
            last.shutdown(socket.SHUT_WR)
            while (said := started.stdout.readline().strip()) != b"last".hex():
                assert said, "the listener is gone"
                received.append(said)
    finally:
        started.kill()
        started.communicate()
    return received


def call(client: FireworksClient) -> Any:
    return client.list_models()


def test_a_listener_of_theirs_is_told_nothing(open_folder: Path) -> None:
    address = open_folder / "address.sock"
    listener = listen(address, OTHER)
    try:
        for _ in range(2):
            with pytest.raises(Unauthenticated, match=f"is of user {OTHER}, not of you"):
                call(FireworksClient(address=f"unix:{address}"))
    finally:
        received = end(listener, address)
    assert received and set(received) == {"nothing"}


def test_a_listener_in_the_place_of_a_dead_daemon_is_told_nothing(open_folder: Path) -> None:
    daemon = DaemonProcess(open_folder / "home")
    daemon.start()
    address = open_folder / "address.sock"
    address.symlink_to(daemon.address.removeprefix("unix:"))
    client = FireworksClient(address=f"unix:{address}")
    try:
        assert call(client) == []
        daemon.kill()
        address.unlink()
        listener = listen(address, OTHER)
        began = time.monotonic()
        try:
            with pytest.raises(Unauthenticated, match=f"is of user {OTHER}, not of you"):
                call(client)
        finally:
            received = end(listener, address)
        assert time.monotonic() - began < 5.0
        assert set(received) == {"nothing"}, received
    finally:
        daemon.stop()
