"""What the program says of a call that failed."""

from __future__ import annotations

import grpc
import pytest

from firetitan_daemon import cli


class Failed:
    """A call that ended UNAVAILABLE, answered by a daemon or by nobody."""

    def __init__(self, *answered: tuple[str, bytes]) -> None:
        self._metadata = answered

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "its worker is being replaced"

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return self._metadata


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (Failed(), cli.EXIT_SILENT, "does not answer"),
        (Failed(("grpc-status-details-bin", b"")), cli.EXIT_FAILED, "its worker is being replaced"),
    ],
)
def test_an_answer_is_told_and_silence_is_called_so(
    error: Failed, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli._refused(error)
    assert caught.value.code == code
    assert said in capsys.readouterr().err
