"""docs/compatibility.md, read: its rows, its count."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
UNIMPLEMENTED = "UNIMPLEMENTED"
STATUSES = ("yes", "no effect", "differs", UNIMPLEMENTED)


@dataclass(frozen=True)
class Row:
    """One row."""

    section: str
    cell: str
    """Its first cell, without marks."""
    names: tuple[str, ...]
    """What the first cell names in backticks."""
    status: str
    test: str
    """`folder/file.py::test`, below tests/."""

    @property
    def key(self) -> str:
        """Section and first cell."""
        return f"{self.section}: {self.cell}"


def rows() -> list[Row]:
    """Every row of every table, those of the differences apart."""
    return [Row(*row) for row in _cells() if row[0] != "Differences"]


def differences() -> list[tuple[str, str]]:
    """Name and test of every deliberate difference."""
    return [(cell, test) for section, cell, _, _, test in _cells() if section == "Differences"]


def head_count() -> int:
    """How many rows are UNIMPLEMENTED, as the head says."""
    (count,) = re.findall(r"^UNIMPLEMENTED rows: (\d+)$", PAGE.read_text(), re.MULTILINE)
    return int(count)


def _cells() -> list[tuple[str, str, tuple[str, ...], str, str]]:
    found = []
    for part in PAGE.read_text().split("\n## ")[1:]:
        section, _, body = part.partition("\n")
        for line in body.splitlines():
            if not line.startswith("| ") or line.startswith("| Name |"):
                continue
            cell, status, test, _ = (one.strip() for one in line.strip("|").split(" |", 3))
            names = tuple(re.findall(r"`(\w+)`", cell))
            found.append((section, cell.replace("`", ""), names, status, test.strip("`")))
    return found
