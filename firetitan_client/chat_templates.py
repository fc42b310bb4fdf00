"""Runs a tokenizer's chat template within limits: it is a program from a model's folder.

Knows: `apply_chat_template`. Must not know: where the tokenizer came from, what becomes of the
tokens. transformers keeps templates in Jinja's sandbox: they reach no file and no module. What the
sandbox does not do is end one that loops, or that writes without end.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Sequence
from typing import Any

MAX_SECONDS = 10.0
MAX_CHARACTERS = 1 << 24


async def apply(tokenizer: Any, messages: Sequence[Any]) -> list[int]:
    """A conversation as tokens, up to where the assistant answers.

    Raises:
        ValueError: The template takes too long, or writes too much.
    """
    return await asyncio.to_thread(_apply, tokenizer, list(messages))


class _TooLong(BaseException):
    """Put into a thread whose time is over; a template cannot catch it."""


def _apply(tokenizer: Any, messages: list[Any]) -> list[int]:
    run = _Run(tokenizer, messages)
    thread = threading.Thread(target=run, name="chat-template", daemon=True)
    thread.start()
    thread.join(MAX_SECONDS)
    if thread.is_alive():
        # At the thread's next step; one that never takes it is left behind.
        identity = ctypes.c_ulong(thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(identity, ctypes.py_object(_TooLong))
        raise ValueError(
            f"the tokenizer's chat template did not end within {MAX_SECONDS:g} s; pass a "
            "tokenizer with another one, or tokens to sample_with_prompt_tokens"
        )
    if run.error is not None:
        raise run.error
    return run.tokens


class _Run:
    """One application of a template."""

    def __init__(self, tokenizer: Any, messages: list[Any]) -> None:
        self._tokenizer = tokenizer
        self._messages = messages
        self.tokens: list[int] = []
        self.error: BaseException | None = None

    def __call__(self) -> None:
        try:
            text = self._apply(tokenize=False)
            if isinstance(text, str) and len(text) > MAX_CHARACTERS:
                raise ValueError(
                    f"the tokenizer's chat template wrote {len(text)} characters; at most "
                    f"{MAX_CHARACTERS} are taken"
                )
            self.tokens = self._apply(tokenize=True, return_dict=False)
        except BaseException as error:  # raised where it was asked for
            self.error = error

    def _apply(self, **options: Any) -> Any:
        return self._tokenizer.apply_chat_template(
            self._messages, add_generation_prompt=True, **options
        )
