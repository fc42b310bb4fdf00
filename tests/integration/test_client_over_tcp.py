"""The Python client over TCP: trains, samples, hands itself on, and survives what TCP brings."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import pickle
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tinker
from support.data import ragged_data
from support.tcp import TcpDaemon

from firetitan_client import (
    AdamParams,
    DaemonNotRunning,
    DeploymentManager,
    DeploymentSampler,
    FiretitanSamplingClient,
    FiretitanServiceClient,
    FireworksClient,
    TrainerJobManager,
    Unauthenticated,
    WeightSyncer,
)
from firetitan_daemon import certificates

pytestmark = pytest.mark.timeout(120)

TOY = "firetitan/toy"
PARAMS = tinker.SamplingParams(max_tokens=6, seed=5, stop=[])
DATA = ragged_data(seed=1, count=2, vocab_size=64)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TcpDaemon]:
    """One that other machines can reach: it asks for everything there is to ask for."""
    daemon = TcpDaemon(tmp_path_factory.mktemp("tcp") / "home", host="0.0.0.0")
    daemon.start()
    yield daemon
    daemon.stop()


@pytest.fixture
def laptop(daemon: TcpDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another machine's home: it has the credentials, and no daemon."""
    home = tmp_path / "laptop"
    shutil.copytree(daemon.credentials, home / "credentials")
    monkeypatch.setenv("FIRETITAN_HOME", str(home))
    for name in ("ADDRESS", "API_KEY", "CREDENTIALS"):
        monkeypatch.delenv(f"FIRETITAN_{name}", raising=False)
    monkeypatch.delenv("FIREWORKS_API_KEY", raising=False)
    return home


def tokens(answer: Any) -> list[int]:
    return list(answer.sequences[0].tokens)


def sample_there(pickled: bytes, handle: str, answers: Any) -> None:
    """In a process that knows nothing of the first one."""
    client = pickle.loads(pickled)
    named = FiretitanSamplingClient.from_sampler_handle(handle)
    answers.put([tokens(one.sample([1, 2], 1, PARAMS).result()) for one in (client, named)])


def test_train_and_sample(daemon: TcpDaemon, laptop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRETITAN_ADDRESS", daemon.target)
    with FiretitanServiceClient.from_firetitan_config(
        base_model=TOY, lora_rank=0, deployment_id="d", base_url="https://api.fireworks.ai"
    ) as service:
        policy = service.create_training_client(seed=3)
        assert service.base_url == f"firetitan+tcp:{daemon.target}#{service.trainer_job_id}"
        for _ in range(3):
            policy.forward_backward(DATA, "cross_entropy")
            stepped = policy.optim_step(AdamParams(learning_rate=1e-2))
        assert stepped.result().metrics["step"] == 3
        # The same in the same place by the socket: the bits do not depend on the way.
        beside = FiretitanServiceClient.from_firetitan_config(
            base_model=TOY, lora_rank=0, create_deployment=False, address=daemon.address
        )
        local = beside.create_training_client(seed=3)
        for _ in range(3):
            local.forward_backward(DATA, "cross_entropy")
            local.optim_step(AdamParams(learning_rate=1e-2))
        ours, theirs = (one.forward(DATA, "cross_entropy").result() for one in (policy, local))
        assert [one["logprobs"].data for one in ours.loss_fn_outputs] == [
            one["logprobs"].data for one in theirs.loss_fn_outputs
        ]
        joined = FiretitanServiceClient(base_url=service.base_url).create_training_client()
        assert joined.optim_step is not None and joined.session_name == policy.session_name
        saved = policy.save_weights_for_sampler("first").result().path
        sampler = service.create_sampling_client(saved)
        drawn = tokens(sampler.sample([1, 2], 1, PARAMS).result())
        assert len(drawn) == 6
        # Elsewhere: by address and names; the token comes from that process's own credentials.
        handle, pickled = sampler.get_sampler_handle(), pickle.dumps(sampler)
        assert daemon.token.encode() not in pickled and daemon.token not in handle
        context = multiprocessing.get_context("spawn")
        answers = context.Queue()
        child = context.Process(target=sample_there, args=(pickled, handle, answers))
        child.start()
        assert answers.get(timeout=60) == [drawn, drawn]
        child.join(30)
        # The managers, and a sampler of its own.
        job = service.trainer_job_id
        assert job in TrainerJobManager(address=daemon.target).get(job)["name"]
        assert DeploymentManager(base_url=daemon.target).get("d") is not None
        native = DeploymentSampler(daemon.target, "d")
        assert native.base_url == f"firetitan+tcp:{daemon.target}"
        result = native.sample_with_prompt_tokens([1, 2], n=1, max_tokens=2, stop=[])
        assert len(asyncio.run(result)[0].full_tokens) == 4
        beside.close()


def test_a_restart_is_a_pause(daemon: TcpDaemon, laptop: Path) -> None:
    service = FiretitanServiceClient.from_firetitan_config(
        base_model=TOY, lora_rank=0, create_deployment=False, address=daemon.target
    )
    policy = service.create_training_client()
    policy.forward_backward(DATA, "cross_entropy").result()
    daemon.kill()
    policy.forward_backward(DATA, "cross_entropy")
    stepped = policy.optim_step(AdamParams(learning_rate=1e-2))
    daemon.start()
    assert stepped.result(timeout=60).metrics["step"] == 1
    service.close()


def test_which_token_is_shown(
    daemon: TcpDaemon, laptop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, address = f"ft_{'x' * 43}", daemon.target

    def call(**arguments: Any) -> Any:
        return FireworksClient(address=address, **arguments).list_models()

    assert call() == []
    with pytest.raises(Unauthenticated, match="token is not this daemon's") as refused:
        call(api_key=wrong)
    assert (refused.value.reason, refused.value.status_code) == ("UNAUTHENTICATED", 401)
    assert wrong not in str(refused.value)
    # A key of the cloud is sent nowhere; the next place is looked at.
    assert call(api_key="fw_cloud") == call(api_key="tml-cloud") == []
    monkeypatch.setenv("FIREWORKS_API_KEY", "fw_cloud_too")
    assert call(api_key="fw_other") == []
    monkeypatch.setenv("FIRETITAN_API_KEY", f"{wrong}1")
    with pytest.raises(Unauthenticated):
        call(api_key="fw_again")
    assert call(api_key=daemon.token) == []
    monkeypatch.setenv("FIRETITAN_API_KEY", daemon.token)
    (laptop / "credentials" / "token").unlink()
    assert call(api_key="fw_once_more") == []
    monkeypatch.delenv("FIRETITAN_API_KEY")
    with pytest.raises(ValueError, match=f"needs {laptop}/credentials/token, which does not exist"):
        call(api_key="fw_last")
    assert call(api_key="fw_there", credentials=daemon.credentials) == []


def test_what_is_missing_or_wrong_is_said(
    daemon: TcpDaemon, laptop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, count = daemon.target, iter(range(9))

    def copy_without(*names: str) -> str:
        folder = tmp_path / f"copy-{next(count)}"
        shutil.copytree(daemon.credentials, folder)
        for name in names:
            (folder / name).unlink()
        return str(folder)

    def call(credentials: str, host: str = "127.0.0.1") -> Any:
        monkeypatch.setenv("FIRETITAN_CREDENTIALS", credentials)
        target = address.replace("127.0.0.1", host)
        return FireworksClient(address=target, api_key=f"fw_{next(count)}").list_models()

    with pytest.raises(ValueError, match=r"needs /nowhere/ca.crt, which does not exist; copy"):
        call("/nowhere")
    with pytest.raises(DaemonNotRunning, match=r"client.crt and client.key"):
        call(copy_without("client.crt"))
    changed = copy_without()
    Path(changed, "ca.crt").write_bytes(certificates.new_authority("other").certificate)
    began = time.monotonic()
    with pytest.raises(Unauthenticated, match=r"not what the credentials' ca.crt vouches for"):
        call(changed)
    # Another name for this machine than the certificate has.
    with pytest.raises((Unauthenticated, DaemonNotRunning), match=r"(?i)verif"):
        call(copy_without(), "127.0.0.9")
    assert time.monotonic() - began < 30.0
    assert call(copy_without()) == []


@pytest.mark.parametrize("name", ["ca.crt", "client.crt", "client.key", "token"])
def test_a_damaged_file_is_named_and_not_quoted(daemon: TcpDaemon, laptop: Path, name: str) -> None:
    """It is no absent daemon, which is what gRPC makes of it."""
    damaged = laptop / "credentials" / name
    damaged.write_text("-----BEGIN QZQZ\nQZQZ\n")
    with pytest.raises(ValueError, match=name) as refused:
        FireworksClient(address=daemon.target, credentials=damaged.parent).list_models()
    assert str(damaged.parent) in str(refused.value)
    assert "QZQZ" not in str(refused.value)


@pytest.mark.parametrize("token", ["ft_QZQZ\r\nx: QZQZ", "ft_QZQZ\N{EURO SIGN}", "ft_QZ QZ", "ft_"])
def test_what_can_be_no_token_is_refused_here(
    daemon: TcpDaemon, laptop: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    with pytest.raises(ValueError, match="api_key says is no token") as refused:
        FireworksClient(address=daemon.target, api_key=token).list_models()
    assert "QZ" not in str(refused.value)
    monkeypatch.setenv("FIRETITAN_API_KEY", token)
    with pytest.raises(ValueError, match="FIRETITAN_API_KEY says is no token"):
        FireworksClient(address=daemon.target, api_key="fw_of_the_cloud").list_models()


def test_no_daemon_is_started_for_an_address_elsewhere(laptop: Path) -> None:
    with pytest.raises(DaemonNotRunning, match=r"no daemon answers at 127.0.0.1:9.*--tcp"):
        FireworksClient(address="127.0.0.1:9", autostart=True).list_models()
    assert not (laptop / "log").exists()


def pass_on(source: socket.socket, target: socket.socket, delay_s: float) -> None:
    """What comes from one goes to the other, each packet later than it came."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            time.sleep(delay_s)
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def slow_network(daemon: TcpDaemon, delay_s: float) -> Iterator[str]:
    """The daemon's address on the other side of a slow network."""
    opened: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far = listener.accept()[0], daemon.connect()
                far.settimeout(None)
                opened.extend((near, far))
                for ends in ((near, far), (far, near)):
                    threads.append(threading.Thread(target=pass_on, args=(*ends, delay_s)))
                    threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threads.append(threading.Thread(target=accept))
        threads[0].start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            threads[0].join(10)
            for one in opened:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(10)
            for one in opened:
                one.close()


def test_a_slow_network_is_no_absent_daemon(daemon: TcpDaemon, laptop: Path) -> None:
    with slow_network(daemon, 0.1) as address:
        assert FireworksClient(address=address).list_models() == []


def test_samplers_of_a_syncer_show_what_its_manager_shows(
    daemon: TcpDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The credentials are where only the caller knows."""
    monkeypatch.setenv("FIRETITAN_HOME", str(tmp_path / "nothing"))
    monkeypatch.delenv("FIRETITAN_CREDENTIALS", raising=False)
    with FiretitanServiceClient.from_firetitan_config(
        base_model=TOY,
        lora_rank=0,
        deployment_id="synced",
        address=daemon.target,
        credentials=daemon.credentials,
    ) as service:
        policy = service.create_training_client()
        manager = DeploymentManager(address=daemon.target, credentials=daemon.credentials)
        syncer = WeightSyncer(policy, manager, "synced", TOY)
        snapshot = syncer.save_and_hotload("a")
        client = syncer.get_sampling_client()
        answer = client.sample([1, 2], 1, PARAMS).result()
        assert answer.snapshot == snapshot
        native = syncer.get_deployment_sampler()
        (made,) = asyncio.run(native.sample_with_prompt_tokens([1, 2], max_tokens=6, stop=[]))
        assert len(made.full_tokens) == 8
        copy = pickle.loads(pickle.dumps(client))
        assert tokens(copy.sample([1, 2], 1, PARAMS).result()) == tokens(answer)
