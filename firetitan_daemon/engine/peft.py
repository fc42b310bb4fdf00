"""Reads PEFT LoRA adapters, ours or another's, and fits them into a session's own.

Knows: PEFT's two files, their names and settings; numpy. Must not know: torch, training, where the
folder came from.

Only `adapter_config.json` and safetensors are read: nothing in them can run code. What plain LoRA
on linear layers cannot honour is refused by name.

Shapes: I inputs and O outputs of a layer, r the adapter's rank, R the session's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import Float32Array
from firetitan_daemon.engine.raw import RawTensor, RawTensors, read_safetensors

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"
_MAX_RANK = 65_536
BASE_SUFFIX = ".base_layer.weight"
"""PEFT stores the base's own weight beside an adapter on the output layer."""

ArrayPair = tuple[Float32Array, Float32Array]
"""A [R, I] and B [O, R] of one layer."""

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
    "layers_to_transform": (),
    "layers_pattern": (),
    "exclude_modules": (),
    "qalora_group_size": (),
    "runtime_config": (),
}
"""Settings with a value that changes nothing here (empty: any value). Which layers are adapted is
what the tensors say."""
_REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")


@dataclass(frozen=True)
class PeftAdapter:
    """A LoRA adapter as it was stored."""

    name: str
    """What messages call it."""
    rank: int
    scaling: float
    """What B A is multiplied by: alpha / r, or alpha / sqrt(r) with rslora."""
    tensors: Mapping[str, RawTensor]
    """By the names in the file."""

    @property
    def modules(self) -> list[str]:
        """Names of the adapted layers, without PEFT's prefix."""
        return [
            name.removesuffix(A_SUFFIX).removeprefix(PEFT_PREFIX)
            for name in sorted(self.tensors)
            if name.endswith(A_SUFFIX)
        ]

    @property
    def base_weights(self) -> dict[str, RawTensor]:
        """Copies of the base's own weights by layer; an adapter may not change them."""
        return {
            name.removesuffix(BASE_SUFFIX).removeprefix(PEFT_PREFIX): tensor
            for name, tensor in self.tensors.items()
            if name.endswith(BASE_SUFFIX)
        }

    def pair(self, module: str) -> tuple[RawTensor, RawTensor]:
        """A [r, I] and B [O, r] of a layer."""
        path = PEFT_PREFIX + module
        return self.tensors[path + A_SUFFIX], self.tensors[path + B_SUFFIX]

    def refuse(
        self, what: str, field: str = "path", reason: Reason = Reason.INVALID_ARGUMENT
    ) -> FiretitanError:
        """The error for something about this adapter."""
        return FiretitanError(reason, f"adapter {self.name}: {what}", field=field)


def read_adapter(folder: Path, name: str | None = None) -> PeftAdapter:
    """Read a PEFT LoRA adapter.

    Args:
        folder: Holds its two files.
        name: What messages call it; None: by the folder's name.

    Raises:
        FiretitanError: INVALID_ARGUMENT naming the missing file or malformed tensor, UNSUPPORTED
            naming the setting this project cannot honour.
    """
    name = folder.name if name is None else name
    path = folder / ADAPTER_CONFIG
    if not path.is_file() or not (folder / ADAPTER_WEIGHTS).is_file():
        raise _bad_adapter(name, f"needs {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS} (safetensors)")
    try:
        settings: dict[str, Any] = json.loads(path.read_bytes())
        rank, scaling = _check_settings(name, settings)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _bad_adapter(name, f"{ADAPTER_CONFIG} is not readable: {error!r}") from error
    try:
        tensors = read_safetensors(folder / ADAPTER_WEIGHTS)
    except FiretitanError as error:
        raise _bad_adapter(name, f"{ADAPTER_WEIGHTS} is no safetensors file") from error
    _check_pairs(name, rank, tensors)
    adapter = PeftAdapter(name, rank, scaling, tensors)
    _check_targets(adapter, settings["target_modules"])
    return adapter


def fit_adapter(
    adapter: PeftAdapter, fresh: Mapping[str, ArrayPair], scaling: float
) -> dict[str, ArrayPair]:
    """The session's pairs with which it computes what the adapter does.

    A smaller rank is filled up with the fresh A and zeros in B: the same product, and all of it can
    be trained. Another scale goes into B. Layers that the adapter leaves out stay fresh, where B is
    zero.

    Args:
        adapter: What to load.
        fresh: The session's pairs as they were first made, by layer.
        scaling: What the session multiplies B A by.

    Raises:
        FiretitanError: INVALID_ARGUMENT or NON_FINITE naming what does not fit.
    """
    session_rank = next(iter(fresh.values()))[0].shape[0]
    if adapter.rank > session_rank:
        raise adapter.refuse(
            f"has rank {adapter.rank}, the session {session_rank}; a session can take its own rank "
            "or less",
            "lora_rank",
        )
    adapted = frozenset(adapter.modules)
    foreign = sorted(adapted - fresh.keys())
    if foreign:
        raise adapter.refuse(
            f'adapts "{foreign[0]}", which this session does not (one of {len(foreign)}); its '
            "train_attn, train_mlp and train_unembed say what it adapts",
            "target_modules",
        )
    fitted = {}
    for module, (fresh_a, fresh_b) in fresh.items():
        a, b = fresh_a.copy(), np.zeros_like(fresh_b)
        if module in adapted:
            stored_a, stored_b = adapter.pair(module)
            wanted = (adapter.rank, a.shape[1]), (b.shape[0], adapter.rank)
            if (stored_a.shape, stored_b.shape) != wanted:
                raise adapter.refuse(
                    f'"{module}" has A {list(stored_a.shape)} and B {list(stored_b.shape)}, this '
                    f"model takes {list(wanted[0])} and {list(wanted[1])}",
                    module,
                )
            a[: adapter.rank] = _float32(adapter, module, stored_a)
            b[:, : adapter.rank] = _float32(adapter, module, stored_b)
            if adapter.scaling != scaling:
                with np.errstate(over="ignore"):
                    b *= np.float32(adapter.scaling / scaling)
                _check_finite(adapter, module, b)
        fitted[module] = (a, b)
    return fitted


def _float32(adapter: PeftAdapter, module: str, tensor: RawTensor) -> Float32Array:
    if tensor.dtype == "BF16":
        bits = tensor.data.view(np.uint16).astype(np.uint32) << 16
        array = bits.view(np.float32).reshape(tensor.shape)
    elif tensor.dtype in ("F32", "F16", "F64"):
        array = tensor.array().astype(np.float32)
    else:
        raise adapter.refuse(
            f'"{module}" is stored as {tensor.dtype}; give floats', module, Reason.UNSUPPORTED
        )
    _check_finite(adapter, module, array)
    return array


def _check_finite(adapter: PeftAdapter, module: str, array: Float32Array) -> None:
    if not np.isfinite(array).all():
        raise adapter.refuse(f'"{module}" holds NaN or infinity', module, Reason.NON_FINITE)


def _check_settings(name: str, settings: dict[str, Any]) -> tuple[int, float]:
    """Refuse what is not plain LoRA; returns the rank and the scale."""
    for key in _REQUIRED:
        if key not in settings:
            raise _bad_adapter(name, f"{ADAPTER_CONFIG} has no {key}, which it needs")
    if settings["peft_type"] != "LORA":
        raise _unsupported(name, "peft_type", settings["peft_type"])
    for key, value in settings.items():
        known = _NEUTRAL.get(key)
        if key == "auto_mapping" and _of_transformers(value):
            continue
        if value and (known is None or (known and value not in known)):
            raise _unsupported(name, key, value)
    rank, alpha = settings["r"], settings["lora_alpha"]
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= _MAX_RANK:
        raise _bad_adapter(name, f"r={rank!r}; a whole number, 1 to {_MAX_RANK}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not _is_finite(alpha):
        raise _bad_adapter(name, f"lora_alpha={alpha!r:.40}; a finite number")
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _is_finite(number: float) -> bool:
    """Whether it is a number of float64; JSON has whole numbers beyond."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def _of_transformers(mapping: object) -> bool:
    """Whether what PEFT notes of a model's class names no library but transformers."""
    if not isinstance(mapping, dict):
        return False
    library = mapping.get("parent_library")
    return isinstance(library, str) and library.partition(".")[0] == "transformers"


def _check_pairs(name: str, rank: int, tensors: RawTensors) -> None:
    keys = [key for key in tensors if not key.endswith(BASE_SUFFIX)]
    if not keys:
        raise _bad_adapter(name, "holds no LoRA tensors")
    for module in sorted({n.removesuffix(A_SUFFIX).removesuffix(B_SUFFIX) for n in keys}):
        a, b = tensors.get(module + A_SUFFIX), tensors.get(module + B_SUFFIX)
        if a is None or b is None or not module.startswith(PEFT_PREFIX):
            raise _bad_adapter(name, f'"{module}" is no pair of lora_A and lora_B weights')
        if len(a.shape) != 2 or len(b.shape) != 2 or {a.shape[0], b.shape[1]} != {rank}:
            raise _bad_adapter(
                name, f'"{module}" has A {list(a.shape)} and B {list(b.shape)}, r is {rank}'
            )


def _check_targets(adapter: PeftAdapter, targets: object) -> None:
    """Refuse tensors of layers that the settings leave out: PEFT would leave them out too.

    A pattern is not run: one can be written that never ends. The tensors say which layers it meant.
    """
    if isinstance(targets, str) or targets is None:
        return
    if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets):
        raise adapter.refuse(f"target_modules={targets!r}; a list of names", "target_modules")
    for module in adapter.modules:
        if not any(module == one or module.endswith(f".{one}") for one in targets):
            raise adapter.refuse(
                f'has tensors of "{module}", which target_modules does not name', "target_modules"
            )


def _bad_adapter(name: str, what: str) -> FiretitanError:
    return FiretitanError(Reason.INVALID_ARGUMENT, f"adapter {name}: {what}", field="path")


def _unsupported(name: str, key: str, value: object) -> FiretitanError:
    return FiretitanError(
        Reason.UNSUPPORTED,
        f"adapter {name}: {ADAPTER_CONFIG} has {key}={value!r}, which is not supported; "
        "plain LoRA on linear layers is",
        field=key,
    )
