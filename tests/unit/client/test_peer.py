"""Who listens on a socket is asked of the kernel before anything is sent."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from firetitan_client import FireworksClient, Unauthenticated
from firetitan_client.peer import ForeignListenerError, check_listener


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "there.sock"))
        listener.listen()
        yield listener


def test_ones_own_listener_is_trusted(listener: socket.socket) -> None:
    check_listener(listener.getsockname())


def test_another_users_listener_is_sent_nothing(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = os.geteuid()
    if ours == 0:
        pytest.skip("root's listeners are trusted; tests/faults/test_other_users.py has another's")
    monkeypatch.setattr(os, "geteuid", lambda: ours + 1)
    with pytest.raises(ForeignListenerError, match=f"is of user {ours}, not of you"):
        check_listener(listener.getsockname())
    with pytest.raises(Unauthenticated, match=f"is of user {ours}"):
        FireworksClient(address=f"unix:{listener.getsockname()}").list_models()
    listener.setblocking(False)
    while True:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            break
        with connection:
            assert connection.recv(1) == b""


def test_nobody_there_is_no_other_user(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        check_listener(str(tmp_path / "nobody.sock"))
