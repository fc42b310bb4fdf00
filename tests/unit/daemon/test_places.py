"""Folders only their owner can enter, and sockets whose path fits."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from firetitan_daemon.places import MAX_SOCKET_PATH, PlaceError, Places, make_private


def test_folders_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        places = Places(tmp_path / "home")
        places.make()
    finally:
        os.umask(before)
    for folder in (places.home, places.spool, places.store, places.workers, places.run):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_an_open_folder_is_closed(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    make_private(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


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
