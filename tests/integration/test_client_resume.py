"""Going on elsewhere: checkpoints of trainers that are gone, notes that another process reads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import tinker
from support.daemon import DaemonProcess

from firetitan_client import (
    FiretitanServiceClient,
    FiretitanTrainingClient,
    NotFound,
    TrainerJobManager,
)

pytestmark = pytest.mark.timeout(240)

TOY = "firetitan/toy"
DATA = [
    tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 5, 9, 2]),
        loss_fn_inputs={"target_tokens": [5, 9, 2, 3]},
    )
]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    process = DaemonProcess(tmp_path_factory.mktemp("daemon") / "home")
    process.start()
    yield process
    process.stop()


def make_service(daemon: DaemonProcess, **settings: Any) -> FiretitanServiceClient:
    return FiretitanServiceClient.from_firetitan_config(
        address=daemon.address, base_model=TOY, create_deployment=False, **settings
    )


def step(policy: FiretitanTrainingClient) -> None:
    policy.forward_backward(DATA, "cross_entropy")
    policy.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()


def logprobs(policy: FiretitanTrainingClient) -> list[float]:
    return list(policy.forward(DATA, "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data)


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_a_run_goes_on_after_its_trainer_is_deleted(daemon: DaemonProcess, rank: int) -> None:
    """By `resolve_checkpoint_path`, or from the start; bit for bit, moments and all."""
    source = f"previous-job-{rank}"
    first = make_service(daemon, trainer_job_id=source, lora_rank=rank, seed=3)
    policy = first.create_training_client()
    for _ in range(3):
        step(policy)
    policy.save_state("step-3", timeout=60)
    kept = logprobs(policy)
    step(policy)
    onwards = logprobs(policy)
    first.close()
    TrainerJobManager(address=daemon.address).delete(source)

    # Moments of its own, and another adapter's first weights: all of it is replaced.
    later = make_service(daemon, lora_rank=rank, seed=4).create_training_client()
    step(later)
    reference = later.resolve_checkpoint_path("step-3", source_job_id=source)
    assert reference == f"cross_job://{source}/step-3"
    later.load_state_with_optimizer(reference).result()
    assert logprobs(later) == kept
    step(later)
    assert logprobs(later) == onwards
    later.load_state(reference).result()
    assert logprobs(later) == kept
    step(later)
    assert logprobs(later) != onwards, "a fresh optimizer takes another step"
    with pytest.raises(NotFound, match="step-9"):
        later.load_state(later.resolve_checkpoint_path("step-9", source_job_id=source)).result()

    begun = make_service(daemon, lora_rank=rank)
    begun_client = begun.create_training_client_from_state_with_optimizer(reference)
    step(begun_client)
    assert logprobs(begun_client) == onwards


def test_notes_are_read_by_another_process(daemon: DaemonProcess) -> None:
    service = make_service(
        daemon, trainer_job_id="noted", lora_rank=4, user_metadata={"team": "a", "run": "service"}
    )
    policy = service.create_training_client(user_metadata={"run": "42"})
    assert policy.user_metadata == {"team": "a", "run": "42"}
    policy.save_state("noted", user_metadata={"why": "the best so far"}, timeout=60)
    code = f"""
import json
from firetitan_client import FiretitanServiceClient, FireworksClient
service = FiretitanServiceClient.from_firetitan_config(
    address={daemon.address!r}, trainer_job_id="noted", create_deployment=False
)
(row,) = FireworksClient(address={daemon.address!r}).list_checkpoints("noted")
run = service.create_rest_client().get_training_run("noted").result()
print(json.dumps([
    service.create_training_client().user_metadata, row["userMetadata"], run.user_metadata
]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
    )
    session, checkpoint, run = json.loads(done.stdout)
    assert session == run == {"team": "a", "run": "42"}
    assert checkpoint == {"why": "the best so far"}
