"""Checkpoints promoted to models, over a real daemon."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tinker
import torch
from peft import PeftModel
from support.daemon import DaemonProcess
from transformers import AutoModelForCausalLM, AutoTokenizer

from firetitan_client import (
    AlreadyExists,
    DeploymentManager,
    FailedPrecondition,
    FiretitanServiceClient,
    FiretitanTrainingClient,
    FireworksClient,
    NotFound,
    TrainerJobManager,
)
from firetitan_client.errors import Corrupt

pytestmark = pytest.mark.timeout(400)
TOY = "firetitan/toy"
TOKENS = [5, 9, 2, 7, 11, 3]
DATUM = tinker.Datum(
    model_input=tinker.ModelInput.from_ints(TOKENS[:-1]),
    loss_fn_inputs={"target_tokens": TOKENS[1:]},
)
ROW = "accounts/local/rlorTrainerJobs/{}/checkpoints/{}"


def client_of(
    daemon: DaemonProcess, base_model: str, trainer: str, rank: int = 0, **more: Any
) -> FiretitanTrainingClient:
    settings = {"create_deployment": False, **more}
    service = FiretitanServiceClient.from_firetitan_config(
        address=daemon.address,
        base_model=base_model,
        lora_rank=rank,
        trainer_job_id=trainer,
        **settings,
    )
    return service.create_training_client()


def step(policy: FiretitanTrainingClient, rate: float = 0.05) -> None:
    policy.forward_backward([DATUM], "cross_entropy")
    policy.optim_step(tinker.AdamParams(learning_rate=rate)).result()


def logprobs(policy: FiretitanTrainingClient) -> torch.Tensor:
    output = policy.forward([DATUM], "cross_entropy").result()
    return torch.tensor(output.loss_fn_outputs[0]["logprobs"].data)


def own_logprobs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS[:-1]])).logits[0].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]


@pytest.fixture
def control(daemon: DaemonProcess) -> Iterator[FireworksClient]:
    with FireworksClient(address=daemon.address) as control:
        yield control


def test_a_base_becomes_a_model_that_is_loaded_by_name(
    daemon: DaemonProcess, control: FireworksClient, tiny_llama: Path
) -> None:
    policy = client_of(daemon, str(tiny_llama), "full")
    step(policy)
    saved = policy.save_weights_for_sampler("end", checkpoint_type="base").result().path
    name = ROW.format("full", saved)
    model = policy.service.promote_checkpoint(
        name=name, output_model_id="mine", base_model=str(tiny_llama)
    )
    assert model["name"] == "accounts/local/models/mine"
    assert (model["kind"], model["state"]) == ("HF_BASE_MODEL", "READY")
    assert policy.service.promote_checkpoint(name=name, output_model_id="mine") == model
    control.delete_checkpoint(name)  # the model stays without it
    expected = logprobs(policy)
    plain = AutoModelForCausalLM.from_pretrained(model["location"], dtype=torch.float32)
    torch.testing.assert_close(own_logprobs(plain), expected, atol=1e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(model["location"]).vocab_size
    daemon.kill()
    daemon.start()
    assert control.list_models() == [model]
    again = client_of(daemon, model["name"], "next", 4, create_deployment=True, deployment_id="d")
    torch.testing.assert_close(logprobs(again), expected, atol=1e-5, rtol=0)
    sampler = again.service.create_sampling_client()
    found = sampler.compute_logprobs(tinker.ModelInput.from_ints(TOKENS)).result()[1:]
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=0)
    assert not control.model_is_moe(model["name"])
    with pytest.raises(FailedPrecondition, match="uses it") as used:
        control.delete_model("mine")
    assert used.value.reason == "MODEL_IN_USE"
    # A deployment takes snapshots of its model whatever name the trainer was made by.
    other = client_of(daemon, model["location"], "other", 4)
    adapter = other.save_weights_for_sampler("a").result().path
    again.service.hotload_sampler_snapshot(adapter)
    for trainer in ("next", "other"):
        TrainerJobManager(address=daemon.address).delete(trainer)
    DeploymentManager(address=daemon.address).delete("d")
    control.delete_model(model["name"])
    assert control.list_models() == [] == list((daemon.home / "store" / "models").iterdir())
    with pytest.raises(NotFound, match=r"config\.toml"):
        control.model_is_moe(model["name"])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore::FutureWarning")
def test_an_adapter_becomes_a_folder_that_peft_loads(
    daemon: DaemonProcess, control: FireworksClient, tiny_llama: Path
) -> None:
    policy = client_of(daemon, str(tiny_llama), "lora", 4)
    step(policy)
    saved = policy.save_weights_for_sampler("end").result().path
    with pytest.warns(DeprecationWarning, match="name="):
        model = control.promote_checkpoint("lora", saved, "tuned", str(tiny_llama))
    assert (model["kind"], model["loraRank"]) == ("HF_PEFT_ADDON", 4)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, model["location"])
    torch.testing.assert_close(own_logprobs(tuned), logprobs(policy), atol=1e-5, rtol=0)
    assert not control.model_is_moe(model["name"])
    # Trained on and served by its name it is the whole model.
    expected = logprobs(policy)
    again = client_of(daemon, model["name"], "again", create_deployment=True, deployment_id="d")
    torch.testing.assert_close(logprobs(again), expected, atol=1e-4, rtol=0)
    sampler = again.service.create_sampling_client()
    found = sampler.compute_logprobs(tinker.ModelInput.from_ints(TOKENS)).result()[1:]
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=0)
    # And an adapter for another session of its base.
    other = client_of(daemon, str(tiny_llama), "other", 4)
    other.load_adapter(model["name"]).result()
    torch.testing.assert_close(logprobs(other), expected, atol=1e-5, rtol=0)


def test_a_merged_base_is_served_promoted_and_trained_on(
    daemon: DaemonProcess, control: FireworksClient, tiny_llama: Path
) -> None:
    policy = client_of(
        daemon, str(tiny_llama), "lora", 4, create_deployment=True, deployment_id="d"
    )
    step(policy)
    expected = logprobs(policy)
    saved = policy.save_weights_for_sampler("m", checkpoint_type="Merged_Base").result().path
    narrow = policy.save_weights_for_sampler_ext(
        "n", checkpoint_type="merged_base", export_precision="bf16"
    )
    adapter = policy.save_weights_for_sampler("a").result().path
    rows = {row["name"].rpartition("/")[2]: row for row in control.list_checkpoints("lora")}
    kinds = [rows[one]["checkpointType"] for one in (saved, narrow.path, adapter)]
    assert kinds == ["CHECKPOINT_TYPE_INFERENCE_BASE"] * 2 + ["CHECKPOINT_TYPE_INFERENCE_LORA"]
    assert all(rows[one]["promotable"] for one in (saved, narrow.path, adapter))
    for snapshot in (saved, adapter, saved):
        sampler = policy.service.create_sampling_client(snapshot)
        found = sampler.compute_logprobs(tinker.ModelInput.from_ints(TOKENS)).result()[1:]
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=0)
    promoted = control.promote_checkpoint(name=rows[narrow.path]["name"], output_model_id="m")
    assert promoted["kind"] == "HF_BASE_MODEL"
    again = client_of(daemon, promoted["name"], "again")
    torch.testing.assert_close(logprobs(again), expected, atol=0.3, rtol=0)
    config = json.loads((Path(promoted["location"]) / "config.json").read_text())
    assert (config["dtype"], config["tie_word_embeddings"]) == ("bfloat16", False)
    # What cannot be merged, or not so, is refused in the call.
    for call in (policy.save_weights_for_sampler, again.save_weights_for_sampler):
        with pytest.raises(ValueError, match="requires checkpoint_type='merged_base'"):
            call("x", checkpoint_type="base", export_precision="bf16")
    with pytest.raises(ValueError, match=r"must be one of \('source', 'bf16'\)"):
        policy.save_weights_for_sampler("x", None, "merged_base", "fp8")
    with pytest.raises(ValueError, match="no adapter to merge"):
        again.save_weights_for_sampler("x", checkpoint_type="merged_base")


def test_what_cannot_be_promoted_says_why(daemon: DaemonProcess, control: FireworksClient) -> None:
    policy = client_of(daemon, TOY, "full")
    policy.save_state("state").result()
    base = policy.save_weights_for_sampler("s").result().path
    delta = policy.save_weights_for_sampler("s").result().path

    def promote(saved: str, model: str = "m", trainer: str = "full", **more: Any) -> Any:
        row = ROW.format(trainer, saved)
        return control.promote_checkpoint(name=row, output_model_id=model, **more)

    with pytest.raises(ValueError, match=r"is a delta and cannot be promoted.*type='base'"):
        promote(delta)
    with pytest.raises(ValueError, match="to resume from and cannot be promoted"):
        promote("state")
    with pytest.raises(ValueError, match=r"base_model: 'other', but .* 'firetitan/toy'"):
        promote(base, base_model="other")
    with pytest.raises(NotFound, match="never"):
        promote("never")
    with pytest.raises(NotFound):
        promote(base, trainer="another")
    made = promote(base, "accounts/me/models/m")
    assert made["name"] == "accounts/me/models/m"
    other = policy.save_weights_for_sampler("o", checkpoint_type="base").result().path
    step(policy)
    changed = policy.save_weights_for_sampler("o", checkpoint_type="base").result().path
    with pytest.raises(AlreadyExists, match="exists, made from"):
        promote(changed)
    assert [one["name"] for one in control.list_models()] == [made["name"]]
    damaged = daemon.home / "store" / "snapshots"
    (file,) = [one for one in damaged.glob(f"{other}-*/*.safetensors")]
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(Corrupt, match=file.name):
        promote(other, "n")
    assert list((daemon.home / "store" / "staging").iterdir()) == []


def test_names_of_the_configuration_stand_for_folders(tiny_llama: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    name = "accounts/fireworks/models/qwen3-8b"
    (home / "config.toml").write_text(f'[models]\n"{name}" = "{tiny_llama}"\n')
    daemon = DaemonProcess(home)
    daemon.start()
    try:
        policy = client_of(daemon, name, "t", 4)
        assert policy.get_tokenizer().vocab_size
        plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        torch.testing.assert_close(own_logprobs(plain), logprobs(policy), atol=1e-5, rtol=0)
        policy.save_state("s").result()
        (row,) = policy.service.list_checkpoints("t")
        assert (row["baseModel"], row["tokenizer"]) == (name, str(tiny_llama))
        with pytest.raises(NotFound, match=r"\[models\] in config"):
            client_of(daemon, "accounts/fireworks/models/other", "u")
    finally:
        daemon.stop()


def test_a_managed_service_asks_for_rows_only_once_it_has_a_trainer(daemon: DaemonProcess) -> None:
    service = FiretitanServiceClient.from_firetitan_config(address=daemon.address, base_model=TOY)
    with pytest.raises(RuntimeError, match="nothing is provisioned yet"):
        service.list_checkpoints("t")
    with pytest.raises(RuntimeError, match="nothing is provisioned yet"):
        service.promote_checkpoint(name=ROW.format("t", "c"), output_model_id="m")
