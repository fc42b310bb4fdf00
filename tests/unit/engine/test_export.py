"""Snapshot folders: transformers and PEFT load them as they are, with the same numbers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from support.models import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine import export
from firetitan_daemon.engine.adapter import write_adapter
from firetitan_daemon.engine.api import LoraSpec, ModelInfo, SnapshotFormat, SnapshotKind
from firetitan_daemon.engine.delta import apply_delta
from firetitan_daemon.engine.export import SnapshotWriter, read_full, write_full
from firetitan_daemon.engine.lora import attach_lora
from firetitan_daemon.engine.peft import ADAPTER_CONFIG, read_adapter
from firetitan_daemon.engine.raw import result_digest, write_safetensors
from firetitan_daemon.engine.tensors import from_raw, stored_dtypes, to_raw

ARCHITECTURES = ["llama", "qwen3", "gemma2", "gpt_neox"]
TOKENS = torch.arange(40, 60)[None]


def _staging(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    folder.mkdir()
    return folder


def _masters(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """Float32 parameters of a model, moved off their stored values."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: parameter.detach() + 1e-2 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters()
    }


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(TOKENS).logits
    return logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_snapshot_loads_in_the_stored_dtype(
    tmp_path: Path, architecture: str, dtype: str
) -> None:
    folder = save_tiny(tmp_path / "base", architecture, dtype=dtype)
    masters = _masters(folder, 1)
    staging = _staging(tmp_path, "s")
    saved = SnapshotWriter(folder, "tiny").save(staging, "s", SnapshotKind.BASE, None, masters)
    loaded = AutoModelForCausalLM.from_pretrained(staging)
    assert loaded.dtype == getattr(torch, dtype)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, masters[name].to(parameter.dtype)), name
    assert saved.format is SnapshotFormat.HF_FULL
    assert result_digest(read_full(staging)) == saved.result_digest
    manifest = durable.verify_folder(staging, saved.files.digest)
    assert manifest["result_digest"] == saved.result_digest
    assert AutoTokenizer.from_pretrained(staging)("ab").input_ids == [
        *AutoTokenizer.from_pretrained(folder)("ab").input_ids
    ]


def test_delta_chain_equals_a_full_export_bitwise(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", dtype="bfloat16")
    masters = _masters(folder, 1)
    writer = SnapshotWriter(folder, "tiny")
    writer.save(_staging(tmp_path, "s0"), "s0", SnapshotKind.BASE, None, masters)
    held = read_full(tmp_path / "s0")
    for step in range(1, 4):
        for tensor in masters.values():
            tensor += 1e-3 * torch.randn(tensor.shape)
        staging = _staging(tmp_path, f"s{step}")
        saved = writer.save(staging, f"s{step}", SnapshotKind.DELTA, f"s{step - 1}", masters)
        assert saved.kind is SnapshotKind.DELTA
        held = apply_delta(staging, held, digest=saved.files.digest)
    full = _staging(tmp_path, "full")
    whole = SnapshotWriter(folder, "tiny").save(full, "full", SnapshotKind.BASE, None, masters)
    assert whole.result_digest == saved.result_digest == result_digest(held)
    exported = from_raw(read_full(full))
    assert all(torch.equal(tensor, exported[name]) for name, tensor in from_raw(held).items())


def test_delta_needs_the_last_snapshot_saved(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base")
    masters = _masters(folder, 1)
    writer = SnapshotWriter(folder, "tiny")
    delta = SnapshotKind.DELTA
    with pytest.raises(FiretitanError, match='the last snapshot saved here is "None"') as caught:
        writer.save(_staging(tmp_path, "a"), "a", delta, "x", masters)
    assert caught.value.reason is Reason.CHAIN_BROKEN
    writer.save(_staging(tmp_path, "b"), "b", SnapshotKind.BASE, None, masters)
    for parent in ("other", None):
        with pytest.raises(FiretitanError, match='the last snapshot saved here is "b"'):
            writer.save(tmp_path / "a", "c", delta, parent, masters)
    writer.save(_staging(tmp_path, "c"), "c", delta, "b", masters)
    writer.forget()
    with pytest.raises(FiretitanError, match="save a base"):
        writer.save(tmp_path / "a", "d", delta, "c", masters)


def test_saved_snapshot_does_not_follow_training(tmp_path: Path) -> None:
    """With float32 masters no cast makes the copy; the parent must still be one."""
    folder = save_tiny(tmp_path / "base", dtype="float32")
    masters = _masters(folder, 1)
    writer = SnapshotWriter(folder, "tiny")
    writer.save(_staging(tmp_path, "a"), "a", SnapshotKind.BASE, None, masters)
    for tensor in masters.values():
        tensor.mul_(1.5)
    writer.save(_staging(tmp_path, "b"), "b", SnapshotKind.DELTA, "a", masters)
    after = from_raw(apply_delta(tmp_path / "b", read_full(tmp_path / "a")))
    assert all(torch.equal(after[name], tensor) for name, tensor in masters.items())


def test_infinite_weights_are_not_served(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base")
    masters = _masters(folder, 1)
    masters["model.norm.weight"][3] = float("inf")
    with pytest.raises(FiretitanError, match=r"model\.norm\.weight") as caught:
        SnapshotWriter(folder, "tiny").save(
            _staging(tmp_path, "a"), "a", SnapshotKind.BASE, None, masters
        )
    assert caught.value.reason is Reason.NON_FINITE


def test_shards_load_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "base", "qwen3")
    masters = _masters(folder, 2)
    monkeypatch.setattr(export, "MAX_SHARD_BYTES", 30_000)
    staging = _staging(tmp_path, "s")
    saved = write_full(staging, "s", masters, folder, "tiny")
    assert len(list(staging.glob("*.safetensors"))) > 2
    assert result_digest(read_full(staging)) == saved.result_digest
    loaded = AutoModelForCausalLM.from_pretrained(staging)
    assert all(torch.equal(p, masters[name]) for name, p in loaded.named_parameters())


def test_raw_views_share_memory() -> None:
    tensors = {"a": torch.arange(6.0).bfloat16().reshape(2, 3), "b": torch.tensor(1.5)}
    back = from_raw(to_raw(tensors))
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor)
        assert back[name].data_ptr() == tensor.data_ptr()


def test_reading_never_writes_the_file(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base")
    before = durable.hash_file(folder / "model.safetensors")
    for tensor in from_raw(read_full(folder)).values():
        tensor.zero_()
    assert durable.hash_file(folder / "model.safetensors") == before


def _adapter(
    tmp_path: Path, architecture: str, spec: LoraSpec, dtype: str = "float32"
) -> tuple[Path, Path, torch.Tensor]:
    """A base folder, an adapter folder written from our own layers, and their logits."""
    folder = save_tiny(tmp_path / "base", architecture, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(folder)
    pairs = attach_lora(model, spec, seed=3)
    for pair in pairs.values():
        pair.b.normal_(0, 0.1, generator=torch.Generator().manual_seed(4))
        pair.refresh()
    staging = _staging(tmp_path, "adapter")
    write_adapter(
        staging,
        "adapter",
        {name: (pair.a, pair.b) for name, pair in pairs.items()},
        alpha=spec.alpha,
        base_model=str(folder),
        revision=None,
        model_folder=folder,
    )
    return folder, staging, _logits(model)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore::FutureWarning")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(4, alpha=8.0),
        LoraSpec(3, alpha=1.5, train_mlp=False, train_unembed=False),
        LoraSpec(2, train_attn=False, train_mlp=False),
    ],
    ids=["all", "attention", "head"],
)
def test_peft_loads_an_adapter_with_equal_logits(
    tmp_path: Path, architecture: str, spec: LoraSpec
) -> None:
    from peft import PeftModel

    folder, adapter, expected = _adapter(tmp_path, architecture, spec)
    base = AutoModelForCausalLM.from_pretrained(folder)
    assert (_logits(base) - expected).abs().max() > 1e-2
    loaded = PeftModel.from_pretrained(base, adapter)
    torch.testing.assert_close(_logits(loaded), expected, rtol=0, atol=2e-5)
    tensors = read_adapter(adapter).tensors
    names = {name.replace(".default.", ".") for name in loaded.state_dict() if "lora_" in name}
    assert names == set(tensors)


def test_adapter_says_what_it_stands_on(tmp_path: Path) -> None:
    folder, adapter, _ = _adapter(tmp_path, "llama", LoraSpec(4, alpha=8.0))
    config = json.loads((adapter / ADAPTER_CONFIG).read_bytes())
    assert config["base_model_name_or_path"] == str(folder)
    assert config["r"] == 4 and config["lora_alpha"] == 8 and config["use_rslora"] is False
    assert config["target_modules"] == sorted(config["target_modules"])
    assert "lm_head" in config["target_modules"]
    read = read_adapter(adapter)
    tensors = read.tensors
    assert (read.rank, read.scaling) == (4, 2.0)
    assert durable.verify_folder(adapter)["result_digest"] == result_digest(tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {"F32"}


def test_adapter_of_a_bfloat16_base_stays_float32(tmp_path: Path) -> None:
    _, adapter, _ = _adapter(tmp_path, "llama", LoraSpec(4), dtype="bfloat16")
    assert {tensor.dtype for tensor in read_adapter(adapter).tensors.values()} == {"F32"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 2}),
        ("peft_type", "LOHA"),
        ("something_new", 7),
    ],
)
def test_settings_that_cannot_be_honoured_are_named(
    tmp_path: Path, key: str, value: object
) -> None:
    _, adapter, _ = _adapter(tmp_path, "llama", LoraSpec(4))
    path = adapter / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {key: value}))
    with pytest.raises(FiretitanError, match=key) as caught:
        read_adapter(adapter)
    assert caught.value.reason is Reason.UNSUPPORTED


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Model has `tie_word_embeddings=True`")
def test_adapter_written_by_peft_is_read(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    folder = save_tiny(tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "theirs")
    read = read_adapter(tmp_path / "theirs")
    assert read.rank == 4 and len(read.tensors) == 4


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("no weights", "needs adapter_config.json and adapter_model.safetensors"),
        ("unpaired", "lora_B"),
        ("rank", "r is 8"),
        # The files of our own snapshots are verified by their hash before.
        ("truncated", "adapter_model.safetensors is no safetensors file"),
        ("json", "adapter_config.json"),
    ],
)
def test_malformed_adapters_are_refused(tmp_path: Path, damage: str, told: str) -> None:
    _, adapter, _ = _adapter(tmp_path, "llama", LoraSpec(4))
    weights, config = adapter / "adapter_model.safetensors", adapter / ADAPTER_CONFIG
    match damage:
        case "no weights":
            shutil.move(weights, adapter / "adapter_model.bin")
        case "unpaired":
            tensors = dict(read_adapter(adapter).tensors)
            tensors.pop(next(name for name in tensors if "lora_B" in name))
            write_safetensors(weights, tensors)
        case "rank":
            config.write_text(json.dumps(json.loads(config.read_bytes()) | {"r": 8}))
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-10])
        case "json":
            config.write_text("{")
    with pytest.raises(FiretitanError, match=re.escape(told)) as caught:
        read_adapter(adapter)
    assert caught.value.reason is Reason.INVALID_ARGUMENT


def test_target_modules_name_no_other_module(tmp_path: Path) -> None:
    from firetitan_daemon.engine.adapter import _target_modules

    stored = [f"model.layers.{i}.{part}.proj.weight" for i in (0, 1) for part in ("attn", "mlp")]
    assert _target_modules([f"model.layers.{i}.attn.proj" for i in (0, 1)], stored) == ["attn.proj"]
    assert _target_modules([name.removesuffix(".weight") for name in stored], stored) == ["proj"]


def test_base_reference_is_the_hub_id_only_for_the_hub() -> None:
    from firetitan_daemon.engine.adapter import base_reference

    info = ModelInfo("/cache/snapshots/abc", "hub", "", "", "", "", 1, 1, 1, True, 1)
    assert base_reference("org/name", info) == ("org/name", "abc")
    other = ModelInfo("/models/x", "gguf", "", "", "", "", 1, 1, 1, True, 1)
    assert base_reference("org/name", other) == ("/models/x", None)


def test_stored_dtypes_are_those_of_the_file(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", dtype="bfloat16")
    assert set(stored_dtypes(folder).values()) == {torch.bfloat16}
