"""The training client against a real daemon and the toy engine."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tinker
from firetitan.v1 import trainer_service_pb2
from support.daemon import DaemonProcess
from support.stubs import TOY
from support.toy_training import ADAM, loss_of, make_service, toy_data

from firetitan_client import (
    FiretitanServiceClient,
    FiretitanTrainingClient,
    GradAccNormalization,
    NoGradients,
    PrecedingFailed,
    SessionLost,
)

pytestmark = pytest.mark.timeout(120)


def bad_data() -> list[tinker.Datum]:
    """Well formed, and refused by the worker: no such token."""
    return [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints([1, 99]),
            loss_fn_inputs={"target_tokens": [1, 2], "weights": [1.0, 1.0]},
        )
    ]


@pytest.fixture
def policy(daemon: DaemonProcess) -> Iterator[FiretitanTrainingClient]:
    with make_service(daemon) as service:
        yield service.create_training_client(base_model=TOY, lora_rank=0)


def test_training_lowers_the_loss(policy: FiretitanTrainingClient) -> None:
    data = toy_data()
    before = loss_of(policy, data)
    output = policy.forward_backward(data, "cross_entropy").result()
    assert output.metrics["loss:sum"] == pytest.approx(before)
    assert output.metrics["response_tokens"] == 18.0
    logprobs = output.loss_fn_outputs[0]["logprobs"]
    assert len(logprobs.data) == 6
    total = sum(sum(one["logprobs"].data) for one in output.loss_fn_outputs)
    assert -total == pytest.approx(before)
    metrics = policy.optim_step(ADAM).result().metrics
    assert metrics["step"] == 1.0
    assert metrics["grad_norm"] > 0
    assert loss_of(policy, data) < before


def test_many_outstanding_run_in_call_order(policy: FiretitanTrainingClient) -> None:
    data = toy_data()
    steps = []
    for _ in range(60):
        policy.forward_backward(data, "cross_entropy")
        steps.append(policy.optim_step(ADAM))
    done = concurrent.futures.wait(steps, timeout=60).done
    assert len(done) == 60
    assert [step.result().metrics["step"] for step in steps] == list(range(1, 61))


def test_calls_of_many_threads_all_run(policy: FiretitanTrainingClient) -> None:
    data = toy_data(count=1)
    losses: list[float] = []

    def work() -> None:
        for _ in range(10):
            output = policy.forward_backward(data, "cross_entropy").result()
            losses.append(output.metrics["loss:sum"])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(losses) == 40
    once = policy.optim_step(
        ADAM, grad_accumulation_normalization=GradAccNormalization.NUM_SEQUENCES
    ).result()
    assert once.metrics["step"] == 1.0


async def test_async_twins_and_double_await(daemon: DaemonProcess) -> None:
    async with make_service(daemon) as service:
        policy = await service.create_training_client_async(base_model=TOY)
        pending = await policy.forward_backward_async(toy_data(), "cross_entropy")
        step = await policy.optim_step_async(ADAM)
        assert (await step).metrics["step"] == 1.0
        assert (await pending).metrics["loss:sum"] > 0
        output = await (await policy.forward_async(toy_data(), "cross_entropy"))
        assert output.loss_fn_outputs


async def test_creating_inside_a_loop_returns_at_once(daemon: DaemonProcess) -> None:
    service = make_service(daemon)
    policy = service.create_training_client()
    assert "opening" in repr(policy)
    step = policy.forward_backward(toy_data(), "cross_entropy")  # waits behind the opening
    assert (await step).metrics["loss:sum"] > 0
    assert await policy is policy
    assert policy.session_name.startswith("trainers/")
    assert policy.future().result(timeout=5) is policy
    assert await policy.result_async(timeout=5) is await policy.coroutine() is policy
    await asyncio.to_thread(service.close)


async def test_first_use_inside_a_loop_waits(
    daemon: DaemonProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """As a loop does that was written for creation that blocks: no await before the first use."""
    service = make_service(daemon)
    with pytest.raises(RuntimeError, match="trainer_job_id is not known yet; create a client"):
        _ = service.trainer_job_id
    policy = service.create_training_client()
    assert service.managed_trainer_job_id is None
    assert service.reference_trainer_job_id is None  # once it is known that there is none
    assert service.trainer_job_id == service.managed_trainer_job_id == policy.model_id
    assert service.max_context_length == 8192
    await asyncio.to_thread(service.close)
    assert "blocks the event loop" not in caplog.text
    service = make_service(daemon)
    policy = service.create_training_client()
    assert policy.session_name.startswith("trainers/")
    assert "opening> is not ready and blocks the event loop; `await` it first" in caplog.text
    assert await asyncio.create_task(policy.coroutine()) is policy
    await asyncio.to_thread(service.close)


async def test_errors_of_creating_inside_a_loop_come_later(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    service = make_service(daemon, base_model=str(tmp_path / "nothing"))
    policy = service.create_training_client()
    queued = policy.forward_backward(toy_data(), "cross_entropy")
    with pytest.raises(RuntimeError, match="trainer_job_id is not known yet"):
        _ = service.trainer_job_id
    with pytest.raises(KeyError, match="nothing"):
        await policy
    with pytest.raises(KeyError, match="nothing"):
        await queued
    with pytest.raises(KeyError, match="nothing"):
        policy.forward_backward(toy_data(), "cross_entropy")
    assert "failed" in repr(policy)


def test_second_client_of_one_service_is_refused(policy: FiretitanTrainingClient) -> None:
    with pytest.raises(ValueError, match=r"'firetitan/toy' \(lora_rank=0\) already exists"):
        policy.service.create_training_client(base_model=TOY, lora_rank=0)


def test_seen_failure_lets_the_client_go_on(policy: FiretitanTrainingClient) -> None:
    failed = policy.forward_backward(bad_data(), "cross_entropy")
    with pytest.raises(ValueError, match=r"data\[0\].model_input: holds token 99") as caught:
        failed.result()
    assert caught.value.field == "data[0].model_input"  # type: ignore[attr-defined]
    policy.forward_backward(toy_data(), "cross_entropy").result()
    assert policy.optim_step(ADAM).result().metrics["step"] == 1.0


def test_unseen_failure_stops_what_was_called_behind_it(policy: FiretitanTrainingClient) -> None:
    failed = policy.forward_backward(bad_data(), "cross_entropy")
    behind = policy.optim_step(ADAM)
    assert isinstance(behind.exception(), PrecedingFailed)
    with pytest.raises(ValueError, match="token 99"):
        failed.result()
    policy.forward_backward(toy_data(), "cross_entropy").result()
    assert policy.optim_step(ADAM).result().metrics["step"] == 1.0


def test_next_call_raises_what_nobody_looked_at(policy: FiretitanTrainingClient) -> None:
    policy.forward_backward(toy_data(), "cross_entropy").result()
    concurrent.futures.wait([policy.forward_backward(bad_data(), "cross_entropy")])
    with pytest.raises(ValueError, match="token 99") as caught:
        policy.optim_step(ADAM)
    assert "raised by the next call" in caught.value.__notes__[0]
    assert policy.optim_step(ADAM).result().metrics["step"] == 1.0


class SlowLoss:
    """A custom loss that runs until it is told to end; calls behind it stay in the client."""

    def __init__(self, policy: FiretitanTrainingClient) -> None:
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.thread = threading.Thread(
            target=lambda: policy.forward_backward_custom(toy_data(), self.loss)
        )

    def loss(self, data: Any, logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        self.entered.set()
        assert self.go_on.wait(30)
        return sum(row.sum() for row in logprobs), {}

    def __enter__(self) -> SlowLoss:
        self.thread.start()
        assert self.entered.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self.thread.join()


def test_looking_at_a_failure_frees_nothing_that_was_called_before(
    policy: FiretitanTrainingClient,
) -> None:
    """More calls than are sent at once: the last ones go out after the failure was looked at."""
    with SlowLoss(policy):
        failed = policy.forward_backward(bad_data(), "cross_entropy")
        behind = [policy.optim_step(ADAM) for _ in range(80)]
    assert isinstance(failed.exception(), ValueError)
    assert all(isinstance(step.exception(), PrecedingFailed) for step in behind)
    assert policy.optim_step(ADAM).result().metrics["step"] == 1.0  # the custom loss's gradient
    with pytest.raises(NoGradients, match="no gradients accumulated"):
        policy.optim_step(ADAM).result()


def test_malformed_calls_raise_at_once_and_leave_no_hole(policy: FiretitanTrainingClient) -> None:
    for wrong in (
        lambda: policy.forward_backward([], "cross_entropy"),
        lambda: policy.optim_step(ADAM, "sometimes"),
        lambda: policy.save_state("a/b"),
        lambda: policy.save_weights_for_sampler("x", checkpoint_type="whole"),
        lambda: policy.forward_backward(toy_data(), 3),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError):
            wrong()
    with pytest.raises(TypeError):
        policy.optim_step()
    policy.forward_backward(toy_data(), "cross_entropy").result()
    assert policy.optim_step(ADAM).result().metrics["step"] == 1.0


def test_unknown_loss_and_missing_input(policy: FiretitanTrainingClient) -> None:
    with pytest.raises(ValueError, match="mean_of_means"):
        policy.forward_backward(toy_data(), "mean_of_means").result()
    with pytest.raises(ValueError, match=r"advantages|logprobs"):
        policy.forward_backward(toy_data(), "importance_sampling").result()


def test_results_larger_than_a_stream_message(policy: FiretitanTrainingClient) -> None:
    data = toy_data(count=300, length=1000)
    output = policy.forward(data, "cross_entropy").result()
    assert len(output.loss_fn_outputs) == 300
    assert len(output.loss_fn_outputs[299]["logprobs"].data) == 1000


def test_too_large_a_call_is_refused_in_the_call(policy: FiretitanTrainingClient) -> None:
    big = toy_data(count=1, length=6_000_000)
    with pytest.raises(ValueError, match="MiB, one call may take 64 MiB"):
        policy.forward_backward(big, "cross_entropy")


def test_cancel_before_it_started(policy: FiretitanTrainingClient) -> None:
    with SlowLoss(policy):
        queued = policy.optim_step(ADAM)
        assert queued.cancel()
        assert queued.cancelled()
    assert policy.optim_step(ADAM).result().metrics["step"] == 1.0


def test_save_and_load(policy: FiretitanTrainingClient) -> None:
    data = toy_data()
    policy.forward_backward(data, "cross_entropy")
    policy.optim_step(ADAM).result()
    saved = policy.save_state("step_10").result()
    policy.save_state("step_2", timeout=30)
    assert policy.list_checkpoints() == ["step_2", "step_10"]
    at_save = loss_of(policy, data)

    def step() -> float:
        policy.forward_backward(data, "cross_entropy")
        policy.optim_step(ADAM).result()
        return loss_of(policy, data)

    uninterrupted = step()
    policy.load_state_with_optimizer(saved).result()
    assert loss_of(policy, data) == at_save
    assert step() == uninterrupted
    policy.load_state(name="step_10").result()
    assert loss_of(policy, data) == at_save
    assert step() != uninterrupted  # a fresh optimizer
    reference = policy.resolve_checkpoint_path("step_10", policy.trainer_job_id)
    assert policy.load_state(reference).result().path == saved.path
    with pytest.raises(KeyError, match="step_3"):
        policy.load_state("step_3").result()


def test_calls_outlive_a_killed_daemon(daemon: DaemonProcess) -> None:
    policy = make_service(daemon).create_training_client()
    data = toy_data()
    futures = []
    for number in range(30):
        futures.append(policy.forward_backward(data, "cross_entropy"))
        futures.append(policy.optim_step(ADAM))
        if number == 10:
            futures[0].result()
            daemon.kill()
        if number == 20:
            daemon.start()
    assert [step.result().metrics["step"] for step in futures[1::2]] == list(range(1, 31))


def test_a_lost_worker_is_told_and_the_trainer_comes_back(daemon: DaemonProcess) -> None:
    # Without what a replay needs, a death is a loss.
    daemon.kill()
    daemon.start({"FIRETITAN_RECOVERY_ENABLED": "0"})
    policy = make_service(daemon).create_training_client()
    saved = policy.save_state("before").result()
    policy.forward_backward(toy_data(), "cross_entropy").result()
    request = trainer_service_pb2.GetTrainerRequest(name=f"trainers/{policy.trainer_job_id}")
    trainer = policy.service.stubs.trainers.GetTrainer(request).trainer
    os.kill(trainer.worker_pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(SessionLost):
            policy.forward_backward(toy_data(), "cross_entropy").result()
    again = FiretitanServiceClient(policy.service.base_url).create_training_client()
    again.load_state_with_optimizer(saved).result()
    again.forward_backward(toy_data(), "cross_entropy").result()
    assert policy.optim_step(ADAM).result().metrics["step"] == 1.0  # the first client is back too


_FORKS = """
import os
from firetitan_client import FiretitanServiceClient
from support.toy_training import ADAM, TOY, toy_data
service = FiretitanServiceClient.from_firetitan_config(
    address={address!r}, base_model=TOY, lora_rank=0, create_deployment=False)
policy = service.create_training_client()
policy.forward_backward(toy_data(), "cross_entropy").result()
pending = policy.forward_backward(toy_data(), "cross_entropy")
child = os.fork()
if child == 0:
    policy.forward_backward(toy_data(), "cross_entropy").result(60)
    print("child", policy.optim_step(ADAM).result(60).metrics["step"], flush=True)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
pending.result(60)
policy.forward_backward(toy_data(), "cross_entropy").result(60)
print("parent", policy.optim_step(ADAM).result(60).metrics["step"], flush=True)
"""


def test_a_forked_child_has_a_lane_of_its_own(daemon: DaemonProcess) -> None:
    code = _FORKS.format(address=daemon.address)
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["child", "1.0", "parent", "2.0"]


def test_a_script_that_ends_has_sent_its_calls(daemon: DaemonProcess) -> None:
    policy = make_service(daemon).create_training_client()
    code = (
        "from firetitan_client import FiretitanServiceClient\n"
        f"c = FiretitanServiceClient(address={daemon.address!r}).create_training_client("
        f"session={policy.session_name!r})\n"
        "c.save_state('last')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    policy.forward(toy_data(), "cross_entropy").result()  # behind it in the session's order
    assert policy.list_checkpoints() == ["last"]
