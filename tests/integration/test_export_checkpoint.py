"""Whatever was saved, exported as a folder that transformers or PEFT loads as it is."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import tinker
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.daemon import DaemonProcess
from transformers import AutoModelForCausalLM, AutoTokenizer

from firetitan_client import (
    FiretitanServiceClient,
    FiretitanTrainingClient,
    FireworksClient,
    NotFound,
)
from firetitan_client.errors import Corrupt

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
TOKENS = [5, 9, 2, 7, 11, 3]
DATUM = tinker.Datum(
    model_input=tinker.ModelInput.from_ints(TOKENS[:-1]),
    loss_fn_inputs={"target_tokens": TOKENS[1:]},
)


def client_of(
    daemon: DaemonProcess, base_model: Path, trainer: str, rank: int
) -> FiretitanTrainingClient:
    service = FiretitanServiceClient.from_firetitan_config(
        address=daemon.address,
        base_model=str(base_model),
        lora_rank=rank,
        trainer_job_id=trainer,
        create_deployment=False,
    )
    return service.create_training_client()


def step(policy: FiretitanTrainingClient) -> None:
    policy.forward_backward([DATUM], "cross_entropy")
    policy.optim_step(tinker.AdamParams(learning_rate=0.05)).result()


def logprobs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS[:-1]])).logits[0].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]


def own(policy: FiretitanTrainingClient) -> torch.Tensor:
    output = policy.forward([DATUM], "cross_entropy").result()
    return torch.tensor(output.loss_fn_outputs[0]["logprobs"].data)


def row(trainer: str, saved: str) -> str:
    return f"accounts/local/rlorTrainerJobs/{trainer}/checkpoints/{saved}"


def test_every_kind_of_a_full_parameter_session(
    daemon: DaemonProcess, tiny_llama: Path, tmp_path: Path
) -> None:
    control = FireworksClient(address=daemon.address)
    policy = client_of(daemon, tiny_llama, "full", 0)
    base = policy.save_weights_for_sampler("s").result().path
    for _ in range(2):
        step(policy)
        delta = policy.save_weights_for_sampler("s").result().path
    policy.save_state("state").result()
    found = {}
    for saved in (base, delta, "state"):
        folder = Path(control.export_checkpoint(row("full", saved), tmp_path / saved))
        assert folder == tmp_path / saved
        found[saved] = load_file(folder / "model.safetensors")
        assert AutoTokenizer.from_pretrained(folder).vocab_size
    model = AutoModelForCausalLM.from_pretrained(tmp_path / delta, dtype=torch.float32)
    torch.testing.assert_close(logprobs(model), own(policy), atol=1e-5, rtol=0)
    assert found[delta].keys() == found["state"].keys() == found[base].keys()
    assert all(torch.equal(one, found["state"][name]) for name, one in found[delta].items())
    assert any(not torch.equal(one, found[base][name]) for name, one in found[delta].items())
    # What was exported is the user's own: changing it harms nothing here.
    (tmp_path / base / "model.safetensors").write_bytes(b"")
    assert control.export_checkpoint(row("full", delta), tmp_path / "again")


def test_both_kinds_of_a_lora_session(
    daemon: DaemonProcess, tiny_llama: Path, tmp_path: Path
) -> None:
    control = FireworksClient(address=daemon.address)
    policy = client_of(daemon, tiny_llama, "lora", 4)
    step(policy)
    adapter = policy.save_weights_for_sampler("s").result().path
    policy.save_state("state").result()
    for saved in (adapter, "state"):
        control.export_checkpoint(row("lora", saved), tmp_path / saved)
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        tuned = PeftModel.from_pretrained(model, tmp_path / saved)
        torch.testing.assert_close(logprobs(tuned), own(policy), atol=1e-5, rtol=0)


def test_the_same_again_is_the_same_export(
    daemon: DaemonProcess, tiny_llama: Path, tmp_path: Path
) -> None:
    control = FireworksClient(address=daemon.address)
    policy = client_of(daemon, tiny_llama, "full", 0)
    first = policy.save_weights_for_sampler("s").result().path
    step(policy)
    second = policy.save_weights_for_sampler("s").result().path
    policy.save_state("state").result()
    for saved in (first, second, "state"):
        folder = tmp_path / saved
        with ThreadPoolExecutor() as pool:
            at_once = [
                pool.submit(control.export_checkpoint, row("full", saved), folder) for _ in range(3)
            ]
        made = folder.stat().st_ino
        again = control.export_checkpoint(row("full", saved), folder)
        assert {again} == {one.result() for one in at_once} == {str(folder)}
        assert folder.stat().st_ino == made
    with pytest.raises(ValueError, match="is there and not empty"):
        control.export_checkpoint(row("full", first), tmp_path / second)
    (tmp_path / first / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match="is there and not empty"):
        control.export_checkpoint(row("full", first), tmp_path / first)
    assert (tmp_path / first / "model.safetensors").read_bytes() == b"mine"


def test_an_export_ends_with_its_daemon_and_is_made_by_the_next(
    daemon: DaemonProcess, tiny_llama: Path, tmp_path: Path
) -> None:
    policy = client_of(daemon, tiny_llama, "full", 0)
    saved = policy.save_weights_for_sampler("s").result().path
    control = FireworksClient(address=daemon.address)
    with ThreadPoolExecutor() as pool:
        export = pool.submit(control.export_checkpoint, row("full", saved), tmp_path / "x")
        exporter = exporter_of(daemon)
        exporter.suspend()
        daemon.kill()
        exporter.resume()
        exporter.wait(20)
        daemon.start()
        assert export.result(60) == str(tmp_path / "x")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["home", "x"]


def exporter_of(daemon: DaemonProcess) -> psutil.Process:
    """The process that writes the export just asked for."""
    assert daemon.process is not None
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for child in psutil.Process(daemon.process.pid).children():
            if "firetitan_daemon.worker.export" in child.cmdline():
                return child
        time.sleep(0.005)
    raise AssertionError("no export was begun")


def test_what_cannot_be_exported_says_why_and_leaves_nothing(
    daemon: DaemonProcess, tiny_llama: Path, tmp_path: Path
) -> None:
    control = FireworksClient(address=daemon.address)
    policy = client_of(daemon, tiny_llama, "full", 0)
    saved = policy.save_weights_for_sampler("s").result().path
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").touch()
    with pytest.raises(ValueError, match="is there and not empty"):
        control.export_checkpoint(row("full", saved), full)
    for inside in (daemon.home / "store" / "models" / "mine", tmp_path / "x" / ".." / "home"):
        with pytest.raises(ValueError, match="is in the daemon's own"):
            control.export_checkpoint(row("full", saved), inside)
    with pytest.raises(NotFound, match="never"):
        control.export_checkpoint(row("full", "never"), tmp_path / "x")
    (file,) = (daemon.home / "store" / "snapshots").glob(f"{saved}-*/model.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(Corrupt, match=file.name):
        control.export_checkpoint(row("full", saved), tmp_path / "x")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["full", "home"]
