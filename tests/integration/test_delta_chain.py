"""A chain of twenty snapshots, served in any order: every time the weights of a full export."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from firetitan.v1 import checkpoint_pb2, checkpoint_service_pb2
from safetensors.torch import load_file
from support.daemon import DaemonProcess
from support.models import save_tiny

from firetitan_client import FiretitanServiceClient, FiretitanTrainingClient
from firetitan_daemon.engine.api import ModelSpec, SnapshotFormat, SnapshotKind, SnapshotLayer
from firetitan_daemon.engine.export import write_full
from firetitan_daemon.engine.hf_sample import HfSampleEngine
from firetitan_daemon.engine.sample_api import SampleRequest

pytestmark = pytest.mark.timeout(400)
SAVES = 20
PROMPT = list(range(60, 84))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", dtype="bfloat16")


@pytest.fixture
def service(daemon: DaemonProcess, model: Path) -> Iterator[FiretitanServiceClient]:
    with FiretitanServiceClient.from_firetitan_config(
        address=daemon.address, base_model=str(model), lora_rank=0, deployment_id="d"
    ) as service:
        yield service


class FullExports:
    """What a snapshot must serve: the masters of a state saved beside it, rounded and written."""

    def __init__(self, model: Path, root: Path) -> None:
        self._model = model
        self._root = root
        self._engine = HfSampleEngine(ModelSpec(str(model)))

    def add(self, name: str, state: Path) -> tuple[str, list[float]]:
        """The digest of the export, and the logprobs of its weights."""
        folder = self._root / name
        folder.mkdir()
        masters = load_file(state / "weights.safetensors")
        rounded = {key: tensor.to(torch.bfloat16) for key, tensor in masters.items()}
        saved = write_full(folder, name, rounded, self._model, str(self._model))
        layer = SnapshotLayer(
            name,
            SnapshotKind.BASE,
            SnapshotFormat.HF_FULL,
            folder,
            saved.files.digest,
            saved.result_digest,
        )
        self._engine.apply([layer])
        request = SampleRequest(np.array(PROMPT, np.int32), 1, 1, seed=0, prompt_logprobs=True)
        logprobs = self._engine.submit(request).result().prompt.logprobs
        assert logprobs is not None
        return saved.result_digest, [float(value) for value in logprobs[1:]]

    def close(self) -> None:
        self._engine.close()


def train(policy: FiretitanTrainingClient, generator: random.Random) -> None:
    tokens = [generator.randrange(256) for _ in range(17)]
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:]},
    )
    policy.forward_backward([datum], "cross_entropy")
    policy.optim_step(tinker.AdamParams(learning_rate=1e-2))


def serve(service: FiretitanServiceClient, snapshot: str) -> list[float]:
    """Bring a snapshot to the deployment; the prompt's logprobs under it."""
    sampler = service.create_sampling_client(snapshot)
    logprobs: Any = sampler.compute_logprobs(tinker.ModelInput.from_ints(PROMPT)).result()
    return [float(value) for value in logprobs[1:]]


def test_twenty_saves_in_any_order_and_after_restarts(
    daemon: DaemonProcess, service: FiretitanServiceClient, model: Path, tmp_path: Path
) -> None:
    generator = random.Random(0)
    policy = service.create_training_client()
    exports = FullExports(model, tmp_path)
    expected: dict[str, list[float]] = {}
    for number in range(SAVES):
        train(policy, generator)
        snapshot = policy.save_weights_for_sampler(f"s{number}").result().path
        policy.save_state(f"state{number}").result()
        (state,) = (daemon.home / "store" / "checkpoints").glob(f"state{number}-*")
        digest, expected[snapshot] = exports.add(snapshot, state)
        request = checkpoint_service_pb2.GetSnapshotRequest(name=snapshot)
        row = service.stubs.checkpoints.GetSnapshot(request).snapshot
        assert row.kind == (
            checkpoint_pb2.Snapshot.KIND_DELTA if number else checkpoint_pb2.Snapshot.KIND_BASE
        )
        assert row.result_digest == digest
    exports.close()
    assert len({tuple(values) for values in expected.values()}) == SAVES

    order = list(expected)
    generator.shuffle(order)
    for snapshot in order:
        assert serve(service, snapshot) == expected[snapshot], snapshot
    daemon.kill()
    daemon.start()
    generator.shuffle(order)
    for snapshot in order[: SAVES // 2]:
        assert serve(service, snapshot) == expected[snapshot], snapshot
    # The sampler too: a fresh one applies the chain from its base.
    daemon.stop()
    daemon.start()
    client = service.create_sampling_client()
    logprobs = client.compute_logprobs(tinker.ModelInput.from_ints(PROMPT)).result()
    assert logprobs[1:] == expected[order[SAVES // 2 - 1]]
    for snapshot in order[SAVES // 2 :]:
        assert serve(service, snapshot) == expected[snapshot], snapshot
