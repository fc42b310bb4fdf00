"""Errors and error texts of the documented API that are made in the client itself.

Knows: how a failed answer is read, worded and asked again. Must not know: gRPC, the daemon's
reasons (`errors` has those).
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from firetitan_client.errors import Busy, ClientClosed, FiretitanError

logger = logging.getLogger("firetitan")
T = TypeVar("T")

DOCS_SDK = "docs/api.md"
"""Where the API is described, in the project's repository."""

MAX_WAIT_TIME = 300.0
"""Seconds `request_with_retries` goes on for."""
RETRYABLE_STATUS_CODES = (408, 429, 500, 502, 503, 504)
_LONGEST_PAUSE_S = 30.0
_FOREIGN_RETRYABLE = (
    ("httpx", "ConnectError"),
    ("httpx", "TimeoutException"),
    ("requests", "ConnectionError"),
    ("requests", "Timeout"),
)
_MODEL_ID = re.compile(r"[a-z0-9-]+")
_MODEL_NAME = re.compile(r"accounts/[A-Za-z0-9._-]+/models/([^/]+)")
_MODEL_ID_LENGTH = 63


class SamplingRequestError(FiretitanError, RuntimeError):
    """A sampling request failed for good, after all its tries.

    Says which request and how it ended; never holds prompts or tokens.

    Args:
        message: For people; None: made from the rest.
        logical_request_id: The request, over all its tries.
        model: What was sampled from.
        attempts: Tries.
        final_status: HTTP-like status of the last one, where there was an answer.
        final_error_kind: What went wrong where there was none.
        request_id: The server's id of the last try.
        context: Further facts of the caller's.
    """

    status_code = 503

    def __init__(
        self,
        message: str | None = None,
        *,
        logical_request_id: str | None = None,
        model: str | None = None,
        attempts: int | None = None,
        final_status: int | None = None,
        final_error_kind: str | None = None,
        request_id: str | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> None:
        self.logical_request_id = logical_request_id
        self.model = model
        self.attempts = attempts
        self.final_status = final_status
        self.final_error_kind = final_error_kind
        self.request_id = request_id
        self.context = dict(context or {})
        super().__init__(self._describe() if message is None else message, reason="UNAVAILABLE")
        if final_status is not None:
            self.status_code = final_status

    def _describe(self) -> str:
        words = [f"Sampling request failed after {self.attempts} attempts:"]
        if self.final_status is not None:
            words.append(f"HTTP {self.final_status}")
        elif self.final_error_kind:
            words.append(self.final_error_kind)
        facts = {"model": self.model, "request_id": self.request_id, **self.context}
        facts["logical_request_id"] = self.logical_request_id
        words += [f"{name}={value}" for name, value in facts.items() if value]
        return " ".join(words)

    def as_error_record(self) -> dict[str, Any]:
        """Identity and end of the request, for a structured log."""
        record: dict[str, Any] = {
            "logical_request_id": self.logical_request_id,
            "model": self.model,
            "attempts": self.attempts,
            "final_status": self.final_status,
            "final_error_kind": self.final_error_kind,
            "request_id": self.request_id,
        }
        if self.context:
            record["context"] = dict(self.context)
        return record


class DeploymentSamplerTimeoutError(SamplingRequestError, TimeoutError):
    """A sampling request ran out of time in all its tries."""

    status_code = 504


class SamplingClientClosedError(ClientClosed):
    """The sampling client was closed; the call did not begin, or did not end in the drain time."""


def format_sdk_error(
    what: str, cause: str, solution: str, docs_url: str | None = None, show_support: bool = False
) -> str:
    """An error in a few lines: what failed, why, and the way out.

    Args:
        what: What failed.
        cause: Why.
        solution: What to do.
        docs_url: Where to read on.
        show_support: Also say what to look at where the fault is not the caller's.
    """
    lines = [f"ERROR: {what}", f"  Cause: {cause}", f"  Solution: {solution}"]
    if docs_url:
        lines.append(f"  Docs: {docs_url}")
    if show_support:
        lines.append("  Support: see what the daemon logged; `firetitand status` shows how it is")
    return "\n".join(lines)


def parse_api_error(response: Any) -> str:
    """The message of a failed answer.

    Args:
        response: An exception, or an HTTP response with `json()` and `text`.
    """
    if isinstance(response, BaseException):
        return str(response)
    try:
        body = response.json()
    except (AttributeError, ValueError):
        return str(getattr(response, "text", response)).strip()[:200]
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        return str(error.get("message", error))
    return str(error)


def request_with_retries(
    func: Callable[..., T], *args: Any, max_wait_time: float = MAX_WAIT_TIME, **kwargs: Any
) -> T:
    """Call a function until it answers, with growing pauses.

    Asked again are broken connections, timeouts, a full server, and answers whose `status_code`
    says so (408, 429, 500, 502, 503, 504). After `max_wait_time` the last answer is returned, or
    the last exception raised.

    Args:
        func: What to call, e.g. a method of `httpx.Client` or `requests.Session`.
        args: Its arguments.
        max_wait_time: Seconds from the first try to the last.
        kwargs: Its keyword arguments.
    """
    deadline = time.monotonic() + max_wait_time
    attempt = 0
    while True:
        try:
            answer = func(*args, **kwargs)
        except _retryable() as error:
            pause_s = _pause_s(attempt, deadline, getattr(error, "retry_after_s", None))
            if pause_s <= 0:
                raise
            logger.debug("try %d failed: %s; again in %.1f s", attempt + 1, error, pause_s)
        else:
            status = getattr(answer, "status_code", None)
            pause_s = _pause_s(attempt, deadline, None)
            if status not in RETRYABLE_STATUS_CODES or pause_s <= 0:
                return answer
            logger.debug("try %d: status %s; again in %.1f s", attempt + 1, status, pause_s)
        time.sleep(pause_s)
        attempt += 1


def _pause_s(attempt: int, deadline: float, asked_s: float | None) -> float:
    """Seconds until the next try; 0 or less where there is no time for one."""
    wanted = asked_s or min(2.0 ** min(attempt, 10), _LONGEST_PAUSE_S)
    return min(wanted, deadline - time.monotonic())


def _retryable() -> tuple[type[BaseException], ...]:
    """What is worth another try; of HTTP libraries, those the caller has loaded."""
    foreign = (
        getattr(sys.modules[module], name)
        for module, name in _FOREIGN_RETRYABLE
        if hasattr(sys.modules.get(module), name)
    )
    return (ConnectionError, TimeoutError, Busy, *foreign)


def validate_output_model_id(output_model_id: str | None) -> list[str]:
    """What is wrong with the id a promoted checkpoint shall have; empty where nothing is.

    Args:
        output_model_id: At most 63 of a-z, 0-9 and hyphen, or `accounts/<a>/models/` and that.
    """
    if not output_model_id:
        return ["output_model_id is required"]
    errors = []
    match = _MODEL_NAME.fullmatch(output_model_id)
    output_model_id = match[1] if match else output_model_id
    if _MODEL_ID.fullmatch(output_model_id) is None:
        errors.append(
            f"output_model_id '{output_model_id}' contains invalid characters. "
            "Must be lowercase a-z, 0-9, or hyphen."
        )
    if len(output_model_id) > _MODEL_ID_LENGTH:
        errors.append(
            f"output_model_id '{output_model_id}' is too long ({len(output_model_id)} chars). "
            f"Maximum is {_MODEL_ID_LENGTH} characters."
        )
    return errors
