"""Configuration, weights and tokenizer of a model's folder, as transformers reads them.

Knows: transformers' loaders. Must not know: what is done with a model.

Nobody vouches for the folder. Nothing in it is run: no code of its own, no pickle, no attention
from elsewhere. Whatever its files make a loader raise is told as what is wrong with the folder.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.resolve import weight_files

_SAFE: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
_ATTENTION = "eager"

_FEW_LAYERS = 1000
"""Layers that need no look at the files."""

log = logging.getLogger(__name__)


def load_config(folder: Path, base_model: str) -> Any:
    """A model's configuration.

    Args:
        folder: Where it is.
        base_model: What messages call the model.

    Raises:
        FiretitanError: UNSUPPORTED, MODEL_NOT_FOUND.
    """
    with _loading(base_model):
        config = AutoConfig.from_pretrained(folder, **_SAFE)
        # Else what the file names would be imported, or fetched from the hub: code.
        config._attn_implementation = _ATTENTION
        _check_layers(config.get_text_config(), folder)
    return config


def load_weights(folder: Path, base_model: str, dtype: torch.dtype | str = "auto") -> Any:
    """A causal language model with its weights, on the CPU.

    Args:
        folder: Where it is.
        base_model: What messages call the model.
        dtype: Of the weights; `auto`: as stored.

    Raises:
        FiretitanError: UNSUPPORTED, MODEL_NOT_FOUND.
    """
    config = load_config(folder, base_model)
    with _loading(base_model):
        return AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=_ATTENTION,
            use_safetensors=True,
            **_SAFE,
        )


def empty_model(folder: Path, base_model: str) -> Any:
    """A causal language model on the meta device: names and shapes alone.

    Args:
        folder: Where it is.
        base_model: What messages call the model.

    Raises:
        FiretitanError: UNSUPPORTED, MODEL_NOT_FOUND.
    """
    config = load_config(folder, base_model)
    with _loading(base_model), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer stored with a model; None where there is none that can be read."""
    try:
        return AutoTokenizer.from_pretrained(folder, **_SAFE)
    except Exception as error:  # its files decide what is raised
        log.info("no tokenizer in %s: %s", folder, _first_line(error))
        return None


def _check_layers(config: Any, folder: Path) -> None:
    """Refuse more layers than there are tensors, before a module is made for each."""
    layers = getattr(config, "num_hidden_layers", 0)
    if not isinstance(layers, int):
        raise ValueError(f"num_hidden_layers is {layers!r}")
    if layers <= _FEW_LAYERS:
        return
    tensors = 0
    for name in weight_files(folder):
        with safe_open(folder / name, framework="numpy") as file:
            tensors += len(file.keys())
    if layers > tensors:
        raise ValueError(f"num_hidden_layers is {layers}, its files hold {tensors} tensors")


@contextmanager
def _loading(base_model: str) -> Iterator[None]:
    """Say in our own terms why transformers cannot load a model."""
    try:
        yield
    except (FiretitanError, MemoryError, torch.OutOfMemoryError):
        raise
    except OSError as error:
        raise FiretitanError(
            Reason.MODEL_NOT_FOUND,
            f"{base_model} cannot be read: {error}",
            field="base_model",
        ) from error
    except Exception as error:  # the folder's files decide what is raised
        raise FiretitanError(
            Reason.UNSUPPORTED,
            f"{base_model} cannot be loaded as a causal language model: {_first_line(error)}",
            field="base_model",
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return (
        text if isinstance(error, ValueError | ImportError) else f"{type(error).__name__}: {text}"
    )
