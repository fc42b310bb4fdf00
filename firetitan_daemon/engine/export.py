"""Weights to serve, as folders that transformers and PEFT load as they are, and their readers.

Knows: torch tensors by parameter name, the Hugging Face and PEFT layouts. Must not know: how the
weights were trained, which model object they go into, the daemon's chain.

A full snapshot has the base's stored dtype and its config and tokenizer files; float32 masters are
rounded once, here. An adapter stays float32. `manifest.json` beside them is ours; both libraries
pass it over.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import ModelInfo, SavedSnapshot, SnapshotFormat, SnapshotKind
from firetitan_daemon.engine.delta import apply_delta
from firetitan_daemon.engine.raw import (
    RawTensor,
    RawTensors,
    disk_errors,
    read_safetensors,
    result_digest,
    seal,
    write_safetensors,
)
from firetitan_daemon.engine.resolve import weight_files
from firetitan_daemon.engine.snapshots import ChainWriter

Tensors = Mapping[str, torch.Tensor]
Pairs = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""A LoRA adapter: A [R, I] and B [O, R] by module name, without any PEFT prefix."""

MAX_SHARD_BYTES = 5_000_000_000
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_INDEX = "model.safetensors.index.json"
_PEFT_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_COPIED = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
_NOT_COPIED = {durable.MANIFEST, _INDEX, ADAPTER_CONFIG}

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def to_raw(tensors: Tensors) -> dict[str, RawTensor]:
    """View CPU tensors as bytes; copies only what is elsewhere or not contiguous."""
    raw = {}
    for name, tensor in tensors.items():
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        raw[name] = RawTensor(
            _CODES[tensor.dtype], tuple(tensor.shape), flat.view(torch.uint8).numpy()
        )
    return raw


def from_raw(tensors: RawTensors) -> dict[str, torch.Tensor]:
    """View raw tensors as torch tensors that share their memory.

    Raises:
        FiretitanError: UNSUPPORTED naming a tensor of another dtype than these.
    """
    result = {}
    for name, raw in tensors.items():
        if raw.dtype not in _DTYPES:
            raise FiretitanError(
                Reason.UNSUPPORTED, f'tensor "{name}" has dtype {raw.dtype}; one of {[*_DTYPES]}'
            )
        flat = torch.from_numpy(raw.data).view(_DTYPES[raw.dtype])
        result[name] = flat.reshape(raw.shape)
    return result


class SnapshotWriter:
    """Full-parameter snapshots of one session: bases, and deltas on the last one saved.

    Args:
        model_folder: The base model's; gives dtypes, config and tokenizer.
        base_model: What it was asked for by; recorded.
    """

    def __init__(self, model_folder: Path, base_model: str) -> None:
        self._dtypes = stored_dtypes(model_folder)
        common = Counter(d for d in self._dtypes.values() if d.is_floating_point).most_common(1)
        self._default = common[0][0] if common else torch.float32
        self._chain = ChainWriter(partial(_write_base, model_folder, base_model))

    def save(
        self,
        staging: Path,
        name: str,
        kind: SnapshotKind,
        parent: str | None,
        tensors: Tensors,
    ) -> SavedSnapshot:
        """Round to the base's dtype and write a base or a delta into an empty folder.

        Args:
            staging: Empty folder.
            name: The snapshot's name.
            kind: Base or delta.
            parent: For a delta, the snapshot it must stand on.
            tensors: Every parameter and persistent buffer by name, tied ones once; masters in
                float32 or weights as computed with. Copied, so training may go on.

        Raises:
            FiretitanError: CHAIN_BROKEN where `parent` is not the last snapshot saved here,
                NON_FINITE naming a tensor, STATE_DISK_FULL.
        """
        rounded = {}
        for key, tensor in tensors.items():
            dtype = self._dtypes.get(key, self._default)
            if not tensor.is_floating_point():
                dtype = tensor.dtype
            copy = tensor.detach().to("cpu", dtype, copy=True).contiguous()
            if copy.is_floating_point() and not bool(torch.isfinite(copy.sum(dtype=torch.float64))):
                raise FiretitanError(
                    Reason.NON_FINITE,
                    f'snapshot "{name}": tensor "{key}" holds NaN or infinity; load a checkpoint',
                    tensor=key,
                )
            rounded[key] = copy
        return self._chain.save(staging, name, kind, parent, to_raw(rounded))

    def forget(self) -> None:
        """Drop the last snapshot: weights were loaded, or it was never published."""
        self._chain.forget()


def stored_dtypes(model_folder: Path) -> dict[str, torch.dtype]:
    """Dtype of each tensor as the folder's safetensors files hold it."""
    dtypes = {}
    for file in weight_files(model_folder):
        for name, raw in read_safetensors(model_folder / file).items():
            dtypes[name] = _DTYPES.get(raw.dtype, torch.float32)
    return dtypes


def write_full(
    staging: Path, name: str, tensors: Tensors, model_folder: Path, base_model: str
) -> SavedSnapshot:
    """Write a Hugging Face model folder: safetensors in shards, config and tokenizer.

    Args:
        staging: Empty folder.
        name: The snapshot's name.
        tensors: By parameter name, tied ones once, in the dtype to store.
        model_folder: Config and tokenizer files are copied from here.
        base_model: Recorded in the manifest.

    Raises:
        FiretitanError: STATE_DISK_FULL.
    """
    return _write_base(model_folder, base_model, staging, name, to_raw(tensors))


def read_full(folder: Path) -> dict[str, torch.Tensor]:
    """Map a full snapshot's or a model folder's tensors; writing to them never changes the file."""
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        tensors |= from_raw(read_safetensors(folder / file))
    return tensors


def read_delta(folder: Path, before: Tensors, *, digest: str | None = None) -> dict[str, Any]:
    """Build the tensors a delta leads to from its parent's, in new memory.

    Raises:
        FiretitanError: As `delta.apply_delta`.
    """
    return from_raw(apply_delta(folder, to_raw(before), digest=digest))


def tensors_digest(tensors: Tensors) -> str:
    """`result_digest` of torch tensors."""
    return result_digest(to_raw(tensors))


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter's files say of it."""

    rank: int
    alpha: float
    scaling: float
    """Factor of B A: alpha / rank, or alpha / sqrt(rank) where PEFT's `use_rslora` is set."""
    target_modules: tuple[str, ...]
    base_model: str
    revision: str | None


def base_reference(base_model: str, info: ModelInfo) -> tuple[str, str | None]:
    """Name and revision under which others find the base: the hub's id, else the local folder."""
    if info.source == "hub":
        return base_model, Path(info.path).name
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
        tensors[f"{_PEFT_PREFIX}{module}{_A}"] = a.detach().to(torch.float32)
        tensors[f"{_PEFT_PREFIX}{module}{_B}"] = b.detach().to(torch.float32)
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
    about = _about(SnapshotFormat.PEFT_ADAPTER, name, base_model, digest)
    return SavedSnapshot(
        seal(staging, about), SnapshotKind.BASE, SnapshotFormat.PEFT_ADAPTER, digest
    )


def read_adapter(
    folder: Path,
) -> tuple[AdapterConfig, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Read a PEFT LoRA adapter, ours or another's; never runs code or reads pickle.

    Returns:
        Its configuration, and A and B by module name.

    Raises:
        FiretitanError: INVALID_ARGUMENT naming the missing file or malformed tensor, UNSUPPORTED
            naming the setting this project cannot honour, CHECKSUM_MISMATCH for a damaged file.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file() or not (folder / ADAPTER_WEIGHTS).is_file():
        raise _bad_adapter(folder, f"needs {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} (safetensors)")
    try:
        settings = json.loads(path.read_bytes())
        config = _adapter_config(folder, settings)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _bad_adapter(folder, f"{ADAPTER_CONFIG} is not readable: {error!r}") from error
    raw = read_safetensors(folder / ADAPTER_WEIGHTS)
    return config, _pairs(folder, config, from_raw(raw))


def adapter_digest(folder: Path) -> str:
    """`result_digest` of an adapter's tensors as its file holds them."""
    return result_digest(read_safetensors(folder / ADAPTER_WEIGHTS))


def _write_base(
    model_folder: Path, base_model: str, staging: Path, name: str, tensors: RawTensors
) -> SavedSnapshot:
    split = split_torch_state_dict_into_shards(from_raw(tensors), max_shard_size=MAX_SHARD_BYTES)
    for file, names in split.filename_to_tensors.items():
        write_safetensors(staging / file, {key: tensors[key] for key in names}, {"format": "pt"})
    with disk_errors(staging / "config.json"):
        if split.is_sharded:
            index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            (staging / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))
        for pattern in _COPIED:
            for path in sorted(model_folder.glob(pattern)):
                if path.name not in _NOT_COPIED:
                    shutil.copyfile(path, staging / path.name)
    digest = result_digest(tensors)
    about = _about(SnapshotFormat.HF_FULL, name, base_model, digest)
    return SavedSnapshot(seal(staging, about), SnapshotKind.BASE, SnapshotFormat.HF_FULL, digest)


def _about(form: SnapshotFormat, name: str, base_model: str, digest: str) -> dict[str, Any]:
    return {
        "kind": SnapshotKind.BASE.value,
        "format": form.value,
        "name": name,
        "base_model": base_model,
        "result_digest": digest,
    }


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


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_dropout": (),
    "init_lora_weights": (),
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


def _adapter_config(folder: Path, settings: dict[str, Any]) -> AdapterConfig:
    if settings["peft_type"] != "LORA":
        raise _unsupported(folder, "peft_type", settings["peft_type"])
    for key, value in settings.items():
        known = _NEUTRAL.get(key)
        if value and (known is None or (known and value not in known)):
            raise _unsupported(folder, key, value)
    rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    if rank < 1:
        raise _bad_adapter(folder, f"r={rank}; 1 or more")
    targets = settings["target_modules"]
    return AdapterConfig(
        rank=rank,
        alpha=alpha,
        scaling=alpha / (rank**0.5 if settings.get("use_rslora") else rank),
        target_modules=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        base_model=str(settings.get("base_model_name_or_path") or ""),
        revision=settings.get("revision"),
    )


def _pairs(
    folder: Path, config: AdapterConfig, tensors: Tensors
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    left = {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in tensors.items()}
    pairs = {}
    for module in sorted({name.removesuffix(_A).removesuffix(_B) for name in left}):
        a, b = left.pop(module + _A, None), left.pop(module + _B, None)
        if a is None or b is None:
            raise _bad_adapter(folder, f'"{module}" is no pair of {_A[1:]} and {_B[1:]}')
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != config.rank or b.shape[1] != config.rank:
            raise _bad_adapter(
                folder,
                f'"{module}" has A {list(a.shape)} and B {list(b.shape)}, r is {config.rank}',
            )
        pairs[module] = (a, b)
    if not pairs:
        raise _bad_adapter(folder, "holds no LoRA tensors")
    return pairs


def _bad_adapter(folder: Path, what: str) -> FiretitanError:
    return FiretitanError(Reason.INVALID_ARGUMENT, f"adapter {folder.name}: {what}", field="path")


def _unsupported(folder: Path, key: str, value: object) -> FiretitanError:
    return FiretitanError(
        Reason.UNSUPPORTED,
        f"adapter {folder.name}: {ADAPTER_CONFIG} has {key}={value!r}, which is not supported; "
        "plain LoRA on linear layers is",
        field=key,
    )
