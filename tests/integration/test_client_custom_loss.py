"""Custom losses through a real daemon and the toy engine: the right gradient, or none."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest
import tinker
import torch
from firetitan.v1 import operation_service_pb2, training_service_pb2
from support.daemon import DaemonProcess

from firetitan_client import (
    FiretitanServiceClient,
    FiretitanTrainingClient,
    NoGradients,
    PrecedingFailed,
    WeightsChanged,
)
from firetitan_client.custom_loss import CustomLossCall

pytestmark = pytest.mark.timeout(120)

TOY = "firetitan/toy"
STILL = tinker.AdamParams(learning_rate=0.0)
MOVE = tinker.AdamParams(learning_rate=1e-2)


def toy_data(count: int = 3, **extra: Any) -> list[tinker.Datum]:
    return [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints([1 + index, 5, 9, 2]),
            loss_fn_inputs={"target_tokens": [5, 9, 2, 3 + index], **extra},
        )
        for index in range(count)
    ]


def cross_entropy(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
    return -torch.cat(logprobs).sum(), {"mine": 1.5}


def squared(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
    return (torch.cat(logprobs) ** 2).sum(), {}


@pytest.fixture
def service(daemon: DaemonProcess) -> Iterator[FiretitanServiceClient]:
    with FiretitanServiceClient.from_firetitan_config(
        base_model=TOY, lora_rank=0, seed=5, create_deployment=False, address=daemon.address
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


def step_by(client: FiretitanTrainingClient) -> None:
    client.forward_backward(toy_data(), "cross_entropy").result()
    client.optim_step(MOVE).result()


def test_equals_the_builtin_loss(policy: FiretitanTrainingClient) -> None:
    builtin = policy.forward_backward(toy_data(), "cross_entropy").result()
    wanted = grad_norm(policy)
    output = policy.forward_backward_custom(toy_data(), cross_entropy).result()
    assert grad_norm(policy) == pytest.approx(wanted, rel=1e-6)
    assert output.metrics["loss:sum"] == pytest.approx(builtin.metrics["loss:sum"], rel=1e-6)
    assert output.metrics["mine"] == 1.5
    for mine, theirs in zip(output.loss_fn_outputs, builtin.loss_fn_outputs, strict=True):
        assert mine["logprobs"].data == theirs["logprobs"].data


def test_the_loss_is_given_data_that_can_be_read_once(policy: FiretitanTrainingClient) -> None:
    def count(data: Any, logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        return -torch.cat(logprobs).sum(), {"datums": len(list(data))}

    output = policy.forward_backward_custom(iter(toy_data(3)), count).result()
    assert output.metrics["datums"] == 3


def test_metrics_of_another_loss(policy: FiretitanTrainingClient) -> None:
    """Of a squared loss the linear surrogate is twice the loss, as in tinker."""
    metrics = policy.forward_backward_custom(toy_data(), squared).result().metrics
    assert metrics["surrogate_loss:sum"] == pytest.approx(2 * metrics["loss:sum"], rel=1e-5)


def test_extras_reach_the_loss_only(policy: FiretitanTrainingClient) -> None:
    data = toy_data(advantages=[1.0, 2.0, 3.0, 4.0])

    def weighted(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        rows = zip(data, logprobs, strict=True)
        return -sum((row @ one.loss_fn_inputs["advantages"].to_torch()) for one, row in rows), {}

    assert policy.forward_backward_custom(data, weighted).result().metrics["loss:sum"] > 0


def test_without_targets_the_next_token_is_the_target(policy: FiretitanTrainingClient) -> None:
    data = [tinker.Datum(model_input=tinker.ModelInput.from_ints([1, 5, 9, 2, 3]))]
    shapes = []

    def loss(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        shapes.append(logprobs[0].shape)
        return cross_entropy(data, logprobs)

    policy.forward_backward_custom(data, loss).result()
    assert shapes == [(4,)]
    shifted = grad_norm(policy)
    policy.forward_backward(toy_data(1), "cross_entropy").result()
    assert shifted == pytest.approx(grad_norm(policy), rel=1e-6)


def test_two_dimensional_targets(policy: FiretitanTrainingClient) -> None:
    targets = torch.zeros(4, 6, dtype=torch.int64)
    targets[:, 0] = torch.tensor([5, 9, 2, 3])
    data = [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints([1, 5, 9, 2]),
            loss_fn_inputs={"target_tokens": targets},
        )
    ]

    def first(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        assert logprobs[0].shape == (4, 6)
        return -logprobs[0][:, 0].sum(), {}

    policy.forward_backward_custom(data, first).result()
    found = grad_norm(policy)
    policy.forward_backward(toy_data(1), "cross_entropy").result()
    assert found == pytest.approx(grad_norm(policy), rel=1e-6)


def test_raising_loss_accumulates_nothing(policy: FiretitanTrainingClient) -> None:
    def broken(data: list[Any], logprobs: list[Any]) -> Any:
        raise LookupError("the user's own bug")

    with pytest.raises(LookupError, match="the user's own bug"):
        policy.forward_backward_custom(toy_data(), broken)
    with pytest.raises(NoGradients):
        policy.optim_step(STILL).result()
    policy.forward_backward_custom(toy_data(), cross_entropy).result()
    assert grad_norm(policy) > 0


@pytest.mark.parametrize(
    ("loss", "error", "text"),
    [
        (lambda data, rows: rows[0].sum(), TypeError, r"return \(loss, metrics\)"),
        (lambda data, rows: (rows[0], {}), TypeError, "one element"),
        (lambda data, rows: (rows[0].sum(), {}), ValueError, "No gradient computed.*tensor 1"),
        (lambda data, rows: (torch.zeros(()), {}), ValueError, "No gradient computed"),
    ],
)
def test_unusable_losses(
    policy: FiretitanTrainingClient, loss: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        policy.forward_backward_custom(toy_data(), loss)
    with pytest.raises(NoGradients):
        policy.optim_step(STILL).result()


def test_not_finite_gradients_fail_the_future(policy: FiretitanTrainingClient) -> None:
    def infinite(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        return torch.cat(logprobs).sum() * float("inf"), {}

    future = policy.forward_backward_custom(toy_data(), infinite)
    behind = policy.optim_step(STILL)
    assert isinstance(behind.exception(), PrecedingFailed)
    with pytest.raises(ValueError, match="not finite"):
        future.result()
    with pytest.raises(NoGradients):
        policy.optim_step(STILL).result()


def test_expired_graph_at_equal_weights(
    policy: FiretitanTrainingClient, other: FiretitanTrainingClient
) -> None:
    """The worker lets go of the graph while the loss runs; the gradient is the same."""
    policy.forward_backward_custom(toy_data(), squared).result()
    wanted = grad_norm(policy)
    dropped = 0

    def dropping(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        nonlocal dropped
        dropped += 1
        graph = graphs[-1]
        hold = other._lane.hold()
        hold.submit(
            "TrainingService/Backward",
            training_service_pb2.BackwardRequest(graph=graph).SerializeToString(),
            training_service_pb2.BackwardResponse,
            lambda operation: operation.forward,
        ).result()
        hold.release()
        return squared(data, logprobs)

    graphs: list[str] = []
    run_loss = CustomLossCall._run_loss

    def spy(call: CustomLossCall, result: Any) -> Any:
        graphs.append(result.graph)
        return run_loss(call, result)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CustomLossCall, "_run_loss", spy)
        policy.forward_backward_custom(toy_data(), dropping)
        step = policy.optim_step(STILL)  # called at once: it waits for the second way
    assert dropped == 1
    assert step.result().metrics["grad_norm"] == pytest.approx(wanted, rel=1e-6)
    listed = policy.service.stubs.operations.ListOperations(
        operation_service_pb2.ListOperationsRequest(parent=policy.session_name)
    )
    ways = [one.method for one in listed.operations][-5:]
    assert ways == ["Forward", "Backward", "Backward", "ForwardBackward", "OptimStep"]


def test_weights_that_moved_run_the_loss_again(
    policy: FiretitanTrainingClient, other: FiretitanTrainingClient
) -> None:
    calls = 0

    def stepping(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        nonlocal calls
        calls += 1
        if calls == 1:
            step_by(other)
        return squared(data, logprobs)

    future = policy.forward_backward_custom(toy_data(), stepping)
    found = policy.optim_step(STILL).result().metrics["grad_norm"]
    assert future.result().metrics["loss:sum"] > 0
    assert calls == 2
    policy.forward_backward_custom(toy_data(), squared).result()
    assert found == pytest.approx(grad_norm(policy), rel=1e-6)


def test_weights_that_never_rest_raise(
    policy: FiretitanTrainingClient, other: FiretitanTrainingClient
) -> None:
    def stepping(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        step_by(other)
        return squared(data, logprobs)

    future = policy.forward_backward_custom(toy_data(), stepping)
    behind = policy.optim_step(STILL)
    with pytest.raises(WeightsChanged):
        future.result()
    assert isinstance(behind.exception(), PrecedingFailed)
    with pytest.raises(NoGradients):
        policy.optim_step(STILL).result()


def test_loss_that_raises_the_second_time(
    policy: FiretitanTrainingClient, other: FiretitanTrainingClient
) -> None:
    """The call has returned by then: the exception comes out of the future, nothing behind runs."""
    calls = 0

    def loss(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise LookupError("second time")
        step_by(other)
        return squared(data, logprobs)

    future = policy.forward_backward_custom(toy_data(), loss)
    behind = policy.optim_step(STILL)
    with pytest.raises(LookupError, match="second time"):
        future.result()
    assert isinstance(behind.exception(), PrecedingFailed)
    with pytest.raises(NoGradients):
        policy.optim_step(STILL).result()


async def test_async_loss_leaves_the_loop_free(service: FiretitanServiceClient) -> None:
    policy = await service.create_training_client_async()
    ticks, meanwhile = 0, 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)

    def slow(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        nonlocal meanwhile
        before, deadline = ticks, time.monotonic() + 30
        while meanwhile < 20 and time.monotonic() < deadline:
            time.sleep(0.001)
            meanwhile = ticks - before
        return cross_entropy(data, logprobs)

    ticking = asyncio.create_task(tick())
    output = await (await policy.forward_backward_custom_async(toy_data(), slow))
    ticking.cancel()
    assert meanwhile >= 20
    assert output.metrics["mine"] == 1.5
    future, step = await asyncio.gather(
        policy.forward_backward_custom_async(toy_data(), cross_entropy),
        policy.optim_step_async(STILL),
    )
    assert (await step).metrics["step"] == 1.0
    await future
