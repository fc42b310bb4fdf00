"""Loading: which architectures run packed, which padded, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.experts import near_ties
from support.models import save_tiny

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine import models as models_module
from firetitan_daemon.engine.api import ModelSpec
from firetitan_daemon.engine.lengths import context_length
from firetitan_daemon.engine.models import HeadSpec, load_model

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
PACKED = {
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=5),
    "mistral_wide": lambda: transformers.MistralConfig(**SMALL, sliding_window=28),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=5),
    "granite": lambda: transformers.GraniteConfig(
        **SMALL, logits_scaling=4.0, attention_multiplier=0.2, embedding_multiplier=3.0
    ),
    "cohere": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.3),
    "phi3": lambda: transformers.Phi3Config(**SMALL),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SMALL, head_dim=8, **EXPERTS),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64
    ),
}
PADDED = {
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=5
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **SMALL,
        **EXPERTS,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
}


def save(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> str:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.to(dtype).save_pretrained(folder)
    return str(folder)


def own_logits(folder: str, sequences: list[torch.Tensor]) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        return torch.cat([model(input_ids=tokens[None]).logits[0] for tokens in sequences]).float()


@pytest.mark.parametrize("name", [*PACKED, *PADDED])
def test_logits_are_the_models_own(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, (PACKED | PADDED)[name]())
    loaded = load_model(ModelSpec(folder))
    assert loaded.info.packed is (name in PACKED)
    assert any("padded path" in note for note in loaded.info.notes) is (name in PADDED)
    sequences = [torch.randint(0, 64, (length,)) for length in (3, 30, 11)]
    with torch.no_grad():
        found = loaded.logits(loaded.hidden_states(sequences))
    torch.testing.assert_close(found, own_logits(folder, sequences), atol=2e-5, rtol=1e-4)


LONG_ROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
"""Of heads of 8 channels; other frequencies beyond 32 of 64 positions."""


def long_rope() -> Any:
    return transformers.Phi3Config(
        **SMALL, original_max_position_embeddings=32, rope_parameters=dict(LONG_ROPE)
    )


def test_longrope_is_run_up_to_where_its_frequencies_change(tmp_path: Path) -> None:
    """Beyond, those of a whole call would depend on its longest sequence."""
    folder = save(tmp_path, long_rope())
    loaded = load_model(ModelSpec(folder))
    assert loaded.info.packed and loaded.info.max_context_length == 32
    sequences = [torch.randint(0, 64, (length,)) for length in (3, 32)]
    with torch.no_grad():
        found = loaded.logits(loaded.hidden_states(sequences))
    torch.testing.assert_close(found, own_logits(folder, sequences), atol=2e-5, rtol=1e-4)
    assert load_model(ModelSpec(folder, max_context_length=8)).info.max_context_length == 8
    with pytest.raises(FiretitanError, match=r"max_context_length is 33.*longrope.*32") as caught:
        load_model(ModelSpec(folder, max_context_length=33))
    assert (caught.value.reason, caught.value.field) == (Reason.UNSUPPORTED, "max_context_length")
    with pytest.raises(FiretitanError, match="takes 1 to 32 tokens") as caught:
        load_model(ModelSpec(folder, max_context_length=65))
    assert caught.value.reason is Reason.INVALID_ARGUMENT


def test_longrope_of_some_layers_counts() -> None:
    config = transformers.Gemma3TextConfig(
        **SMALL,
        head_dim=8,
        rope_parameters={
            "full_attention": {
                **LONG_ROPE,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 16,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    assert context_length(config, None, "model") == 16
    config.rope_parameters["full_attention"]["rope_type"] = "default"
    assert context_length(config, None, "model") == 64


WINDOWED = {
    "qwen2_moe": lambda window: transformers.Qwen2MoeConfig(
        **SMALL,
        **EXPERTS,
        shared_expert_intermediate_size=16,
        use_sliding_window=window is not None,
        sliding_window=window,
    ),
    "phimoe": lambda window: transformers.PhimoeConfig(
        **SMALL, num_local_experts=2, sliding_window=window
    ),
}


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_that_comes_as_a_mask_only_is_not_lost(tmp_path: Path, name: str) -> None:
    """One wider than what is tried at load shows nowhere but in the configuration."""
    sequences = [torch.randint(0, 64, (length,)) for length in (3, 60)]
    for window, packed in ((32, False), (64, True), (None, True)):
        folder = save(tmp_path / str(window), WINDOWED[name](window))
        loaded = load_model(ModelSpec(folder))
        with torch.no_grad():
            found = loaded.logits(loaded.hidden_states(sequences))
        torch.testing.assert_close(found, own_logits(folder, sequences), atol=2e-5, rtol=1e-4)
        assert loaded.info.packed is packed
        assert any("window of 32" in note for note in loaded.info.notes) is not packed


def test_experts_in_bfloat16_run_packed(tmp_path: Path) -> None:
    loaded = load_model(ModelSpec(save(tmp_path, PACKED["qwen3_moe"](), torch.bfloat16)))
    assert loaded.info.packed and loaded.info.dtype == "bfloat16"
    assert any("LoRA leaves fused experts" in note for note in loaded.info.notes)
    dense = load_model(ModelSpec(save(tmp_path / "dense", PACKED["mistral"]())))
    assert not dense.info.notes


def test_near_ties_of_routers_do_not_look_like_another_attention(tmp_path: Path) -> None:
    folder = near_ties(tmp_path, "mixtral")
    assert load_model(ModelSpec(str(folder), dtype="bfloat16")).info.packed


STATE_SPACE = {
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8
    ),
    "mamba2": lambda: transformers.Mamba2Config(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        num_heads=8,
        head_dim=8,
        n_groups=1,
    ),
}


@pytest.mark.parametrize("name", STATE_SPACE)
def test_state_spaces_in_bfloat16_keep_a_float32_residual(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path, STATE_SPACE[name](), torch.bfloat16)
    loaded = load_model(ModelSpec(folder))
    sequences = [torch.randint(0, 64, (length,)) for length in (3, 30)]
    with torch.no_grad():
        hidden = loaded.hidden_states(sequences)
        found = loaded.logits(hidden)
    assert hidden.dtype == torch.bfloat16
    expected = own_logits(folder, sequences)
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    config = transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48)
    with pytest.raises(FiretitanError, match="XLNetLMHeadModel is not causal") as caught:
        load_model(ModelSpec(save(tmp_path, config)))
    assert (caught.value.reason, caught.value.field) == (Reason.UNSUPPORTED, "base_model")


def test_a_model_that_cannot_be_run_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("expected m1 and m2 to have the same dtype")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    with pytest.raises(FiretitanError, match="LlamaForCausalLM in float32 cannot be run") as caught:
        load_model(ModelSpec(str(save_tiny(tmp_path / "model"))))
    assert (caught.value.reason, caught.value.field) == (Reason.UNSUPPORTED, "base_model")


def test_info_says_what_was_loaded(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", dtype="bfloat16")
    info = load_model(ModelSpec(str(folder))).info
    assert (info.architecture, info.dtype, info.device) == ("LlamaForCausalLM", "bfloat16", "cpu")
    assert (info.path, info.source) == (str(folder), "folder")
    assert (info.vocab_size, info.max_context_length) == (272, 256)
    assert info.num_threads == torch.get_num_threads()
    assert {"torch", "transformers", "cpu_capability"} <= info.versions.keys()
    assert load_model(ModelSpec(str(folder), dtype="float32")).info.dtype == "float32"
    assert load_model(ModelSpec(str(folder), max_context_length=16)).info.max_context_length == 16


def test_a_head_that_does_more_than_known_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "model", "gemma2")
    monkeypatch.setattr(models_module, "_head_spec", lambda config: HeadSpec(factor=0.5))
    with pytest.raises(FiretitanError, match="head") as caught:
        load_model(ModelSpec(str(folder)))
    assert caught.value.reason is Reason.UNSUPPORTED


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"dtype": "float64"}, "dtype"),
        ({"device": "tpu"}, "device"),
        ({"max_context_length": 257}, "max_context_length"),
        ({"max_context_length": 0}, "max_context_length"),
    ],
)
def test_bad_specs_are_named(tmp_path: Path, spec: dict[str, Any], field: str) -> None:
    folder = save_tiny(tmp_path / "model")
    with pytest.raises(FiretitanError) as caught:
        load_model(ModelSpec(str(folder), **spec))
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_ARGUMENT, field)


def test_no_gpu_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FiretitanError, match="no GPU") as caught:
        load_model(ModelSpec(str(save_tiny(tmp_path / "model")), device="cuda"))
    assert caught.value.reason is Reason.OUT_OF_DEVICES


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    config = (folder / "config.json").read_text().replace('"llama"', '"no_such_model"')
    (folder / "config.json").write_text(config)
    with pytest.raises(FiretitanError) as caught:
        load_model(ModelSpec(str(folder)))
    assert caught.value.reason is Reason.UNSUPPORTED
