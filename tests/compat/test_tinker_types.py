"""What `compat.install` adds to tinker's types, whichever tinker is installed."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import warnings
from collections.abc import Iterator
from typing import get_args

import pydantic
import pytest
from tinker import types

from firetitan_client import compat, convert, routing


@pytest.fixture
def installed() -> Iterator[None]:
    compat.install(force=True)
    yield
    compat.uninstall()


def test_this_is_the_tinker_asked_for() -> None:
    wanted = os.environ.get("FIRETITAN_TEST_TINKER")
    assert wanted in (None, importlib.metadata.version("tinker"))


@pytest.mark.usefixtures("installed")
def test_model_inputs_carry_routing_matrices() -> None:
    routed = types.ModelInput.from_ints([5, 6], routing_matrices=["AA==", ""])
    assert routed.routing_matrices == ["AA==", ""]
    assert routed.to_ints() == [5, 6]
    assert types.ModelInput.from_ints(tokens=[5]).routing_matrices is None
    again = types.ModelInput.model_validate(routed.model_dump())
    assert again == routed
    datum = types.Datum(model_input=routed, loss_fn_inputs={"target_tokens": [6, 7]})
    assert datum.model_input.routing_matrices == ["AA==", ""]
    assert list(convert.data_to_proto([datum])[0].model_input.routing_matrices) == [b"\0", b""]
    with pytest.raises(pydantic.ValidationError):
        types.ModelInput.from_ints([5], routing_matrices=[1])


@pytest.mark.usefixtures("installed")
def test_a_wrong_number_of_matrices_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "_told_of_lengths", False)
    with caplog.at_level(logging.ERROR, "firetitan"):
        for _ in range(2):
            types.ModelInput.from_ints([5, 6], routing_matrices=[""])
    assert [one.getMessage() for one in caplog.records] == [
        "routing_matrices: has 1 values, the model input 2 tokens; give one per token"
    ]


@pytest.mark.usefixtures("installed")
def test_chunks_are_told_apart_by_their_type() -> None:
    mixed = {
        "chunks": [
            {"type": "encoded_text", "tokens": [1]},
            {"type": "image_asset_pointer", "format": "png", "location": "x"},
        ]
    }
    made = types.ModelInput.model_validate(mixed)
    assert [type(chunk).__name__ for chunk in made.chunks] == [
        "EncodedTextChunk",
        "ImageAssetPointerChunk",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made.model_dump(mode="json")["chunks"][0] == {"tokens": [1], "type": "encoded_text"}
    with pytest.raises(pydantic.ValidationError, match="union_tag_invalid"):
        types.ModelInput.model_validate({"chunks": [{"type": "smell"}]})


@pytest.mark.usefixtures("installed")
def test_losses_of_the_managed_service_are_known() -> None:
    losses = get_args(types.LossFnType)
    assert {"cross_entropy", "importance_sampling", "ppo", "cispo", "dro"} < set(losses)
    assert losses.count("dapo") == losses.count("gspo") == 1
    from tinker.types._pydantic_types.forward_backward_input import ForwardBackwardInput

    assert "dapo" in get_args(ForwardBackwardInput.model_fields["loss_fn"].annotation)
    ForwardBackwardInput.model_validate({"data": [], "loss_fn": "dapo"})
    with pytest.raises(pydantic.ValidationError):
        ForwardBackwardInput.model_validate({"data": [], "loss_fn": "dopa"})


@pytest.mark.usefixtures("installed")
def test_lora_has_an_alpha() -> None:
    assert types.LoraConfig(rank=4).alpha is None
    config = types.LoraConfig(rank=4, alpha=8)
    assert config.alpha == 8
    request = types.CreateModelRequest(
        session_id="s", model_seq_id=0, base_model="m", lora_config=config
    )
    assert request.model_dump()["lora_config"]["alpha"] == 8
    with pytest.raises(pydantic.ValidationError):
        types.LoraConfig(rank=4, alpha="much")


@pytest.mark.usefixtures("installed")
def test_steps_may_ask_for_gradient_norms() -> None:
    assert types.AdamParams().emit_grad_norm_metrics is None
    for mode in ("off", "basic", "detailed", True):
        params = types.AdamParams(emit_grad_norm_metrics=mode)
        assert params.emit_grad_norm_metrics == mode
        request = types.OptimStepRequest(adam_params=params, model_id="m")
        assert request.model_dump()["adam_params"]["emit_grad_norm_metrics"] == mode
    assert types.AdamParams(learning_rate=0.5).learning_rate == 0.5
    with pytest.raises(pydantic.ValidationError):
        types.AdamParams(emit_grad_norm_metrics="all")


def test_uninstall_leaves_tinker_as_it_was() -> None:
    before = (
        types.LossFnType,
        types.ModelInput.model_fields["chunks"].annotation,
        set(types.ModelInput.model_fields) | set(types.LoraConfig.model_fields),
        set(types.AdamParams.model_fields),
    )
    compat.install(force=True)
    compat.install(force=True)
    compat.uninstall()
    assert before == (
        types.LossFnType,
        types.ModelInput.model_fields["chunks"].annotation,
        set(types.ModelInput.model_fields) | set(types.LoraConfig.model_fields),
        set(types.AdamParams.model_fields),
    )
    assert "dapo" not in get_args(types.LossFnType)
    assert types.ModelInput.from_ints([1]).model_dump() == {
        "chunks": [{"tokens": [1], "type": "encoded_text"}]
    }
    with pytest.raises(TypeError):
        types.ModelInput.from_ints([1], routing_matrices=[""])
    with pytest.raises(pydantic.ValidationError):
        types.AdamParams(emit_grad_norm_metrics="basic")
    with pytest.raises(pydantic.ValidationError):
        types.LoraConfig(rank=1, alpha=2)
