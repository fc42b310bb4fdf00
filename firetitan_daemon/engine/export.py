"""Full weights to serve, as folders that transformers loads as they are, and their reader.

Knows: torch tensors by parameter name, the Hugging Face layout. Must not know: how the weights were
trained, which model object they go into, the daemon's chain.

A full snapshot has the base's stored dtype and its config and tokenizer files; float32 masters are
rounded once, here. `manifest.json` beside them is ours; transformers passes it over. Adapters have
modules of their own.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import SavedSnapshot, SnapshotFormat, SnapshotKind
from firetitan_daemon.engine.peft import ADAPTER_CONFIG
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
from firetitan_daemon.engine.snapshots import ChainWriter, about_base
from firetitan_daemon.engine.tensors import Tensors, from_raw, stored_dtypes, to_raw

MAX_SHARD_BYTES = 5_000_000_000
_INDEX = "model.safetensors.index.json"
_COPIED = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
_NOT_COPIED = {durable.MANIFEST, _INDEX, ADAPTER_CONFIG}


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
            if copy.is_floating_point() and not finite(copy):
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


def write_full(
    staging: Path,
    name: str,
    tensors: Tensors,
    model_folder: Path,
    base_model: str,
    config: dict[str, Any] | None = None,
) -> SavedSnapshot:
    """Write a Hugging Face model folder: safetensors in shards, config and tokenizer.

    Args:
        staging: Empty folder.
        name: The snapshot's name.
        tensors: By parameter name, tied ones once, in the dtype to store.
        model_folder: Config and tokenizer files are copied from here.
        base_model: Recorded in the manifest.
        config: Content of config.json; None: the base model's.

    Raises:
        FiretitanError: STATE_DISK_FULL.
    """
    return _write_base(model_folder, base_model, staging, name, to_raw(tensors), config)


def read_full(folder: Path) -> dict[str, RawTensor]:
    """Map the tensors of a full snapshot or a model folder; writing to one never changes the file.

    Raises:
        FiretitanError: CHECKSUM_MISMATCH naming a damaged file.
    """
    tensors: dict[str, RawTensor] = {}
    for file in weight_files(folder):
        tensors |= read_safetensors(folder / file)
    return tensors


def finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; one pass, a second only where the sum overflows."""
    fast = bool(torch.isfinite(tensor.sum(dtype=torch.float32)))
    return fast or bool(torch.isfinite(tensor).all())


def _write_base(
    model_folder: Path,
    base_model: str,
    staging: Path,
    name: str,
    tensors: RawTensors,
    config: dict[str, Any] | None = None,
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
        if config is not None:
            (staging / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    digest = result_digest(tensors)
    about = about_base(SnapshotFormat.HF_FULL, name, base_model, digest)
    return SavedSnapshot(seal(staging, about), SnapshotKind.BASE, SnapshotFormat.HF_FULL, digest)
