"""The steps of a close(): all of them, once, in order, whatever fails or interrupts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest

from firetitan_client.closing import Closing


def step(done: list[str], name: str, *errors: BaseException) -> tuple[str, Callable[[], None]]:
    """A step that raises its errors, one a try, then works."""
    left = list(errors)

    def run() -> None:
        if left:
            raise left.pop(0)
        done.append(name)

    return name, run


def test_each_step_is_done_once() -> None:
    done: list[str] = []
    closing = Closing("close")
    closing.run(step(done, "a"), step(done, "b"))
    closing.run(step(done, "a"), step(done, "b"))
    assert done == ["a", "b"]


def test_the_first_error_is_raised_and_the_others_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    done: list[str] = []
    failing = step(done, "b", ValueError("first")), step(done, "c", ValueError("second"))
    with pytest.raises(ValueError, match="first"):
        Closing("close").run(step(done, "a"), *failing, step(done, "d"))
    assert done == ["a", "d"]
    assert [record.getMessage() for record in caplog.records] == ["close: second"]


def test_ctrl_c_ends_a_wait_and_not_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        Closing("close").run(step(done, "calls", KeyboardInterrupt()), step(done, "clean-up"))
    assert done == ["clean-up"]
    assert "no longer waiting for: calls" in caplog.text


def test_a_second_ctrl_c_says_what_is_left_and_another_close_does_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    done: list[str] = []
    closing = Closing("close")
    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        closing.run(
            step(done, "calls", KeyboardInterrupt()),
            step(done, "clean-up", KeyboardInterrupt()),
            step(done, "lease"),
        )
    assert done == []
    assert "not finished: clean-up, lease" in caplog.text
    closing.run()
    assert done == ["clean-up", "lease"]


def test_a_thread_that_closes_meanwhile_waits_and_repeats_nothing() -> None:
    done: list[str] = []
    closing = Closing("close")
    began, other_came = threading.Event(), threading.Event()

    def slow() -> None:
        began.set()
        other_came.wait(10)
        done.append("calls")

    def close_too() -> None:
        began.wait(10)
        other_came.set()
        closing.run()
        done.append("the other returned")

    other = threading.Thread(target=close_too)
    other.start()
    closing.run(("calls", slow), step(done, "clean-up"))
    other.join(10)
    assert done == ["calls", "clean-up", "the other returned"]


def test_a_signal_that_closes_waits_for_the_interrupted_step_again() -> None:
    done: list[str] = []
    closing = Closing("close")

    def interrupted() -> None:
        done.append("calls")
        if len(done) == 1:
            closing.run()

    closing.run(("calls", interrupted), step(done, "clean-up"))
    assert done == ["calls", "calls", "clean-up"]


def test_who_may_not_wait_leaves_it_to_the_thread_that_is_at_it() -> None:
    done: list[str] = []
    closing = Closing("close")
    began, other_left = threading.Event(), threading.Event()

    def waits_for_the_other() -> None:
        began.set()
        assert other_left.wait(10)
        done.append("calls")

    def close_too() -> None:
        began.wait(10)
        closing.run(wait=False)
        other_left.set()

    other = threading.Thread(target=close_too)
    other.start()
    closing.run(("calls", waits_for_the_other), step(done, "clean-up"))
    other.join(10)
    assert done == ["calls", "clean-up"]
