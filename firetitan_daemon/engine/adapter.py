"""Writes LoRA adapters as PEFT folders: `PeftModel.from_pretrained` loads them as they are.

Knows: torch tensors, PEFT's two files. Must not know: training, the model object, the chain.
`peft.py` reads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from firetitan_daemon.engine.api import ModelInfo, SavedSnapshot, SnapshotFormat, SnapshotKind
from firetitan_daemon.engine.peft import (
    A_SUFFIX,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    B_SUFFIX,
    PEFT_PREFIX,
)
from firetitan_daemon.engine.raw import disk_errors, result_digest, seal, write_safetensors
from firetitan_daemon.engine.snapshots import about_base
from firetitan_daemon.engine.tensors import stored_dtypes, to_raw

Pairs = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""A LoRA adapter: A [R, I] and B [O, R] by module name, without any PEFT prefix."""


def base_reference(base_model: str, info: ModelInfo) -> tuple[str, str | None]:
    """Name and revision under which others find the base: the hub's id, else the local folder."""
    if info.source == "hub":
        return base_model.partition("@")[0], Path(info.path).name
    return info.path, None


def write_adapter(
    staging: Path,
    name: str,
    pairs: Pairs,
    *,
    alpha: float,
    base_model: str,
    revision: str | None,
    model_folder: Path,
) -> SavedSnapshot:
    """Write a PEFT adapter folder; always complete, so always a base.

    PEFT loads an adapter on the output layer of a tied model as it is, and warns that merging it
    would need the tie undone; that warning has no setting.

    Args:
        staging: Empty folder.
        name: The snapshot's name.
        pairs: The adapter, written in float32.
        alpha: The product is scaled by alpha / rank.
        base_model: For `base_model_name_or_path`, see `base_reference`.
        revision: Commit of the base, where it has one.
        model_folder: The base model's, to tell its other layers from the adapted ones.

    Raises:
        FiretitanError: STATE_DISK_FULL.
    """
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors[f"{PEFT_PREFIX}{module}{A_SUFFIX}"] = a.detach().to(torch.float32)
        tensors[f"{PEFT_PREFIX}{module}{B_SUFFIX}"] = b.detach().to(torch.float32)
    raw = to_raw(tensors)
    write_safetensors(staging / ADAPTER_WEIGHTS, raw, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": next(iter(pairs.values()))[0].shape[0],
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": _target_modules(pairs, stored_dtypes(model_folder)),
    }
    with disk_errors(staging / ADAPTER_CONFIG):
        (staging / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
    digest = result_digest(raw)
    about = about_base(SnapshotFormat.PEFT_ADAPTER, name, base_model, digest)
    return SavedSnapshot(
        seal(staging, about), SnapshotKind.BASE, SnapshotFormat.PEFT_ADAPTER, digest
    )


def _target_modules(adapted: Iterable[str], stored: Iterable[str]) -> list[str]:
    """Shortest endings of module names that cover the adapted modules and no other."""
    wanted = set(adapted)
    others = {name.removesuffix(".weight") for name in stored if name.endswith(".weight")} - wanted
    targets = set()
    for module in wanted:
        parts = module.split(".")
        for count in range(1, len(parts) + 1):
            ending = ".".join(parts[-count:])
            if not any(other == ending or other.endswith(f".{ending}") for other in others):
                break
        targets.add(ending)
    return sorted(targets)
