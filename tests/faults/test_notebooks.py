"""Ctrl-C in any cell of a notebook, a kernel that is restarted, two notebooks on one session."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from firetitan.v1 import operation_service_pb2, trainer_service_pb2
from support.daemon import DaemonProcess
from support.kernel import Kernel
from support.stopping import stopped
from support.stubs import Stubs

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def kernel(daemon: DaemonProcess) -> Iterator[Kernel]:
    kernel = Kernel(daemon)
    yield kernel
    kernel.kill()


def interrupt(kernel: Kernel, cell: str) -> None:
    """Begin a cell that waits, and press Ctrl-C."""
    kernel.begin(cell)
    # It is within the cell; that it waits there, nobody tells.
    time.sleep(0.5)
    kernel.interrupt()
    assert kernel.end()["error"] == "KeyboardInterrupt", cell


def test_ctrl_c_in_a_cell_stops_the_waiting_alone(daemon: DaemonProcess, kernel: Kernel) -> None:
    kernel.run("service = make('t'); policy = service.create_training_client()")
    (sampler,) = daemon.worker_pids("sampler")
    (trainer,) = daemon.worker_pids("trainer")
    with stopped(trainer), stopped(sampler):
        kernel.run("policy.forward_backward(DATA, 'cross_entropy'); step = policy.optim_step(ADAM)")
        for cell in (
            "step.result()",
            "await step",
            "await step.result_async()",
            "policy.save_weights_and_get_sampling_client('a')",
            "await policy.save_weights_and_get_sampling_client('b')",
            "service.create_sampling_client().sample([1], 1).result()",
            "for _ in service.create_sampling_client().sample_stream([1]): pass",
            "with service:\n    step.result()",
        ):
            interrupt(kernel, cell)
    assert kernel.run("out = step.result().metrics['step']") == 1
    again = "policy = make('t').create_training_client()"
    kernel.run(f"{again}; policy.forward_backward(DATA, 'cross_entropy').result()")
    assert kernel.run("out = (await policy.optim_step(ADAM)).metrics['step']") == 2


def test_ctrl_c_while_something_is_made(daemon: DaemonProcess, kernel: Kernel) -> None:
    assert daemon.process is not None
    kernel.run("service = make('t')")
    with stopped(daemon.process.pid):
        for cell in (
            "service.create_training_client()",
            "await service.create_training_client_async()",
            "service.create_sampling_client()",
        ):
            interrupt(kernel, cell)
    kernel.run("policy = service.create_training_client()")
    kernel.run("service.create_sampling_client().sample([1], 1).result()")
    assert kernel.run("out = policy.forward(DATA, 'cross_entropy').result().metrics['loss:sum']")
    stubs = Stubs(daemon.address)
    trainers = stubs.trainers.ListTrainers(trainer_service_pb2.ListTrainersRequest()).trainers
    assert [one.name for one in trainers] == ["trainers/t"]
    stubs.channel.close()


def test_a_restarted_kernel_and_a_second_notebook(daemon: DaemonProcess, kernel: Kernel) -> None:
    kernel.run("policy = make('t', create_deployment=False).create_training_client()")
    session = kernel.run("out = policy.session_name")
    (trainer,) = daemon.worker_pids()
    stubs = Stubs(daemon.address)
    with stopped(trainer):
        kernel.run("for _ in range(9): policy.forward_backward(DATA, 'cross_entropy')")
        kernel.run("policy.optim_step(ADAM); out = policy._lane.wait_accepted(30)")
        kernel.kill()
        second = Kernel(daemon)
        second.run("policy = make('t', create_deployment=False).create_training_client()")
        assert second.run("out = policy.session_name") == session
        request = operation_service_pb2.ListOperationsRequest(parent=session)
        left = stubs.operations.ListOperations(request).operations
        assert len(left) == 10 and not any(one.done for one in left)
    assert all(not stubs.done(one).HasField("error") for one in left)
    third = Kernel(daemon)
    third.run("policy = make('t', create_deployment=False).create_training_client()")
    for step, notebook in enumerate((second, third, second), 2):
        notebook.run("policy.forward_backward(DATA, 'cross_entropy').result()")
        assert notebook.run("out = policy.optim_step(ADAM).result().metrics['step']") == step
    for notebook in (second, third):
        notebook.kill()
    stubs.channel.close()
