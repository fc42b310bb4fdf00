"""Stop strings end at the token that completes them, whatever the tokens' borders are."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from firetitan_daemon.engine.stops import StopStrings, eos_token_ids


def _bytes_decoder(pieces: dict[int, bytes]):
    def decode(ids: Sequence[int]) -> str:
        return b"".join(pieces[token] for token in ids).decode("utf-8", errors="replace")

    return decode


def _tokens(*parts: bytes) -> tuple[list[int], dict[int, bytes]]:
    pieces = dict(enumerate(parts))
    return list(pieces), pieces


def _first_stop(strings: list[str], prompt: list[bytes], parts: list[bytes]) -> int | None:
    ids, pieces = _tokens(*prompt, *parts)
    stops = StopStrings(strings, _bytes_decoder(pieces), ids[: len(prompt)])
    for index, token in enumerate(ids[len(prompt) :]):
        if stops.push(token):
            return index
    return None


@pytest.mark.parametrize(
    ("strings", "parts", "index"),
    [
        (["END"], [b"a", b"E", b"N", b"D", b"x"], 3),
        (["END"], [b"a", b"xENDy", b"z"], 1),
        (["\n\n"], [b"a\n", b"\nb"], 1),
        (["no", "lo w"], [b"hel", b"lo", b" w"], 2),
        (["zz"], [b"a", b"z", b"a", b"z"], None),
        (["a" * 40], [b"a"] * 45, 39),
        (["é!"], [b"caf\xc3", b"\xa9", b"!"], 2),
        (["é"], [b"caf\xc3", b"\xa9", b"!"], 1),
        (["stop"], [b"st", b"op\xf0\x9f", b"\x98\x80"], 1),
        (["\U0001f600."], [b"\xf0", b"\x9f", b"\x98", b"\x80", b".", b"x"], 4),
        (["ok"], [b"\xff"] * 12 + [b"o", b"k"], 13),
        (["ab"], [b"a", b"", b"", b"b"], 3),
    ],
)
def test_the_completing_token(strings: list[str], parts: list[bytes], index: int | None) -> None:
    assert _first_stop(strings, [b"p", b"q"], parts) == index


def test_a_match_that_starts_in_the_prompt_does_not_count() -> None:
    assert _first_stop(["END"], [b"x", b"E", b"N"], [b"D", b"END"]) == 1


def test_a_prompt_that_ends_inside_a_character() -> None:
    assert _first_stop(["é!"], [b"x", b"\xc3"], [b"\xa9", b"!"]) == 1


def test_long_sequences_keep_a_bounded_window() -> None:
    pieces = {0: b"word ", 1: b"ST", 2: b"OP"}
    stops = StopStrings(["STOP"], _bytes_decoder(pieces), [0])
    assert not any(stops.push(0) for _ in range(5000))
    assert len(stops._ids) < 100
    assert not stops.push(1)
    assert stops.push(2)


def test_leading_space_of_the_first_token_is_text() -> None:
    def decode(ids: Sequence[int]) -> str:
        return "".join([" the", " end"][token] for token in ids).removeprefix(" ")

    stops = StopStrings([" end"], decode, [0])
    assert stops.push(1)


def test_eos_ids_from_every_source() -> None:
    sources = (
        SimpleNamespace(eos_token_id=2),
        SimpleNamespace(eos_token_id=[2, 7]),
        SimpleNamespace(eos_token_id=None),
        None,
        object(),
    )
    assert eos_token_ids(*sources) == {2, 7}
