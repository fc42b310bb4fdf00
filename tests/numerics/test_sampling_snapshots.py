"""Snapshots in service: right weights under the right name, swaps under load, refusals."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from support.models import save_tiny
from support.sampling import Snapshots, bits, plain_logprobs, plain_model, random_requests

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import ModelSpec, SnapshotLayer
from firetitan_daemon.engine.hf_sample import HfSampleEngine
from firetitan_daemon.engine.sample_api import SampleRequest
from firetitan_daemon.engine.scheduler import SamplerConfig
from firetitan_daemon.engine.versions import Version

PROMPT = np.arange(60, 76, dtype=np.int32)
REQUEST = SampleRequest(PROMPT, 3, 12, seed=5, use_eos=False)
SLOW = SampleRequest(PROMPT, 2, 100, seed=1, use_eos=False)

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def snapshots(folder: Path, tmp_path: Path) -> Snapshots:
    return Snapshots(folder, tmp_path)


@pytest.fixture
def engine(folder: Path) -> Iterator[HfSampleEngine]:
    engine = HfSampleEngine(ModelSpec(str(folder)), SamplerConfig(max_rows=16, branch_rows=4))
    yield engine
    engine.close()


def _gap(engine: HfSampleEngine, model: torch.nn.Module, request: SampleRequest) -> float:
    """Largest difference to a plain forward pass."""
    gaps = []
    for sequence in engine.submit(request).result().sequences:
        tokens = np.concatenate((request.prompt, sequence.token_ids))
        expected = plain_logprobs(model, tokens)[len(request.prompt) - 1 :]
        gaps.append(np.abs(expected - sequence.inference_logprobs).max())
    return float(max(gaps))


def test_a_chain_serves_what_it_was_saved_from(
    engine: HfSampleEngine, snapshots: Snapshots, folder: Path
) -> None:
    base = bits(engine.submit(REQUEST).result())
    for step in range(3):
        name = f"step-{step}"
        chain = snapshots.full(name, seed=step)
        engine.apply(chain if step < 2 else chain[-1:])
        assert engine.active == name
        assert engine.loaded == (name,)
        result = engine.submit(REQUEST).result()
        assert result.snapshot == name
        assert bits(result)[2] != base[2]
        assert _gap(engine, plain_model(folder, snapshots.tensors[name]), REQUEST) < 1e-4


def test_adapters_follow_one_another_before_anything_is_sampled(
    engine: HfSampleEngine, snapshots: Snapshots
) -> None:
    for seed in range(3):
        engine.apply(snapshots.adapter(f"step-{seed}", seed))
    assert engine.submit(REQUEST).result().snapshot == "step-2"


def test_weights_that_nobody_needs_are_freed_before_others_are_built(
    engine: HfSampleEngine, snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = snapshots.full("step-0", seed=0)
    engine.apply(chain)
    engine.submit(REQUEST).result()
    first = weakref.ref(engine._versions.find("step-0"))
    engine.apply(snapshots.full("step-1", seed=1))
    chain = snapshots.full("step-2", seed=2)
    build, held = engine._weights.build, []

    def watched(*arguments: object) -> object:
        gc.collect()
        held.append(first() is not None)
        return build(*arguments)

    monkeypatch.setattr(engine._weights, "build", watched)
    engine.apply(chain)
    assert held == [False]


def test_a_chain_and_its_end_alone_give_the_same_bits(
    engine: HfSampleEngine, snapshots: Snapshots, folder: Path
) -> None:
    for step in range(3):
        chain = snapshots.full(f"step-{step}", seed=step)
    engine.apply(chain)
    expected = bits(engine.submit(REQUEST).result())
    other = HfSampleEngine(ModelSpec(str(folder)))
    for end in (1, 2, 3):
        other.apply(chain[:end])
    found = bits(other.submit(REQUEST).result())
    other.close()
    assert found == expected


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_what_peft_makes_of_them(dtype: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", dtype=dtype)
    snapshots = Snapshots(folder, tmp_path / "snapshots")
    engine = HfSampleEngine(ModelSpec(str(folder)), SamplerConfig(max_rows=16, branch_rows=4))
    base = bits(engine.submit(REQUEST).result())
    names = ["first", "second"]
    layers = {name: snapshots.adapter(name, seed=i, rank=4 + i) for i, name in enumerate(names)}
    for name in names:
        engine.apply(layers[name], keep=[*names, ""])
    assert engine.loaded == ("", "first", "second")
    requests = random_requests(6, seed=1)
    alone = {}
    for name in names:
        model = PeftModel.from_pretrained(plain_model(folder), layers[name][0].path)
        gap = _gap(engine, model, replace(REQUEST, snapshot=name))
        assert gap < (1e-4 if dtype == "float32" else 5e-2)
        alone[name] = [bits(engine.submit(replace(r, snapshot=name)).result()) for r in requests]
    futures = [
        (name, at, engine.submit(replace(request, snapshot=name)))
        for at, request in enumerate(requests)
        for name in names
    ]
    assert all(bits(future.result()) == alone[name][at] for name, at, future in futures)
    assert bits(engine.submit(replace(REQUEST, snapshot="")).result()) == base
    engine.apply(layers["first"])
    assert (engine.active, engine.loaded) == ("first", ("first",))
    engine.close()


def test_swaps_under_load_name_the_weights_that_ran(
    engine: HfSampleEngine, snapshots: Snapshots, folder: Path
) -> None:
    chain = [snapshots.full(f"step-{step}", seed=step) for step in range(4)]
    engine.apply(chain[0])
    results: list[tuple[SampleRequest, object]] = []
    enough = threading.Event()

    def ask(worker: int) -> None:
        seed = 1000 * worker
        while not enough.is_set():
            request = replace(REQUEST, seed=seed, max_tokens=20)
            results.append((request, engine.submit(request).result()))
            seed += 1

    threads = [threading.Thread(target=ask, args=(worker,), daemon=True) for worker in range(3)]
    for thread in threads:
        thread.start()
    for step, layers in enumerate(chain):
        if step:
            engine.apply(layers)
        _wait_until(lambda name=f"step-{step}": any(r.snapshot == name for _, r in results[:]))
    enough.set()
    for thread in threads:
        thread.join()
    names = {result.snapshot for _, result in results}  # type: ignore[attr-defined]
    assert names == {f"step-{step}" for step in range(4)}
    for name in names:
        fresh = HfSampleEngine(ModelSpec(str(folder)))
        fresh.apply(chain[int(name[-1])])
        for request, result in [each for each in results if each[1].snapshot == name][:5]:
            assert bits(fresh.submit(request).result()) == bits(result)  # type: ignore[arg-type]
        fresh.close()


def test_running_sequences_end_on_the_weights_they_began_with(
    engine: HfSampleEngine, snapshots: Snapshots
) -> None:
    engine.apply(snapshots.full("old", seed=0))
    expected = bits(engine.submit(SLOW).result())
    _slow_down(engine)
    running = engine.submit(SLOW)
    _wait_until(lambda: _begun(engine) == 1)
    engine.apply(snapshots.full("new", seed=1))
    assert engine.loaded == ("new",)
    assert not running.done()
    with pytest.raises(FiretitanError, match="'old' is not loaded") as caught:
        engine.submit(replace(REQUEST, snapshot="old"))
    assert caught.value.reason == Reason.SNAPSHOT_NOT_ACTIVE
    assert engine.submit(REQUEST).result().snapshot == "new"
    assert bits(running.result()) == expected


def test_what_is_prepared_is_not_served_until_it_is_applied(
    engine: HfSampleEngine, snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = [snapshots.full(f"step-{step}", seed=step) for step in range(3)]
    adapter = snapshots.adapter("adapter", seed=5)
    build, built = engine._weights.build, []

    def watched(layers: list[SnapshotLayer], *others: object) -> Version:
        built.append(layers[-1].name)
        return build(layers, *others)

    monkeypatch.setattr(engine._weights, "build", watched)
    engine.apply(chain[0])
    expected = bits(engine.submit(REQUEST).result())
    for prepared in (chain[1], adapter):
        name = prepared[-1].name
        engine.prepare(prepared)
        assert (engine.active, engine.loaded) == ("step-0", ("step-0",))
        with pytest.raises(FiretitanError) as caught:
            engine.submit(replace(REQUEST, snapshot=name))
        assert caught.value.reason == Reason.SNAPSHOT_NOT_ACTIVE
        assert bits(engine.submit(REQUEST).result()) == expected
    # Only what was prepared last is held.
    assert engine._versions.find("step-1") is None
    engine.apply(adapter)
    assert engine.submit(REQUEST).result().snapshot == "adapter"
    assert built == ["step-0", "step-1", "adapter"]
    engine.prepare(chain[2])
    engine.retain(())
    assert engine.loaded == ("adapter",) and engine._versions.find("step-2") is None


def test_a_third_full_version_waits_for_the_oldest(
    engine: HfSampleEngine, snapshots: Snapshots
) -> None:
    chain = [snapshots.full(f"step-{step}", seed=step) for step in range(3)]
    engine.apply(chain[0])
    _slow_down(engine)
    running = engine.submit(SLOW)
    _wait_until(lambda: _begun(engine) == 1)
    engine.apply(chain[1], keep=["step-0"])
    assert engine.loaded == ("step-0", "step-1")
    assert not running.done()
    engine.apply(chain[2][2:], keep=["step-0"])
    assert running.done()
    assert running.result().snapshot == "step-0"
    assert engine.loaded == ("step-2",)


def test_a_request_that_waits_takes_the_snapshot_active_when_it_begins(
    engine: HfSampleEngine, snapshots: Snapshots
) -> None:
    chain = snapshots.full("next", seed=0)
    blocker = engine.submit(replace(SLOW, num_samples=16))
    _wait_until(lambda: _begun(engine) == 1)
    waiting = engine.submit(REQUEST)
    named = engine.submit(replace(REQUEST, snapshot=""))
    engine.apply(chain)
    assert blocker.result().snapshot == ""
    assert waiting.result().snapshot == "next"
    with pytest.raises(FiretitanError) as caught:
        named.result()
    assert caught.value.reason == Reason.SNAPSHOT_NOT_ACTIVE


def test_damage_is_refused_and_the_old_weights_serve_on(
    engine: HfSampleEngine, snapshots: Snapshots
) -> None:
    chain = snapshots.full("good", seed=0)
    engine.apply(chain)
    expected = bits(engine.submit(REQUEST).result())
    chain = snapshots.full("bad", seed=1)
    file = chain[-1].path / "delta.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(FiretitanError) as caught:
        engine.apply(chain)
    assert caught.value.reason == Reason.CHECKSUM_MISMATCH
    adapter = snapshots.adapter("adapter", seed=1)
    with pytest.raises(FiretitanError) as caught:
        engine.apply([replace(adapter[0], result_digest="0" * 64)])
    assert caught.value.reason == Reason.CHECKSUM_MISMATCH
    assert engine.active == "good"
    assert bits(engine.submit(REQUEST).result()) == expected


def test_a_delta_without_its_parent_is_refused(
    engine: HfSampleEngine, snapshots: Snapshots
) -> None:
    snapshots.full("base", seed=0)
    chain = snapshots.full("delta", seed=1)
    with pytest.raises(FiretitanError, match="base") as caught:
        engine.apply(chain[1:])
    assert caught.value.reason == Reason.CHAIN_BROKEN
    assert engine.active == ""


def test_weights_of_another_model_are_refused_by_tensor(
    engine: HfSampleEngine, tmp_path: Path
) -> None:
    other = Snapshots(save_tiny(tmp_path / "other", "gpt_neox"), tmp_path / "snapshots")
    for layers in (other.full("full", seed=0), other.adapter("adapter", seed=0)):
        with pytest.raises(FiretitanError, match="does not fit") as caught:
            engine.apply(layers)
        assert caught.value.reason == Reason.CHAIN_BROKEN
    assert engine.submit(REQUEST).result().snapshot == ""


def _begun(engine: HfSampleEngine) -> int:
    return engine._versions.active.running


def _slow_down(engine: HfSampleEngine) -> None:
    """Make a step take long enough that what is to happen meanwhile does."""
    step = engine._decoder.step

    def slow(parts: object) -> object:
        time.sleep(0.015)
        return step(parts)

    engine._decoder.step = slow  # type: ignore[method-assign]


def _wait_until(condition: object) -> None:
    deadline = time.monotonic() + 20
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.002)
