"""Whose word is taken for where a daemon listens."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from firetitan_daemon import processes
from firetitan_daemon.places import Places
from firetitan_daemon.processes import find_daemon


@pytest.fixture
def places(tmp_path: Path) -> Places:
    found = Places(tmp_path / "home")
    found.make()
    (tmp_path / "other").mkdir(mode=0o700)
    return found


@contextmanager
def listening(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))
        one.listen()
        yield


def announce(places: Places, content: object) -> None:
    places.announcement.write_text(json.dumps(content))


def test_it_is_found_where_it_said(places: Places, tmp_path: Path) -> None:
    elsewhere = tmp_path / "other" / "d.sock"
    announce(places, {"address": f"unix:{elsewhere}", "pid": os.getpid()})
    with listening(elsewhere), listening(places.socket):
        found, pid = find_daemon(places)
    assert (found.socket, found.home, pid) == (elsewhere, places.home, os.getpid())


@pytest.mark.parametrize(
    "word",
    [
        None,
        [],
        {},
        {"address": 7},
        {"address": "unix:relative"},
        {"address": "127.0.0.1:7465"},
        {"address": "unix:/" + "x" * 200},
        {"address": "unix:/a\0b"},
        {"address": "unix:/nowhere/d.sock"},
    ],
)
def test_a_word_that_leads_nowhere_is_passed_over(places: Places, word: object) -> None:
    announce(places, word)
    assert find_daemon(places) == (places, None)
    with listening(places.socket):
        assert find_daemon(places) == (places, os.getpid())


def test_another_users_listener_is_passed_over(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "other" / "d.sock"
    announce(places, {"address": f"unix:{elsewhere}", "pid": 7})
    with listening(elsewhere), listening(places.socket):
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert find_daemon(places) == (places, os.getpid())
        monkeypatch.undo()
        monkeypatch.setattr(processes, "socket_owner", lambda *_: (7, os.geteuid() + 1))
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        assert find_daemon(places)[0].socket == elsewhere  # root may look at anyone's
