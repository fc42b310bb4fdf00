"""What the managed service adds to tinker's types, added to whichever tinker is installed.

Knows: tinker's public types from 0.23 to 0.38, pydantic's model fields. Must not know: what is done
with the added fields, how anything is sent.

Added: `ModelInput.routing_matrices`, a discriminator on `ModelInput.chunks`, the losses `dapo` and
`gspo` in `LossFnType`, `LoraConfig.alpha`, `AdamParams.emit_grad_norm_metrics`. A tinker that has
one of these keeps its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from types import GenericAlias, ModuleType
from typing import Annotated, Any, Literal, get_args

from firetitan_client import routing

_LOSSES = ("dapo", "gspo")
_undo: list[Callable[[], None]] = []
"""What takes each change back, in the order of the changes."""
_applied = False


def apply() -> None:
    """Add what is missing. A second call changes nothing."""
    global _applied
    if _applied:
        return
    _applied = True
    from tinker import types

    _add_field(types.ModelInput, "routing_matrices", list[str] | None)
    _replace_from_ints(types.ModelInput)
    _discriminate_chunks(types.ModelInput)
    _add_losses(types.LossFnType)
    _add_field(types.LoraConfig, "alpha", int | None)
    modes = Literal["off", "basic", "detailed"] | bool | None
    _add_field(types.AdamParams, "emit_grad_norm_metrics", modes)


def revert() -> None:
    """Take back what `apply` did."""
    global _applied
    while _undo:
        _undo.pop()()
    _applied = False


def _add_field(model: Any, name: str, annotation: Any) -> None:
    """Give a pydantic model an optional field."""
    from pydantic.fields import FieldInfo

    if name in model.model_fields:
        return
    model.model_fields[name] = FieldInfo(annotation=annotation, default=None)
    model.__annotations__[name] = annotation
    _rebuild(model)

    def undo() -> None:
        del model.model_fields[name]
        del model.__annotations__[name]
        _rebuild(model)

    _undo.append(undo)


def _replace_from_ints(model: Any) -> None:
    before = vars(model)["from_ints"]
    chunk = sys.modules[model.__module__].EncodedTextChunk

    def from_ints(
        cls: Any, tokens: Sequence[int], routing_matrices: list[str] | None = None
    ) -> Any:
        """A model input of tokens and, per token, a text of expert indices ("": no replay)."""
        if routing_matrices is not None and len(routing_matrices) != len(tokens):
            routing.tell_of_lengths(len(routing_matrices), len(tokens))
        extra = {} if routing_matrices is None else {"routing_matrices": routing_matrices}
        return cls(chunks=[chunk(tokens=tokens)], **extra)

    model.from_ints = classmethod(from_ints)
    _undo.append(lambda: setattr(model, "from_ints", before))


def _discriminate_chunks(model: Any) -> None:
    """Tell pydantic to choose a chunk's class by its `type`, whichever classes there are."""
    from pydantic import Discriminator

    field = model.model_fields["chunks"]
    before = field.annotation
    (chunk,) = get_args(before)
    union, *metadata = get_args(chunk) if hasattr(chunk, "__metadata__") else (chunk,)
    if any(isinstance(one, Discriminator) for one in metadata):
        return
    annotated: Any = Annotated
    described = annotated[(union, Discriminator("type"), *metadata)]
    _set_chunks(model, GenericAlias(list, (described,)))
    _undo.append(lambda: _set_chunks(model, before))


def _set_chunks(model: Any, annotation: Any) -> None:
    model.model_fields["chunks"].annotation = annotation
    model.__annotations__["chunks"] = annotation
    _rebuild(model)


def _add_losses(before: Any) -> None:
    names = get_args(before)
    missing = [name for name in _LOSSES if name not in names]
    if not missing:
        return
    after: Any = Literal[(*names, *missing)]
    _replace_literal(before, after)
    _undo.append(lambda: _replace_literal(after, before))


def _replace_literal(old: Any, new: Any) -> None:
    """Put a literal type in the other's place, wherever tinker's types name it."""
    for module in _type_modules():
        if getattr(module, "LossFnType", None) == old:
            module.LossFnType = new  # type: ignore[attr-defined]
    for kind in _types():
        fields = getattr(kind, "model_fields", {})
        if "loss_fn" in fields and fields["loss_fn"].annotation == old:
            fields["loss_fn"].annotation = new
            kind.__annotations__["loss_fn"] = new
            _rebuild(kind)


def _rebuild(model: Any) -> None:
    """Let pydantic look at a model's fields again, and at those of models that contain it."""
    model.model_rebuild(force=True)
    for kind in _types():
        fields = getattr(kind, "model_fields", {}).values()
        if kind is not model and any(_mentions(field.annotation, model) for field in fields):
            _rebuild(kind)


def _mentions(annotation: Any, model: Any) -> bool:
    return annotation is model or any(_mentions(part, model) for part in get_args(annotation))


def _type_modules() -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        if name == "tinker.types" or name.startswith("tinker.types."):
            yield module


def _types() -> list[Any]:
    """Every pydantic model of tinker's types."""
    from pydantic import BaseModel

    return list(
        {
            id(kind): kind
            for module in _type_modules()
            for kind in list(vars(module).values())
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        }.values()
    )
