"""Find out how a loaded model can be run: two short sequences, its own way and ours.

Knows: a loaded model, its own attention and the packed one. Must not know: files, LoRA, sampling.

The experts that the model's own pass chose are forced on ours: a choice that falls the other way by
rounding says nothing about attention or the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.model_records import ModelInfo
from firetitan_daemon.engine.attention import ATTENTION, noting_windows

if TYPE_CHECKING:
    from firetitan_daemon.engine.models import LoadedModel

_LENGTHS = (9, 23)
"""The longer one last: what leaks over the bound between them shows on most tokens."""
_BEGINNING = 12
"""Tokens of the longer one that run on their own too: what follows them must not matter."""


def probe(loaded: LoadedModel, note: str | None, window: int | None = None) -> None:
    """Set `info.packed` and its notes; refuse what is not causal or not ours to compute.

    Args:
        loaded: On its own eager attention; ends on the packed one where that agrees.
        note: What is known to speak against the packed one.
        window: Keys a query of some layer sees; None: all.

    Raises:
        FiretitanError: UNSUPPORTED.
    """
    model = loaded.model
    generator = torch.Generator().manual_seed(0)
    sequences = [
        torch.randint(0, loaded.info.vocab_size, (length,), generator=generator)
        for length in _LENGTHS
    ]
    exact = loaded.dtype == torch.float32
    with torch.no_grad(), _running(loaded.info):
        logits, experts = [], []
        for tokens in sequences:
            with loaded.routers.recording() as recording:
                output = model(input_ids=tokens[None].to(loaded.device), use_cache=False)
            logits.append(output.logits[0])
            experts.append(recording.experts)
        own = torch.cat(logits).float()
        whole, chosen = sequences[-1], experts[-1]
        beginning = whole[:_BEGINNING], None if chosen is None else chosen[:_BEGINNING]
        ours = loaded.logits(
            loaded.hidden_states([*sequences, beginning[0]], [*experts, beginning[1]])
        )
        difference = _relative(ours[: len(own)], own)
        if not difference <= (1e-4 if exact else 0.1):
            raise FiretitanError(
                Reason.UNSUPPORTED,
                f"{loaded.info.architecture}: logits computed from its hidden states differ from "
                f"its own by {difference:.1e}; its head does more than this engine knows",
                field="base_model",
            )
        difference = _relative(ours[len(own) :], logits[-1][:_BEGINNING].float())
        if not difference <= (1e-4 if exact else 0.1):
            raise FiretitanError(
                Reason.UNSUPPORTED,
                f"{loaded.info.architecture} is not causal: logits at a token change with what "
                f"follows it, by {difference:.1e}",
                field="base_model",
            )
        note = note or _try_packed(loaded, sequences, experts, own, exact, window)
    if note is not None:
        model.set_attn_implementation("eager")
        note = f"padded path: packed attention does not fit {loaded.info.architecture}: {note}"
    said = (note, loaded.routers.note)
    notes = (*(each for each in said if each is not None), *loaded.info.notes)
    loaded.info = replace(loaded.info, packed=note is None, notes=notes)


@contextmanager
def _running(info: ModelInfo) -> Iterator[None]:
    """Say in our own terms that a model cannot be run the way this engine runs models."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise FiretitanError(
            Reason.UNSUPPORTED,
            f"{info.architecture} in {info.dtype} cannot be run by this engine: {error}",
            field="base_model",
        ) from error


def _try_packed(
    loaded: LoadedModel,
    sequences: list[torch.Tensor],
    experts: list[torch.Tensor | None],
    own: torch.Tensor,
    exact: bool,
    window: int | None,
) -> str | None:
    """Switch to the packed attention; returns what speaks against it."""
    try:
        loaded.model.set_attn_implementation(ATTENTION)
        loaded.info = replace(loaded.info, packed=True)
        with noting_windows() as windows:
            packed = loaded.logits(loaded.hidden_states(sequences, experts))
    except (FiretitanError, ValueError, TypeError, RuntimeError, AssertionError) as error:
        return str(error)
    # Wider than these sequences are long, a window that is lost does not show in the logits.
    if window is not None and not windows:
        return f"its window of {window} tokens is said by a mask alone"
    difference = _relative(packed, own)
    if difference <= (1e-4 if exact else 0.1):
        return None
    return f"logits differ by {difference:.1e}"


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))
