"""Names of models: which folder or hub repository stands behind one.

Knows: names, the configured ones, promoted models. Must not know: files, how a model is loaded.

A name `accounts/{account}/models/{model}` is looked up, in this order, among the configured names,
the promoted models, and the built-in names of account "fireworks". Anything else is a folder or a
Hugging Face id and stands for itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.model_records import Model

LOCAL = "local"
"""The account everything here belongs to."""
MAX_ID_LENGTH = 63
MAX_LOCATION = 4096
"""Longest folder or id."""
_ID = re.compile(r"[a-z0-9-]{1,63}")
_NAME = re.compile(r"accounts/(?P<account>[A-Za-z0-9._-]+)/models/(?P<id>[A-Za-z0-9._-]+)")

BUILT_IN: Mapping[str, str] = {
    "gemma-3-270m-it": "google/gemma-3-270m-it",
    "gemma-3-4b-it": "google/gemma-3-4b-it",
    "gemma-3-27b-it": "google/gemma-3-27b-it",
    "gpt-oss-20b": "openai/gpt-oss-20b",
    "llama-v3p1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama-v3p1-70b-instruct": "meta-llama/Llama-3.1-70B-Instruct",
    "llama-v3p2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-v3p2-3b-instruct": "meta-llama/Llama-3.2-3B-Instruct",
    "llama-v3p3-70b-instruct": "meta-llama/Llama-3.3-70B-Instruct",
    "mixtral-8x7b-instruct": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "qwen2p5-0p5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2p5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2p5-32b-instruct": "Qwen/Qwen2.5-32B-Instruct",
    "qwen2p5-72b-instruct": "Qwen/Qwen2.5-72B-Instruct",
    "qwen3-0p6b": "Qwen/Qwen3-0.6B",
    "qwen3-1p7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
}
"""Models of account "fireworks" by id: their Hugging Face ids."""


@dataclass(frozen=True)
class NamedModel:
    """What a configured name stands for."""

    location: str
    """A folder or a Hugging Face id."""
    revision: str = ""
    """Commit, tag or branch of a hub repository; empty: its main branch."""

    @property
    def reference(self) -> str:
        """What a worker is given: the location, `@revision` behind it where there is one."""
        return f"{self.location}@{self.revision}" if self.revision else self.location


@dataclass(frozen=True)
class ModelId:
    """A promoted model's name, taken apart."""

    id: str
    account: str = LOCAL


class ModelNames:
    """Every name that is known.

    Args:
        configured: By name, as in `[models]` of the configuration.
    """

    def __init__(self, configured: Mapping[str, NamedModel] | None = None) -> None:
        self.configured = dict(configured or {})
        self.promoted: dict[str, Model] = {}
        """By id."""

    def restore(self, models: Iterable[Model]) -> None:
        """Take over the models that were promoted before."""
        self.promoted = {model.id: model for model in models}

    def find(self, name: str) -> Model | NamedModel:
        """What a name stands for.

        Args:
            name: `accounts/{account}/models/{model}`, `models/{model}` of a promoted model, a
                configured name, a folder or a Hugging Face id.

        Raises:
            FiretitanError: MODEL_NOT_FOUND for a model's name that stands for nothing.
        """
        if name in self.configured:
            return self.configured[name]
        match = _NAME.fullmatch(name)
        short = name.removeprefix("models/")
        if match is None and (short == name or short not in self.promoted):
            return NamedModel(name)
        account, model_id = (match["account"], match["id"]) if match else (LOCAL, short)
        model = self.promoted.get(model_id)
        if model is not None and account in (LOCAL, model.account):
            return model
        if account == "fireworks" and model_id in BUILT_IN:
            return NamedModel(BUILT_IN[model_id])
        raise FiretitanError(
            Reason.MODEL_NOT_FOUND,
            f"{name}: no model has this name; promote a checkpoint to it, or say under [models] in "
            f'config.toml what it is: "{name}" = "<folder or Hugging Face id>"',
            field="base_model",
            model=name,
        )

    def reference(self, name: str) -> str:
        """What a worker is given to load for a name: a folder, or a Hugging Face id.

        Raises:
            FiretitanError: MODEL_NOT_FOUND.
        """
        found = self.find(name)
        return found.folder if isinstance(found, Model) else found.reference


def parse_model_id(text: str, field: str = "model_id") -> ModelId:
    """The name a checkpoint is promoted to: an id, or `accounts/{account}/models/{id}`.

    Raises:
        FiretitanError: NAME_INVALID.
    """
    match = _NAME.fullmatch(text)
    model_id, account = (match["id"], match["account"]) if match else (text, LOCAL)
    if _ID.fullmatch(model_id) is None:
        raise FiretitanError(
            Reason.NAME_INVALID,
            f"{field}: {text[:200]!r} is no id for a model; use 1 to {MAX_ID_LENGTH} of a-z, 0-9 "
            "and '-', or accounts/<account>/models/<such an id>",
            field=field,
        )
    return ModelId(model_id, account)


def check_location(text: str, field: str) -> None:
    """Refuse what can be no folder and no Hugging Face id.

    Raises:
        FiretitanError: INVALID_ARGUMENT naming the field.
    """
    if not text or "\0" in text or len(text) > MAX_LOCATION:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"{field}: {text[:80]!r} names no model; give a Hugging Face id or a folder",
            field=field,
        )
