"""PEFT adapter folders, written without PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from firetitan_daemon.engine.raw import RawTensor, write_safetensors

Arrays = Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]
TOY_LAYER = "unembed"
"""The layer that adapters of the toy model are on, [64, 16]."""


def write_peft(folder: Path, pairs: Arrays, *, alpha: float = 8.0, **settings: Any) -> Path:
    """A folder with A [r, I] and B [O, r] for each layer; `settings` replace those of its file."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = RawTensor.of_array(a)
        tensors[f"base_model.model.{module}.lora_B.weight"] = RawTensor.of_array(b)
    write_safetensors(folder / "adapter_model.safetensors", tensors)
    config = {
        "peft_type": "LORA",
        "r": next(iter(pairs.values()))[0].shape[0],
        "lora_alpha": alpha,
        "target_modules": sorted({module.rpartition(".")[2] for module in pairs}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    return folder


def write_toy(folder: Path, *, rank: int = 4, seed: int = 0, **settings: Any) -> Path:
    """An adapter of the toy model."""
    draw = np.random.default_rng(seed)
    a = draw.normal(size=(rank, 16)).astype(np.float32)
    b = draw.normal(size=(64, rank)).astype(np.float32)
    return write_peft(folder, {TOY_LAYER: (a, b)}, **settings)
