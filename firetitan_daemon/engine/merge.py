"""Adapters merged into their base model: whole weights that need no LoRA to run.

Knows: a transformers model's parameters, adapters by module name, the Hugging Face layout. Must not
know: training, the chain, PEFT's files.

W + scaling * B A is computed in float32 and rounded once. Where the output layer is tied to the
embeddings and has an adapter, the two part: the layer gets a weight of its own, and the written
configuration says so.

Shapes: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.adapter import Pairs
from firetitan_daemon.engine.api import ExportPrecision, SavedSnapshot, SnapshotKind
from firetitan_daemon.engine.export import finite, write_full
from firetitan_daemon.engine.tensors import Tensors


@dataclass(frozen=True)
class Merged:
    """Whole weights."""

    tensors: Tensors
    """By parameter name, tied ones once; on the CPU."""
    untied: bool
    """Whether the output layer has a weight of its own now that it had not before."""


def merge_adapter(
    model: Any,
    pairs: Pairs,
    scaling: float,
    dtypes: Mapping[str, torch.dtype],
    precision: ExportPrecision = ExportPrecision.SOURCE,
) -> Merged:
    """Add an adapter to the weights it stands on; the model stays as it is.

    Args:
        model: A transformers model; its linear layers may be wrapped.
        pairs: A [R, I] and B [O, R] by module name.
        scaling: Of the product B A.
        dtypes: Of the stored base's tensors by name; others get the most common one.
        precision: Those dtypes, or bfloat16 for every floating-point tensor.

    Raises:
        FiretitanError: NON_FINITE naming a tensor.
    """
    tensors: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}
    untied = False
    everything = {**dict(model.named_parameters(remove_duplicate=False))}
    everything |= {k: t for k, t in model.state_dict().items() if k not in everything}
    head = next(
        (n for n, m in model.named_modules() if m is model.get_output_embeddings()), "lm_head"
    )
    floating = [dtype for dtype in dtypes.values() if dtype.is_floating_point]
    common = max(set(floating), key=floating.count) if floating else torch.float32
    with torch.no_grad():
        for name, tensor in everything.items():
            module = name.removesuffix(".weight")
            pair = pairs.get(module) if name.endswith(".weight") else None
            first = names.setdefault(id(tensor), name)
            if pair is None and first != name and first in tensors:
                continue
            untied = untied or (module == head and pair is not None and first != name)
            merged = tensor.detach()
            if pair is not None:
                a, b = (each.detach().to(tensor.device, torch.float32) for each in pair)
                merged = torch.addmm(merged.to(torch.float32), b, a, alpha=scaling)
            dtype = tensor.dtype
            if dtype.is_floating_point:
                dtype = dtypes.get(name, common)
                if precision is ExportPrecision.BF16:
                    dtype = torch.bfloat16
            tensors[name] = merged.to("cpu", dtype, copy=True).contiguous()
            if dtype.is_floating_point and not finite(tensors[name]):
                raise FiretitanError(
                    Reason.NON_FINITE,
                    f'tensor "{name}" with the adapter merged into it holds NaN or infinity; load '
                    "a checkpoint",
                    tensor=name,
                )
    return Merged(tensors, untied)


def write_merged(
    staging: Path,
    name: str,
    merged: Merged,
    model_folder: Path,
    base_model: str,
    precision: ExportPrecision = ExportPrecision.SOURCE,
) -> SavedSnapshot:
    """Write merged weights as a Hugging Face folder.

    Args:
        staging: Empty folder.
        name: The snapshot's name.
        merged: The weights.
        model_folder: Config and tokenizer files are copied from here.
        base_model: Recorded in the manifest.
        precision: Also said in the written configuration.

    Raises:
        FiretitanError: STATE_DISK_FULL.
    """
    config = json.loads((model_folder / "config.json").read_bytes())
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict):
            continue
        if merged.untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
        if precision is ExportPrecision.BF16:
            part.pop("torch_dtype", None)
            part["dtype"] = "bfloat16"
    saved = write_full(staging, name, merged.tensors, model_folder, base_model, config)
    return replace(saved, kind=SnapshotKind.MERGED_BASE)
