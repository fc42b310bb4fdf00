"""Which failed calls are made again."""

from __future__ import annotations

import grpc
import pytest

from firetitan_client.errors import FiretitanError
from firetitan_client.transport import Patience, Transport, run


class Ended(grpc.RpcError):
    """A call that ended with a code and no details of ours."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._code.name

    def trailing_metadata(self) -> tuple[()]:
        return ()


async def wait_after(code: grpc.StatusCode) -> None:
    await Patience(Transport("unix:/nobody/listens.sock"), patience_s=5).after(Ended(code))


def test_a_call_that_an_ending_daemon_cancelled_is_made_again() -> None:
    run(wait_after(grpc.StatusCode.CANCELLED)).result(5)


def test_what_another_try_would_not_change_is_raised() -> None:
    with pytest.raises(FiretitanError):
        run(wait_after(grpc.StatusCode.NOT_FOUND)).result(5)
