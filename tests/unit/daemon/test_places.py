"""Folders only their owner can enter, and sockets whose path fits."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from pathlib import Path

import pytest

from firetitan_daemon.places import (
    MAX_SOCKET_PATH,
    PlaceError,
    Places,
    check_socket,
    make_private,
    remove_stale_socket,
)


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_folders_are_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        places = Places(tmp_path / "above" / "home")
        places.make()
    finally:
        os.umask(before)
    for folder in (places.home, places.spool, places.store, places.workers, places.run):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not places.home.parent.stat().st_mode & 0o022


def test_a_folder_that_others_can_read_is_closed(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    make_private(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_a_folder_that_others_could_write_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(PlaceError, match=f"{tmp_path} can be written by others.*chmod 700"):
        make_private(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == mode
    tmp_path.chmod(0o700)


def test_another_users_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(PlaceError, match=f"belongs to user {tmp_path.stat().st_uid}"):
        make_private(tmp_path)


def test_a_file_system_without_modes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o755)
    monkeypatch.setattr(Path, "chmod", lambda *_: None)
    with pytest.raises(PlaceError, match="keeps no modes"):
        make_private(tmp_path)


@pytest.mark.parametrize("kind", ["file", "folder", "link", "dangling link", "pipe"])
def test_what_is_no_socket_is_not_removed(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "firetitan.sock"
    if kind == "file":
        place.write_text("mine")
    elif kind == "folder":
        place.mkdir()
    elif kind == "link":
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(tmp_path / "other.sock"))
        place.symlink_to(tmp_path / "other.sock")
    elif kind == "dangling link":
        place.symlink_to(tmp_path / "nothing")
    else:
        os.mkfifo(place)
    with pytest.raises(PlaceError, match="is no socket"):
        remove_stale_socket(place)
    assert os.path.lexists(place)
    with pytest.raises(PlaceError):
        check_socket(place)


def test_a_stale_socket_is_removed_and_an_open_one_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "firetitan.sock"
    remove_stale_socket(place)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(place))
    place.chmod(0o600)
    check_socket(place)
    place.chmod(0o660)
    with pytest.raises(PlaceError, match="0660"):
        check_socket(place)
    remove_stale_socket(place)
    assert not place.exists()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_no_folder_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "place"
    if kind == "file":
        place.write_text("")
    else:
        place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PlaceError, match="place"):
        make_private(place)


@pytest.mark.parametrize("length", [10, 66, 80, 200])
def test_every_socket_path_fits(length: int) -> None:
    places = Places(Path("/" + "h" * length))
    assert len(os.fsencode(places.socket)) <= MAX_SOCKET_PATH
    assert len(os.fsencode(places.run / ("w-" + 16 * "0" + ".sock"))) <= MAX_SOCKET_PATH


def test_two_long_homes_have_two_run_folders() -> None:
    assert Places(Path("/" + "h" * 100)).run != Places(Path("/" + "i" * 100)).run


def test_leaving_takes_away_an_empty_run_folder_outside_the_home(tmp_path: Path) -> None:
    long, short = Places(tmp_path / ("h" * 100)), Places(Path("/tmp") / tmp_path.name)
    long.make()
    (long.run / "w-1.sock").touch()
    long.leave()
    assert long.run.is_dir()
    (long.run / "w-1.sock").unlink()
    long.leave()
    assert not long.run.exists()
    short.make()
    short.leave()
    assert short.run.is_dir()
    shutil.rmtree(short.home)
