"""The sampling engine against transformers: greedy tokens, logprobs, and independence of mates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from support.experts import chosen, forced
from support.models import VOCAB_SIZE, save_tiny
from support.sampling import bits, plain_logprobs, plain_model, random_requests

from firetitan_daemon.engine.api import ModelSpec
from firetitan_daemon.engine.hf_sample import HfSampleEngine
from firetitan_daemon.engine.sample_api import SampleRequest, StopReason
from firetitan_daemon.engine.scheduler import SamplerConfig

ROUTED = ["qwen3_moe", "mixtral"]
ARCHITECTURES = ["llama", "qwen3", "gemma2", "gpt_neox", *ROUTED]
PROMPT = np.arange(60, 84, dtype=np.int32)
SMALL = SamplerConfig(max_rows=20, branch_rows=4)
Open = Callable[..., HfSampleEngine]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    root = tmp_path_factory.mktemp("models")

    def folder_of(architecture: str, dtype: str = "float32") -> Path:
        folder = root / f"{architecture}-{dtype}"
        if not folder.exists():
            save_tiny(folder, architecture, dtype=dtype)
        return folder

    return folder_of


@pytest.fixture
def open_engine() -> Iterator[Open]:
    engines = []

    def open_engine(folder: Path, **settings: object) -> HfSampleEngine:
        config = replace(SMALL, **settings)  # type: ignore[arg-type]
        engines.append(HfSampleEngine(ModelSpec(str(folder)), config))
        return engines[-1]

    yield open_engine
    for engine in engines:
        engine.close()


def _generate(model: torch.nn.Module, prompt: np.ndarray, count: int) -> list[int]:
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    model.generation_config.eos_token_id = None
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_is_what_transformers_generates(
    architecture: str, folder_of: Callable[..., Path], open_engine: Open
) -> None:
    folder = folder_of(architecture)
    engine = open_engine(folder)
    assert engine.info.packed
    model = plain_model(folder)
    futures = [
        engine.submit(SampleRequest(PROMPT[:length], 1, 40, seed=0, temperature=0.0, use_eos=False))
        for length in (24, 11, 1)
    ]
    for future, length in zip(futures, (24, 11, 1), strict=True):
        (sequence,) = future.result().sequences
        assert sequence.token_ids.tolist() == _generate(model, PROMPT[:length], 40)
        assert sequence.stop_reason is StopReason.LENGTH


@pytest.mark.parametrize("dtype, mean, worst", [("float32", 1e-5, 1e-4), ("bfloat16", 1e-2, 1e-1)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_are_those_of_one_plain_forward_pass(
    architecture: str,
    dtype: str,
    mean: float,
    worst: float,
    folder_of: Callable[..., Path],
    open_engine: Open,
) -> None:
    folder = folder_of(architecture, dtype)
    engine = open_engine(folder)
    model = plain_model(folder, dtype=dtype)
    request = SampleRequest(
        PROMPT,
        6,
        40,
        seed=4,
        use_eos=False,
        prompt_logprobs=True,
        routing=architecture in ROUTED,
        prompt_routing=architecture in ROUTED,
    )
    result = engine.submit(request).result()
    assert result.prompt.logprobs is not None
    assert np.isnan(result.prompt.logprobs[0])
    gaps = []
    for sequence in result.sequences:
        tokens = np.concatenate((PROMPT, sequence.token_ids))
        if architecture in ROUTED:
            # By rounding alone two experts may change places; that is not what is compared here.
            routing = [*result.prompt_routing, *sequence.routing[1:], b""]
            with forced(model, chosen(routing)):
                expected = plain_logprobs(model, tokens)
        else:
            expected = plain_logprobs(model, tokens)
        found = np.concatenate((result.prompt.logprobs[1:], sequence.inference_logprobs))
        gaps.append(np.abs(found - expected))
        assert np.array_equal(sequence.sampling_logprobs, sequence.inference_logprobs)
    assert np.mean(gaps) <= mean
    assert np.max(gaps) <= worst


def test_long_prompts_run_in_chunks_with_the_same_logprobs(
    folder_of: Callable[..., Path], open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firetitan_daemon.engine.decode._CHUNK", 7)
    folder = folder_of("gemma2")
    prompt = np.random.default_rng(0).integers(0, 256, 60).astype(np.int32)
    request = SampleRequest(prompt, 1, 5, seed=1, temperature=0.0, prompt_logprobs=True)
    result = open_engine(folder).submit(request).result()
    assert result.prompt.logprobs is not None
    expected = plain_logprobs(plain_model(folder), prompt)
    assert np.abs(result.prompt.logprobs[1:] - expected).max() < 1e-4
    assert result.sequences[0].token_ids.tolist() == _generate(plain_model(folder), prompt, 5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_request_never_depends_on_what_else_runs(
    architecture: str, dtype: str, folder_of: Callable[..., Path], open_engine: Open
) -> None:
    requests = random_requests(10, seed=len(architecture))
    engine = open_engine(folder_of(architecture, dtype))
    alone = [bits(engine.submit(request).result()) for request in requests]
    rng = np.random.default_rng(3)
    for _ in range(3):
        chosen = rng.permutation(len(requests))[: rng.integers(3, 11)]
        futures = [(index, engine.submit(requests[index])) for index in chosen]
        for index, future in futures:
            assert bits(future.result()) == alone[index]
    roomy = open_engine(folder_of(architecture, dtype), max_rows=60, branch_rows=4)
    futures = [roomy.submit(request) for request in requests]
    assert [bits(future.result()) for future in futures] == alone


def _save_odd(kind: str, folder: Path, dtype: torch.dtype) -> Path:
    common = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "pad_token_id": 258,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    if kind == "experts":
        config: transformers.PretrainedConfig = transformers.MixtralConfig(**common)
    else:
        config = transformers.GptOssConfig(
            **common,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=16,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.12)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kind, note", [("experts", "branches decode one by one"), ("sinks", "the model's own cache")]
)
def test_models_whose_rows_cannot_share_a_step(
    kind: str, note: str, dtype: torch.dtype, tmp_path: Path, open_engine: Open
) -> None:
    folder = _save_odd(kind, tmp_path / kind, dtype)
    engine = open_engine(folder)
    assert any(note in each for each in engine.info.notes)
    requests = random_requests(5, seed=2, longest=20)
    alone = [bits(engine.submit(request).result()) for request in requests]
    futures = [engine.submit(request) for request in requests]
    assert [bits(future.result()) for future in futures] == alone
    if dtype == torch.float32:
        model = plain_model(folder)
        request = SampleRequest(
            PROMPT, 2, 20, seed=0, temperature=0.0, use_eos=False, prompt_logprobs=True
        )
        result = engine.submit(request).result()
        assert result.sequences[1].token_ids.tolist() == _generate(model, PROMPT, 20)
        assert result.prompt.logprobs is not None
        expected = plain_logprobs(model, PROMPT)
        assert np.abs(result.prompt.logprobs[1:] - expected).max() < 1e-4
