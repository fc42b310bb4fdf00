"""Modules that answer to `fireworks.training.sdk` and hand out firetitan's names.

Knows: `sys.modules`, whether a real `fireworks` is there. Must not know: the names (`names` does),
tinker.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from firetitan_client.compat import names

_TOP = "fireworks"
_TRAINING = f"{_TOP}.training"


class _StandIn(ModuleType):
    """A module of the SDK; its names are resolved when they are asked for."""

    def __init__(self, name: str, *, is_package: bool) -> None:
        super().__init__(name, "firetitan's stand-in for this module of the managed service's SDK.")
        self.__spec__ = ModuleSpec(name, None, is_package=is_package)
        self.__package__ = name if is_package else name.rpartition(".")[0]
        if is_package:
            self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if not self.__name__.startswith(names.SDK):
            raise AttributeError(f"module {self.__name__!r} (of firetitan) has no {name!r}")
        if name == "__all__":
            return [one for one in names.listed(self.__name__) if names.exists(one)]
        value = names.resolve(self.__name__, name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        listed = self.__getattr__("__all__") if self.__name__.startswith(names.SDK) else []
        return sorted({*super().__dir__(), *listed})


@dataclass(frozen=True)
class _Replaced:
    """What was there before."""

    modules: dict[str, ModuleType]
    top: ModuleType
    training: Any
    """Attribute `training` of a real `fireworks`; None: it had none."""


_replaced: _Replaced | None = None


def put_in_place(*, force: bool) -> bool:
    """Put the stand-ins into `sys.modules`.

    Args:
        force: Also under a real `fireworks`, whose other parts stay.

    Returns:
        False where a real `fireworks` is installed and nothing was done.
    """
    global _replaced
    if _replaced is not None:
        return True
    real = _is_installed()
    if real and not force:
        return False
    top = importlib.import_module(_TOP) if real else _StandIn(_TOP, is_package=True)
    before = {
        name: module
        for name, module in sys.modules.items()
        if name == _TRAINING or name.startswith(f"{_TRAINING}.")
    }
    _replaced = _Replaced(before, top, vars(top).get("training"))
    for name in before:
        del sys.modules[name]
    sys.modules[_TOP] = top
    training = _add(top, "training", is_package=True)
    sdk = _add(training, "sdk", is_package=True)
    for name in names.SUBMODULES:
        _add(sdk, name, is_package=False)
    return True


def take_away() -> None:
    """Put back what the stand-ins replaced."""
    global _replaced
    if _replaced is None:
        return
    for name, module in list(sys.modules.items()):
        if isinstance(module, _StandIn):
            del sys.modules[name]
    sys.modules.update(_replaced.modules)
    if _replaced.training is not None:
        vars(_replaced.top)["training"] = _replaced.training
    else:
        vars(_replaced.top).pop("training", None)
    _replaced = None


def _add(parent: ModuleType, name: str, *, is_package: bool) -> ModuleType:
    module = _StandIn(f"{parent.__name__}.{name}", is_package=is_package)
    sys.modules[module.__name__] = module
    setattr(parent, name, module)
    return module


def _is_installed() -> bool:
    """Whether there is a real `fireworks`; a mere folder of that name is none."""
    if _TOP in sys.modules:
        return True
    spec = importlib.util.find_spec(_TOP)
    return spec is not None and spec.origin is not None
