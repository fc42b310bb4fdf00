"""A PEFT adapter as a model of its own: merged into its base once, kept in the cache.

Knows: adapters' folders, the models they stand on. Must not know: training, sampling, who asks.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from firetitan_daemon.engine.merge import merge_adapter, write_merged
from firetitan_daemon.engine.peft import ADAPTER_CONFIG, PeftAdapter, read_adapter
from firetitan_daemon.engine.pretrained import load_weights
from firetitan_daemon.engine.raw import result_digest
from firetitan_daemon.engine.resolve import (
    ResolvedModel,
    fingerprint,
    local_folder,
    made_model,
    resolve_model,
)
from firetitan_daemon.engine.tensors import from_raw, stored_dtypes

_MERGER = "1"
"""Changes whenever the same adapter would merge to other weights."""

log = logging.getLogger(__name__)


def merged_model(folder: Path, above: tuple[Path, ...] = ()) -> ResolvedModel:
    """The model an adapter makes of its base.

    Args:
        folder: A PEFT LoRA adapter; its configuration names the base model.
        above: Folders of the adapters whose base this is.

    Raises:
        FiretitanError: INVALID_ARGUMENT or UNSUPPORTED for an adapter that cannot be read or does
            not fit; MODEL_NOT_FOUND where its base model is not there.
    """
    adapter = read_adapter(folder)
    if folder in above:
        raise adapter.refuse("is among the adapters that it stands on", "base_model")
    base_model = _base_of(folder, adapter)
    base = resolve_model(base_model, (*above, folder))
    made_from = "\0".join(
        (_MERGER, base.fingerprint, repr(adapter.scaling), result_digest(adapter.tensors))
    )

    def build(staging: Path) -> None:
        log.info("merging adapter %s into %s, once", adapter.name, base_model)
        model = load_weights(base.path, base_model)
        pairs = {module: _pair(model, adapter, module) for module in adapter.modules}
        dtypes = stored_dtypes(base.path)
        merged = merge_adapter(model, pairs, adapter.scaling, dtypes)
        write_merged(staging, adapter.name, merged, base.path, base_model)

    path = made_model(f"merged-{adapter.name[:40]}", made_from, build)
    return ResolvedModel(path, f"adapter merged into {base_model}", fingerprint(path), None)


def _base_of(folder: Path, adapter: PeftAdapter) -> str:
    settings: dict[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_bytes())
    name, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    base = local_folder(name) if isinstance(name, str) else None
    if not isinstance(name, str) or not name or (base and base.resolve() == folder):
        raise adapter.refuse("names no base model; merge it, or give its base", "base_model")
    return f"{name}@{revision}" if base is None and isinstance(revision, str) and revision else name


def _pair(model: Any, adapter: PeftAdapter, module: str) -> Any:
    a, b = adapter.pair(module)
    try:
        weight = model.get_submodule(module).weight
    except AttributeError:
        raise adapter.refuse(f'adapts "{module}", which its base model lacks', module) from None
    if (a.shape[1], b.shape[0]) != (weight.shape[1], weight.shape[0]):
        raise adapter.refuse(
            f'"{module}" has A {list(a.shape)} and B {list(b.shape)}, its weight is '
            f"{list(weight.shape)}",
            module,
        )
    tensors = from_raw({"a": a, "b": b})
    return tensors["a"], tensors["b"]
