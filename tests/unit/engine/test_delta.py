"""Deltas: a chain ends in the bits of a full export, and nothing damaged gets through."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine import delta
from firetitan_daemon.engine.api import SavedFiles, SavedSnapshot, SnapshotFormat, SnapshotKind
from firetitan_daemon.engine.raw import (
    RawTensor,
    read_safetensors,
    result_digest,
    write_safetensors,
)

Weights = dict[str, RawTensor]


def _weights(seed: int) -> Weights:
    draw = np.random.default_rng(seed)
    return {
        "layer.weight": RawTensor.of_array(draw.standard_normal((17, 9)).astype(np.float32)),
        "layer.bias": RawTensor.of_array(draw.standard_normal(5).astype(np.float32)),
        "half": RawTensor("BF16", (4, 3), draw.integers(0, 256, 24).astype(np.uint8)),
        "scalar": RawTensor.of_array(np.array(3.5, np.float32)),
        "empty": RawTensor.of_array(np.empty((0, 4), np.float32)),
    }


def _moved(weights: Weights, seed: int) -> Weights:
    """A few bytes differ, as after a small step."""
    draw = np.random.default_rng(seed)
    moved = {}
    for name, tensor in weights.items():
        data = tensor.data.copy()
        if data.size:
            data[draw.integers(0, data.size, 3)] ^= 1
        moved[name] = RawTensor(tensor.dtype, tensor.shape, data)
    return moved


def _saved(weights: Weights) -> SavedSnapshot:
    files = SavedFiles("ab" * 32, 1)
    return SavedSnapshot(files, SnapshotKind.BASE, SnapshotFormat.HF_FULL, result_digest(weights))


def _encode(folder: Path, before: Weights, now: Weights) -> str:
    folder.mkdir()
    saved = delta.encode_delta(
        folder,
        name="step-2",
        parent="step-1",
        parent_saved=_saved(before),
        before=before,
        now=now,
    )
    return saved.result_digest


def _reseal(folder: Path, **changes: object) -> None:
    """Give a folder a valid manifest again, with other facts: damage that no checksum shows."""
    manifest = json.loads((folder / durable.MANIFEST).read_bytes())
    (folder / durable.MANIFEST).unlink()
    durable.seal_folder(folder, {k: v for k, v in manifest.items() if k != "files"} | changes)


def _same(left: Weights, right: Weights) -> bool:
    return left.keys() == right.keys() and all(
        (left[n].dtype, left[n].shape) == (right[n].dtype, right[n].shape)
        and np.array_equal(left[n].data, right[n].data)
        for n in left
    )


def test_chain_ends_in_the_bits_of_the_last_weights(tmp_path: Path) -> None:
    now = _weights(0)
    held = {n: RawTensor(t.dtype, t.shape, t.data.copy()) for n, t in now.items()}
    for step in range(5):
        before, now = now, _moved(now, step)
        promised = _encode(tmp_path / f"d{step}", before, now)
        untouched = {n: t.data.copy() for n, t in held.items()}
        shadow = delta.apply_delta(tmp_path / f"d{step}", held)
        assert all(np.array_equal(held[n].data, untouched[n]) for n in held)
        held = shadow
        assert promised == result_digest(now)
    assert _same(held, now)
    assert result_digest(held) == result_digest(now)


def test_equal_weights_make_equal_folders(tmp_path: Path) -> None:
    before, now = _weights(0), _moved(_weights(0), 1)
    _encode(tmp_path / "a", before, now)
    _encode(tmp_path / "b", before, now)
    manifests = [(tmp_path / each / durable.MANIFEST).read_bytes() for each in ("a", "b")]
    assert manifests[0] == manifests[1]


def test_large_tensor_goes_through_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta, "_BLOCK_BYTES", 1000)
    draw = np.random.default_rng(3)
    before = {"w": RawTensor.of_array(draw.integers(0, 256, 10_007).astype(np.uint8))}
    now = _moved(before, 1)
    _encode(tmp_path / "d", before, now)
    assert _same(delta.apply_delta(tmp_path / "d", before), now)


def test_small_change_makes_a_small_file(tmp_path: Path) -> None:
    before = {"w": RawTensor.of_array(np.random.default_rng(0).standard_normal(100_000))}
    _encode(tmp_path / "d", before, _moved(before, 1))
    assert (tmp_path / "d" / delta.DELTA_FILE).stat().st_size < 2_000


@pytest.mark.parametrize("what", ["name", "dtype", "shape", "bytes"])
def test_digest_tells_apart(what: str) -> None:
    base = _weights(0)
    other = dict(base)
    tensor = other.pop("layer.bias")
    match what:
        case "name":
            other["layer.bia"] = tensor
        case "dtype":
            other["layer.bias"] = RawTensor("I32", tensor.shape, tensor.data)
        case "shape":
            other["layer.bias"] = RawTensor(tensor.dtype, (5, 1), tensor.data)
        case "bytes":
            other["layer.bias"] = RawTensor(tensor.dtype, tensor.shape, tensor.data ^ np.uint8(1))
    assert result_digest(other) != result_digest(base)
    assert result_digest(dict(reversed(base.items()))) == result_digest(base)


@pytest.mark.parametrize("at", [0, 100, -1])
def test_flipped_bit_is_named(tmp_path: Path, at: int) -> None:
    before, now = _weights(0), _moved(_weights(0), 1)
    _encode(tmp_path / "d", before, now)
    file = tmp_path / "d" / delta.DELTA_FILE
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)
    with pytest.raises(FiretitanError, match=r"d/delta\.safetensors is damaged") as caught:
        delta.apply_delta(tmp_path / "d", before)
    assert caught.value.reason is Reason.CHECKSUM_MISMATCH


def test_truncated_file_is_named(tmp_path: Path) -> None:
    before = _weights(0)
    _encode(tmp_path / "d", before, _moved(before, 1))
    file = tmp_path / "d" / delta.DELTA_FILE
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(FiretitanError, match="bytes") as caught:
        delta.apply_delta(tmp_path / "d", before)
    assert caught.value.reason is Reason.CHECKSUM_MISMATCH


def test_other_digest_than_asked_for_is_refused(tmp_path: Path) -> None:
    before = _weights(0)
    _encode(tmp_path / "d", before, _moved(before, 1))
    with pytest.raises(FiretitanError, match="expected 00"):
        delta.apply_delta(tmp_path / "d", before, digest="00" * 32)


def test_damaged_stream_names_the_tensor(tmp_path: Path) -> None:
    before = _weights(0)
    _encode(tmp_path / "d", before, _moved(before, 1))
    file = tmp_path / "d" / delta.DELTA_FILE
    packed = read_safetensors(file)
    packed = {n: RawTensor(t.dtype, t.shape, t.data.copy()) for n, t in packed.items()}
    packed["layer.bias"].data[:4] = 0
    write_safetensors(file, packed)
    _reseal(tmp_path / "d")
    with pytest.raises(FiretitanError, match=r'"layer\.bias" does not decompress') as caught:
        delta.apply_delta(tmp_path / "d", before)
    assert caught.value.reason is Reason.CHECKSUM_MISMATCH


@pytest.mark.parametrize("longer", [False, True])
def test_stream_of_another_length_names_the_tensor(tmp_path: Path, longer: bool) -> None:
    before = _weights(0)
    _encode(tmp_path / "d", before, _moved(before, 1))
    file = tmp_path / "d" / delta.DELTA_FILE
    packed = read_safetensors(file)
    other = packed["layer.weight" if longer else "scalar"]
    packed["layer.bias"] = RawTensor(other.dtype, other.shape, other.data.copy())
    write_safetensors(file, packed)
    _reseal(tmp_path / "d")
    with pytest.raises(FiretitanError, match=r'"layer\.bias" does not hold 20 bytes'):
        delta.apply_delta(tmp_path / "d", before)


def test_other_parent_is_a_broken_chain(tmp_path: Path) -> None:
    before = _weights(0)
    _encode(tmp_path / "d", before, _moved(before, 1))
    other = {**before, "layer.bias": _weights(9)["layer.bias"]}
    with pytest.raises(FiretitanError, match=r'"layer\.bias".*its parent is step-1') as caught:
        delta.apply_delta(tmp_path / "d", other)
    assert caught.value.reason is Reason.CHAIN_BROKEN


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_other_layout_is_a_broken_chain(tmp_path: Path, change: str) -> None:
    before = _weights(0)
    _encode(tmp_path / "d", before, _moved(before, 1))
    other = dict(before)
    if change == "missing":
        del other["half"]
    elif change == "extra":
        other["halt"] = before["half"]
    else:
        other["half"] = RawTensor("BF16", (3, 4), before["half"].data)
    with pytest.raises(FiretitanError, match='tensor "hal') as caught:
        delta.apply_delta(tmp_path / "d", other)
    assert caught.value.reason is Reason.CHAIN_BROKEN
    (tmp_path / "e").mkdir()
    with pytest.raises(FiretitanError, match='tensor "hal'):
        delta.encode_delta(
            tmp_path / "e",
            name="b",
            parent="a",
            parent_saved=_saved(other),
            before=other,
            now=before,
        )


def test_unknown_codec_is_refused_before_anything(tmp_path: Path) -> None:
    before = _weights(0)
    _encode(tmp_path / "d", before, _moved(before, 1))
    shutil.copy(tmp_path / "d" / durable.MANIFEST, tmp_path / "kept.json")
    (tmp_path / "d" / delta.DELTA_FILE).write_bytes(b"not safetensors at all")
    _reseal(tmp_path / "d", codec="arc_v3")
    with pytest.raises(FiretitanError, match='codec "arc_v3"') as caught:
        delta.apply_delta(tmp_path / "d", before)
    assert caught.value.reason is Reason.UNSUPPORTED


def test_promised_result_is_checked(tmp_path: Path) -> None:
    before = _weights(0)
    _encode(tmp_path / "d", before, _moved(before, 1))
    _reseal(tmp_path / "d", result_digest="ab" * 32)
    with pytest.raises(FiretitanError, match="promised is abab"):
        delta.apply_delta(tmp_path / "d", before)


def test_the_parents_manifest_is_named_and_compared(tmp_path: Path) -> None:
    before = _weights(0)
    _encode(tmp_path / "d", before, _moved(before, 1))
    manifest = json.loads((tmp_path / "d" / durable.MANIFEST).read_bytes())
    assert manifest["parent"] == "step-1"
    assert manifest["parent_digest"] == "ab" * 32
    assert manifest["parent_result_digest"] == result_digest(before)
    delta.apply_delta(tmp_path / "d", before, parent_digest="ab" * 32)
    with pytest.raises(FiretitanError, match=r"step-1.*hashes to abab.*found cdcd") as caught:
        delta.apply_delta(tmp_path / "d", before, parent_digest="cd" * 32)
    assert caught.value.reason is Reason.CHECKSUM_MISMATCH
    assert caught.value.metadata["expected"] == "ab" * 32
