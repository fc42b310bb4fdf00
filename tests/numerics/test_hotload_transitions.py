"""What running sequences do when other weights are served: finish, be waited for, or go over."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.models import save_tiny
from support.sampling import Snapshots, bits, plain_model

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import HotloadTransition, ModelSpec
from firetitan_daemon.engine.hf_sample import HfSampleEngine
from firetitan_daemon.engine.sample_api import NewTokens, SampleRequest, SnapshotRange
from firetitan_daemon.engine.scheduler import SamplerConfig

pytestmark = pytest.mark.timeout(180)

PROMPT = np.random.default_rng(5).integers(0, 256, 12).astype(np.int32)
LONG = SampleRequest(PROMPT, 3, 150, seed=3, use_eos=False)
SHORT = SampleRequest(PROMPT, 2, 6, seed=4, use_eos=False)
CONFIG = SamplerConfig(max_rows=16, branch_rows=2)


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> Snapshots:
    root = tmp_path_factory.mktemp("transitions")
    snapshots = Snapshots(save_tiny(root / "model"), root / "snapshots")
    snapshots.full("one", seed=1)
    snapshots.full("two", seed=2)
    return snapshots


@pytest.fixture
def engine(snapshots: Snapshots) -> Iterator[HfSampleEngine]:
    engine = HfSampleEngine(ModelSpec(str(snapshots.folder)), CONFIG)
    yield engine
    engine.close()


class Started:
    """Progress that tells when every sequence has some tokens."""

    def __init__(self, tokens: int = 5) -> None:
        self.event = threading.Event()
        self._tokens = tokens

    def __call__(self, news: Sequence[NewTokens]) -> None:
        if any(one.first_token >= self._tokens for one in news):
            self.event.set()


def test_sync_begins_nothing_until_the_running_have_ended(
    engine: HfSampleEngine, snapshots: Snapshots
) -> None:
    alone = bits(engine.submit(LONG).result())
    started = Started()
    running = engine.submit(replace(LONG, num_samples=5), started)
    assert started.event.wait(60)
    swap = threading.Thread(
        target=engine.apply,
        args=(snapshots.layers[:1],),
        kwargs={"transition": HotloadTransition.SYNC},
    )
    swap.start()
    while not engine._scheduler._drains:
        assert swap.is_alive()
    asked = engine.submit(SHORT)
    old, new = running.result(), asked.result()
    swap.join()
    assert (old.snapshot, new.snapshot) == ("", "one")
    assert {one.made_by for one in old.sequences} == {(SnapshotRange("", 0),)}
    assert bits(replace(old, sequences=old.sequences[:3])) == alone
    assert new.times.queue_s > 0
    assert bits(engine.submit(SHORT).result()) == bits(new)
    assert engine.loaded == ("one",)


def test_sync_with_nothing_running_and_with_the_engine_closed_meanwhile(
    snapshots: Snapshots,
) -> None:
    engine = HfSampleEngine(ModelSpec(str(snapshots.folder)), CONFIG)
    engine.apply(snapshots.layers[:1], transition=HotloadTransition.SYNC)
    assert engine.active == "one"
    failed: list[FiretitanError] = []
    started = Started()
    running = engine.submit(LONG, started)
    assert started.event.wait(60)

    def apply() -> None:
        try:
            engine.apply(snapshots.layers[1:2], transition=HotloadTransition.SYNC)
        except FiretitanError as error:
            failed.append(error)

    swap = threading.Thread(target=apply)
    swap.start()
    while not engine._scheduler._drains:
        assert swap.is_alive()
    engine.close()
    swap.join()
    assert [error.reason for error in failed] == [Reason.CLOSED]
    assert running.exception() is not None


def test_async_goes_over_between_two_tokens(engine: HfSampleEngine, snapshots: Snapshots) -> None:
    alone = engine.submit(LONG).result()
    started = Started()
    told: list[NewTokens] = []

    def progress(news: Sequence[NewTokens]) -> None:
        told.extend(news)
        started(news)

    running = engine.submit(LONG, progress)
    named = engine.submit(replace(LONG, snapshot=""), started)
    assert started.event.wait(60)
    engine.apply(snapshots.layers[:1], transition=HotloadTransition.ASYNC)
    result = running.result()
    assert result.snapshot == "one"
    assert bits(named.result()) == bits(alone)
    old_model = plain_model(snapshots.folder)
    new_model = plain_model(snapshots.folder, snapshots.tensors["one"])
    for index, sequence in enumerate(result.sequences):
        assert [one.snapshot for one in sequence.made_by] == ["", "one"]
        change = sequence.made_by[1].first_token
        assert 0 < change < 150
        tokens = sequence.token_ids
        assert tokens[:change].tolist() == alone.sequences[index].token_ids[:change].tolist()
        expected = _crossed_over(old_model, new_model, tokens, change)
        assert np.abs(sequence.inference_logprobs - expected).max() < 1e-4
        mine = [news for news in told if news.sequence == index]
        assert [news.snapshot for news in mine] == [""] * change + ["one"] * (150 - change)
    assert engine.loaded == ("one",)


def _crossed_over(
    old: torch.nn.Module, new: torch.nn.Module, tokens: np.ndarray, change: int
) -> np.ndarray:
    """Raw logprob of each token: the first ones by the old model, the others by the new one on
    the old one's keys and values."""
    ids = torch.from_numpy(np.concatenate((PROMPT, tokens)).astype(np.int64))[None]
    known = len(PROMPT) + change - 1  # positions the old model has computed
    with torch.no_grad():
        before = old(input_ids=ids[:, :known], use_cache=True)
        # transformers 5.24 renamed it.
        renamed = "cache" in inspect.signature(new.forward).parameters
        name = "cache" if renamed else "past_key_values"
        cache = {name: getattr(before, name)}
        after = new(input_ids=ids[:, known:], use_cache=True, **cache)
    logits = torch.cat((before.logits, after.logits), 1)[0].float()
    logprobs = torch.log_softmax(logits, -1)[len(PROMPT) - 1 : -1]
    return logprobs.gather(1, ids[0, len(PROMPT) :, None])[:, 0].numpy()


def test_async_over_two_swaps_names_each(engine: HfSampleEngine, snapshots: Snapshots) -> None:
    started, later = Started(5), Started(80)

    def progress(news: Sequence[NewTokens]) -> None:
        started(news)
        later(news)

    running = engine.submit(replace(LONG, max_tokens=200, num_samples=1), progress)
    assert started.event.wait(60)
    engine.apply(snapshots.layers[:1], transition=HotloadTransition.ASYNC)
    assert later.event.wait(60)
    engine.apply(snapshots.layers[1:2], transition=HotloadTransition.ASYNC)
    (sequence,) = running.result().sequences
    assert [one.snapshot for one in sequence.made_by] == ["", "one", "two"]
    # Nothing ran out on an older one: no third set of weights was ever waited for.
    assert engine.loaded == ("two",)


def test_prompts_of_what_stays_loaded_are_kept_on_demand(
    engine: HfSampleEngine, snapshots: Snapshots
) -> None:
    for keep_prompts, cached in ((True, len(PROMPT)), (False, 0)):
        engine.apply(snapshots.layers[:1], keep=["", "two"])
        engine.submit(SHORT).result()
        engine.apply(snapshots.layers[:2], keep=["one"], keep_prompts=keep_prompts)
        again = engine.submit(replace(SHORT, snapshot="one")).result()
        assert again.cached_prompt_tokens == cached
        assert engine.submit(SHORT).result().cached_prompt_tokens == 0
