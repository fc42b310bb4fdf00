"""The pages against the code: paths exist, the map is whole, settings are described."""

from __future__ import annotations

import dataclasses
import re
import sqlite3
from pathlib import Path

import pytest

from firetitan_daemon.config import load_config
from firetitan_daemon.core.failpoints import NAMES
from firetitan_daemon.engine.losses import LOSSES
from firetitan_daemon.store import schema

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
BESIDE = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
TOP = ("firetitan_client", "firetitan_daemon", "proto", "tests", "examples", "bench", "docs")
PACKAGES = ("firetitan_client", "firetitan_daemon")


def page(name: str) -> str:
    return (DOCS / name).read_text()


def section(text: str, title: str) -> str:
    assert f"\n## {title}\n" in text
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def mapped() -> set[str]:
    """Every path in the annotated tree of architecture.md."""
    tree = section(page("architecture.md"), "The tree").split("```")[1]
    found, above = set(), [""] * 8
    for line in tree.strip("\n").splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        above[depth] = name
        found.add("".join(above[: depth + 1]))
    return found


@pytest.mark.parametrize("path", [*PAGES, *BESIDE], ids=lambda path: path.name)
def test_every_path_on_a_page_exists(path: Path) -> None:
    text = path.read_text()
    named = re.findall(rf"`((?:{'|'.join(TOP)}|\.ci)/[\w./-]*)`", text)
    missing = [name for name in named if not (ROOT / name).exists()]
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    missing += [link for link in links if not (path.parent / link).exists()]
    assert missing == []


def test_the_map_names_what_there_is() -> None:
    assert [name for name in mapped() if not (ROOT / name).exists()] == []


def test_the_map_names_every_module_and_package() -> None:
    wanted = set()
    for package in PACKAGES:
        for module in (ROOT / package).rglob("*.py"):
            name = str(module.relative_to(ROOT))
            wanted.add(name.removesuffix("__init__.py"))
    assert sorted(wanted - mapped()) == []


def test_the_table_of_changes_is_long_enough_to_be_of_use() -> None:
    rows = section(page("architecture.md"), "I want to change ...").count("\n| ") - 1
    assert rows >= 25


def test_every_page_is_linked() -> None:
    pages = [path for path in [*PAGES, *BESIDE] if path.name != "README.md"]
    text = "".join(path.read_text() for path in PAGES)
    assert [path.name for path in pages if path.name not in text] == []


def test_every_setting_is_described_with_its_default(tmp_path: Path) -> None:
    _, settings = load_config(home=tmp_path, environment={})
    row = r"^\| `([\w.]+)` \| (?:`([^`]+)` )?\|"
    rows = dict(re.findall(row, page("operations.md"), re.MULTILINE))
    defaults = {one.key: str(one.value) for one in settings if one.key != "home"}
    assert {key: value for key, value in rows.items() if "." in key} == defaults


def test_every_loss_is_described_with_its_settings() -> None:
    text = section(page("numerics.md"), "Losses")
    for loss in LOSSES.values():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{loss.name}` |"))
        for name in [*loss.settings, *loss.required, *loss.optional]:
            assert name == "target_tokens" or f"`{name}" in row, (loss.name, name)
        for name, default in loss.settings.items():
            shown = "off" if default is None else f"{default:g}"
            assert f"`{name}` {shown}" in row, (loss.name, name, shown)


def test_every_table_of_the_ledger_is_described() -> None:
    with sqlite3.connect(":memory:") as connection:
        for migration in schema.MIGRATIONS:
            migration(connection)
        query = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        tables = [name for (name,) in connection.execute(query)]
    connection.close()
    described = re.findall(r"^\| `(\w+)` \|", section(page("storage.md"), "Ledger"), re.MULTILINE)
    assert sorted(described) == sorted(tables)


def test_every_failpoint_is_described() -> None:
    text = page("request-lifecycle.md")
    assert [name for name in NAMES if f"`{name}`" not in text] == []


def test_every_promise_names_a_test_or_says_not_yet() -> None:
    rows = re.findall(
        r"^\| R(\d+) \| ([^|]+) \| ([^|]+) \| ([^|]*)\|$", page("reliability.md"), re.MULTILINE
    )
    assert [int(number) for number, *_ in rows] == list(range(1, 31))
    missing = []
    for number, _, shown, _ in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", shown)
        assert tests or "not yet" in shown, f"R{number}: neither a test nor `not yet`"
        missing += [
            name
            for path, name in tests
            if not re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.MULTILINE)
        ]
    assert missing == []


def test_every_managed_setting_is_in_the_table() -> None:
    from firetitan_client.managed import FiretitanProvisioningConfig

    text = page("api.md")
    fields = [one.name for one in dataclasses.fields(FiretitanProvisioningConfig)]
    assert [name for name in fields if f"`{name}`" not in text] == []


def test_every_public_method_is_in_the_table() -> None:
    import firetitan_client

    text = page("api.md")
    missing = []
    for kind in (
        firetitan_client.FiretitanServiceClient,
        firetitan_client.FiretitanTrainingClient,
        firetitan_client.FiretitanSamplingClient,
        firetitan_client.DeploymentSampler,
        firetitan_client.FireworksClient,
        firetitan_client.TrainerJobManager,
        firetitan_client.DeploymentManager,
    ):
        for name in dir(kind):
            written = name.removesuffix("_async")
            if not name.startswith("_") and not re.search(rf"`(\w+\.)?{written}`", text):
                missing.append(f"{kind.__name__}.{name}")
    assert missing == []


def test_diagrams_hold_nothing_that_ends_a_line() -> None:
    """Mermaid takes `;` and `#` in a message for the end of it."""
    blocks = re.findall(r"```mermaid\n(.*?)```", page("request-lifecycle.md"), re.DOTALL)
    assert len(blocks) >= 2
    assert [line for block in blocks for line in block.splitlines() if set(line) & set(";#")] == []


def test_every_exported_name_is_in_the_table() -> None:
    import firetitan_client

    text = page("api.md")
    assert [name for name in firetitan_client.__all__ if f"`{name}" not in text] == []


def test_the_names_that_are_not_there_are_those_listed() -> None:
    from firetitan_client.compat import names

    text = section(page("api.md"), "Code written for fireworks.training.sdk")
    listed = text.partition("These are:")[2].partition(".")[0]
    missing = [name for name in names.ROOT if not names.exists(name)]
    assert re.findall(r"`(\w+)`", listed) == missing
