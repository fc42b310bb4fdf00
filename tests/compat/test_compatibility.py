"""docs/compatibility.md against the documented API, the client and the tests it names."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from support import compatibility, surface
from support.compatibility import UNIMPLEMENTED, Row

import firetitan_client
from firetitan_client.compat import names as sdk

TESTS = Path(__file__).resolve().parents[1]
ROWS = compatibility.rows()
WITHOUT_DAEMON = {
    "Learning-rate schedules",
    "Concurrency controllers",
    "Results and constants",
    "Errors",
    "Code written for fireworks.training.sdk and for tinker",
}
"""Sections of what is made in the client alone."""
ELSEWHERE = {
    "APIFuture": "Futures",
    "WeightSyncer": "Weight sync",
    "SaveSamplerResult": "Results and constants",
    "GradAccNormalization": "Results and constants",
    "GradNormMetricsMode": "Results and constants",
    "FixedConcurrencyController": "Concurrency controllers",
    "AdaptiveConcurrencyController": "Concurrency controllers",
}
"""Classes whose section has another name."""
FOR_US = {
    "APIFuture": "finish finish_cancelled operation running set_exception set_result "
    "set_running_or_notify_cancel",
    "FiretitanSamplingClient": "hold_snapshot",
    "FireworksClient": "list_training_session_checkpoints promote_session_checkpoint "
    "delete_training_session",
    "AdaptiveConcurrencyController": "ema_prefill_queue in_flight note_retry_exhausted",
    "TrainerJobConfig": "refuse_unsupported",
    "DeploymentConfig": "refuse_unsupported",
    "DeploymentManager": "account_id base_url close",
}
"""Public names that are no part of the documented API."""


def row_of(section: str, name: str) -> Row | None:
    return next((row for row in ROWS if row.section == section and name in row.names), None)


def section_of(kind: str) -> str:
    return ELSEWHERE.get(kind, kind)


def class_names() -> list[tuple[str, str]]:
    return [(kind, name) for kind, text in surface.CLASSES.items() for name in surface.names(text)]


def works(kind: str, name: str) -> bool:
    row = row_of(section_of(kind), name)
    return row is not None and row.status != UNIMPLEMENTED


def signature(call: Any) -> str:
    found = inspect.signature(call)
    plain = [
        one.replace(annotation=inspect.Parameter.empty)
        for name, one in found.parameters.items()
        if name != "self"
    ]
    return str(inspect.Signature(plain))


def test_every_documented_name_has_a_row() -> None:
    missing = [
        f"{kind}.{name}" for kind, name in class_names() if row_of(section_of(kind), name) is None
    ]
    everywhere = {name for row in ROWS for name in row.names}
    others = [*surface.calls(surface.FUNCTIONS), *surface.fields(surface.VALUES)]
    others += [*surface.EXPORTS, *surface.SCHEDULES, *surface.CHECKPOINT_KINDS]
    missing += [name for name in others if name not in everywhere]
    for section, wanted in (("Losses", surface.LOSSES), ("Errors", surface.CODES)):
        missing += [name for name in wanted if row_of(section, name) is None]
    missing += [
        alias for alias in surface.ALIASES if row_of("FiretitanServiceClient", alias) is None
    ]
    assert missing == []


def test_every_public_name_is_documented() -> None:
    extra = []
    for kind, text in surface.CLASSES.items():
        known = {kind, *surface.names(text), *FOR_US.get(kind, "").split()}
        found = getattr(firetitan_client, kind)
        inherited = set(dir(str)) if issubclass(found, str) else set()
        extra += [
            f"{kind}.{name}"
            for name in set(dir(found)) - known - inherited
            if not name.startswith("_") and name.removesuffix("_async") not in known
        ]
    # A manager is also the client of the control plane.
    control = set(surface.names(surface.CLASSES["FireworksClient"]))
    control |= set(FOR_US["FireworksClient"].split())
    assert [one for one in extra if one.partition(".")[2] not in control] == []


@pytest.mark.parametrize("kind", surface.CLASSES)
def test_calls_have_the_documented_arguments(kind: str) -> None:
    found = getattr(firetitan_client, kind)
    ours, documented = {}, {}
    for name, wanted in surface.calls(surface.CLASSES[kind]).items():
        if not works(kind, name):
            continue
        call = found if name == kind else getattr(found, name)
        documented[name] = wanted
        ours[name] = wanted if passes_on(name, call, wanted) else signature(call)
    assert ours == documented


def passes_on(name: str, call: Any, wanted: str) -> bool:
    """Whether a twin gives whatever it gets to its call."""
    head, _, rest = signature(call).rpartition("**")
    return (
        name.endswith("_async") and bool(rest) and wanted.startswith(head.removesuffix("*args, "))
    )


@pytest.mark.parametrize("kind", surface.CLASSES)
def test_fields_have_the_documented_defaults(kind: str) -> None:
    found = getattr(firetitan_client, kind)
    documented = surface.fields(surface.CLASSES[kind])
    if dataclasses.is_dataclass(found):
        ours = {one.name: repr(one.default) for one in dataclasses.fields(found)}
    else:
        ours = {name: repr(getattr(found, name).value) for name in documented}
    assert {name: ours.get(name) for name in documented} == documented


def test_fields_that_may_be_given_by_place_have_the_documented_places() -> None:
    for kind, text in surface.CLASSES.items():
        found = getattr(firetitan_client, kind)
        if not dataclasses.is_dataclass(found) or kind == "FiretitanProvisioningConfig":
            continue  # settings of a service are given by name
        ours = [one.name for one in dataclasses.fields(found) if one.init and not one.kw_only]
        documented = [name for name in surface.names(text) if name in ours]
        assert ours == documented, kind


@pytest.mark.parametrize("kind", surface.CLASSES)
def test_bare_names_are_there(kind: str) -> None:
    found = getattr(firetitan_client, kind)
    have = set(dir(found)) | set(inspect.signature(found).parameters)
    if dataclasses.is_dataclass(found):
        have |= {one.name for one in dataclasses.fields(found)}
    if kind in ("FiretitanServiceClient", "DeploymentSampler"):
        have |= {"stubs", "concurrency_controller"}  # set when they are made
    bare = set(surface.names(surface.CLASSES[kind])) - {kind}
    assert [name for name in bare if works(kind, name) and name not in have] == []


def test_functions_and_values() -> None:
    def found(name: str) -> Any:
        module = "fireworks.training.sdk" if name in sdk.ROOT else "fireworks.training.sdk.errors"
        return sdk.resolve(module, name)

    documented = surface.calls(surface.FUNCTIONS)
    assert {name: signature(found(name)) for name in documented} == documented
    values = surface.fields(surface.VALUES)
    assert {name: repr(found(name)) for name in values} == values
    assert set(surface.EXPORTS) == set(sdk.ROOT)


def test_statuses_and_their_count() -> None:
    assert {row.status for row in ROWS} <= set(compatibility.STATUSES)
    unimplemented = [row for row in ROWS if row.status == UNIMPLEMENTED]
    assert compatibility.head_count() == len(unimplemented)
    assert len({row.key for row in ROWS}) == len(ROWS)
    assert [name for name, _ in compatibility.differences()] == surface.DIFFERENCES


def marks_by_test(path: Path) -> dict[str, list[str]]:
    """Test to its marks, as they are written."""
    return {
        node.name: [ast.unparse(one) for one in node.decorator_list]
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }


def test_every_row_names_a_test_that_runs() -> None:
    named = [(row.key, row.test) for row in ROWS] + compatibility.differences()
    wrong = []
    for key, test in named:
        file, _, name = test.partition("::")
        path = TESTS / file
        marks = marks_by_test(path).get(name) if path.exists() else None
        if marks is None or any("xfail" in mark or "mark.skip(" in mark for mark in marks):
            wrong.append((key, test))
    assert wrong == []


def source_of(test: str) -> str:
    """A test as it is written, with its marks and what it uses of its module."""
    file, _, name = test.partition("::")
    text = (TESTS / file).read_text()
    tree = ast.parse(text)
    defined: dict[str, str] = {}
    for node in tree.body:
        source = ast.get_source_segment(text, node) or ""
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined[node.name] = "\n".join([*map(ast.unparse, node.decorator_list), source])
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name):
                defined[target.id] = source
    found, left = "", [name]
    while left:
        part = defined.pop(left.pop(), "")
        found += f"{part}\n"
        left += [word for word in set(re.findall(r"\w+", part)) if word in defined]
    if "documented_page" in text:  # its tests run blocks of that page
        found += (TESTS / "support" / "documented_page.py").read_text()
    return found


def test_a_rows_test_has_to_do_with_every_name_of_the_row() -> None:
    """Textually: enough to notice a name that was added to a row whose test never heard of it."""
    unnamed = []
    for row in ROWS:
        source = source_of(row.test)
        for name in row.names:
            twin = name.endswith("_async")  # test_what_each_twin_gives goes through all of them
            if not twin and name not in surface.CODES and not re.search(rf"\b{name}\b", source):
                unnamed.append(f"{row.key}: {name} in {row.test}")
    assert unnamed == []


def test_what_a_daemon_has_a_part_in_is_tested_with_one() -> None:
    for row in ROWS:
        assert not row.test.startswith("unit/") or row.section in WITHOUT_DAEMON, row.key
