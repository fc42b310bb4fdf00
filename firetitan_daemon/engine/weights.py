"""Turns published snapshots into weights of one loaded model, and puts a version into the model.

Knows: snapshot folders, the model's parameters and linear layers. Must not know: requests, batches,
who is served what.

A version is built beside the live ones and checked before anything can see it. To serve it, the
model's parameters point at its tensors and the LoRA layers at its adapter: no tensor is copied.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import SnapshotFormat, SnapshotKind, SnapshotLayer
from firetitan_daemon.engine.delta import apply_delta
from firetitan_daemon.engine.export import read_full
from firetitan_daemon.engine.lora import Adapter, LoraPair, LoraSlot, wrap_modules
from firetitan_daemon.engine.models import LoadedModel
from firetitan_daemon.engine.peft import read_adapter
from firetitan_daemon.engine.raw import RawTensors, result_digest
from firetitan_daemon.engine.tensors import Tensors, from_raw
from firetitan_daemon.engine.versions import Version


@dataclass(frozen=True)
class Content:
    """What a version puts into the model."""

    parameters: Tensors
    """By the model's parameter names; an adapter's are those of the base."""
    adapter: Adapter | None
    stored: RawTensors | None
    """A full version's tensors as saved: what the next delta stands on."""


class ModelWeights:
    """The weights of one loaded model. `build` may run on any thread, the rest on the model's.

    Args:
        loaded: The model, holding the base's weights.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        self._parameters = dict(loaded.model.named_parameters())
        self._twins: dict[str, str] = {}
        """Parameters that were one with another until a version told them apart; to that other."""
        self._slot: LoraSlot | None = None
        self._wrapped: set[str] = set()
        self._selected: Version | None = None
        self._on_base: weakref.WeakSet[Version] = weakref.WeakSet()
        """The base and the adapters over it that are still in use: they hold the base's tensors."""

    def base(self) -> Version:
        """The base model's own weights, under the empty name."""
        own = {name: parameter.data for name, parameter in self._parameters.items()}
        version = Version("", self._loaded.info.fingerprint, True, Content(own, None, None))
        self._on_base.add(version)
        return version

    def build(
        self,
        layers: Sequence[SnapshotLayer],
        find: Callable[[str], Version | None],
    ) -> Version:
        """Read, verify and assemble the version the last layer names.

        Args:
            layers: From a base, or from a delta whose parent `find` knows.
            find: A version in memory by name, or None.

        Raises:
            FiretitanError: CHECKSUM_MISMATCH, CHAIN_BROKEN, UNSUPPORTED, each naming the layer.
        """
        last = layers[-1]
        if last.format is SnapshotFormat.PEFT_ADAPTER:
            return self._build_adapter(last)
        start, stored = _start(layers, find)
        for index, layer in enumerate(layers[start:], start):
            parent = layers[index - 1] if index > start else None
            stored = _read_layer(layer, stored, parent.digest if parent is not None else None)
        assert stored is not None
        parameters = self._fitted(stored, last.name)
        return Version(last.name, last.result_digest, True, Content(parameters, None, stored))

    def select(self, version: Version) -> None:
        """Make the model compute with a version."""
        if version is self._selected:
            return
        content: Content = version.content
        for name, parameter in self._parameters.items():
            own = content.parameters.get(name)
            parameter.data = content.parameters[self._twins[name]] if own is None else own
        if self._slot is not None:
            self._slot.active = content.adapter
        self._selected = version

    def wrap_for(self, version: Version) -> None:
        """Make the model able to hold the version.

        Every layer it adapts gets a LoRA layer, and every tied parameter of which it has a weight
        of its own becomes one, where that is not so yet.
        """
        for name in sorted(version.content.parameters.keys() - self._parameters.keys()):
            self._untie(name)
        new = set(version.content.adapter or ()) - self._wrapped
        if new:
            self._slot = wrap_modules(self._loaded.model, sorted(new))
            self._wrapped |= new
            self._selected = None

    def _untie(self, name: str) -> None:
        module, _, leaf = name.rpartition(".")
        owner = self._loaded.model.get_submodule(module)
        tied = getattr(owner, leaf)
        (twin,) = (key for key, parameter in self._parameters.items() if parameter is tied)
        own = torch.nn.Parameter(tied.data, requires_grad=False)
        setattr(owner, leaf, own)
        self._parameters[name], self._twins[name] = own, twin
        self._selected = None

    def _build_adapter(self, layer: SnapshotLayer) -> Version:
        durable.verify_folder(layer.path, layer.digest)
        stored = read_adapter(layer.path)
        _check_result(layer, stored.tensors)
        adapter = {}
        for name in stored.modules:
            a, b = from_raw(dict(zip("ab", stored.pair(name), strict=True))).values()
            adapter[name] = self._pair(layer, name, a, b, stored.scaling)
        content = Content(self._base_parameters(), adapter, None)
        version = Version(layer.name, layer.result_digest, False, content)
        self._on_base.add(version)
        return version

    def _pair(
        self, layer: SnapshotLayer, name: str, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> LoraPair:
        weight = self._weight_of(name)
        if weight is None:
            raise _misfit(layer.name, f"{name!r} is no linear layer of this model")
        if a.shape[1] != weight.shape[1] or b.shape != (weight.shape[0], a.shape[0]):
            raise _misfit(
                layer.name,
                f"{name!r} has A {list(a.shape)} and B {list(b.shape)}, its weight is "
                f"{list(weight.shape)}",
            )
        a, b = (each.to(weight.device, torch.float32, copy=True) for each in (a, b))
        return LoraPair(a, b, scaling, weight.dtype)

    def _weight_of(self, module: str) -> torch.Tensor | None:
        try:
            weight = getattr(self._loaded.model.get_submodule(module), "weight", None)
        except AttributeError:
            return None
        return weight if isinstance(weight, torch.Tensor) and weight.dim() == 2 else None

    def _base_parameters(self) -> Tensors:
        for version in self._on_base:
            parameters: Tensors = version.content.parameters
            return parameters
        # A whole model has taken the base's place since.
        return self._fitted(read_full(Path(self._loaded.info.path)), "the base model")

    def _fitted(self, stored: RawTensors, name: str) -> dict[str, torch.Tensor]:
        """A tensor for each parameter, in its dtype and on its device; no copy where both fit.

        A tied parameter that is stored under several names with different content has a tensor
        under each.
        """
        model = self._loaded.model
        aliases: dict[int, list[str]] = {}
        for alias, parameter in model.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(parameter), []).append(alias)
        known = {alias for group in aliases.values() for alias in group}
        unknown = sorted(stored.keys() - known - model.state_dict().keys())
        if unknown:
            raise _misfit(name, f"{unknown[0]!r} is no tensor of {type(model).__name__}")
        tensors = from_raw(stored)
        fitted = {}
        for key, parameter in self._parameters.items():
            found = [alias for alias in aliases[id(parameter)] if alias in stored]
            if not found and key in self._twins:
                continue
            if not found:
                raise _misfit(name, f"{key!r} is missing")
            # The key itself, where it is stored, else the name it is stored under.
            found.sort(key=lambda alias: alias != key)
            for alias in found:
                tensor = tensors[alias]
                if tensor.shape != parameter.shape:
                    raise _misfit(
                        name, f"{alias!r} is {list(tensor.shape)}, here {list(parameter.shape)}"
                    )
                if alias == found[0]:
                    fitted[key] = tensor.to(parameter.device, parameter.dtype)
                elif not torch.equal(tensor, tensors[found[0]]):
                    fitted[alias] = tensor.to(parameter.device, parameter.dtype)
        return fitted


def _start(
    layers: Sequence[SnapshotLayer], find: Callable[[str], Version | None]
) -> tuple[int, RawTensors | None]:
    """Where to begin: behind the last layer that is in memory, or at a base."""
    for index in reversed(range(len(layers))):
        version = find(layers[index].name)
        if version is not None and version.result_digest == layers[index].result_digest:
            return index + 1, version.content.stored
        if layers[index].kind is not SnapshotKind.DELTA:
            return index, None
    parent = str(durable.verify_folder(layers[0].path, layers[0].digest).get("parent"))
    version = find(parent)
    if version is None or version.content.stored is None:
        raise FiretitanError(
            Reason.CHAIN_BROKEN,
            f"delta {layers[0].name} stands on {parent}, which is not in memory here; send the "
            "chain from its base",
            snapshot=layers[0].name,
            parent=parent,
        )
    return 0, version.content.stored


def _read_layer(
    layer: SnapshotLayer, before: RawTensors | None, parent_digest: str | None
) -> RawTensors:
    if layer.format is SnapshotFormat.HF_FULL:
        durable.verify_folder(layer.path, layer.digest)
        tensors: RawTensors = read_full(layer.path)
    elif layer.format is SnapshotFormat.XOR_ZSTD and before is not None:
        tensors = apply_delta(layer.path, before, digest=layer.digest, parent_digest=parent_digest)
    else:
        raise FiretitanError(
            Reason.CHAIN_BROKEN,
            f"snapshot {layer.name} is {layer.format} and cannot stand inside a chain",
            snapshot=layer.name,
        )
    _check_result(layer, tensors)
    return tensors


def _check_result(layer: SnapshotLayer, tensors: RawTensors) -> None:
    found = result_digest(tensors)
    if found != layer.result_digest:
        raise FiretitanError(
            Reason.CHECKSUM_MISMATCH,
            f"snapshot {layer.name} comes out as {found}, expected {layer.result_digest}; what was "
            "served before is served on",
            snapshot=layer.name,
            expected=layer.result_digest,
            found=found,
        )


def _misfit(name: str, what: str) -> FiretitanError:
    return FiretitanError(
        Reason.CHAIN_BROKEN,
        f"snapshot {name} does not fit the model served here: {what}",
        snapshot=name,
    )
