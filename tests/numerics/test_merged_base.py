"""An adapter merged into its base: the model PEFT computes with, as a plain Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.models import save_tiny
from transformers import AutoModelForCausalLM

from firetitan_daemon.core.errors import FiretitanError
from firetitan_daemon.engine.api import (
    AdamParams,
    Datum,
    ExportPrecision,
    LoraSpec,
    ModelSpec,
    Normalization,
    SavedSnapshot,
    SessionSpec,
    SnapshotFormat,
    SnapshotKind,
    SnapshotLayer,
)
from firetitan_daemon.engine.hf_sample import HfSampleEngine
from firetitan_daemon.engine.hf_train import HfTrainEngine
from firetitan_daemon.engine.resolve import resolve_model
from firetitan_daemon.engine.sample_api import SampleRequest

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
TOKENS = torch.arange(60, 84)


def trained(folder: Path, *, unembed: bool = True) -> HfTrainEngine:
    """A LoRA session that has taken a few wide steps."""
    engine = HfTrainEngine(ModelSpec(str(folder)))
    engine.open_session(SessionSpec(3, LoraSpec(4, 16.0, train_unembed=unembed)))
    tokens = TOKENS.numpy().astype(np.int32)
    datum = Datum(tokens[:-1], {"target_tokens": tokens[1:].astype(np.int64)})
    for _ in range(3):
        engine.forward_backward([datum], "cross_entropy", {})
        engine.optim_step(AdamParams(learning_rate=2e-2), Normalization.NONE)
    return engine


def save(
    engine: HfTrainEngine, root: Path, name: str, kind: SnapshotKind, **more: Any
) -> tuple[Path, SavedSnapshot]:
    folder = root / name
    folder.mkdir()
    return folder, engine.save_snapshot(folder, name, kind, None, **more)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS[None]).logits[0].float()
    return found


def plain(folder: Path, dtype: Any = "auto") -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"], ids=["tied head", "head of its own"])
@pytest.mark.parametrize("unembed", [True, False], ids=["head adapted", "head left out"])
def test_a_merged_base_computes_what_peft_does(
    tmp_path: Path, architecture: str, unembed: bool
) -> None:
    base = save_tiny(tmp_path / "base", architecture)
    engine = trained(base, unembed=unembed)
    adapter, _ = save(engine, tmp_path, "adapter", SnapshotKind.BASE)
    before = engine.save_state(_empty(tmp_path / "state")).digest
    folder, saved = save(engine, tmp_path, "merged", SnapshotKind.MERGED_BASE)
    assert engine.save_state(_empty(tmp_path / "again")).digest == before
    assert (saved.kind, saved.format) == (SnapshotKind.MERGED_BASE, SnapshotFormat.HF_FULL)
    tuned = PeftModel.from_pretrained(plain(base), adapter)
    assert (logits(tuned) - logits(plain(base))).abs().max() > 0.5
    torch.testing.assert_close(logits(plain(folder)), logits(tuned), atol=1e-4, rtol=0)
    config = json.loads((folder / "config.json").read_text())
    tied = architecture == "llama"
    assert config["tie_word_embeddings"] == (tied and not unembed)
    stored = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in stored) == (unembed or not tied)
    engine.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapters_folder_is_a_model_merged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setenv("FIRETITAN_CACHE", str(tmp_path / "cache"))
    base = save_tiny(tmp_path / "base", dtype=dtype)
    engine = trained(base)
    adapter, _ = save(engine, tmp_path, "adapter", SnapshotKind.BASE)
    expected, _ = save(engine, tmp_path, "merged", SnapshotKind.MERGED_BASE)
    engine.close()
    model = resolve_model(str(adapter))
    assert model.source == f"adapter merged into {base}"
    found, wanted = (load_file(one / "model.safetensors") for one in (model.path, expected))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    assert resolve_model(str(adapter)) == model
    assert [one.name for one in (tmp_path / "cache" / "models").glob("m*")] == [model.path.name]
    # Its own adapters name a folder that PEFT finds.
    again = HfTrainEngine(ModelSpec(str(adapter)))
    again.open_session(SessionSpec(1, LoraSpec(2)))
    fresh, _ = save(again, tmp_path, "fresh", SnapshotKind.BASE)
    again.close()
    config = json.loads((fresh / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model.path)


@pytest.mark.parametrize(
    ("name", "why"), [(None, "names no base model"), ("/nowhere", "no such folder")]
)
def test_an_adapter_without_its_base_says_so(tmp_path: Path, name: str | None, why: str) -> None:
    base = save_tiny(tmp_path / "base")
    engine = trained(base)
    adapter, _ = save(engine, tmp_path, "adapter", SnapshotKind.BASE)
    engine.close()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": name})
    )
    with pytest.raises(FiretitanError, match=why):
        resolve_model(str(adapter))


def test_precision_is_the_bases_own_or_bfloat16(tmp_path: Path) -> None:
    for stored in ("float32", "bfloat16"):
        base = save_tiny(tmp_path / stored, dtype=stored)
        engine = trained(base)
        source, _ = save(engine, tmp_path, f"{stored}-source", SnapshotKind.MERGED_BASE)
        narrow, _ = save(
            engine,
            tmp_path,
            f"{stored}-bf16",
            SnapshotKind.MERGED_BASE,
            precision=ExportPrecision.BF16,
        )
        engine.close()
        own, rounded = (load_file(one / "model.safetensors") for one in (source, narrow))
        assert {tensor.dtype for tensor in own.values()} == {getattr(torch, stored)}
        # Rounded once, from float32.
        exact = own if stored == "float32" else rounded
        for name, tensor in rounded.items():
            assert torch.equal(tensor, exact[name].to(torch.bfloat16)), name
        assert plain(narrow).dtype == torch.bfloat16
        assert plain(source).dtype == getattr(torch, stored)


def test_a_tied_model_serves_a_merged_base_adapters_and_itself(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    engine = trained(base)
    adapter, as_adapter = save(engine, tmp_path, "adapter", SnapshotKind.BASE)
    merged, as_merged = save(engine, tmp_path, "merged", SnapshotKind.MERGED_BASE)
    engine.close()
    tuned = _prompt_logprobs(logits(PeftModel.from_pretrained(plain(base), adapter)))
    full = trained_full(base, tmp_path)
    sampler = HfSampleEngine(ModelSpec(str(base)))
    try:
        own = _sampled(sampler)
        np.testing.assert_allclose(own, _prompt_logprobs(logits(plain(base))), atol=1e-5)
        for _ in range(2):
            sampler.apply([_layer("merged", merged, as_merged)])
            np.testing.assert_allclose(_sampled(sampler), tuned, atol=1e-4)
            # A version that is tied again, behind one that is not.
            sampler.apply([_layer("full", *full)])
            whole = _prompt_logprobs(logits(plain(full[0])))
            np.testing.assert_allclose(_sampled(sampler), whole, atol=1e-5)
            sampler.apply([_layer("adapter", adapter, as_adapter)])
            np.testing.assert_allclose(_sampled(sampler), tuned, atol=1e-4)
    finally:
        sampler.close()


def trained_full(base: Path, root: Path) -> tuple[Path, SavedSnapshot]:
    """A base snapshot of full-parameter training."""
    engine = HfTrainEngine(ModelSpec(str(base)))
    engine.open_session(SessionSpec(3, None))
    tokens = TOKENS.numpy().astype(np.int32)
    datum = Datum(tokens[:-1], {"target_tokens": tokens[1:].astype(np.int64)})
    engine.forward_backward([datum], "cross_entropy", {})
    engine.optim_step(AdamParams(learning_rate=1e-2), Normalization.NONE)
    saved = save(engine, root, "full", SnapshotKind.BASE)
    engine.close()
    return saved


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _layer(name: str, folder: Path, saved: SavedSnapshot) -> SnapshotLayer:
    return SnapshotLayer(
        name, saved.kind, saved.format, folder, saved.files.digest, saved.result_digest
    )


def _prompt_logprobs(values: torch.Tensor) -> Any:
    table = values[:-1].log_softmax(-1)
    return table.gather(1, TOKENS[1:, None])[:, 0].numpy()


def _sampled(sampler: HfSampleEngine) -> Any:
    prompt = TOKENS.numpy().astype(np.int32)
    request = SampleRequest(prompt, 1, 1, seed=0, prompt_logprobs=True)
    found = sampler.submit(request).result().prompt.logprobs
    assert found is not None
    return found[1:]
