"""load_adapter over a real daemon: where it reads, what it leaves, what a replay comes back to."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker
from support.adapters import write_toy
from support.daemon import DaemonProcess
from support.stubs import LaneClient, Stubs

from firetitan_client import (
    FiretitanServiceClient,
    FiretitanTrainingClient,
    FireworksClient,
    TrainerJobManager,
)

pytestmark = pytest.mark.timeout(240)

TOY = "firetitan/toy"
MOVE = tinker.AdamParams(learning_rate=1e-2)
DATA = [
    tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 5, 9, 2]),
        loss_fn_inputs={"target_tokens": [5, 9, 2, 3]},
    )
]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One for all; each test has a trainer of its own."""
    process = DaemonProcess(tmp_path_factory.mktemp("daemon") / "home")
    process.start()
    yield process
    process.stop()


def make_policy(
    daemon: DaemonProcess, rank: int = 4, base_model: str = TOY
) -> FiretitanTrainingClient:
    service = FiretitanServiceClient.from_firetitan_config(
        base_model=base_model,
        lora_rank=rank,
        lora_alpha=8,
        seed=5,
        create_deployment=False,
        address=daemon.address,
    )
    return service.create_training_client()


def logprobs(policy: FiretitanTrainingClient) -> list[float]:
    output = policy.forward(DATA, "cross_entropy").result()
    return list(output.loss_fn_outputs[0]["logprobs"].data)


def step(policy: FiretitanTrainingClient) -> float:
    policy.forward_backward(DATA, "cross_entropy")
    return float(policy.optim_step(MOVE).result().metrics["grad_norm"])


def copies(daemon: DaemonProcess) -> list[Path]:
    return list((daemon.home / "store" / "adapters").iterdir())


def test_every_way_to_name_a_folder(
    daemon: DaemonProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_toy(tmp_path / "run-42")
    policy = make_policy(daemon)
    start = logprobs(policy)
    result = policy.load_adapter(str(folder)).result()
    assert result == {
        "model_id": policy.model_id,
        "adapter_path": str(folder),
        "type": "load_adapter",
    }
    loaded = logprobs(policy)
    assert loaded != start
    monkeypatch.chdir(tmp_path)
    for name in ("run-42", folder, f"file://{folder}"):
        step(policy)
        assert logprobs(policy) != loaded
        policy.load_adapter(name).result()  # type: ignore[arg-type]  # a Path will do
        assert logprobs(policy) == loaded


def test_a_load_is_a_warm_start_only(daemon: DaemonProcess, tmp_path: Path) -> None:
    """Moments and steps are anew, what was pending is gone; the rank is honoured."""
    folder = write_toy(tmp_path / "small", rank=2, lora_alpha=3, use_rslora=True)
    trained, fresh = make_policy(daemon), make_policy(daemon)
    step(trained)
    trained.forward_backward(DATA, "cross_entropy").result()
    for policy in (trained, fresh):
        policy.load_adapter(str(folder)).result()
    assert logprobs(trained) == logprobs(fresh)
    with pytest.raises(RuntimeError, match="no gradients"):
        trained.optim_step(MOVE).result()
    assert step(trained) == step(fresh)
    assert logprobs(trained) == logprobs(fresh)


@pytest.mark.parametrize(
    ("adapter", "kind", "text"),
    [
        ("gs://my-bucket/adapters/run-42", NotImplementedError, "gcsfs"),
        ("accounts/local/models/nothing", KeyError, "no model has this name"),
        ("no/such/folder", ValueError, "absolute path"),
        ("/no/such/folder", KeyError, "does not exist"),
        ("wide", ValueError, "has rank 8, the session 4"),
        ("dora", NotImplementedError, "use_dora"),
        ("foreign", ValueError, 'foreign: has tensors of "unembed"'),
    ],
)
def test_what_cannot_be_loaded_says_why_and_changes_nothing(
    daemon: DaemonProcess, tmp_path: Path, adapter: str, kind: type[Exception], text: str
) -> None:
    write_toy(tmp_path / "wide", rank=8)
    write_toy(tmp_path / "dora", use_dora=True)
    write_toy(tmp_path / "foreign", target_modules=["o_proj"])
    policy = make_policy(daemon)
    before = logprobs(policy)
    policy.forward_backward(DATA, "cross_entropy").result()
    inside = tmp_path / adapter
    held = copies(daemon)
    with pytest.raises(kind, match=text):
        policy.load_adapter(str(inside) if inside.exists() else adapter).result()
    assert logprobs(policy) == before
    assert policy.optim_step(MOVE).result().metrics["grad_norm"] > 0, "what was pending is there"
    assert copies(daemon) == held


@pytest.mark.parametrize("adapter", ["", "   ", None, 7])
def test_blank_paths_raise_in_the_call(daemon: DaemonProcess, adapter: object) -> None:
    service = FiretitanServiceClient.from_firetitan_config(
        base_model=TOY, create_deployment=False, address=daemon.address
    )
    policy = service.create_training_client()
    with pytest.raises(ValueError, match="adapter_path must be a non-empty string"):
        policy.load_adapter(adapter)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lora_rank"):
        policy.load_adapter("/tmp").result()


def test_promoted_adapters_and_snapshots_are_adapters(
    daemon: DaemonProcess, tiny_llama: Path
) -> None:
    policy = make_policy(daemon, base_model=str(tiny_llama))
    step(policy)
    saved = policy.save_weights_for_sampler("good").result()
    wanted = logprobs(policy)
    control = FireworksClient(address=daemon.address)
    row = f"accounts/local/rlorTrainerJobs/{policy.model_id}/checkpoints/{saved.path}"
    control.promote_checkpoint(name=row, output_model_id="good-adapter", base_model=str(tiny_llama))
    (folder,) = (daemon.home / "store" / "snapshots").glob(f"{saved.path}-*")
    for adapter in ("accounts/local/models/good-adapter", str(folder)):
        step(policy)
        assert logprobs(policy) != pytest.approx(wanted, abs=1e-4)
        policy.load_adapter(adapter).result()
        assert logprobs(policy) == pytest.approx(wanted, abs=1e-6)


def test_a_killed_trainer_comes_back_to_a_folder_that_is_gone(tmp_path: Path) -> None:
    """The load is replayed from the daemon's copy, which goes when no replay can need it.

    Recovery points, which would hold its effect, take longer than the test.
    """
    slow = {"FIRETITAN_FAILPOINTS": "worker.point_written=delay(120000)"}
    daemon = DaemonProcess(tmp_path / "home", slow)
    daemon.start()
    try:
        policy = make_policy(daemon)
        step(policy)
        first = write_toy(tmp_path / "first", seed=1)
        second = write_toy(tmp_path / "second", seed=2)
        policy.load_adapter(str(first)).result()
        shutil.rmtree(first)
        step(policy)
        wanted = logprobs(policy)
        (pid,) = daemon.worker_pids()
        os.kill(pid, signal.SIGKILL)
        assert logprobs(policy) == wanted
        policy.load_adapter(str(second)).result()
        shutil.rmtree(second)
        step(policy)
        wanted = logprobs(policy)
        (pid,) = daemon.worker_pids()
        daemon.kill()
        os.kill(pid, signal.SIGKILL)
        daemon.start()
        assert logprobs(policy) == wanted
        assert len(copies(daemon)) == 2
        policy.service.close()
        TrainerJobManager(address=daemon.address).delete(policy.model_id)
        daemon.kill()
        daemon.start()
        assert copies(daemon) == []
    finally:
        daemon.stop()


def test_a_load_that_was_begun_ends_with_the_files_it_began_with(tmp_path: Path) -> None:
    """The daemon dies with the load on its way; by then the user's folder holds something else."""
    dies = {"FIRETITAN_FAILPOINTS": "commands.dispatched=2*off->kill"}
    daemon = DaemonProcess(tmp_path / "home", dies)
    daemon.start()
    folder, other = write_toy(tmp_path / "run", seed=1), write_toy(tmp_path / "other", seed=1)

    def restart() -> None:
        assert daemon.process is not None
        daemon.process.wait()
        shutil.rmtree(folder)
        write_toy(folder, seed=2)
        daemon.start({"FIRETITAN_FAILPOINTS": ""})

    restarting = threading.Thread(target=restart)
    restarting.start()
    try:
        stubs = Stubs(daemon.address)
        digests = []
        for trainer, adapter in (("t", folder), ("undisturbed", other)):
            stubs.create_trainer(trainer, rank=4)
            lane = LaneClient(stubs, stubs.session(f"trainers/{trainer}"))
            lane.step()
            stubs.done(lane.load_adapter(str(adapter)))
            lane.step()
            digests.append(stubs.done(lane.save_state("end")).checkpoint.digest)
        restarting.join()
        assert digests[0] == digests[1]
    finally:
        restarting.join()
        daemon.stop()
