"""Losses over embeddings, precomputed forwards and weights by version, over a real daemon."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from firetitan.v1 import operation_service_pb2
from support.daemon import DaemonProcess

from firetitan_client import (
    FiretitanServiceClient,
    FiretitanTrainingClient,
    GradAccNormalization,
    NoGradients,
    WeightsChanged,
)
from firetitan_client.custom_loss import CustomLossCall

pytestmark = pytest.mark.timeout(180)

TOY = "firetitan/toy"
STILL = tinker.AdamParams(learning_rate=0.0)
MOVE = tinker.AdamParams(learning_rate=1e-2)

SEQUENCES = ([1, 5, 9], [2, 6], [5, 9, 1, 4], [6, 2, 8], [7])


def texts() -> list[tinker.Datum]:
    """Sequences without any loss input."""
    return [
        tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens), loss_fn_inputs={})
        for tokens in SEQUENCES
    ]


def labelled() -> list[tinker.Datum]:
    return [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints([1, 5, 9, 2]),
            loss_fn_inputs={"target_tokens": [5, 9, 2, 3 + index]},
        )
        for index in range(2)
    ]


def squared(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
    return (torch.cat(logprobs) ** 2).sum(), {}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """One for all; each test has a trainer of its own."""
    process = DaemonProcess(tmp_path_factory.mktemp("daemon") / "home")
    process.start()
    yield process
    process.stop()


@pytest.fixture
def service(daemon: DaemonProcess) -> Iterator[FiretitanServiceClient]:
    with FiretitanServiceClient.from_firetitan_config(
        base_model=TOY,
        lora_rank=0,
        seed=5,
        create_deployment=False,
        cleanup_trainer_on_close=True,
        address=daemon.address,
    ) as service:
        yield service


@pytest.fixture
def policy(service: FiretitanServiceClient) -> FiretitanTrainingClient:
    return service.create_training_client()


@pytest.fixture
def other(
    service: FiretitanServiceClient, policy: FiretitanTrainingClient
) -> FiretitanTrainingClient:
    """A second client of the same session."""
    return FiretitanServiceClient(service.base_url).create_training_client()


def grad_norm(policy: FiretitanTrainingClient) -> float:
    return float(policy.optim_step(STILL).result().metrics["grad_norm"])


def methods(policy: FiretitanTrainingClient) -> list[str]:
    listed = policy.service.stubs.operations.ListOperations(
        operation_service_pb2.ListOperationsRequest(parent=policy.session_name)
    )
    return [one.method for one in listed.operations]


def embeddings(policy: FiretitanTrainingClient, pooling: str) -> torch.Tensor:
    config = {"output": "embedding", "pooling": pooling}
    output = policy.forward(texts(), "cross_entropy", config).result()
    return torch.stack([row["embedding"].to_torch() for row in output.loss_fn_outputs])


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_the_loss_is_given_embeddings(policy: FiretitanTrainingClient, pooling: str) -> None:
    wanted = embeddings(policy, pooling)
    seen: list[torch.Tensor] = []

    def pull(data: list[Any], rows: list[Any]) -> tuple[Any, dict[str, float]]:
        assert len(data) == len(SEQUENCES)
        seen.append(torch.stack(rows).detach())
        return (torch.stack(rows) ** 2).sum(), {"mine": 2.0}

    output = policy.forward_backward_custom(
        texts(), pull, output="embedding", pooling=pooling
    ).result()
    assert torch.equal(seen[0], wanted)
    assert output.metrics["mine"] == 2.0
    assert output.metrics["loss:sum"] == pytest.approx(float((wanted**2).sum()), rel=1e-5)
    assert output.loss_fn_outputs[1]["embedding"].shape == [wanted.shape[1]]
    assert methods(policy)[-2:] == ["Forward", "Backward"]
    before = float((wanted**2).sum())
    policy.optim_step(MOVE, GradAccNormalization.NUM_SEQUENCES).result()
    assert float((embeddings(policy, pooling) ** 2).sum()) < before


def test_the_loss_is_given_cosines(policy: FiretitanTrainingClient) -> None:
    """As if it had computed them of the embeddings itself."""
    vectors = embeddings(policy, "last")

    def of_cosines(data: list[Any], rows: list[Any]) -> tuple[Any, dict[str, float]]:
        assert [tuple(row.shape) for row in rows] == [(len(data),)] * len(data)
        return rows[0][2] - rows[1][3], {}

    def of_embeddings(data: list[Any], rows: list[Any]) -> tuple[Any, dict[str, float]]:
        unit = torch.nn.functional.normalize(torch.stack(rows), dim=1)
        cosines = unit @ unit.T
        return cosines[0, 2] - cosines[1, 3], {}

    output = policy.forward_backward_custom(
        texts(), of_cosines, output="cos_similarity_matrix", pooling="last"
    ).result()
    found = grad_norm(policy)
    cosine = torch.nn.functional.cosine_similarity
    wanted = cosine(vectors[0], vectors[2], dim=0) - cosine(vectors[1], vectors[3], dim=0)
    assert output.metrics["loss:sum"] == pytest.approx(float(wanted), abs=1e-5)
    policy.forward_backward_custom(
        texts(), of_embeddings, output="embedding", pooling="last"
    ).result()
    assert found == pytest.approx(grad_norm(policy), rel=1e-5)


def test_contrastive_is_the_custom_loss_of_its_formula(policy: FiretitanTrainingClient) -> None:
    def info_nce(data: list[Any], rows: list[Any]) -> tuple[Any, dict[str, float]]:
        unit = torch.nn.functional.normalize(torch.stack(rows), dim=1)
        labels = torch.arange(2)
        forth = torch.nn.functional.cross_entropy(unit[:2] @ unit[2:].T / 0.5, labels)
        back = torch.nn.functional.cross_entropy(unit[2:4] @ unit[:2].T / 0.5, labels)
        return (forth + back) / 2, {}

    custom = policy.forward_backward_custom(
        texts(), info_nce, output="embedding", pooling="last"
    ).result()
    wanted = grad_norm(policy)
    output = policy.forward_backward_contrastive(
        texts(), num_queries=2, temperature=0.5, num_extra_negatives=1
    ).result()
    assert output.metrics["loss"] == pytest.approx(custom.metrics["loss:sum"], rel=1e-5)
    assert len(output.loss_fn_outputs) == len(SEQUENCES)
    assert grad_norm(policy) == pytest.approx(wanted, rel=1e-4)


async def test_contrastive_in_a_loop(service: FiretitanServiceClient) -> None:
    policy = await service.create_training_client_async()
    future = await policy.forward_backward_contrastive_async(
        texts()[:4], num_queries=2, temperature=0.5, pooling="mean"
    )
    step = await policy.optim_step_async(MOVE)
    assert (await future).metrics["loss"] > 0
    assert (await step).metrics["grad_norm"] > 0


def test_tokens_cannot_normalise_embeddings(policy: FiretitanTrainingClient) -> None:
    policy.forward_backward_contrastive(texts()[:2], num_queries=1, temperature=1.0).result()
    step = policy.optim_step(STILL, GradAccNormalization.NUM_LOSS_TOKENS)
    with pytest.raises(RuntimeError, match="num_sequences"):
        step.result()
    policy.optim_step(STILL, GradAccNormalization.NUM_SEQUENCES).result()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"output": "hidden"}, "Unsupported output='hidden'; expected 'logprobs', 'embedding', or"),
        ({"output": "embedding", "pooling": "max"}, "Unsupported pooling='max'; expected 'mean'"),
        ({"loss_type_input": "logits"}, "loss_type_input"),
        ({"output": "embedding", "precomputed_forward": object()}, "only taken with output"),
    ],
)
def test_wrong_options_raise_in_the_call(
    policy: FiretitanTrainingClient, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        policy.forward_backward_custom(texts(), squared, **options)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"num_queries": 2, "temperature": 1.0}, "has 5 datums; .* = 4"),
        ({"num_queries": 0, "temperature": 1.0}, "num_queries"),
        ({"num_queries": 2, "temperature": 0.0, "num_extra_negatives": 1}, "temperature"),
        ({"num_queries": 2, "temperature": 1.0, "num_extra_negatives": -1}, "num_extra_negatives"),
        (
            {"num_queries": 2, "temperature": 1.0, "num_extra_negatives": 1, "pooling": "max"},
            "Unsupported pooling",
        ),
    ],
)
def test_wrong_contrastive_calls_raise_in_the_call(
    policy: FiretitanTrainingClient, settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        policy.forward_backward_contrastive(texts(), **settings)
    with pytest.raises(ValueError, match="output"):
        policy.forward(texts(), "cross_entropy", {"output": "cos_similarity_matrix"})


def test_without_a_graph_embeddings_have_the_same_gradient(policy: FiretitanTrainingClient) -> None:
    def pull(data: list[Any], rows: list[Any]) -> tuple[Any, dict[str, float]]:
        return (torch.stack(rows) ** 3).sum(), {}

    def run() -> None:
        policy.forward_backward_custom(texts(), pull, output="embedding", pooling="mean").result()

    run()
    wanted = grad_norm(policy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CustomLossCall, "_backward", CustomLossCall._surrogate)
        run()
    assert methods(policy)[-2:] == ["Forward", "ForwardBackward"]
    assert grad_norm(policy) == pytest.approx(wanted, rel=1e-6)


# Forwards that were run before


def test_a_precomputed_forward_spares_one(policy: FiretitanTrainingClient) -> None:
    policy.forward_backward_custom(labelled(), squared).result()
    wanted = grad_norm(policy)
    forward = policy.forward(labelled(), "cross_entropy").result()
    output = policy.forward_backward_custom(
        labelled(), squared, precomputed_forward=forward
    ).result()
    assert methods(policy)[-2:] == ["Forward", "ForwardBackward"]
    assert output.metrics["loss:sum"] > 0
    assert grad_norm(policy) == pytest.approx(wanted, rel=1e-5)


def test_a_stale_precomputed_forward_is_not_used(policy: FiretitanTrainingClient) -> None:
    forward = policy.forward(labelled(), "cross_entropy").result()
    policy.forward_backward(labelled(), "cross_entropy").result()
    policy.optim_step(MOVE).result()
    calls = 0

    def counted(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        nonlocal calls
        calls += 1
        return squared(data, logprobs)

    policy.forward_backward_custom(labelled(), counted, precomputed_forward=forward).result()
    assert calls == 2
    found = grad_norm(policy)
    policy.forward_backward_custom(labelled(), squared).result()
    assert found == pytest.approx(grad_norm(policy), rel=1e-6)


def test_precomputed_forwards_of_other_data_are_refused(policy: FiretitanTrainingClient) -> None:
    forward = policy.forward(labelled(), "cross_entropy").result()

    def run(data: list[Any], given: Any) -> None:
        policy.forward_backward_custom(data, squared, precomputed_forward=given)

    for data, given, text in (
        (labelled()[:1], forward, "has 2 outputs for 1 datums"),
        (texts()[:2], forward, r"loss_fn_outputs\[0\]: logprobs have shape \[4\]"),
        (labelled(), policy.forward(labelled(), "cross_entropy"), "forward\\(...\\).result"),
    ):
        with pytest.raises(ValueError, match=text):
            run(data, given)
    with pytest.raises(NoGradients):
        policy.optim_step(STILL).result()


def test_a_reference_forward_is_no_precomputed_one(daemon: DaemonProcess) -> None:
    with FiretitanServiceClient.from_firetitan_config(
        base_model=TOY, lora_rank=4, create_deployment=False, address=daemon.address
    ) as service:
        policy = service.create_training_client()
        reference = service.create_base_training_client()
        forward = reference.forward(labelled(), "cross_entropy").result()
        with pytest.raises(ValueError, match="base model"):
            policy.forward_backward_custom(labelled(), squared, precomputed_forward=forward)


# Which weights


def test_a_load_that_ends_on_the_same_step_changes_the_weights(
    policy: FiretitanTrainingClient, other: FiretitanTrainingClient
) -> None:
    """The step alone cannot tell: the surrogate would mix two sets of weights."""

    def step(data: list[tinker.Datum]) -> None:
        other.forward_backward(data, "cross_entropy").result()
        other.optim_step(MOVE).result()

    step(labelled()[:1])
    other.save_state("one").result()
    other.load_state_with_optimizer("one").result()
    start = policy.forward(labelled(), "cross_entropy").result()
    calls = 0

    def moving(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        nonlocal calls
        calls += 1
        if calls == 1:
            other.load_state("one").result()
            step(labelled()[1:])
        return squared(data, logprobs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CustomLossCall, "_backward", CustomLossCall._surrogate)
        output = policy.forward_backward_custom(labelled(), moving).result()
    assert calls == 2, "the other weights were at step 1 as well"
    now = np.array(output.loss_fn_outputs[0]["logprobs"].data)
    assert not np.allclose(now, start.loss_fn_outputs[0]["logprobs"].data)


def test_weights_that_never_rest_raise(
    policy: FiretitanTrainingClient, other: FiretitanTrainingClient
) -> None:
    other.save_state("start").result()

    def loading(data: list[Any], rows: list[Any]) -> tuple[Any, dict[str, float]]:
        other.load_state("start").result()
        return torch.stack(rows).sum(), {}

    future = policy.forward_backward_custom(texts(), loading, output="embedding")
    with pytest.raises(WeightsChanged):
        future.result()
