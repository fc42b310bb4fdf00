"""A mixture of experts end to end: routing matrices from the sampler to the trainer."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from support.daemon import DaemonProcess
from support.models import save_tiny

from firetitan_client import (
    FireworksClient,
    FiretitanSamplingParams,
    FiretitanServiceClient,
    FiretitanTrainingClient,
    InvalidArgument,
    compat,
    routing,
)

pytestmark = pytest.mark.timeout(240)

PROMPT = list(range(60, 77))
PARAMS = FiretitanSamplingParams(max_tokens=8, seed=7, include_routing_matrix=True)
MATRIX_BYTES = 4
"""Two layers, two experts a token, one byte each."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {name: str(save_tiny(root / name, name)) for name in ("qwen3_moe", "mixtral", "llama")}


@pytest.fixture(autouse=True)
def routed_inputs() -> Iterator[None]:
    compat.install(force=True)
    yield
    compat.uninstall()


def open_service(daemon: DaemonProcess, base_model: str, **settings: Any) -> FiretitanServiceClient:
    return FiretitanServiceClient.from_firetitan_config(
        base_model=base_model, seed=5, address=daemon.address, **settings
    )


def logprobs(policy: FiretitanTrainingClient, data: list[Any]) -> list[np.ndarray]:
    output = policy.forward(data, "cross_entropy").result()
    return [np.array(one["logprobs"].data) for one in output.loss_fn_outputs]


def datum(tokens: list[int], matrices: list[str] | None) -> Any:
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1], routing_matrices=matrices),
        loss_fn_inputs={"target_tokens": tokens[1:]},
    )


@pytest.mark.parametrize(("base", "rank"), [("qwen3_moe", 4), ("mixtral", 0)])
def test_what_the_sampler_routes_the_trainer_replays(
    daemon: DaemonProcess, folders: dict[str, str], base: str, rank: int
) -> None:
    assert FireworksClient(base_url=daemon.address).model_is_moe(folders[base])
    with open_service(daemon, folders[base], lora_rank=rank, deployment_id="serve") as service:
        policy = service.create_training_client()
        for name in ("first", "second"):
            data = [datum([*PROMPT, 9, 9], None)]
            policy.forward_backward(data, "cross_entropy")
            policy.optim_step(tinker.AdamParams(learning_rate=1e-2)).result()
            saved = policy.save_weights_for_sampler(name).result()
            sampler = service.create_sampling_client(model_path=saved.path)
        answer = sampler.sample(PROMPT, num_samples=2, sampling_params=PARAMS).result()
        assert answer.snapshot == saved.path
        data, own, expected = [], [], []
        for sequence in answer.sequences:
            matrices = sequence.routing_matrices
            assert len(matrices) == len(sequence.tokens)
            assert {len(base64.b64decode(text)) for text in matrices} == {MATRIX_BYTES}
            tokens = [*PROMPT, *sequence.tokens]
            aligned = [""] * (len(PROMPT) - 1) + matrices
            data.append(datum(tokens, aligned))
            own.append(datum(tokens, None))
            expected.append(sequence.inference_logprobs)
        # Trainer and sampler choose alike here: replay changes nothing, other experts would.
        for found, plain, wanted in zip(
            logprobs(policy, data), logprobs(policy, own), expected, strict=True
        ):
            assert np.array_equal(found, plain)
            np.testing.assert_allclose(found[len(PROMPT) - 1 :], wanted, atol=1e-4)
        others = base64.b64encode(bytes([0, 1, 1, 0])).decode()
        forced = [datum([*PROMPT, 9], [others] * len(PROMPT))]
        kept = [datum([*PROMPT, 9], None)]
        assert np.abs(logprobs(policy, forced)[0] - logprobs(policy, kept)[0]).max() > 1e-3

        completions = asyncio.run(
            sampler.deployment_sampler.sample_with_prompt_tokens(
                PROMPT, 2, max_tokens=8, seed=7, include_routing_matrix=True
            )
        )
        assert [one.routing_matrices for one in completions] == [
            one.routing_matrices for one in answer.sequences
        ]
        plain = sampler.sample(PROMPT, 1, tinker.SamplingParams(max_tokens=2)).result()
        assert plain.sequences[0].routing_matrices is None


def test_bad_matrices_are_named_and_a_wrong_number_is_logged(
    daemon: DaemonProcess,
    folders: dict[str, str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routing, "_told_of_lengths", False)
    with open_service(daemon, folders["mixtral"], lora_rank=4) as service:
        policy = service.create_training_client()
        tokens = [1, 2, 3]
        with pytest.raises(
            InvalidArgument, match=r"data\[0\].model_input.routing_matrices\[1\].*base64"
        ):
            policy.forward_backward([datum(tokens, ["", "%%"])], "cross_entropy")
        short = base64.b64encode(b"\0\1\2").decode()
        outside = base64.b64encode(b"\0\1\2\7").decode()
        for text, message in ((short, "has 3 bytes"), (outside, "0 to 3")):
            failed = policy.forward_backward([datum(tokens, ["", text])], "cross_entropy")
            with pytest.raises(InvalidArgument, match=message) as caught:
                failed.result()
            assert caught.value.field == "data[0].model_input.routing_matrices[1]"
        with pytest.raises(RuntimeError, match="no gradients"):
            policy.optim_step(tinker.AdamParams()).result()
        with caplog.at_level(logging.ERROR, "firetitan"):
            for _ in range(2):
                found = logprobs(policy, [datum(tokens, [""])])
        assert len([one for one in caplog.records if "routing_matrices" in one.message]) == 1
        assert np.array_equal(found[0], logprobs(policy, [datum(tokens, None)])[0])


def test_a_custom_loss_replays(daemon: DaemonProcess, folders: dict[str, str]) -> None:
    with open_service(daemon, folders["mixtral"], lora_rank=4) as service:
        policy = service.create_training_client()
        other = base64.b64encode(bytes([3, 2, 0, 3])).decode()
        inputs = tinker.ModelInput.from_ints([1, 2, 3, 4], routing_matrices=[other] * 4)
        bare = tinker.Datum(model_input=inputs, loss_fn_inputs={})
        seen = []

        def loss(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
            seen.append(logprobs[0].detach().numpy())
            return -logprobs[0].sum(), {}

        policy.forward_backward_custom([bare], loss).result()
        (expected,) = logprobs(policy, [datum([1, 2, 3, 4], [other] * 3)])
        np.testing.assert_allclose(seen[0], expected, atol=1e-6)


def test_dense_models_take_matrices_and_return_none(
    daemon: DaemonProcess, folders: dict[str, str]
) -> None:
    assert not FireworksClient(base_url=daemon.address).model_is_moe(folders["llama"])
    with open_service(daemon, folders["llama"], lora_rank=4, deployment_id="dense") as service:
        policy = service.create_training_client()
        text = base64.b64encode(b"\0\1\2\3").decode()
        found, expected = (
            logprobs(policy, [datum([1, 2, 3], matrices)]) for matrices in ([text, ""], None)
        )
        assert np.array_equal(found[0], expected[0])
        saved = policy.save_weights_for_sampler("s").result()
        sampler = service.create_sampling_client(model_path=saved.path)
        answer = sampler.sample(PROMPT, sampling_params=PARAMS).result()
        assert answer.sequences[0].routing_matrices is None
