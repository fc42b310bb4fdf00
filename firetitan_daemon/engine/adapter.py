"""LoRA adapters as PEFT folders: `PeftModel.from_pretrained` loads what is written here as it is.

Knows: PEFT's two files and their names. Must not know: training, the model object, the chain.

The other way round, only `adapter_config.json` and safetensors are read, and a setting that plain
LoRA on linear layers cannot honour is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import ModelInfo, SavedSnapshot, SnapshotFormat, SnapshotKind
from firetitan_daemon.engine.raw import (
    RawTensor,
    RawTensors,
    disk_errors,
    read_safetensors,
    result_digest,
    seal,
    write_safetensors,
)
from firetitan_daemon.engine.snapshots import about_base
from firetitan_daemon.engine.tensors import stored_dtypes, to_raw

Pairs = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""A LoRA adapter: A [R, I] and B [O, R] by module name, without any PEFT prefix."""

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_dropout": (),
    # The others (PiSSA, OLoRA, LoftQ, CorDA) change the base's weights.
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
    "megatron_core": (),
    "inference_mode": (),
    "task_type": (),
    "peft_type": (),
    "peft_version": (),
    "r": (),
    "lora_alpha": (),
    "use_rslora": (),
    "target_modules": (),
    "base_model_name_or_path": (),
    "revision": (),
    "auto_mapping": (),
    "qalora_group_size": (),
    "runtime_config": (),
}
"""Settings with a value that changes nothing here (empty: any value)."""


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


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, RawTensor]]:
    """Read a PEFT LoRA adapter, ours or another's; never runs code or reads pickle.

    Returns:
        The settings of its configuration file, all of them honourable; and its tensors by the names
        in the file, pairs of `base_model.model.<module>.lora_A.weight` [R, I] and `lora_B` [O, R].

    Raises:
        FiretitanError: INVALID_ARGUMENT naming the missing file or malformed tensor, UNSUPPORTED
            naming the setting this project cannot honour, CHECKSUM_MISMATCH for a damaged file.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file() or not (folder / ADAPTER_WEIGHTS).is_file():
        raise _bad_adapter(folder, f"needs {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} (safetensors)")
    try:
        settings: dict[str, Any] = json.loads(path.read_bytes())
        rank = _check_settings(folder, settings)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _bad_adapter(folder, f"{ADAPTER_CONFIG} is not readable: {error!r}") from error
    tensors = read_safetensors(folder / ADAPTER_WEIGHTS)
    _check_pairs(folder, rank, tensors)
    return settings, tensors


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


def _check_settings(folder: Path, settings: dict[str, Any]) -> int:
    """Refuse what is not plain LoRA; returns the rank."""
    if settings["peft_type"] != "LORA":
        raise _unsupported(folder, "peft_type", settings["peft_type"])
    for key, value in settings.items():
        known = _NEUTRAL.get(key)
        if value and (known is None or (known and value not in known)):
            raise _unsupported(folder, key, value)
    rank, _ = int(settings["r"]), float(settings["lora_alpha"])
    if rank < 1:
        raise _bad_adapter(folder, f"r={rank}; 1 or more")
    return rank


def _check_pairs(folder: Path, rank: int, tensors: RawTensors) -> None:
    for module in sorted({n.removesuffix(A_SUFFIX).removesuffix(B_SUFFIX) for n in tensors}):
        a, b = tensors.get(module + A_SUFFIX), tensors.get(module + B_SUFFIX)
        if a is None or b is None:
            raise _bad_adapter(folder, f'"{module}" is no pair of lora_A and lora_B weights')
        if len(a.shape) != 2 or len(b.shape) != 2 or {a.shape[0], b.shape[1]} != {rank}:
            raise _bad_adapter(
                folder, f'"{module}" has A {list(a.shape)} and B {list(b.shape)}, r is {rank}'
            )
    if not tensors:
        raise _bad_adapter(folder, "holds no LoRA tensors")


def _bad_adapter(folder: Path, what: str) -> FiretitanError:
    return FiretitanError(Reason.INVALID_ARGUMENT, f"adapter {folder.name}: {what}", field="path")


def _unsupported(folder: Path, key: str, value: object) -> FiretitanError:
    return FiretitanError(
        Reason.UNSUPPORTED,
        f"adapter {folder.name}: {ADAPTER_CONFIG} has {key}={value!r}, which is not supported; "
        "plain LoRA on linear layers is",
        field=key,
    )
