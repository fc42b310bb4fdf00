"""Every call and argument of the installed tinker, taken or refused by name."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import tinker

from firetitan_client import (
    FiretitanSamplingClient,
    FiretitanServiceClient,
    FiretitanTrainingClient,
)
from firetitan_client.rest_client import RestClient

OF_TINKERS_OWN = {"on_queue_state_change"}
"""What its own machinery calls."""
OTHERWISE = {"SamplingClient.create"}
"""What has another meaning in the managed service's API."""


def calls(kind: type[Any]) -> dict[str, Any]:
    return {
        name: call
        for name, call in inspect.getmembers(kind, callable)
        if not name.startswith("_") and name not in OF_TINKERS_OWN
    }


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("ServiceClient", FiretitanServiceClient),
        ("TrainingClient", FiretitanTrainingClient),
        ("SamplingClient", FiretitanSamplingClient),
    ],
)
def test_every_argument_is_taken(theirs: str, ours: type[Any]) -> None:
    missing = []
    for name, call in calls(getattr(tinker, theirs)).items():
        if f"{theirs}.{name}" in OTHERWISE:
            continue
        found = getattr(ours, name, None)
        if found is None:
            missing.append(name)
            continue
        # A twin hands what it is given to its call.
        twin = "kwargs" in inspect.signature(found).parameters
        known = inspect.signature(getattr(ours, name.removesuffix("_async")) if twin else found)
        if "_" in known.parameters or "options" in known.parameters:
            continue
        wanted = set(inspect.signature(call).parameters) - {"self", "args", "kwargs"}
        missing += [f"{name}({one}=)" for one in wanted - set(known.parameters)]
    assert missing == []


def test_rest_calls_are_there_or_refused() -> None:
    rest = RestClient(None)  # type: ignore[arg-type]
    theirs = importlib.import_module("tinker.lib.public_interfaces.rest_client").RestClient
    missing = [name for name in calls(theirs) if not hasattr(rest, name)]
    assert missing == []
