"""TrainingShapeProfile: a training shape of the daemon in documented terms.

Knows: the documented fields, a model's config.json. Must not know: how the daemon is asked.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firetitan.v1 import shape_pb2

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")


@dataclass(frozen=True)
class TrainingShapeProfile:
    """A training shape, resolved to its pinned version."""

    training_shape_version: str
    trainer_image_tag: str
    max_supported_context_length: int
    """Tokens; 0: the base model's own limit."""
    node_count: int
    deployment_shape_version: str
    deployment_image_tag: str
    accelerator_type: str
    accelerator_count: int
    base_model_weight_precision: str
    pipeline_parallelism: int
    trainer_mode: str = ""

    @property
    def training_shape(self) -> str | None:
        """The training shape without its version."""
        return _unversioned(self.training_shape_version)

    @property
    def deployment_shape(self) -> str | None:
        """The deployment shape without its version."""
        return _unversioned(self.deployment_shape_version)

    @property
    def supports_lora(self) -> bool:
        """Whether adapters can be trained; always, unless the mode says otherwise."""
        return self.trainer_mode in ("", "LORA_TRAINER")


def profile_of(shape: shape_pb2.Shape, max_context_length: int = 0) -> TrainingShapeProfile:
    """The profile of a training shape.

    Args:
        shape: As the daemon tells it.
        max_context_length: Tokens, where the shape leaves it to the model; 0: unknown.
    """
    return TrainingShapeProfile(
        training_shape_version=shape.name,
        trainer_image_tag="",
        max_supported_context_length=shape.max_context_length or max_context_length,
        node_count=1,
        deployment_shape_version=shape.deployment_shape,
        deployment_image_tag="",
        accelerator_type=shape.device.upper() if shape.num_devices else "",
        accelerator_count=shape.num_devices,
        base_model_weight_precision=shape.dtype,
        pipeline_parallelism=1,
        trainer_mode=shape.trainer_mode,
    )


def _unversioned(shape: str) -> str | None:
    return shape.partition("/versions/")[0] or None


def read_config(model: str) -> dict[str, Any] | None:
    """The config.json of a model in a folder or in the Hugging Face cache; None: not there."""
    for folder in _folders(model):
        try:
            config = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError):
            continue
        if isinstance(config, dict):
            return config
    return None


def _folders(model: str) -> list[Path]:
    if "\0" in model:
        return []
    found = [Path(model).expanduser()]
    if ".." not in model and not model.startswith(("/", "~", ".")):
        home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
        cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
        repository = cache / f"models--{model.replace('/', '--')}"
        found += sorted((repository / "snapshots").glob("*"))
    return found


def is_moe(config: dict[str, Any]) -> bool:
    """Whether a model's config.json describes a mixture of experts."""
    return any(int(part.get(name) or 0) > 1 for part in _parts(config) for name in _EXPERTS)


def context_length(config: dict[str, Any]) -> int:
    """Longest sequence of a model's config.json in tokens; 0 where it does not say."""
    found = (part.get(name) for part in _parts(config) for name in _LENGTHS)
    return next((int(value) for value in found if value), 0)


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    text = config.get("text_config")
    return [config, text] if isinstance(text, dict) else [config]
