from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firetitan_daemon.core import names
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.records import Checkpoint

GOOD = ["a", "7", "train_state_step_100", "step-4", "Qwen3.5", "a..b", "x" * 128]
BAD = ["", ".", "..", "-a", "_a", ".a", "a b", "a/b", "a\n", "a\0", "\u00e4", "a\u0660", "x" * 129]
SESSION = "trainers/t/sessions/s"


def refused(call: Callable[..., object], *args: object, **kwargs: object) -> FiretitanError:
    with pytest.raises(FiretitanError) as caught:
        call(*args, **kwargs)
    assert caught.value.reason == Reason.NAME_INVALID
    return caught.value


@pytest.mark.parametrize("value", GOOD)
def test_good_ids(value: str) -> None:
    assert names.check_id(value, "trainer_id") == value


@pytest.mark.parametrize("value", BAD)
def test_bad_ids_name_field_value_and_rule(value: str) -> None:
    error = refused(names.check_id, value, "trainer_id")
    assert error.field == "trainer_id"
    assert error.message.startswith("trainer_id: ")
    assert repr(value)[:100] in error.message
    assert "1 to 128 characters" in error.message


@given(st.text("aZ09._-", min_size=1, max_size=20).filter(lambda text: text[0].isalnum()))
def test_names_are_taken_apart_as_they_were_put_together(one: str) -> None:
    assert names.parse_trainer(names.trainer_name(one)) == one
    assert names.parse_deployment(names.deployment_name(one)) == one
    assert names.parse_operation(names.operation_name(one)) == one
    assert names.parse_snapshot(names.snapshot_name(one)) == one
    session = names.session_name("t", one)
    assert names.parse_session(session).name == session
    assert names.parse_checkpoint(names.checkpoint_name(session, one)).name == (
        f"trainers/t/sessions/{one}/checkpoints/{one}"
    )


def test_the_last_segment_alone_where_it_is_allowed() -> None:
    assert names.parse_trainer("t") == "t"
    refused(names.parse_trainer, "t", bare=False)
    refused(names.parse_trainer, "deployments/t")
    refused(names.parse_trainer, "trainers/")
    refused(names.parse_trainer, "trainers/a/b")
    refused(names.parse_session, "s")


@pytest.mark.parametrize(
    "name",
    ["trainers/t", "trainers/t/sessions", "trainers/t/sessions/", "trainers/t/sessions/..",
     "trainers/t/sessions/s/", "/trainers/t/sessions/s", "trainers//sessions/s",
     "sessions/t/trainers/s", SESSION + "/checkpoints/c"],
)  # fmt: skip
def test_bad_session_names(name: str) -> None:
    error = refused(names.parse_session, name, "session")
    assert "expected trainers/{trainer}/sessions/{session}" in error.message


def test_a_parent_is_a_trainer_or_a_session() -> None:
    assert names.parse_parent("trainers/t") == ("t", None)
    assert names.parse_parent(SESSION) == ("t", SESSION)
    refused(names.parse_parent, "t")


def test_snapshot_references() -> None:
    for text in ("x-0badcafe", "snapshots/x-0badcafe", "tinker://run-1/sampler_weights/x-0badcafe"):
        assert names.parse_snapshot(text) == "x-0badcafe"
    for text in ("tinker://run/weights/x", "tinker:///sampler_weights/x", "gs://a/b", "a/b",
                 "tinker://r/sampler_weights/", "tinker://r/sampler_weights/..",
                 "snapshots/.."):  # fmt: skip
        refused(names.parse_snapshot, text)


def test_a_taken_snapshot_name_is_counted_up() -> None:
    taken = {"a-0badcafe", "a.2-0badcafe"}
    assert names.choose_snapshot_id("b", "0badcafe", taken.__contains__) == "b-0badcafe"
    assert names.choose_snapshot_id("a", "0badcafe", taken.__contains__) == "a.3-0badcafe"
    assert names.choose_snapshot_id("a", "1badcafe", taken.__contains__) == "a-1badcafe"
    longest = names.choose_snapshot_id("x" * 119, "0badcafe", taken.__contains__)
    assert len(longest) == 128
    error = refused(names.choose_snapshot_id, "x" * 120, "0badcafe", taken.__contains__)
    assert "at most 119 characters" in error.message
    refused(names.choose_snapshot_id, "..", "0badcafe", taken.__contains__)


@pytest.mark.parametrize(
    ("text", "checkpoint", "trainer", "session"),
    [
        ("step-4", "step-4", None, None),
        ("  train_state_step_100 ", "train_state_step_100", None, None),
        ("cross_job://job-1/step-4", "step-4", "job-1", None),
        (SESSION + "/checkpoints/step-4", "step-4", "t", SESSION),
    ],
)
def test_checkpoint_references(
    text: str, checkpoint: str, trainer: str | None, session: str | None
) -> None:
    found = names.parse_checkpoint_reference(text)
    assert (found.checkpoint, found.trainer, found.session) == (checkpoint, trainer, session)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "checkpoint path cannot be empty"),
        ("  ", "checkpoint path cannot be empty"),
        ("a\0b", "checkpoint path contains invalid characters"),
        ("a\\b", "checkpoint path contains invalid characters"),
        ("..", "checkpoint path contains empty or traversal segments"),
        ("a/../b", "checkpoint path contains empty or traversal segments"),
        ("a//b", "checkpoint path contains empty or traversal segments"),
        ("a/", "checkpoint path contains empty or traversal segments"),
        ("cross_job://../x", "checkpoint path contains empty or traversal segments"),
        ("-a", "checkpoint path segment '-a' is not valid"),
        ("/etc/passwd", "must be a logical name or opaque cross_job:// reference"),
        ("~/x", "must be a logical name or opaque cross_job:// reference"),
        ("gs://bucket/x", "must be a logical name or opaque cross_job:// reference"),
        ("file:///x", "must be a logical name or opaque cross_job:// reference"),
        ("cross_job://a", "Expected 'cross_job://<source_job_id>/<checkpoint_name>'"),
        ("cross_job:///a", "Expected 'cross_job://<source_job_id>/<checkpoint_name>'"),
        ("cross_job://a/b/c", "Expected 'cross_job://<source_job_id>/<checkpoint_name>'"),
        ("cross_job://a/b c", "checkpoint path segment 'b c' is not valid"),
        ("snapshots/x-0badcafe", "is a snapshot for serving"),
        ("trainers/t/checkpoints/c", "expected trainers/{trainer}/sessions/{session}/checkpoints"),
    ],
)
def test_refused_checkpoint_references(text: str, why: str) -> None:
    error = refused(names.parse_checkpoint_reference, text, "checkpoint")
    assert why in error.message
    assert error.field == "checkpoint"


@given(st.text())
def test_no_text_breaks_the_parsers(text: str) -> None:
    for parse in (names.parse_checkpoint_reference, names.parse_snapshot, names.parse_session,
                  names.parse_checkpoint, names.parse_parent, names.parse_trainer):  # fmt: skip
        try:
            parse(text)
        except FiretitanError as error:
            assert error.reason == Reason.NAME_INVALID
            assert len(error.message) < 1000


def row(session: str, checkpoint: str, time: float) -> Checkpoint:
    name = names.checkpoint_name(session, checkpoint)
    return Checkpoint(name, session, "base", 8, 1, 1, "f", "d", 1, time)


def test_the_sessions_own_checkpoint_comes_first() -> None:
    other = "trainers/t/sessions/u"
    rows = [row(SESSION, "a", 1.0), row(other, "a", 2.0), row(other, "b", 1.0)]
    pick = names.pick_checkpoint
    reference = names.parse_checkpoint_reference
    assert pick(reference("a"), SESSION, rows) == rows[0]
    assert pick(reference("a"), "trainers/t/sessions/new", rows) == rows[1]
    assert pick(reference("b"), SESSION, rows) == rows[2]
    assert pick(reference(rows[1].name), SESSION, rows) == rows[1]
    with pytest.raises(FiretitanError, match="trainers/t has a, b; nothing was loaded") as caught:
        pick(reference("c"), SESSION, rows)
    assert caught.value.reason == Reason.CHECKPOINT_NOT_FOUND
    with pytest.raises(FiretitanError, match="no checkpoint at all"):
        pick(reference("cross_job://x/c"), SESSION, [])


def test_numbers_sort_as_numbers() -> None:
    sorted_names = ["1", "a", "step-2", "step-02x", "step-2x", "step-10", "step-10-b", "step-a"]
    shuffled = sorted(sorted_names)
    assert sorted(shuffled, key=names.natural_key) == sorted_names


@given(st.text("a10-."), st.text("a10-."))
def test_any_two_names_can_be_ordered(one: str, other: str) -> None:
    less = names.natural_key(one) < names.natural_key(other)
    more = names.natural_key(one) > names.natural_key(other)
    assert less + more == (one != other)
