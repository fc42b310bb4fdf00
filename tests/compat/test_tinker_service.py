"""`tinker.ServiceClient` as firetitan's."""

from __future__ import annotations

from pathlib import Path

import pytest
import tinker
from support.daemon import DaemonProcess

from firetitan_client import (
    FiretitanServiceClient,
    install_tinker_service_client,
    patched_tinker_service_client,
    restore_tinker_service_client,
)


def test_installed_and_restored() -> None:
    before = tinker.ServiceClient
    original = install_tinker_service_client(base_model="m", lora_rank=4)
    try:
        assert original is before and tinker.ServiceClient is not before
        service = tinker.ServiceClient(
            {"who": "me"}, base_url="https://api.fireworks.ai", api_key="key", project_id="p"
        )
        assert isinstance(service, FiretitanServiceClient)
        assert isinstance(service, tinker.ServiceClient)
        assert tinker.ServiceClient | None
        with pytest.raises(TypeError, match="organisation"):
            tinker.ServiceClient(organisation="o")
    finally:
        restore_tinker_service_client(original)
    assert tinker.ServiceClient is before


def test_wrong_settings_change_nothing() -> None:
    before = tinker.ServiceClient
    with pytest.raises(TypeError, match="'base_modle'"):
        install_tinker_service_client(base_modle="m")
    with pytest.raises(ValueError, match="lora_rank: is -1"):
        install_tinker_service_client(lora_rank=-1)
    assert tinker.ServiceClient is before


def test_restored_after_an_error() -> None:
    before = tinker.ServiceClient
    with pytest.raises(KeyError), patched_tinker_service_client(base_model="m"):
        assert tinker.ServiceClient is not before
        raise KeyError
    assert tinker.ServiceClient is before


@pytest.mark.timeout(120)
def test_a_loop_in_tinkers_words(
    daemon: DaemonProcess, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIRETITAN_ADDRESS", daemon.address)
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 2, 3, 4]),
        loss_fn_inputs={"target_tokens": [2, 3, 4, 5], "weights": [0.0, 1.0, 1.0, 1.0]},
    )
    settings = {"base_model": str(tiny_llama), "lora_rank": 4, "cleanup_trainer_on_close": True}
    with patched_tinker_service_client(**settings), tinker.ServiceClient() as service:
        client = service.create_lora_training_client(str(tiny_llama), rank=4)
        losses = []
        for _ in range(4):
            made = client.forward_backward([datum], "cross_entropy")
            client.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
            losses.append(made.result().metrics["loss:sum"])
        sampler = client.save_weights_and_get_sampling_client()
        params = tinker.SamplingParams(max_tokens=3, temperature=0.0)
        answer = sampler.sample(tinker.ModelInput.from_ints([1, 2]), 1, params).result()
    assert losses[-1] < losses[0]
    assert len(answer.sequences[0].tokens) <= 3
