"""Shapes: named sets of what a trainer or a deployment is to be, with pinned versions.

Knows: shapes, what they allow, this host's devices as a number. Must not know: models' files, who
asks. A shape that was not asked for is derived from what was loaded; only a named one that cannot
serve is an error.

A name of another account than "local" that is not configured was made for a data centre: this host
stands in for it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.model_records import ModelInfo, Shape

LORA_MODE = "LORA_TRAINER"
FULL_MODE = "POLICY_TRAINER"
FORWARD_MODE = "FORWARD_ONLY"
MODES = ("", LORA_MODE, FULL_MODE, FORWARD_MODE)
DTYPES = ("auto", "float32", "bfloat16")
DEVICES = ("auto", "cpu", "cuda")
TRAINING, DEPLOYMENT = "trainingShapes", "deploymentShapes"
_FIELDS = {TRAINING: "training_shape", DEPLOYMENT: "deployment_shape"}
_NAME = re.compile(
    r"(?:accounts/(?P<account>[\w.-]+)/(?P<kind>trainingShapes|deploymentShapes)/)?"
    r"(?P<id>[\w.-]+)(?:/versions/(?P<version>[\w.-]+))?"
)
_LOCAL = "local"
_MAX_NAME = 512
"""Longest name of a shape; one that is not known here is repeated in the answer."""

BUILT_IN_TRAINING = (
    Shape("local"),
    Shape("local-lora", trainer_mode=LORA_MODE),
    Shape("local-full", trainer_mode=FULL_MODE),
    Shape("local-reference", trainer_mode=FORWARD_MODE),
    Shape("local-cpu", device="cpu", deployment_shape="local-cpu"),
    Shape("local-gpu", device="cuda", num_devices=1, deployment_shape="local-gpu"),
)
BUILT_IN_DEPLOYMENT = (
    Shape("local", deployment_shape=""),
    Shape("local-cpu", device="cpu", deployment_shape=""),
    Shape("local-gpu", device="cuda", num_devices=1, deployment_shape=""),
)

logger = logging.getLogger("firetitan.shapes")


@dataclass(frozen=True)
class Wish:
    """What is asked for beside a shape; 0 and `auto` leave it to the shape."""

    base_model: str
    max_context_length: int = 0
    dtype: str = "auto"
    mode: str = ""
    """What a trainer does; empty: its sessions say."""


class Shapes:
    """Every shape that is known.

    Args:
        training: Configured ones; one of a built-in name takes its place.
        deployment: The same of deployments.
        num_gpus: Of this host.

    Raises:
        FiretitanError: INVALID_ARGUMENT where a configured shape names no deployment shape.
    """

    def __init__(
        self,
        training: Iterable[Shape] = (),
        deployment: Iterable[Shape] = (),
        num_gpus: int = 0,
    ) -> None:
        self._shapes = {
            DEPLOYMENT: _by_name(DEPLOYMENT, (*BUILT_IN_DEPLOYMENT, *deployment)),
            TRAINING: _by_name(TRAINING, (*BUILT_IN_TRAINING, *training)),
        }
        self._num_gpus = num_gpus
        self.all(TRAINING)

    def all(self, kind: str) -> list[Shape]:
        """Shapes of a kind by name.

        Raises:
            FiretitanError: INVALID_ARGUMENT for no such kind.
        """
        if kind not in self._shapes:
            known = " or ".join(sorted(self._shapes))
            raise _refused("kind", f"{kind[:200]!r} is no kind of shape; give {known}")
        return [self.find(kind, name) for name in sorted(self._shapes[kind])]

    def find(self, kind: str, name: str) -> Shape:
        """The shape of a name, under its full name with its version.

        Args:
            kind: `trainingShapes` or `deploymentShapes`.
            name: An id, `accounts/{a}/{kind}/{id}`, or that with `/versions/{n}` behind it.

        Raises:
            FiretitanError: INVALID_ARGUMENT for no such name, or another version.
        """
        field, known = _FIELDS[kind], self._shapes[kind]
        match = _NAME.fullmatch(name)
        if match is None or match["kind"] not in (None, kind) or len(name) > _MAX_NAME:
            raise _refused(field, f"{name[:200]!r} is no name; give accounts/<a>/{kind}/<id>")
        full = f"accounts/{match['account'] or _LOCAL}/{kind}/{match['id']}"
        given = name.partition("/versions/")[0]
        shape = known.get(full)
        if shape is None:
            if match["account"] == _LOCAL:
                there = ", ".join(one.rpartition("/")[2] for one in sorted(known))
                raise _refused(field, f"there is no {full}; there are {there}, and configured ones")
            note = f"{given} is not configured here: this host stands in for it"
            shape = replace(known[f"accounts/{_LOCAL}/{kind}/{_LOCAL}"], notes=(note,))
            return replace(
                shape,
                name=f"{given}/versions/{match['version'] or 1}",
                deployment_shape=self._linked(shape),
            )
        if match["version"] not in (None, str(shape.version)):
            raise _refused(
                field, f"{full} has version {shape.version} here, not {match['version']}"
            )
        return replace(
            shape,
            name=f"{full}/versions/{shape.version}",
            deployment_shape=self._linked(shape),
        )

    def _linked(self, shape: Shape) -> str:
        if not shape.deployment_shape:
            return ""
        return self.find(DEPLOYMENT, shape.deployment_shape).name

    def choose(self, kind: str, name: str, wish: Wish) -> Shape:
        """The shape of a name with what is asked for put in; no name: derived.

        Raises:
            FiretitanError: INVALID_ARGUMENT where it cannot serve that, saying why.
        """
        if not name:
            return derive(kind, wish)
        shape = self.find(kind, name)
        length, needed = shape.max_context_length, max(1, shape.num_devices)
        why = None
        if shape.base_model and shape.base_model != wish.base_model:
            why = f"is for {shape.base_model!r}, not for {wish.base_model!r}"
        elif shape.trainer_mode and wish.mode and shape.trainer_mode != wish.mode:
            why = f"is for {shape.trainer_mode}, and a {wish.mode} was asked for"
        elif shape.device == "cuda" and self._num_gpus < needed:
            why = f"needs {needed} GPU(s), and this host has {self._num_gpus}"
        elif 0 < length < wish.max_context_length:
            why = f"takes {length} tokens, and max_context_length is {wish.max_context_length}"
        elif "auto" not in (shape.dtype, wish.dtype) and shape.dtype != wish.dtype:
            why = f"is in {shape.dtype}, and dtype is {wish.dtype}"
        if why is not None:
            raise _refused(
                _FIELDS[kind], f"{shape.name} cannot serve: it {why}; name another, or none"
            )
        for note in shape.notes:
            logger.warning("%s", note)
        return replace(
            shape,
            base_model=wish.base_model,
            max_context_length=wish.max_context_length or length,
            dtype=shape.dtype if wish.dtype == "auto" else wish.dtype,
            trainer_mode=wish.mode or shape.trainer_mode,
        )


def derive(kind: str, wish: Wish) -> Shape:
    """The shape where none was asked for: this host, with whatever was asked for.

    Args:
        kind: `trainingShapes` or `deploymentShapes`.
        wish: What it is for.
    """
    linked = f"accounts/{_LOCAL}/{DEPLOYMENT}/{_LOCAL}/versions/1" if kind == TRAINING else ""
    return Shape(
        f"accounts/{_LOCAL}/{kind}/{_LOCAL}/versions/1",
        base_model=wish.base_model,
        trainer_mode=wish.mode,
        max_context_length=wish.max_context_length,
        dtype=wish.dtype,
        deployment_shape=linked,
        notes=("derived from the model and this host: no shape was asked for",),
    )


def as_loaded(shape: Shape, model: ModelInfo | None) -> Shape:
    """A shape with what it left open as it came out once the model was loaded."""
    if model is None:
        return shape
    device = model.device.partition(":")[0]
    return replace(
        shape,
        max_context_length=shape.max_context_length or model.max_context_length,
        dtype=model.dtype,
        device=device,
        num_devices=0 if device == "cpu" else max(1, shape.num_devices),
    )


def unversioned(name: str) -> str:
    """A shape's name without its version."""
    return name.partition("/versions/")[0]


def _by_name(kind: str, shapes: Iterable[Shape]) -> Mapping[str, Shape]:
    found = {}
    for shape in shapes:
        full = shape.name
        if not full.startswith("accounts/"):
            full = f"accounts/{_LOCAL}/{kind}/{full}"
        found[full] = replace(shape, name=full)
    return found


def _refused(field: str, why: str) -> FiretitanError:
    return FiretitanError(Reason.INVALID_ARGUMENT, f"{field}: {why}", field=field)
