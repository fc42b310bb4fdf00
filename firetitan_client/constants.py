"""Documented constants and words of settings that other code imports by name.

Knows: their values. Must not know: anything else.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, TypeAlias

DEFAULT_CHECKSUM_FORMAT = "alder32"
"""Documented default (so spelled). Snapshots here carry digests of the daemon's own."""

DEFAULT_DELTA_COMPRESSION = "arc_v2"
"""Documented default. The daemon makes and applies deltas itself, in a format of its own."""

ExportPrecision: TypeAlias = Literal["source", "bf16"]
"""Precision of a `merged_base` export: the base model's own, or bfloat16."""

DEFAULT_MERGED_BASE_EXPORT_PRECISION: ExportPrecision = "source"
"""Precision of a `merged_base` export where none is named."""


class GradNormMetricsMode(StrEnum):
    """What `optim_step` reports about gradient norms beside the global one."""

    OFF = "off"
    BASIC = "basic"
    DETAILED = "detailed"
