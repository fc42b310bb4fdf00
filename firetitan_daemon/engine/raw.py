"""Tensors as bytes: reading and writing safetensors without a copy, and the digest of a weight set.

Knows: safetensors files, numpy byte views, BLAKE3. Must not know: torch, models, snapshots.
Weights in bfloat16, which numpy lacks, pass through here as bytes with a dtype name.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import SavedFiles

Bytes = npt.NDArray[np.uint8]

_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "I64": "int64", "I32": "int32"} | {
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "BOOL": "bool",
    "BF16": "bfloat16",
}
"""safetensors dtype codes and the names its writer takes."""
_FULL = ("No space left", "os error 28", "os error 122")


@dataclass(frozen=True)
class RawTensor:
    """A tensor whose content is bytes, little-endian, row-major."""

    dtype: str
    """safetensors code, e.g. `BF16`."""
    shape: tuple[int, ...]
    data: Bytes
    """Flat and contiguous; may be a view of memory that something else owns."""

    @staticmethod
    def of_array(array: npt.NDArray[np.generic]) -> RawTensor:
        """View a numpy array, copying only where it is not contiguous."""
        codes = {name: code for code, name in _NAMES.items()}
        flat = np.ascontiguousarray(array).reshape(-1)
        return RawTensor(codes[array.dtype.name], array.shape, flat.view(np.uint8))

    def array(self) -> npt.NDArray[np.generic]:
        """View as a numpy array; bfloat16 has none."""
        return self.data.view(np.dtype(_NAMES[self.dtype])).reshape(self.shape)


RawTensors = Mapping[str, RawTensor]


def write_safetensors(
    path: Path, tensors: RawTensors, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file straight from the tensors' memory.

    Raises:
        FiretitanError: STATE_DISK_FULL naming the file.
    """
    specs = {
        name: TensorSpec(
            dtype=_NAMES[tensor.dtype],
            shape=tensor.shape,
            data_ptr=tensor.data.ctypes.data,
            data_len=tensor.data.nbytes,
        )
        for name, tensor in sorted(tensors.items())
    }
    with disk_errors(path, sum(tensor.data.nbytes for tensor in tensors.values())):
        serialize_file(specs, path, metadata=dict(metadata) if metadata else None)


@contextmanager
def disk_errors(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn what a full disk raises into STATE_DISK_FULL naming `path`; other errors pass.

    Args:
        path: In a folder that is being filled, which is below another.
        needed_bytes: What is written, where that is known.
    """
    try:
        yield
    except (SafetensorError, OSError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if not full and not any(text in str(error) for text in _FULL):
            raise
        free = shutil.disk_usage(path.parents[1]).free
        need = f"{needed_bytes} bytes are needed, " if needed_bytes else ""
        raise FiretitanError(
            Reason.STATE_DISK_FULL,
            f"no space left to write {path.name} in {path.parents[1]}: {need}{free} bytes free; "
            "nothing was saved, free some space there and save again",
            file=path.name,
            free_bytes=str(free),
            **({"needed_bytes": str(needed_bytes)} if needed_bytes else {}),
        ) from error


def read_safetensors(path: Path) -> dict[str, RawTensor]:
    """Map a safetensors file; its bytes are read when they are used.

    The arrays are private: writing to one changes memory, never the file.

    Raises:
        FiretitanError: CHECKSUM_MISMATCH where the file is truncated or no safetensors file.
    """
    try:
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
    except (SafetensorError, OSError, ValueError) as error:
        raise FiretitanError(
            Reason.CHECKSUM_MISMATCH,
            f"{path.parent.name}/{path.name} is damaged or no safetensors file: {error}",
            file=path.name,
        ) from error
    header.pop("__metadata__", None)
    start = 8 + header_bytes
    if path.stat().st_size == start:
        content: Bytes = np.empty(0, np.uint8)
    else:
        content = np.asarray(np.memmap(path, np.uint8, mode="c", offset=start))
    return {
        name: RawTensor(
            entry["dtype"], tuple(entry["shape"]), content[slice(*entry["data_offsets"])]
        )
        for name, entry in sorted(header.items())
    }


def seal(staging: Path, about: dict[str, Any]) -> SavedFiles:
    """Seal a staging folder (see `durable.seal_folder`).

    Raises:
        FiretitanError: STATE_DISK_FULL.
    """
    with disk_errors(staging / durable.MANIFEST):
        digest, size_bytes = durable.seal_folder(staging, about)
    return SavedFiles(digest, size_bytes)


def tensor_hash(tensor: RawTensor) -> str:
    """BLAKE3 of a tensor's bytes, hex."""
    return blake3(tensor.data.data).hexdigest()


def result_digest(tensors: RawTensors) -> str:
    """BLAKE3 of a set of weights, hex: over (name, dtype, shape, BLAKE3 of the bytes) by name.

    Says nothing of files, so a base and a chain of deltas that reaches it have the same digest.
    """
    return digest_of_hashes(
        {name: (t.dtype, t.shape, tensor_hash(t)) for name, t in tensors.items()}
    )


def digest_of_hashes(hashes: Mapping[str, tuple[str, tuple[int, ...], str]]) -> str:
    """`result_digest` from hashes taken before: name to (dtype, shape, BLAKE3 hex)."""
    lines = [[name, dtype, list(shape), hex_] for name, (dtype, shape, hex_) in hashes.items()]
    return blake3(json.dumps(sorted(lines)).encode()).hexdigest()
