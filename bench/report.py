"""What the comparisons found: a table for people, JSON for machines.

Knows: rounds, ratios, targets. Must not know: how anything was measured.
"""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One ratio, larger is better, and what it should reach."""

    name: str
    ours: str
    other: str
    ratio: float
    target: float | None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """In one word."""
        if self.target is None:
            return ""
        return "ok" if self.ratio >= self.target else "missed"


def interleaved(
    name: str,
    ours: list[float],
    other: list[float],
    target: float | None,
    details: dict[str, Any],
) -> Finding:
    """A ratio of times: the median over rounds, each with both sides back to back.

    Args:
        name: What was compared.
        ours: Seconds of each round.
        other: Seconds of each round.
        target: What the ratio should reach.
        details: Goes into the JSON file.
    """
    ratios = [theirs / mine for mine, theirs in zip(ours, other, strict=True)]
    return Finding(
        name,
        f"{statistics.median(ours):.2f} s",
        f"{statistics.median(other):.2f} s",
        statistics.median(ratios),
        target,
        {"ours_s": ours, "other_s": other, "ratios": ratios, **details},
    )


def show(findings: list[Finding]) -> None:
    """Print the table."""
    width = max(len(each.name) for each in findings)
    print(f"\n{'':{width}}  {'firetitan':>10}  {'other':>10}  {'ratio':>7}  {'target':>7}")
    for each in findings:
        target = "" if each.target is None else f">= {each.target:.2f}"
        print(
            f"{each.name:{width}}  {each.ours:>10}  {each.other:>10}  {each.ratio:6.2f}x"
            f"  {target:>7}  {each.verdict}"
        )


def write(path: Path, findings: list[Finding], about: dict[str, Any]) -> None:
    """Write everything measured."""
    content = {
        "about": {**about, "load_average": os.getloadavg()},
        "findings": [{**asdict(each), "verdict": each.verdict} for each in findings],
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
