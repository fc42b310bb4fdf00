"""Bad input through the client: what it is sent to, and what every refusal must be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker

from firetitan_client import FiretitanServiceClient, FiretitanTrainingClient
from firetitan_client.errors import BY_REASON, FiretitanError
from support.daemon import DaemonProcess
from support.stubs import LaneClient, Stubs

VOCAB = 272
CONTEXT = 64
TEN_MB = "x" * 10_000_000
ADAM = tinker.AdamParams(learning_rate=1e-2)
PROMPT = tinker.ModelInput.from_ints([1, 2, 3])
NAN, INF = float("nan"), float("inf")


@dataclasses.dataclass
class World:
    """One daemon, one session with a gradient pending, one deployment, something of a toy."""

    daemon: DaemonProcess
    stubs: Stubs
    service: FiretitanServiceClient
    policy: FiretitanTrainingClient
    sampler: Any
    lane: LaneClient
    snapshot: str
    """Of the session, served."""
    foreign: str
    """Of another base model."""

    def state(self) -> tuple[str, list[int]]:
        """Digest of weights, optimizer and gradients; the daemon and its workers."""
        saved = self.stubs.done(self.lane.save_state("probe")).checkpoint
        return saved.digest, [self.daemon.process.pid, *sorted(self.daemon.worker_pids())]

    @contextmanager
    def unharmed(self) -> Iterator[None]:
        """What was there before is there after, and the next good calls work."""
        before = self.state()
        yield
        assert self.state() == before
        go_on(self.policy)
        answer = self.sampler.sample(PROMPT, 1, tinker.SamplingParams(max_tokens=2)).result()
        assert answer.snapshot == self.snapshot


@contextmanager
def bad_input_world(home: Path, model: Path) -> Iterator[World]:
    """A world on a fresh home, with sessions of a tiny model's folder."""
    daemon = DaemonProcess(home)
    daemon.start()
    try:
        stubs = Stubs(daemon.address)
        service = FiretitanServiceClient.from_firetitan_config(
            address=daemon.address,
            base_model=str(model),
            lora_rank=4,
            seed=5,
            max_context_length=CONTEXT,
            trainer_job_id="llama",
            deployment_id="serving",
        )
        policy = service.create_training_client()
        go_on(policy)
        saved = policy.save_weights_for_sampler("served").result()
        policy.save_state("kept").result()
        stubs.create_trainer("toy")
        toy = LaneClient(stubs, stubs.session("trainers/toy"))
        foreign = stubs.done(toy.save_snapshot("foreign")).snapshot.name
        yield World(
            daemon,
            stubs,
            service,
            policy,
            service.create_sampling_client(saved.path),
            LaneClient(stubs, policy.session_name),
            saved.path,
            foreign,
        )
        service.close()
        stubs.channel.close()
    finally:
        daemon.stop()


def go_on(policy: FiretitanTrainingClient) -> None:
    """A step where there is a gradient, then a gradient."""
    policy.forward_backward([datum()], "cross_entropy").result()
    policy.optim_step(ADAM).result()
    policy.forward_backward([datum()], "cross_entropy").result()


def datum(tokens: Any = (1, 2, 3), targets: Any = (2, 3, 4), **inputs: Any) -> tinker.Datum:
    arrays = {name: np.asarray(value, np.float32) for name, value in inputs.items()}
    if targets is not None:
        arrays["target_tokens"] = np.asarray(targets)
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(list(tokens)), loss_fn_inputs=arrays
    )


def refused(call: Callable[[], Any]) -> FiretitanError:
    """What a call or its future raised, fit to be shown."""
    with pytest.raises(FiretitanError) as caught:
        outcome = call()
        outcome.result()
    return fit(caught.value)


def fit(error: FiretitanError) -> FiretitanError:
    text = f"{error} {error.field} {error.metadata}"
    for internal in ("Traceback", 'File "', "site-packages", "firetitan_daemon", "/home/"):
        assert internal not in text
    assert len(text) < 4000
    assert error.reason != "INTERNAL" and isinstance(error, BY_REASON[error.reason])
    return error


def check(error: FiretitanError, reason: str, field: str | None, *texts: str) -> None:
    assert (error.reason, error.field) == (reason, field), str(error)
    for text in texts:
        assert text in str(error)
