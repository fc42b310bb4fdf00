"""Tiny random models with a byte tokenizer, saved as plain Hugging Face folders."""

from __future__ import annotations

from pathlib import Path

VOCAB_SIZE = 272
"""256 bytes, three special tokens, the rest never produced by the tokenizer."""

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def _config(architecture: str) -> object:
    import transformers

    match architecture:
        case "llama":
            return transformers.LlamaConfig(**_GROUPED, tie_word_embeddings=True)
        case "qwen3":
            return transformers.Qwen3Config(**_GROUPED, head_dim=8, tie_word_embeddings=False)
        case "gemma2":
            return transformers.Gemma2Config(**_GROUPED, head_dim=8, sliding_window=16)
        case "qwen3_moe":
            return transformers.Qwen3MoeConfig(
                **_GROUPED, **_EXPERTS, head_dim=8, norm_topk_prob=True
            )
        case "mixtral":
            return transformers.MixtralConfig(
                **_GROUPED, num_local_experts=4, num_experts_per_tok=2
            )
        case "gpt_neox":
            return transformers.GPTNeoXConfig(**_COMMON)
        case _:
            raise ValueError(f"no tiny {architecture}")


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: text -> UTF-8 bytes -> ids 0..255, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<bos>", "<eos>", "<pad>"]
    vocab = {piece: index for index, piece in enumerate([*alphabet, *specials])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    fast.save_pretrained(folder)


def save_tiny(
    folder: Path, architecture: str = "llama", *, seed: int = 0, dtype: str = "float32"
) -> Path:
    """Save a two-layer random model (hidden 32, vocabulary 272) with its tokenizer.

    Weights are drawn wide enough that its predictions differ visibly from uniform.
    """
    import torch
    from transformers import AutoModelForCausalLM

    generator_state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_config(architecture)).to(getattr(torch, dtype))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_((torch.randn(parameter.shape) * 0.12).to(parameter.dtype))
            elif "norm" not in name:
                parameter.copy_((torch.randn(parameter.shape) * 0.05).to(parameter.dtype))
    torch.random.set_rng_state(generator_state)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder
