"""Files nobody vouches for (R26): whatever is in them, none is run and none is waited for."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from firetitan.v1 import checkpoint_pb2, operation_pb2, trainer_service_pb2
from support import bombs
from support.adapters import write_peft
from support.hostile import CODES, Refusal, refusal
from support.hostile_world import World
from support.models import save_tiny
from support.stubs import START_S

from firetitan_daemon.core.errors import FiretitanError
from firetitan_daemon.engine import pretrained
from firetitan_daemon.engine.api import ModelSpec
from firetitan_daemon.engine.models import load_model

pytestmark = pytest.mark.timeout(300)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTED = "model.layers.0.self_attn.q_proj"
HUGE = 1 << 42
DAMAGED = {*CODES, "DATA_LOSS"}
BASE = checkpoint_pb2.Snapshot.KIND_BASE
PATIENCE_S = 60.0
"""How long a refusal may take on a machine that does much else; a pipe would be for ever."""
ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices")


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """What a bomb would make; nobody does."""
    path = tmp_path / "canary"
    bombs.arm(path)
    yield path
    assert not path.exists()


def _bin(folder: Path, canary: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(bombs.pickled(canary))


def _beside(folder: Path, canary: Path) -> None:
    """Refused for what it is; the bombs beside it are not looked at."""
    for name in ("adapter_model.bin", "optimizer.pt", ".metadata", "training_args.bin"):
        (folder / name).write_bytes(bombs.pickled(canary))
    (folder / "evil.py").write_text(bombs.code(canary))
    bombs.edit(folder / CONFIG, r=5)


def _auto_mapping(folder: Path, canary: Path) -> None:
    (folder / "evil.py").write_text(bombs.code(canary))
    mapping = {"base_model_class": "Model", "parent_library": "evil"}
    bombs.edit(folder / CONFIG, auto_mapping=mapping)


def _foreign(folder: Path, canary: Path) -> None:
    secret = folder.parent / "secret.txt"
    secret.write_text("a secret of another folder")
    (folder / WEIGHTS).unlink()
    os.link(secret, folder / WEIGHTS)


def _linked_out(folder: Path, canary: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/etc/passwd")


def _declared(folder: Path, canary: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    bombs.sparse(folder / WEIGHTS, 4096, header)


ADAPTERS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "pickle as bin": (_bin, "pickle"),
    "pickle as safetensors": (
        lambda folder, canary: bombs.replace(folder / WEIGHTS, bombs.pickled(canary)),
        "no safetensors file",
    ),
    "pickle as config": (
        lambda folder, canary: bombs.replace(folder / CONFIG, bombs.pickled(canary)),
        "not readable",
    ),
    "bombs beside it": (_beside, "r is 5"),
    "auto_mapping": (_auto_mapping, "auto_mapping"),
    "nesting": (
        lambda folder, canary: bombs.replace(folder / CONFIG, "[" * 100_000),
        "not readable",
    ),
    "link": (_linked_out, "symbolic link"),
    "hard link": (_foreign, "no safetensors file"),
    "pipe": (lambda folder, canary: bombs.pipe(folder / WEIGHTS), "no regular file"),
    "pipe as config": (lambda folder, canary: bombs.pipe(folder / CONFIG), "no regular file"),
    "sparse": (lambda folder, canary: bombs.sparse(folder / WEIGHTS, HUGE), "more than"),
    "declared": (_declared, "no safetensors file"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(world: World, tmp_path: Path, canary: Path, name: str) -> None:
    damage, text = ADAPTERS[name]
    folder = _adapter(tmp_path / "adapter")
    damage(folder, canary)
    _refused_adapter(world, folder, text)


@ROOT
def test_an_adapter_that_is_a_device(world: World, tmp_path: Path) -> None:
    folder = _adapter(tmp_path / "adapter")
    bombs.device(folder / WEIGHTS)
    _refused_adapter(world, folder, "no regular file")


def test_the_adapter_that_was_damaged_is_a_good_one(world: World, tmp_path: Path) -> None:
    lane = world.llama.new_lane()
    world.stubs.done(lane.load_adapter(str(_adapter(tmp_path / "adapter"))))


def _adapter(folder: Path) -> Path:
    import numpy as np

    a, b = np.ones((4, 32), np.float32), np.zeros((32, 4), np.float32)
    return write_peft(folder, {ADAPTED: (a, b)})


def _refused_adapter(world: World, folder: Path, text: str) -> None:
    before, begun = world.llama.digest(), time.monotonic()
    lane = world.llama.new_lane()
    told = _failed(world, lane.load_adapter(str(folder)))
    assert told.field and text in told.text, told
    assert "secret of another" not in told.text and "root:" not in told.text
    assert time.monotonic() - begun < PATIENCE_S
    assert world.llama.digest() == before


def _failed(world: World, accepted: operation_pb2.Operation) -> Refusal:
    ended = world.stubs.wait(accepted.name, timeout_s=PATIENCE_S)
    assert ended.HasField("error")
    return refusal(ended.error, codes=DAMAGED)


# -- what was saved, damaged where it lies ---------------------------------------------------------

DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "pickle": lambda path, canary: bombs.replace(path, bombs.pickled(canary)),
    "pipe": lambda path, canary: bombs.pipe(path),
    "link": lambda path, canary: (path.unlink(), path.symlink_to("/etc/passwd"))[0],
    "sparse": lambda path, canary: bombs.sparse(path, HUGE),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["manifest.json", "*.safetensors"])
def test_checkpoints_and_snapshots(world: World, canary: Path, file: str, damage: str) -> None:
    site = world.toy
    lane = site.new_lane()
    world.stubs.done(lane.save_state("hostile"))
    saved = world.stubs.done(lane.save_snapshot("hostile", BASE)).snapshot
    for folder in _published(world, "hostile", saved.name.rpartition("/")[2]):
        DAMAGES[damage](next(iter(sorted(folder.glob(file)))), canary)
    before = site.digest()
    loaded = _failed(world, site.new_lane().load_state("hostile"))
    assert loaded.code == "DATA_LOSS" and file.removeprefix("*") in loaded.text, loaded
    served = site.stubs.hotload(site.deployment, saved.name)
    told = refusal(served.error, codes=DAMAGED)
    assert told.code == "DATA_LOSS" and file.removeprefix("*") in told.text, told
    assert site.digest() == before
    assert site.stubs.sample(site.deployment).snapshot == site.snapshot


def test_bombs_beside_what_was_saved_are_not_looked_at(world: World, canary: Path) -> None:
    site = world.toy
    lane = site.new_lane()
    world.stubs.done(lane.save_state("beside"))
    saved = world.stubs.done(lane.save_snapshot("beside", BASE)).snapshot
    for folder in _published(world, "beside", saved.name.rpartition("/")[2]):
        for name in (".metadata", "adapter_model.bin", "optimizer.pt", "pytorch_model.bin"):
            (folder / name).write_bytes(bombs.pickled(canary))
        (folder / "modeling_evil.py").write_text(bombs.code(canary))
    world.stubs.done(site.new_lane().load_state("beside"))
    assert not site.stubs.hotload(site.deployment, saved.name).HasField("error")
    assert not site.stubs.hotload(site.deployment, site.snapshot).HasField("error")


def _published(world: World, checkpoint: str, snapshot: str) -> list[Path]:
    """The folders of a checkpoint, as saved last, and of a snapshot."""
    store = world.daemon.home / "store"
    states = sorted(store.glob(f"checkpoints/{checkpoint}-*"), key=lambda one: one.stat().st_mtime)
    (served,) = store.glob(f"snapshots/{snapshot}-*")
    return [states[-1], served]


# -- base models -----------------------------------------------------------------------------------


def _pickled_weights(name: str) -> Callable[[Path, Path], None]:
    def damage(folder: Path, canary: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(bombs.pickled(canary))

    return damage


def _auto_map(folder: Path, canary: Path) -> None:
    (folder / "evil.py").write_text(bombs.code(canary))
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    bombs.edit(folder / "config.json", auto_map=names, model_type="evil", trust_remote_code=True)


def _index(name: str) -> Callable[[Path, Path], None]:
    def damage(folder: Path, canary: Path) -> None:
        (folder.parent / "outside.safetensors").write_bytes(b"")
        (folder / "outside.bin").write_bytes(bombs.pickled(canary))
        content = f'{{"weight_map": {{"a": "{name}"}}}}'
        (folder / "model.safetensors.index.json").write_text(content)

    return damage


def _adapter_within(folder: Path, canary: Path) -> None:
    _adapter(folder)
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(bombs.pickled(canary))
    bombs.edit(folder / CONFIG, base_model_name_or_path="evil/base")


def _adapter_on_itself(folder: Path, canary: Path) -> None:
    other = folder.with_name("other")
    for one, base in ((folder, other), (other, folder)):
        for path in one.iterdir() if one.is_dir() else ():
            path.unlink()
        bombs.edit(_adapter(one) / CONFIG, base_model_name_or_path=str(base))


def _in_config(**settings: object) -> Callable[[Path, Path], None]:
    return lambda folder, canary: bombs.edit(folder / "config.json", **settings)


MODELS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "bin": (_pickled_weights("pytorch_model.bin"), "pickle"),
    "pt": (_pickled_weights("model.pt"), "pickle"),
    "pickle as safetensors": (
        lambda folder, canary: bombs.replace(folder / "model.safetensors", bombs.pickled(canary)),
        "cannot be loaded",
    ),
    "pickle as config": (
        lambda folder, canary: bombs.replace(folder / "config.json", bombs.pickled(canary)),
        "cannot be",
    ),
    "auto_map": (_auto_map, "cannot be loaded"),
    "index with dots": (_index("../outside.safetensors"), "../outside.safetensors"),
    "index of pickles": (_index("outside.bin"), "outside.bin"),
    "adapter within": (_adapter_within, CONFIG),
    "adapter on itself": (_adapter_on_itself, "adapters that it stands on"),
    "pipe": (lambda folder, canary: bombs.pipe(folder / "tokenizer.json"), "no regular file"),
    "pipe as config": (lambda folder, canary: bombs.pipe(folder / "config.json"), "config.json"),
    "sparse": (lambda folder, canary: bombs.sparse(folder / "model.safetensors", HUGE), "memory"),
    "declared": (
        lambda folder, canary: bombs.sparse(
            folder / "model.safetensors",
            4096,
            {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        ),
        "cannot be loaded",
    ),
    "a million layers": (_in_config(num_hidden_layers=1_000_000), "num_hidden_layers"),
    "layers that are none": (_in_config(num_hidden_layers="many"), "cannot be loaded"),
    "a text for a number": (_in_config(hidden_size={"a": 1}), "cannot be loaded"),
    "nesting": (
        lambda folder, canary: bombs.replace(folder / "config.json", "[" * 100_000),
        "cannot be",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_base_models(
    tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("FIRETITAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    damage, text = MODELS[name]
    folder, begun = save_tiny(tmp_path / "model"), time.monotonic()
    damage(folder, canary)
    with pytest.raises(FiretitanError) as caught:
        load_model(ModelSpec(str(folder), device="cpu"))
    assert text in caught.value.message, caught.value.message
    assert caught.value.field is not None and caught.value.reason != "INTERNAL"
    assert time.monotonic() - begun < PATIENCE_S


@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"]
)
def test_an_attention_from_elsewhere_is_not_fetched(tmp_path: Path, key: str) -> None:
    """transformers takes the name of a hub repository there, and runs what is in it."""
    folder = save_tiny(tmp_path / "model")
    bombs.edit(folder / "config.json", **{key: "evil/kernels"})
    loaded = load_model(ModelSpec(str(folder), device="cpu"))
    assert "evil" not in str(loaded.model.config._attn_implementation)
    empty = pretrained.empty_model(folder, "model")
    assert "evil" not in str(empty.config._attn_implementation)


def _tokenizer_code(folder: Path, canary: Path) -> None:
    (folder / "evil.py").write_text(bombs.code(canary))
    bombs.edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
        tokenizer_class="EvilTokenizer",
    )
    bombs.edit(folder / "config.json", model_type="evil")


TOKENIZERS: dict[str, Callable[[Path, Path], None]] = {
    "code": _tokenizer_code,
    "pipe": lambda folder, canary: bombs.pipe(folder / "tokenizer_config.json"),
    "pickle": lambda folder, canary: bombs.replace(
        folder / "tokenizer.json", bombs.pickled(canary)
    ),
    "auto_map of a number": lambda folder, canary: bombs.edit(
        folder / "tokenizer_config.json", auto_map=7
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_of_a_client(tmp_path: Path, canary: Path, name: str) -> None:
    from firetitan_client.sample_requests import load_tokenizer

    folder = save_tiny(tmp_path / "model")
    TOKENIZERS[name](folder, canary)
    with pytest.raises(ValueError, match="no tokenizer in"):
        load_tokenizer(str(folder))


def test_a_tokenizer_with_code_does_not_keep_its_model_from_being_served(
    tmp_path: Path, canary: Path
) -> None:
    folder = save_tiny(tmp_path / "model")
    (folder / "evil.py").write_text(bombs.code(canary))
    bombs.edit(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
    )
    load_model(ModelSpec(str(folder), device="cpu")).tokenizer  # noqa: B018  # loads it


def test_a_hostile_model_ends_no_daemon(world: World, tmp_path: Path, canary: Path) -> None:
    """One of each kind through CreateTrainer: the trainer fails by name, all others go on."""
    before, accepted = world.processes(), {}
    for index, name in enumerate(("bin", "auto_map", "pipe")):
        folder = save_tiny(tmp_path / f"model-{index}")
        MODELS[name][0](folder, canary)
        request = trainer_service_pb2.CreateTrainerRequest(
            trainer_id=f"hostile-{index}", base_model=str(folder), request_id=name
        )
        operation = world.stubs.trainers.CreateTrainer(request).operation
        accepted[name] = operation
    for name, operation in accepted.items():
        ended = world.stubs.wait(operation.name, timeout_s=START_S)
        told = refusal(ended.error, [str(world.daemon.home)])
        assert MODELS[name][1] in told.text and told.field, told
    world.clear()
    assert world.processes() == before


# -- chat templates --------------------------------------------------------------------------------

FOR_EVER = "{% for a in range(99999) %}{% for b in range(99999) %}{{ '' }}" + "{% endfor %}" * 2
TEMPLATES = {
    "reaches classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "reaches globals": "{{ raise_exception.__globals__['os'] }}",
    "reaches a module": "{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}",
    "imports": "{% import 'os' as os %}{{ os.mkdir('CANARY') }}",
    "reads a file": "{% include '/etc/passwd' %}",
    "formats its way out": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "loops for ever": FOR_EVER,
    "writes for ever": FOR_EVER.replace("''", "'x' * 100"),
    "writes too much": "{% for a in range(9999) %}{{ 'x' * 100 }}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
async def test_chat_templates(
    tmp_path: Path, canary: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from firetitan_client import chat_templates
    from firetitan_client.sample_requests import load_tokenizer

    monkeypatch.setattr(chat_templates, "MAX_SECONDS", 2.0)
    monkeypatch.setattr(chat_templates, "MAX_CHARACTERS", 100_000)
    folder = save_tiny(tmp_path / "model")
    template = TEMPLATES[name].replace("CANARY", str(canary))
    (folder / "chat_template.jinja").write_text(template)
    tokenizer, begun = load_tokenizer(str(folder)), time.monotonic()
    assert tokenizer.chat_template == template
    with pytest.raises(Exception) as caught:
        await chat_templates.apply(tokenizer, [{"role": "user", "content": "hello"}])
    assert "root:" not in str(caught.value)
    assert time.monotonic() - begun < PATIENCE_S
    deadline = time.monotonic() + PATIENCE_S
    while any(thread.name == "chat-template" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the template still runs"
        await asyncio.sleep(0.05)
