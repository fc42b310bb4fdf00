"""Training state on disk: everything the next step depends on, in safetensors and a manifest.

Knows: raw tensors, the state folder, what a state must agree with to be loaded. Must not know:
torch, models, checkpoint names.

A state folder holds `weights.safetensors` (float32 masters of what is trained),
`optimizer.safetensors` (first and second moments), `gradients.safetensors` (pending sums) and, in
`manifest.json`, the counters and what the state was made from. Nothing in it can run code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import LoraSpec, Normalization, SavedFiles, WriteState
from firetitan_daemon.engine.raw import (
    RawTensor,
    RawTensors,
    read_safetensors,
    seal,
    write_safetensors,
)

FORMAT_VERSION = 1
_KIND = "state"
_WEIGHTS = "weights.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_GRADIENTS = "gradients.safetensors"
_FIRST = "first_moment."
_SECOND = "second_moment."


@dataclass(frozen=True)
class Counters:
    """Where the session stands; all but the first belong to the pending gradients."""

    step: int = 0
    """Optimizer steps taken; also the exponent of Adam's bias correction."""
    pending_backwards: int = 0
    loss_tokens: int = 0
    """Positions with a non-zero loss gradient since the last step."""
    loss_sequences: int = 0
    """Sequences with a non-zero loss gradient."""
    embedding_backwards: int = 0
    """Of the backwards, those of a loss over embeddings: they have no tokens."""

    def add(self, *, tokens: int, sequences: int, embeddings: bool = False) -> Counters:
        """Count one backward.

        Args:
            tokens: Positions with a non-zero loss gradient.
            sequences: Sequences with one.
            embeddings: Whether its loss was over embeddings.
        """
        return replace(
            self,
            pending_backwards=self.pending_backwards + 1,
            loss_tokens=self.loss_tokens + tokens,
            loss_sequences=self.loss_sequences + sequences,
            embedding_backwards=self.embedding_backwards + embeddings,
        )

    def denominator(self, normalization: Normalization) -> int:
        """What the accumulated gradient is divided by, at least 1.

        Raises:
            FiretitanError: NO_GRADIENTS where there was no backward; NO_LOSS_TOKENS where tokens
                are asked for and a loss over embeddings had none.
        """
        if self.pending_backwards == 0:
            raise FiretitanError(
                Reason.NO_GRADIENTS,
                "no gradients accumulated since the last step; call forward_backward first",
            )
        if normalization is Normalization.NUM_LOSS_TOKENS and self.embedding_backwards:
            raise FiretitanError(
                Reason.NO_LOSS_TOKENS,
                "grad_accumulation_normalization=num_loss_tokens: the accumulated gradients hold "
                f"{self.embedding_backwards} of a loss over embeddings, which has no loss tokens; "
                "use num_sequences or none. Nothing was changed",
                field="grad_acc_normalization",
            )
        counts = {
            Normalization.NONE: 1,
            Normalization.NUM_LOSS_TOKENS: self.loss_tokens,
            Normalization.NUM_SEQUENCES: self.loss_sequences,
        }
        return max(counts[normalization], 1)


@dataclass(frozen=True)
class StateOrigin:
    """What a state was made from; all but the last three must agree to load it."""

    base_fingerprint: str
    lora: LoraSpec | None
    base_model: str = ""
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingState:
    """Tensors by parameter name; moments and gradients may be empty (all zero)."""

    weights: RawTensors
    first_moment: RawTensors
    second_moment: RawTensors
    gradients: RawTensors
    counters: Counters


def save_state(
    staging: Path,
    state: TrainingState,
    origin: StateOrigin,
    facts: Mapping[str, str | int] | None = None,
) -> SavedFiles:
    """Write a state into an empty folder and seal it.

    Args:
        staging: The folder.
        state: What to write.
        origin: What it was made from.
        facts: More for the manifest; nothing here reads them.

    Raises:
        FiretitanError: STATE_DISK_FULL.
    """
    write_safetensors(staging / _WEIGHTS, state.weights)
    moments = {_FIRST + name: tensor for name, tensor in state.first_moment.items()}
    moments |= {_SECOND + name: tensor for name, tensor in state.second_moment.items()}
    write_safetensors(staging / _OPTIMIZER, moments)
    write_safetensors(staging / _GRADIENTS, state.gradients)
    return seal(
        staging,
        {
            **(facts or {}),
            "kind": _KIND,
            "format_version": FORMAT_VERSION,
            "counters": asdict(state.counters),
            "origin": asdict(origin) | {"versions": dict(origin.versions)},
        },
    )


def state_writer(state: TrainingState, origin: StateOrigin, *, copy: bool) -> WriteState:
    """A function that writes a state.

    Args:
        state: May share memory with what is trained.
        origin: What it was made from.
        copy: Copy its bytes, so that it can be written while training goes on.

    Raises:
        FiretitanError: DEVICE_OUT_OF_MEMORY where less than twice a copy's size is free.
    """
    if not copy:
        return lambda staging, facts: save_state(staging, state, origin, facts)
    parts = (state.weights, state.first_moment, state.second_moment, state.gradients)
    needed = sum(tensor.data.nbytes for part in parts for tensor in part.values())
    free = psutil.virtual_memory().available
    if 2 * needed > free:
        raise FiretitanError(
            Reason.DEVICE_OUT_OF_MEMORY,
            f"a copy of the training state takes {needed} bytes, {free} are free",
        )
    weights, first, second, gradients = (
        {name: RawTensor(t.dtype, t.shape, t.data.copy()) for name, t in part.items()}
        for part in parts
    )
    copied = TrainingState(weights, first, second, gradients, state.counters)
    return lambda staging, facts: save_state(staging, copied, origin, facts)


def load_state(
    folder: Path,
    origin: StateOrigin,
    weights: RawTensors,
    *,
    with_optimizer: bool,
    digest: str | None = None,
) -> TrainingState:
    """Verify a state folder whole, compare it with the session, then map its tensors.

    Args:
        folder: A published state.
        origin: The session's own.
        weights: The session's own; names, dtypes and shapes must be the same.
        with_optimizer: False leaves out moments, gradients and counters: a fresh optimizer.
        digest: What the folder's manifest must hash to.

    Raises:
        FiretitanError: CHECKSUM_MISMATCH for damaged files, INVALID_ARGUMENT for a state of another
            base model, adapter or shape and for a folder that is no state, each naming what.
    """
    manifest = durable.verify_folder(folder, digest)
    if manifest.get("kind") != _KIND:
        kind = f"a {manifest['kind']} snapshot" if manifest.get("kind") else "no training state"
        raise _refused(folder, f"holds {kind}; give a checkpoint made by save_state", "kind")
    if manifest.get("format_version") != FORMAT_VERSION:
        version = manifest.get("format_version")
        raise _refused(folder, f"has format version {version}, not {FORMAT_VERSION}", "format")
    _check_origin(folder, manifest["origin"], origin)
    loaded = read_safetensors(folder / _WEIGHTS)
    _check_layout(folder, "weights", loaded, weights, may_be_empty=False)
    if not with_optimizer:
        return TrainingState(loaded, {}, {}, {}, Counters())
    moments = read_safetensors(folder / _OPTIMIZER)
    first = {k.removeprefix(_FIRST): t for k, t in moments.items() if k.startswith(_FIRST)}
    second = {k.removeprefix(_SECOND): t for k, t in moments.items() if k.startswith(_SECOND)}
    gradients = read_safetensors(folder / _GRADIENTS)
    for what, tensors in (("first moment", first), ("second moment", second)):
        _check_layout(folder, what, tensors, weights, may_be_empty=True)
    counters = Counters(**manifest["counters"])
    if counters.step and not (first and second):
        raise _refused(folder, "has no optimizer; load it with load_state", "optimizer")
    return TrainingState(loaded, first, second, gradients, counters)


def _check_origin(folder: Path, saved: dict[str, Any], origin: StateOrigin) -> None:
    if saved["base_fingerprint"] != origin.base_fingerprint:
        raise _refused(
            folder,
            f'was trained on base model "{saved["base_model"]}" (fingerprint '
            f'{saved["base_fingerprint"][:12]}), this session\'s is "{origin.base_model}" '
            f"({origin.base_fingerprint[:12]})",
            "base_model",
        )
    mine = None if origin.lora is None else asdict(origin.lora)
    if (saved["lora"] is None) != (mine is None):
        kinds = {True: "full-parameter training", False: "a LoRA adapter"}
        raise _refused(
            folder,
            f"is of {kinds[saved['lora'] is None]}, this session trains {kinds[mine is None]}",
            "lora_rank",
        )
    for name, value in (mine or {}).items():
        if saved["lora"].get(name) != value:
            raise _refused(
                folder, f"has LoRA {name}={saved['lora'].get(name)}, this session {value}", name
            )


def _check_layout(
    folder: Path, what: str, found: RawTensors, wanted: RawTensors, *, may_be_empty: bool
) -> None:
    if may_be_empty and not found:
        return
    for name in sorted(found.keys() | wanted.keys()):
        if name not in found or name not in wanted:
            where = "the session" if name not in wanted else "the file"
            raise _refused(folder, f'{what} of "{name}" are missing in {where}', name)
        here, there = found[name], wanted[name]
        if (here.dtype, here.shape) != (there.dtype, there.shape):
            raise _refused(
                folder,
                f'{what} of "{name}" are {here.dtype} {list(here.shape)}, the session has '
                f"{there.dtype} {list(there.shape)}",
                name,
            )


def _refused(folder: Path, what: str, about: str) -> FiretitanError:
    return FiretitanError(
        Reason.INVALID_ARGUMENT,
        f"checkpoint {folder.name} {what}; nothing was loaded",
        field="path",
        about=about,
    )
