"""Adapters that PEFT wrote, loaded into a session: the logits are PeftModel's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.models import VOCAB_SIZE, save_tiny
from transformers import AutoModelForCausalLM

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import Datum, LoraSpec, ModelSpec, SessionSpec
from firetitan_daemon.engine.hf_train import HfTrainEngine
from firetitan_daemon.engine.raw import RawTensor, read_safetensors, write_safetensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]

CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "smaller": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"]},
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True},
    "causal": {"r": 4, "lora_alpha": 64, "target_modules": ["o_proj"], "task_type": "CAUSAL_LM"},
    "one layer": {"r": 3, "target_modules": ["up_proj"], "layers_to_transform": [1]},
    "head": {"r": 4, "lora_alpha": 8, "target_modules": ["k_proj", "lm_head"]},
}


def write_theirs(model: Path, folder: Path, settings: dict[str, Any]) -> Path:
    """An adapter as PEFT saves it; B drawn, for zeros would say nothing."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model)
    theirs = get_peft_model(base, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    theirs.save_pretrained(folder)
    durable.seal_folder(folder, {})
    return folder


def open_engine(model: Path, rank: int = 4) -> HfTrainEngine:
    engine = HfTrainEngine(ModelSpec(str(model)))
    engine.open_session(SessionSpec(seed=3, lora=LoraSpec(rank=rank, alpha=8.0)))
    return engine


def every_logprob(engine: HfTrainEngine, tokens: np.ndarray) -> torch.Tensor:
    """Of every token at every position, [N, V]: the logits but for a constant a row."""
    targets = np.tile(np.arange(VOCAB_SIZE), (len(tokens), 1))
    output = engine.forward(
        [Datum(tokens.astype(np.int32), {"target_tokens": targets})], "cross_entropy", {}
    )
    return torch.from_numpy(output.outputs[0]["logprobs"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_logits_equal_peft(tmp_path: Path, architecture: str, case: str) -> None:
    model = save_tiny(tmp_path / "model", architecture)
    folder = write_theirs(model, tmp_path / "theirs", CASES[case])
    engine = open_engine(model)
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, 30)
    before = every_logprob(engine, tokens)
    engine.load_adapter(folder)
    found = every_logprob(engine, tokens)
    base = AutoModelForCausalLM.from_pretrained(model)
    theirs = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        logits = theirs(input_ids=torch.from_numpy(tokens)[None]).logits[0]
    expected = torch.log_softmax(logits.float(), 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (before - expected).abs().max() > 1e-2


def test_a_bigger_rank_is_refused_naming_both(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    folder = write_theirs(model, tmp_path / "run-42", CASES["plain"] | {"r": 8})
    with pytest.raises(FiretitanError, match="run-42: has rank 8, the session 4"):
        open_engine(model).load_adapter(folder)


def test_other_weights_beside_the_adapter_are_refused(tmp_path: Path) -> None:
    """PEFT stores the output layer's own weight; one that differs would change the base."""
    model = save_tiny(tmp_path / "model")
    folder = write_theirs(model, tmp_path / "theirs", CASES["head"])
    (folder / durable.MANIFEST).unlink()
    path = folder / "adapter_model.safetensors"
    tensors = {
        name: RawTensor(tensor.dtype, tensor.shape, tensor.data.copy())
        for name, tensor in read_safetensors(path).items()
    }
    (stored,) = [name for name in tensors if name.endswith(".base_layer.weight")]
    changed = tensors[stored].array().copy()
    changed[0, 0] += 1
    tensors[stored] = RawTensor.of_array(changed)
    write_safetensors(path, tensors)
    durable.seal_folder(folder, {})
    with pytest.raises(FiretitanError, match="lm_head") as caught:
        open_engine(model).load_adapter(folder)
    assert caught.value.reason is Reason.UNSUPPORTED


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    llama, other = save_tiny(tmp_path / "llama"), save_tiny(tmp_path / "neox", "gpt_neox")
    folder = write_theirs(llama, tmp_path / "theirs", CASES["plain"])
    with pytest.raises(FiretitanError, match="down_proj"):
        open_engine(other).load_adapter(folder)
