"""Whoever stops waiting stops nothing else, and long work uses nobody's patience up."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import tinker
import torch
from support.daemon import DaemonProcess
from support.stopping import stopped, worker_of
from support.toy_training import make_service

from firetitan_client import FiretitanServiceClient, FiretitanTrainingClient, attachment, patience

pytestmark = pytest.mark.timeout(120)

LONG = tinker.SamplingParams(max_tokens=4000, seed=5, stop=[])


def datum(token: int = 5) -> tinker.Datum:
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, token]),
        loss_fn_inputs={"target_tokens": [token, 2]},
    )


def plain(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
    return -torch.cat(logprobs).sum(), {}


@pytest.fixture
def service(daemon: DaemonProcess) -> Iterator[FiretitanServiceClient]:
    with make_service(daemon, create_deployment=True) as service:
        yield service


@pytest.fixture
def policy(service: FiretitanServiceClient) -> FiretitanTrainingClient:
    return service.create_training_client()


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Ctrl-C in this thread, within the block."""
    main = threading.main_thread().ident
    assert main == threading.get_ident()
    timer = threading.Timer(seconds, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        yield
    timer.join()


PATIENCE_S = 10.0
"""A busy machine starts a daemon within it."""


def be_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds for what takes minutes outside a test."""
    monkeypatch.setattr(patience, "PATIENCE_S", PATIENCE_S)
    monkeypatch.setattr(patience, "_CONNECTED_S", 1.0)
    monkeypatch.setattr(attachment, "SLICE_S", 0.5)


def test_a_daemon_may_restart_behind_a_command_that_lasts_longer_than_patience(
    daemon: DaemonProcess, policy: FiretitanTrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_impatient(monkeypatch)
    with stopped(worker_of(policy)):
        passing = policy.forward_backward([datum()], "cross_entropy")
        time.sleep(PATIENCE_S + 1)
        daemon.kill()
        daemon.start()
    assert passing.result(60).metrics["loss:sum"] > 0
    step = policy.optim_step(tinker.AdamParams()).result(60)
    assert step.metrics["step"] == 1


def test_a_daemon_may_restart_behind_samples_that_last_longer_than_patience(
    daemon: DaemonProcess, service: FiretitanServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = service.create_sampling_client()
    params = tinker.SamplingParams(max_tokens=4, seed=3)
    before = sampler.sample([1, 2], 1, params).result()
    be_impatient(monkeypatch)
    (pid,) = daemon.worker_pids("sampler")
    with stopped(pid):
        sampling = sampler.sample([1, 2], 1, params)
        time.sleep(PATIENCE_S + 1)
        daemon.kill()
        daemon.start()
    assert sampling.result(60).sequences[0].tokens == before.sequences[0].tokens


def test_a_custom_loss_whose_waiting_is_cancelled_lets_the_calls_behind_it_go_on(
    policy: FiretitanTrainingClient,
) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        entered.set()
        go_on.wait(30)
        return plain(data, logprobs)

    async def cancel_those_behind() -> None:
        custom = policy.forward_backward_custom_async
        tasks = [asyncio.create_task(custom([datum()], slow))]
        await asyncio.to_thread(entered.wait, 30)
        # More than the event loop has threads of its own for.
        tasks += [asyncio.create_task(custom([datum()], plain)) for _ in range(40)]
        await asyncio.sleep(0.2)
        for task in tasks[1:]:
            task.cancel()
        go_on.set()
        await tasks[0]

    asyncio.run(cancel_those_behind())
    norm = policy.optim_step(tinker.AdamParams()).result(60).metrics["grad_norm"]
    policy.forward_backward_custom([datum()], plain).result(60)
    once = policy.optim_step(tinker.AdamParams()).result(60).metrics["grad_norm"]
    assert norm == pytest.approx(41 * once, rel=0.05), "a cancelled wait stops no call"


def test_what_a_cancelled_custom_loss_fails_with_is_raised_by_the_next_call(
    policy: FiretitanTrainingClient,
) -> None:
    async def leave() -> None:
        await asyncio.wait_for(policy.forward_backward_custom_async([datum(99)], plain), 0.3)

    with stopped(worker_of(policy)), pytest.raises(TimeoutError):
        asyncio.run(leave())
    with pytest.raises(ValueError, match="token 99"):
        until_raised(policy)
    assert policy.forward([datum()], "cross_entropy").result(20).metrics["loss:sum"] > 0


def test_what_a_custom_loss_fails_with_behind_ctrl_c_is_raised_by_the_next_call(
    policy: FiretitanTrainingClient,
) -> None:
    with stopped(worker_of(policy)), interrupted_after(0.5):
        policy.forward_backward_custom([datum(99)], plain)
    with pytest.raises(ValueError, match="token 99"):
        until_raised(policy)
    assert policy.forward([datum()], "cross_entropy").result(20).metrics["loss:sum"] > 0


def until_raised(policy: FiretitanTrainingClient) -> None:
    """Call until what failed is raised."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        policy.forward([datum()], "cross_entropy")
        time.sleep(0.1)


def test_ctrl_c_before_a_custom_loss_leaves_nothing_behind(policy: FiretitanTrainingClient) -> None:
    with stopped(worker_of(policy)), interrupted_after(0.5):
        policy.forward_backward_custom([datum()], plain)
    policy.forward_backward_custom([datum()], plain).result(20)
    twice = policy.forward_backward_custom([datum()], plain)
    assert twice.result(20).metrics["loss:sum"] > 0
    assert policy.optim_step(tinker.AdamParams()).result(20).metrics["step"] == 1


def test_a_custom_loss_that_was_called_before_close_runs_to_its_end(
    service: FiretitanServiceClient, policy: FiretitanTrainingClient
) -> None:
    entered, go_on = threading.Event(), threading.Event()
    outcome: list[Any] = []

    def slow(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
        entered.set()
        go_on.wait(30)
        return plain(data, logprobs)

    def call() -> None:
        try:
            outcome.append(policy.forward_backward_custom([datum()], slow).result(30))
        except Exception as error:  # the test shows it
            outcome.append(error)

    calling = threading.Thread(target=call)
    calling.start()
    assert entered.wait(30)
    closing = threading.Thread(target=service.close)
    closing.start()
    time.sleep(0.3)
    go_on.set()
    closing.join(30)
    calling.join(30)
    assert outcome[0].metrics["loss:sum"] > 0


def test_a_wait_for_a_chunk_that_is_given_up_loses_no_tokens(
    daemon: DaemonProcess, service: FiretitanServiceClient
) -> None:
    sampler = service.create_sampling_client()
    whole = sampler.sample([1, 2], 1, LONG).result().sequences[0].tokens
    (pid,) = daemon.worker_pids("sampler")

    async def collect() -> list[int]:
        tokens: list[int] = []
        async with sampler.sample_stream([1, 2], 1, LONG) as stream:
            tokens += (await anext(stream)).tokens
            with stopped(pid):
                with pytest.raises(TimeoutError):
                    while True:
                        tokens += (await asyncio.wait_for(anext(stream), 0.3)).tokens
                await asyncio.sleep(0.1)
            async for chunk in stream:
                tokens += chunk.tokens
        return tokens

    assert asyncio.run(collect()) == whole


def test_ctrl_c_within_a_stream_ends_it(
    daemon: DaemonProcess, service: FiretitanServiceClient
) -> None:
    sampler = service.create_sampling_client()
    (pid,) = daemon.worker_pids("sampler")
    stream = sampler.sample_stream([1, 2], 1, LONG)
    with stopped(pid), interrupted_after(0.5), stream:
        for _ in stream:
            pass
    assert list(stream) == []


def test_another_thread_may_close_a_stream_that_is_waited_for(
    daemon: DaemonProcess, service: FiretitanServiceClient
) -> None:
    sampler = service.create_sampling_client()
    (pid,) = daemon.worker_pids("sampler")
    stream = sampler.sample_stream([1, 2], 1, LONG)
    with stopped(pid):
        threading.Timer(0.5, stream.close).start()
        assert list(stream) == []


def test_a_creation_whose_waiting_is_cancelled_can_be_asked_for_again(
    service: FiretitanServiceClient, daemon: DaemonProcess
) -> None:
    async def leave() -> None:
        await asyncio.wait_for(service.create_training_client_async(), 0.3)

    assert daemon.process is not None
    with stopped(daemon.process.pid), pytest.raises(TimeoutError):
        asyncio.run(leave())
    policy = service.create_training_client()
    assert policy.forward([datum()], "cross_entropy").result(20).metrics["loss:sum"] > 0


def test_an_awaited_creation_lets_a_notebooks_loop_go_on(
    service: FiretitanServiceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    longest = 0.0

    async def tick() -> None:
        nonlocal longest
        before = time.monotonic()
        while True:
            await asyncio.sleep(0.01)
            longest, before = max(longest, time.monotonic() - before), time.monotonic()

    async def create() -> FiretitanTrainingClient:
        ticking = asyncio.create_task(tick())
        await asyncio.sleep(0.05)
        policy = await service.create_training_client_async()
        await asyncio.sleep(0.05)
        ticking.cancel()
        return policy

    began = time.monotonic()
    assert asyncio.run(create()).session_name
    assert longest < 0.8 * (time.monotonic() - began)
