"""What goes wrong in a first hour with the client, against a real daemon: typing errors, Ctrl-C, an
absent daemon, calls nobody looked at. Each has a way out that needs no restart.
"""

from __future__ import annotations

import _thread
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tinker
from firetitan.v1 import system_service_pb2, trainer_service_pb2
from support.daemon import DaemonProcess
from support.stopping import stopped, worker_of

from firetitan_client import FiretitanServiceClient
from firetitan_daemon import processes

pytestmark = pytest.mark.timeout(120)

TOY = "firetitan/toy"


def datum(last: int = 4) -> tinker.Datum:
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"target_tokens": [2, 3, last], "weights": [1.0, 1.0, 1.0]},
    )


def trainers_of(service: FiretitanServiceClient) -> list[Any]:
    request = trainer_service_pb2.ListTrainersRequest()
    return list(service.stubs.trainers.ListTrainers(request).trainers)


@pytest.fixture
def address(daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FIRETITAN_ADDRESS", daemon.address)
    return daemon.address


def test_a_mistyped_model_can_be_corrected(address: str, tmp_path: Path) -> None:
    with FiretitanServiceClient() as service:
        with pytest.raises(KeyError, match="nothing"):
            service.create_training_client(str(tmp_path / "nothing"), lora_rank=4)
        policy = service.create_training_client(TOY, lora_rank=2)
        assert "LoRA rank 2" in repr(policy)
        assert [one.base_model for one in trainers_of(service)] == [TOY]


def test_a_mistyped_rank_of_a_joined_trainer_can_be_corrected(address: str) -> None:
    first = FiretitanServiceClient.from_firetitan_config(
        base_model=TOY, lora_rank=4, create_deployment=False
    )
    policy = first.create_training_client()
    joining = FiretitanServiceClient(trainer_job_id=policy.trainer_job_id)
    with pytest.raises(ValueError, match="lora_rank: 8 was asked for"):
        joining.create_training_client(lora_rank=8)
    assert joining.create_training_client().session_name == policy.session_name


def test_tinkers_words_keep_what_the_service_was_set_to(address: str) -> None:
    first = FiretitanServiceClient.from_firetitan_config(
        base_model=TOY, lora_rank=4, lora_alpha=8, train_mlp=False, create_deployment=False
    )
    policy = first.create_lora_training_client(TOY)
    assert "rank 4" in repr(policy)
    joining = FiretitanServiceClient(trainer_job_id=policy.trainer_job_id)
    assert joining.create_lora_training_client(TOY).session_name == policy.session_name
    assert "rank 32" in repr(FiretitanServiceClient().create_lora_training_client(TOY))


def test_calls_are_named_as_they_were_made(address: str) -> None:
    service = FiretitanServiceClient.from_firetitan_config(base_model=TOY, lora_rank=4)
    policy = service.create_training_client()
    with stopped(worker_of(policy)):
        futures = [policy.forward_backward([datum()], "cross_entropy") for _ in range(50)]
        with pytest.raises(TimeoutError, match=r"^forward_backward: not done within"):
            futures[-1].result(0.0)
    futures[-1].result()
    assert repr(futures[0]) == f"<APIFuture forward_backward {futures[0].operation} done>"
    with pytest.raises(ValueError, match="loss_fn: is 'ppo'; give a function"):
        policy.forward_backward_custom([datum()], "ppo")
    sampler = service.create_sampling_client()
    with pytest.raises(ValueError, match="prompt: holds text; encode it with get_tokenizer"):
        sampler.sample("hello")
    sampled = sampler.sample([1], 1, tinker.SamplingParams(max_tokens=1))
    sampled.result()
    assert repr(sampled) == "<APIFuture sample done>"


def test_an_interrupted_creation_can_be_repeated(address: str) -> None:
    """Ctrl-C while the model loads, then the same cell again."""
    service = FiretitanServiceClient.from_firetitan_config(
        base_model=TOY, lora_rank=4, create_deployment=False
    )
    timer = threading.Timer(0.1, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        service.create_training_client()
    policy = service.create_training_client()
    assert policy.forward([datum()], "cross_entropy").result().metrics["loss:sum"] > 0
    assert len(trainers_of(service)) == 1


def test_ctrl_c_while_waiting_stops_nothing(address: str) -> None:
    service = FiretitanServiceClient.from_firetitan_config(
        base_model=TOY, lora_rank=4, create_deployment=False
    )
    policy = service.create_training_client()
    ctrl_c = (threading.main_thread().ident, signal.SIGINT)
    with stopped(worker_of(policy)):
        futures = [policy.forward_backward([datum()], "cross_entropy") for _ in range(200)]
        step = policy.optim_step(tinker.AdamParams())
        threading.Timer(0.05, signal.pthread_kill, ctrl_c).start()
        with pytest.raises(KeyboardInterrupt):
            step.result()
    assert step.result().metrics["step"] == 1
    assert all(future.done() for future in futures)


def test_sampling_a_base_model_makes_no_trainer(address: str) -> None:
    with FiretitanServiceClient() as service:
        with pytest.raises(ValueError, match="base_model: missing"):
            service.create_sampling_client()
        sampler = service.create_sampling_client(base_model=TOY)
        params = tinker.SamplingParams(max_tokens=3)
        assert sampler.sample([1, 2], 1, params).result().snapshot == ""
        assert trainers_of(service) == []
        policy = service.create_training_client(lora_rank=2)
        saved = policy.save_weights_for_sampler("a").result()
        service.hotload_sampler_snapshot(saved.path)
        assert sampler.sample([1, 2], 1, params).result().snapshot == saved.path


def test_nothing_is_said_of_clearing_up_where_there_is_no_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FIRETITAN_ADDRESS", f"unix:{tmp_path / 'none.sock'}")
    service = FiretitanServiceClient.from_firetitan_config(base_model=TOY)
    for create in (service.create_training_client, service.create_sampling_client):
        with pytest.raises(ConnectionError, match="start one with: firetitand serve"):
            create()
    assert caplog.records == []


def test_closing_tells_of_failures_nobody_looked_at(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    service = FiretitanServiceClient.from_firetitan_config(
        base_model=TOY, lora_rank=4, create_deployment=False, cleanup_trainer_on_close=True
    )
    policy = service.create_training_client()
    looked_at = policy.forward_backward([datum(99)], "cross_entropy")
    assert looked_at.exception() is not None
    policy.forward_backward([datum(98)], "cross_entropy")
    service.close()
    messages = [record.getMessage() for record in caplog.records]
    assert sum("98" in message for message in messages) == 1
    assert not any("99" in message for message in messages)


def test_waiting_for_a_daemon_that_is_away_is_told_once(
    daemon: DaemonProcess, address: str, caplog: pytest.LogCaptureFixture
) -> None:
    service = FiretitanServiceClient.from_firetitan_config(
        base_model=TOY, lora_rank=4, create_deployment=False
    )
    policy = service.create_training_client()
    daemon.kill()
    futures = [policy.forward([datum()], "cross_entropy") for _ in range(3)]
    deadline = time.monotonic() + 30
    while not caplog.records and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.0)
    warnings = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert len(warnings) == 1 and "firetitand serve" in warnings[0]
    daemon.start()
    assert [future.result().metrics["loss:sum"] > 0 for future in futures] == [True] * 3


def test_base_install_says_what_the_daemon_needs() -> None:
    """`pip install firetitan` without its extra, then `firetitand serve`."""
    code = (
        "import runpy, sys\n"
        "sys.modules['click'] = None\n"
        "runpy.run_module('firetitan_daemon', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "pip install '.[daemon]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["home", "link/home", "a_long_name" * 8])
def test_autostart(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    root = tmp_path_factory.mktemp("a")
    (root / "link").symlink_to(root)
    home = root / Path(name).name
    monkeypatch.setenv("FIRETITAN_HOME", str(root / name))
    monkeypatch.delenv("FIRETITAN_ADDRESS", raising=False)
    service = FiretitanServiceClient.from_firetitan_config(
        base_model=TOY, create_deployment=False, autostart=True
    )
    daemon = DaemonProcess(home)
    try:
        policy = service.create_training_client()
        assert policy.forward([datum()], "cross_entropy").result().metrics["loss:sum"] > 0
        info = service.stubs.system.GetSystemInfo(system_service_pb2.GetSystemInfoRequest())
        assert info.home == str(home)
        os.kill(info.pid, signal.SIGTERM)
        # It would start another in the place of a worker that is killed before it has stopped.
        while processes.state_of(info.pid) not in ("", "Z"):
            time.sleep(0.02)
    finally:
        daemon.stop()
