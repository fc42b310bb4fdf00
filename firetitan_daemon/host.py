"""What this machine has: its GPUs, as a number.

Knows: device files, CUDA's variable. Must not know: torch, which the daemon does not load.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def count_gpus(environment: Mapping[str, str] | None = None, devices: Path = Path("/dev")) -> int:
    """GPUs that workers can use: those CUDA_VISIBLE_DEVICES leaves, or all of NVIDIA's.

    Args:
        environment: Stands in for `os.environ`.
        devices: Folder of the device files.
    """
    there = sum(path.name.removeprefix("nvidia").isdigit() for path in devices.glob("nvidia*"))
    visible = (os.environ if environment is None else environment).get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return there
    return min(there, len([one for one in visible.split(",") if one.strip() not in ("", "-1")]))
