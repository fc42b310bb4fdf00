"""Error texts, and asking again."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from firetitan_client import errors, sdk_errors


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only pauses move; the pauses."""
    made: list[float] = []
    monkeypatch.setattr(time, "sleep", made.append)
    monkeypatch.setattr(time, "monotonic", lambda: sum(made))
    return made


def in_turn(*outcomes: Any) -> Callable[[], Any]:
    left = list(outcomes)

    def call() -> Any:
        outcome = left.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return call


def test_a_sampling_error_says_which_request() -> None:
    error = sdk_errors.SamplingRequestError(
        logical_request_id="r1",
        model="deployments/d",
        attempts=7,
        final_status=503,
        context={"row": 4},
    )
    assert str(error) == (
        "Sampling request failed after 7 attempts: HTTP 503 model=deployments/d row=4 "
        "logical_request_id=r1"
    )
    assert error.status_code == 503
    assert error.as_error_record()["context"] == {"row": 4}
    assert isinstance(error, RuntimeError) and isinstance(error, errors.FiretitanError)


def test_a_timeout_is_a_sampling_error() -> None:
    error = sdk_errors.DeploymentSamplerTimeoutError("late", attempts=2)
    assert isinstance(error, sdk_errors.SamplingRequestError) and isinstance(error, TimeoutError)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.attempts, copy.status_code) == ("late", 2, 504)


def test_error_text_has_the_way_out() -> None:
    text = sdk_errors.format_sdk_error("save failed", "disk full", "free some", "docs/api.md")
    assert text.splitlines() == [
        "ERROR: save failed",
        "  Cause: disk full",
        "  Solution: free some",
        "  Docs: docs/api.md",
    ]
    assert "firetitand status" in sdk_errors.format_sdk_error("a", "b", "c", show_support=True)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (httpx.Response(400, json={"error": {"message": "bad name"}}), "bad name"),
        (httpx.Response(400, json={"message": "bad"}), "bad"),
        (httpx.Response(400, json={"error": "plain"}), "plain"),
        (httpx.Response(400, json={"error": {"code": 5}}), "{'code': 5}"),
        (httpx.Response(400, json=["x"]), "['x']"),
        (httpx.Response(502, text=" <html>" + "x" * 300), "<html>" + "x" * 194),
        (errors.NotFound("no such trainer"), "no such trainer"),
    ],
)
def test_message_of_an_answer(response: Any, message: str) -> None:
    assert sdk_errors.parse_api_error(response) == message


def test_asks_again_until_there_is_an_answer(pauses: list[float]) -> None:
    done = httpx.Response(200)
    call = in_turn(
        httpx.Response(503),
        ConnectionError("gone"),
        httpx.ConnectError("gone"),
        errors.Unavailable("starting"),
        done,
    )
    assert sdk_errors.request_with_retries(call) is done
    assert pauses == [1, 2, 4, 8]


def test_waits_as_long_as_the_daemon_asks(pauses: list[float]) -> None:
    call = in_turn(errors.Busy("full", retry_after_s=7.5), "answer")
    assert sdk_errors.request_with_retries(call) == "answer"
    assert pauses == [7.5]


def test_gives_up_in_time(pauses: list[float]) -> None:
    always = httpx.Response(500)
    call = in_turn(*[always] * 20)
    assert sdk_errors.request_with_retries(call, max_wait_time=10) is always
    assert pauses == [1, 2, 4, 3]
    pauses.clear()
    with pytest.raises(TimeoutError):
        sdk_errors.request_with_retries(in_turn(*[TimeoutError()] * 9), max_wait_time=2)
    assert pauses == [1, 1]


def test_other_failures_are_final(pauses: list[float]) -> None:
    for outcome in (ValueError("no"), errors.InvalidArgument("no"), errors.InternalError("no")):
        with pytest.raises(type(outcome)):
            sdk_errors.request_with_retries(in_turn(outcome))
    assert sdk_errors.request_with_retries(in_turn(httpx.Response(404))).status_code == 404
    assert pauses == []


@pytest.mark.parametrize("good", ["a", "my-model-1", "x" * 63])
def test_good_model_ids(good: str) -> None:
    assert sdk_errors.validate_output_model_id(good) == []


@pytest.mark.parametrize(
    ("bad", "problems"),
    [
        (None, ["is required"]),
        ("", ["is required"]),
        ("My_Model", ["contains invalid characters"]),
        ("a\n", ["contains invalid characters"]),
        ("x" * 64, ["is too long (64 chars)"]),
        ("X" * 64, ["contains invalid characters", "is too long"]),
    ],
)
def test_bad_model_ids(bad: str | None, problems: list[str]) -> None:
    found = sdk_errors.validate_output_model_id(bad)
    assert len(found) == len(problems)
    for text, problem in zip(found, problems, strict=True):
        assert problem in text
