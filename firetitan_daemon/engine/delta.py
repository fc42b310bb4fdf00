"""The difference between two sets of weights: XOR of the bytes, zstd level 1, tensor by tensor.

Knows: raw tensors, the delta folder. Must not know: torch, models, which chain a delta belongs to.
XOR is exact and its own inverse: a chain of deltas cannot drift from what a base would hold.

A delta folder holds `delta.safetensors` (one uint8 tensor per weight, the compressed XOR) and, in
`manifest.json`, the codec, the parent's name, the hash of its manifest, its result digest, the
result's own and a table of every tensor's dtype, shape and BLAKE3 after the delta.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import SavedSnapshot, SnapshotFormat, SnapshotKind
from firetitan_daemon.engine.raw import (
    Bytes,
    RawTensor,
    RawTensors,
    digest_of_hashes,
    read_safetensors,
    seal,
    tensor_hash,
    write_safetensors,
)

CODEC = "xor_zstd"
DELTA_FILE = "delta.safetensors"
_LEVEL = 1
_BLOCK_BYTES = 1 << 24
"""XOR is taken in blocks of this size, so a large tensor costs no second copy of itself."""


def encode_delta(
    staging: Path,
    *,
    name: str,
    parent: str,
    parent_saved: SavedSnapshot,
    before: RawTensors,
    now: RawTensors,
) -> SavedSnapshot:
    """Write the way from `before` to `now` into an empty folder and seal it.

    Args:
        staging: Empty folder.
        name: Name of the snapshot that `now` is.
        parent: Name of the snapshot that `before` is.
        parent_saved: What it was saved as.
        before: The parent's tensors.
        now: Tensors of the same names, dtypes and shapes.

    Raises:
        FiretitanError: CHAIN_BROKEN naming a tensor that differs in name, dtype or shape.
    """
    _same_layout({n: (t.dtype, t.shape) for n, t in before.items()}, now, parent)
    packed, table, hashes = {}, {}, {}
    for key, tensor in sorted(now.items()):
        packed[key] = RawTensor.of_array(_compress(before[key].data, tensor.data))
        hashes[key] = (tensor.dtype, tensor.shape, tensor_hash(tensor))
        table[key] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "blake3": hashes[key][2],
        }
    write_safetensors(staging / DELTA_FILE, packed)
    result = digest_of_hashes(hashes)
    files = seal(
        staging,
        {
            "kind": SnapshotKind.DELTA.value,
            "format": SnapshotFormat.XOR_ZSTD.value,
            "codec": CODEC,
            "name": name,
            "parent": parent,
            "parent_digest": parent_saved.files.digest,
            "parent_result_digest": parent_saved.result_digest,
            "result_digest": result,
            "tensors": table,
        },
    )
    return SavedSnapshot(files, SnapshotKind.DELTA, SnapshotFormat.XOR_ZSTD, result)


def apply_delta(
    folder: Path,
    before: RawTensors,
    *,
    digest: str | None = None,
    parent_digest: str | None = None,
) -> dict[str, RawTensor]:
    """Build the tensors a delta leads to, in new memory; `before` is not touched.

    Args:
        folder: A published delta.
        before: The parent's tensors.
        digest: What the folder's manifest must hash to.
        parent_digest: What the manifest of the folder `before` was read from hashes to; None where
            it came from memory.

    Raises:
        FiretitanError: UNSUPPORTED for an unknown codec, CHAIN_BROKEN where `before` has other
            tensors or bytes than the parent, CHECKSUM_MISMATCH for damaged files; each names the
            tensor or the file.
    """
    manifest = durable.verify_folder(folder, digest)
    table = _check_manifest(folder, manifest)
    _check_parent(folder, manifest, parent_digest)
    _same_layout(table, before, manifest["parent"])
    packed = read_safetensors(folder / DELTA_FILE)
    if packed.keys() != table.keys():
        raise _damaged(folder, min(packed.keys() ^ table.keys()), "is not in file and table both")
    after = {}
    for key, (dtype, shape) in table.items():
        data = _decompress(folder, key, packed[key].data, before[key].data)
        after[key] = RawTensor(dtype, shape, data)
    hashes = {key: (t.dtype, t.shape, tensor_hash(t)) for key, t in after.items()}
    for key, entry in manifest["tensors"].items():
        if hashes[key][2] != entry["blake3"]:
            raise FiretitanError(
                Reason.CHAIN_BROKEN,
                f'tensor "{key}" of {manifest["name"]} does not come out as saved: the delta does '
                f"not stand on these weights; its parent is {manifest['parent']}",
                tensor=key,
                parent=str(manifest["parent"]),
            )
    found = digest_of_hashes(hashes)
    if found != manifest["result_digest"]:
        raise _damaged(folder, "*", f"gives {found}, promised is {manifest['result_digest']}")
    return after


def _compress(before: Bytes, now: Bytes) -> Bytes:
    compressor = zstandard.ZstdCompressor(level=_LEVEL).compressobj(size=now.nbytes)
    parts = [
        compressor.compress((before[at : at + _BLOCK_BYTES] ^ now[at : at + _BLOCK_BYTES]).data)
        for at in range(0, now.nbytes, _BLOCK_BYTES)
    ]
    return np.frombuffer(b"".join([*parts, compressor.flush()]), np.uint8)


def _decompress(folder: Path, key: str, packed: Bytes, before: Bytes) -> Bytes:
    after = np.empty_like(before, subok=False)
    view = after.data
    filled = 0
    try:
        with zstandard.ZstdDecompressor().stream_reader(packed.data) as reader:
            while filled < after.nbytes:
                count = reader.readinto(view[filled : filled + _BLOCK_BYTES])
                if count == 0:
                    break
                filled += count
            longer = bool(reader.read(1))
    except zstandard.ZstdError as error:
        raise _damaged(folder, key, f"does not decompress ({error})") from error
    if filled != after.nbytes or longer:
        raise _damaged(folder, key, f"does not hold {before.nbytes} bytes")
    after ^= before
    return after


def _check_manifest(
    folder: Path, manifest: Mapping[str, Any]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    codec = manifest.get("codec")
    if codec != CODEC:
        raise FiretitanError(
            Reason.UNSUPPORTED,
            f'{folder.name} has codec "{codec}"; this build reads "{CODEC}" only',
            codec=str(codec),
        )
    try:
        return {
            str(key): (str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))
            for key, entry in manifest["tensors"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(folder, "*", f"has no readable tensor table ({error!r})") from error


def _check_parent(folder: Path, manifest: Mapping[str, Any], found: str | None) -> None:
    # Deltas of the first versions do not say which; what they lead to is hashed all the same.
    expected = manifest.get("parent_digest", found)
    if found is not None and expected != found:
        raise FiretitanError(
            Reason.CHECKSUM_MISMATCH,
            f"{folder.name} stands on {manifest['parent']}, whose {durable.MANIFEST} hashes to "
            f"{expected}, found {found}: it was replaced; nothing was changed",
            file=f"{folder.name}/{durable.MANIFEST}",
            expected=str(expected),
            found=found,
        )


def _same_layout(
    table: Mapping[str, tuple[str, tuple[int, ...]]], tensors: RawTensors, parent: str
) -> None:
    for key in sorted(table.keys() | tensors.keys()):
        wanted = table.get(key)
        found = (tensors[key].dtype, tensors[key].shape) if key in tensors else None
        if wanted != found:
            raise FiretitanError(
                Reason.CHAIN_BROKEN,
                f'tensor "{key}": {_layout(wanted)} on one side of the delta, {_layout(found)} on '
                f"the other; {parent} is not its parent, save or load a base",
                tensor=key,
                parent=parent,
            )


def _layout(layout: tuple[str, tuple[int, ...]] | None) -> str:
    return "missing" if layout is None else f"{layout[0]} {list(layout[1])}"


def _damaged(folder: Path, key: str, what: str) -> FiretitanError:
    return FiretitanError(
        Reason.CHECKSUM_MISMATCH,
        f'{folder.name}: tensor "{key}" {what}; nothing was changed',
        tensor=key,
    )
