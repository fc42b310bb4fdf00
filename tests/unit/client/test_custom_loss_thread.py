"""A custom loss in a thread of its own."""

from __future__ import annotations

import contextvars
import queue

from firetitan_client.custom_loss import _apart

NAME: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="nobody's")


def test_it_runs_in_the_context_of_the_call() -> None:
    found: queue.SimpleQueue[object] = queue.SimpleQueue()
    before = NAME.set("the caller's")
    try:
        _apart(lambda: found.put(NAME.get()), found.put)
    finally:
        NAME.reset(before)
    assert found.get(timeout=10) == "the caller's"
