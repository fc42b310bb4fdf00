"""A mixture of experts end to end: routing matrices from the sampler to the trainer."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tinker
from support.daemon import DaemonProcess
from support.models import save_tiny

from firetitan_client import (
    FiretitanSamplingParams,
    FiretitanServiceClient,
    FiretitanTrainingClient,
    FireworksClient,
    InvalidArgument,
    compat,
    routing,
)

pytestmark = pytest.mark.timeout(240)

PROMPT = list(range(60, 77))
PARAMS = FiretitanSamplingParams(
    max_tokens=8, seed=7, include_routing_matrix=True, r3_ttl_seconds=60
)
OTHERS = base64.b64encode(bytes([0, 1, 1, 0])).decode()
TOY = "firetitan/toy"
MATRIX_BYTES = 4
"""Two layers, two experts a token, one byte each."""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    daemon = DaemonProcess(tmp_path_factory.mktemp("home"))
    daemon.start()
    yield daemon
    daemon.stop()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny", "qwen3_moe"))


@pytest.fixture(scope="module")
def service(daemon: DaemonProcess, model: str) -> Iterator[FiretitanServiceClient]:
    with FiretitanServiceClient.from_firetitan_config(
        base_model=model, lora_rank=4, seed=5, deployment_id="serve", address=daemon.address
    ) as service:
        yield service


@pytest.fixture(scope="module")
def policy(service: FiretitanServiceClient) -> FiretitanTrainingClient:
    return service.create_training_client()


@pytest.fixture(autouse=True)
def routed_inputs() -> Iterator[None]:
    compat.install(force=True)
    yield
    compat.uninstall()


def logprobs(policy: FiretitanTrainingClient, data: list[Any]) -> list[np.ndarray]:
    output = policy.forward(data, "cross_entropy").result()
    return [np.array(one["logprobs"].data) for one in output.loss_fn_outputs]


def datum(tokens: list[int], matrices: list[str] | None) -> Any:
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1], routing_matrices=matrices),
        loss_fn_inputs={"target_tokens": tokens[1:]},
    )


def test_what_the_sampler_routes_the_trainer_replays(
    service: FiretitanServiceClient, policy: FiretitanTrainingClient
) -> None:
    for name in ("first", "second"):
        policy.forward_backward([datum([*PROMPT, 9, 9], None)], "cross_entropy")
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
        data.append(datum(tokens, [""] * (len(PROMPT) - 1) + matrices))
        own.append(datum(tokens, None))
        expected.append(sequence.inference_logprobs)
    # Trainer and sampler choose alike here: replay changes nothing, other experts do.
    for found, plain, wanted in zip(
        logprobs(policy, data), logprobs(policy, own), expected, strict=True
    ):
        assert np.array_equal(found, plain)
        np.testing.assert_allclose(found[len(PROMPT) - 1 :], wanted, atol=1e-4)
    (forced,) = logprobs(policy, [datum([*PROMPT, 9], [OTHERS] * len(PROMPT))])
    (free,) = logprobs(policy, [datum([*PROMPT, 9], None)])
    assert np.abs(forced - free).max() > 1e-3

    completions = asyncio.run(
        sampler.deployment_sampler.sample_with_prompt_tokens(
            PROMPT, 2, max_tokens=8, seed=7, include_routing_matrix=True
        )
    )
    assert [one.routing_matrices for one in completions] == [
        one.routing_matrices for one in answer.sequences
    ]
    streamed: list[list[str]] = [[], []]
    for chunk in sampler.sample_stream(PROMPT, num_samples=2, sampling_params=PARAMS):
        streamed[chunk.sequence].extend(chunk.routing_matrices or [])
    assert streamed == [one.routing_matrices for one in answer.sequences]
    plain = sampler.sample(PROMPT, 1, tinker.SamplingParams(max_tokens=2)).result()
    assert plain.sequences[0].routing_matrices is None


def test_a_mixture_of_experts_is_known_as_one(daemon: DaemonProcess, model: str) -> None:
    client = FireworksClient(base_url=daemon.address)
    assert client.model_is_moe(model)
    assert not client.model_is_moe(TOY)


def test_bad_matrices_are_named_and_change_nothing(policy: FiretitanTrainingClient) -> None:
    tokens = [1, 2, 3]
    with pytest.raises(
        InvalidArgument, match=r"data\[0\].model_input.routing_matrices\[1\].*base64"
    ):
        policy.forward_backward([datum(tokens, ["", "%%"])], "cross_entropy")
    short = base64.b64encode(b"\0\1\2").decode()
    outside = base64.b64encode(b"\0\1\2\x08").decode()
    for text, message in ((short, "has 3 bytes"), (outside, "0 to 7")):
        failed = policy.forward_backward([datum(tokens, ["", text])], "cross_entropy")
        with pytest.raises(InvalidArgument, match=message) as caught:
            failed.result()
        assert caught.value.field == "data[0].model_input.routing_matrices[1]"
    with pytest.raises(RuntimeError, match="no gradients"):
        policy.optim_step(tinker.AdamParams()).result()


def test_a_wrong_number_of_matrices_is_logged_once(
    policy: FiretitanTrainingClient,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routing, "_told_of_lengths", False)
    with caplog.at_level(logging.ERROR, "firetitan"):
        for _ in range(2):
            (found,) = logprobs(policy, [datum([1, 2, 3], [OTHERS])])
    assert len([one for one in caplog.records if "routing_matrices" in one.message]) == 1
    (free,) = logprobs(policy, [datum([1, 2, 3], None)])
    assert np.array_equal(found, free)


def test_a_custom_loss_replays(policy: FiretitanTrainingClient) -> None:
    inputs = tinker.ModelInput.from_ints([1, 2, 3, 4], routing_matrices=[OTHERS] * 4)
    seen = []

    def loss(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        seen.append(logprobs[0].detach().numpy())
        return -logprobs[0].sum(), {}

    policy.forward_backward_custom(
        [tinker.Datum(model_input=inputs, loss_fn_inputs={})], loss
    ).result()
    (expected,) = logprobs(policy, [datum([1, 2, 3, 4], [OTHERS] * 3)])
    np.testing.assert_allclose(seen[0], expected, atol=1e-6)


def test_dense_models_take_matrices_and_return_none(daemon: DaemonProcess) -> None:
    with FiretitanServiceClient.from_firetitan_config(
        base_model=TOY, lora_rank=4, seed=5, deployment_id="dense", address=daemon.address
    ) as service:
        policy = service.create_training_client()
        found, expected = (
            logprobs(policy, [datum([1, 2, 3], matrices)]) for matrices in ([OTHERS, ""], None)
        )
        assert np.array_equal(found[0], expected[0])
        saved = policy.save_weights_for_sampler("s").result()
        sampler = service.create_sampling_client(model_path=saved.path)
        answer = sampler.sample([1, 2], sampling_params=PARAMS).result()
        assert answer.sequences[0].routing_matrices is None
