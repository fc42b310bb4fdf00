"""Between torch tensors and raw ones, without a copy where that can be.

Knows: torch CPU tensors, safetensors dtype codes. Must not know: models, snapshots.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.raw import RawTensor, RawTensors, read_safetensors
from firetitan_daemon.engine.resolve import weight_files

Tensors = Mapping[str, torch.Tensor]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


def to_raw(tensors: Tensors) -> dict[str, RawTensor]:
    """View CPU tensors as bytes; copies only what is elsewhere or not contiguous.

    Raises:
        FiretitanError: UNSUPPORTED naming a tensor of another dtype than these.
    """
    raw = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in _CODES:
            raise _unsupported(name, str(tensor.dtype))
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        raw[name] = RawTensor(
            _CODES[tensor.dtype], tuple(tensor.shape), flat.view(torch.uint8).numpy()
        )
    return raw


def from_raw(tensors: RawTensors) -> dict[str, torch.Tensor]:
    """View raw tensors as torch tensors that share their memory.

    Raises:
        FiretitanError: UNSUPPORTED naming a tensor of another dtype than these.
    """
    result = {}
    for name, raw in tensors.items():
        if raw.dtype not in _DTYPES:
            raise _unsupported(name, raw.dtype)
        flat = torch.from_numpy(raw.data).view(_DTYPES[raw.dtype])
        result[name] = flat.reshape(raw.shape)
    return result


def stored_dtypes(model_folder: Path) -> dict[str, torch.dtype]:
    """Dtype of each tensor as the folder's safetensors files hold it."""
    dtypes = {}
    for file in weight_files(model_folder):
        for name, raw in read_safetensors(model_folder / file).items():
            dtypes[name] = _DTYPES.get(raw.dtype, torch.float32)
    return dtypes


def _unsupported(name: str, dtype: str) -> FiretitanError:
    return FiretitanError(
        Reason.UNSUPPORTED, f'tensor "{name}" has dtype {dtype}; supported are {", ".join(_DTYPES)}'
    )
