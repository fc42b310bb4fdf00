"""What was saved, written once more as a plain Hugging Face or PEFT folder.

Knows: snapshot and state folders. Must not know: who asks, where the ledger is.

A base or an adapter is copied, a chain of deltas is applied to its base, a training state becomes
the snapshot that would have been saved beside it.
"""

from __future__ import annotations

import errno
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.adapter import write_adapter
from firetitan_daemon.engine.api import SnapshotKind
from firetitan_daemon.engine.delta import apply_delta
from firetitan_daemon.engine.export import SnapshotWriter, read_full, write_full
from firetitan_daemon.engine.peft import A_SUFFIX, B_SUFFIX
from firetitan_daemon.engine.raw import disk_errors, read_safetensors
from firetitan_daemon.engine.resolve import ResolvedModel, resolve_model
from firetitan_daemon.engine.tensors import Tensors, from_raw


@dataclass(frozen=True)
class Export:
    """What to write where."""

    name: str
    """Of what was saved; recorded."""
    base_model: str
    """What its session was trained on: a folder or a Hugging Face id."""
    layers: tuple[tuple[str, str], ...]
    """(folder, digest): a base or an adapter and the deltas on it, or one training state."""
    is_state: bool
    target: str
    """Folder that does not exist yet, is empty, or holds this very export."""


def export(job: Export) -> None:
    """Write a folder; it is there as a whole, or not.

    Raises:
        FiretitanError: CHECKSUM_MISMATCH naming a damaged file, MODEL_NOT_FOUND and
            INVALID_ARGUMENT for a state whose base model is gone or another, or a target that holds
            something else, STATE_DISK_FULL.
        OSError: The target cannot be written to.
    """
    target = Path(job.target)
    staging = target.parent / f"{durable.TEMPORARY_PREFIX}{target.name}"
    durable.remove(staging)
    with disk_errors(staging / "config.json"):
        durable.make_folder(target.parent)
        staging.mkdir()
        try:
            _fill(job, staging)
            if _is_same(staging, target):
                return
            if target.is_dir():
                _remove_empty(target)
            durable.publish_folder(staging, target)
        finally:
            durable.remove(staging)


def _is_same(staging: Path, target: Path) -> bool:
    """Whether the target holds the export already: its sender did not hear of it."""
    try:
        if durable.read_manifest(staging) != durable.read_manifest(target):
            return False
        durable.verify_folder(target)
    except (FileNotFoundError, FiretitanError):  # none, or changed by its owner since
        return False
    return True


def _remove_empty(target: Path) -> None:
    try:
        target.rmdir()
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"folder: {target} is there and not empty; choose another",
            field="folder",
        ) from error


def _fill(job: Export, staging: Path) -> None:
    folders = [(Path(folder), digest) for folder, digest in job.layers]
    base, digest = folders[0]
    manifest = durable.verify_folder(base, digest)
    if job.is_state:
        _write_state(job, base, manifest, staging)
        return
    if len(folders) == 1:
        for file in base.iterdir():
            shutil.copyfile(file, staging / file.name)
        durable.flush_folder(staging)
        return
    tensors = read_full(base)
    for (_, parent_digest), (folder, delta_digest) in pairwise(folders):
        tensors = apply_delta(folder, tensors, digest=delta_digest, parent_digest=parent_digest)
    write_full(staging, job.name, from_raw(tensors), base, job.base_model)


def _write_state(job: Export, state: Path, manifest: dict[str, Any], staging: Path) -> None:
    origin = manifest.get("origin", {})
    model = resolve_model(job.base_model)
    if origin.get("base_fingerprint") != model.fingerprint:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"{job.name} was trained on {job.base_model!r} as it was before: its fingerprint is "
            f"{model.fingerprint[:12]} now, it was {str(origin.get('base_fingerprint'))[:12]}",
            field="base_model",
        )
    masters = from_raw(read_safetensors(state / "weights.safetensors"))
    lora = origin.get("lora")
    if lora is None:
        writer = SnapshotWriter(model.path, job.base_model)
        whole = _buffers(model) | masters
        writer.save(staging, job.name, SnapshotKind.BASE, None, whole)
        return
    is_hub = model.source == "hub"
    modules = [name.removesuffix(A_SUFFIX) for name in masters if name.endswith(A_SUFFIX)]
    write_adapter(
        staging,
        job.name,
        {one: (masters[one + A_SUFFIX], masters[one + B_SUFFIX]) for one in modules},
        alpha=float(lora["alpha"]),
        base_model=job.base_model.partition("@")[0] if is_hub else str(model.path),
        revision=model.revision,
        model_folder=model.path,
    )


def _buffers(model: ResolvedModel) -> dict[str, torch.Tensor]:
    """The model's persistent buffers, which training leaves as they are."""
    from firetitan_daemon.engine.pretrained import empty_model  # transformers takes seconds

    empty = empty_model(model.path, model.path.name)
    parameters = {name for name, _ in empty.named_parameters(remove_duplicate=False)}
    stored: Tensors = from_raw(read_full(model.path))
    kept = empty.state_dict().keys() - parameters
    return {name: tensor for name, tensor in stored.items() if name in kept}
