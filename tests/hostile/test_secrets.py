"""No secret is in a log, a command line or a worker's environment (R28), whatever goes wrong.

The daemon serves over its socket and over TCP, with a token and keys of its own making.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from firetitan.v1 import checkpoint_service_pb2, trainer_service_pb2, training_service_pb2
from support.sizes import figure
from support.stubs import TOY, LaneClient, Stubs
from support.tcp import TcpDaemon, raw_call

from firetitan_client import (
    DeploymentManager,
    DeploymentSampler,
    FiretitanServiceClient,
    FireworksClient,
    TrainerJobManager,
)
from firetitan_daemon.launch.local import HUB_TOKENS

pytestmark = pytest.mark.timeout(180)


def secret(of: str) -> str:
    return f"canary-{of}-{uuid.uuid4().hex}"


VARIABLES = {
    name: secret(name)
    for name in (
        "FIREWORKS_API_KEY", "TINKER_API_KEY", "FIRETITAN_API_KEY", "FIRETITAN_TOKEN", "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN", "HF_SECRET_KEY", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY",
        "PYTHON_KEYRING_PASSWORD", "OPENAI_API_KEY",
    )
}  # fmt: skip
API_KEY, HEADER, NOTE = secret("api-key"), secret("header"), secret("note")
HEADERS = {"Authorization": f"Bearer {HEADER}"}
ADDRESS_PASSWORD, ADDRESS_QUERY = secret("password"), secret("signature")
TOKEN = f"ft_{secret('token')}"
"""Of another daemon."""
LIST_TOY = training_service_pb2.ListSessionsRequest(parent="trainers/toy")
ALL = [*VARIABLES.values(), API_KEY, HEADER, NOTE, TOKEN, ADDRESS_PASSWORD, ADDRESS_QUERY]


@pytest.fixture
def told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> Iterator[Told]:
    caplog.set_level(logging.DEBUG)
    daemon = TcpDaemon(
        tmp_path / "home",
        environment={
            **VARIABLES,
            "FIRETITAN_LOG_LEVEL": "debug",
            "HF_HUB_OFFLINE": "0",
            # Nobody listens there: fetching fails in whatever way fetching fails.
            "HF_ENDPOINT": "http://127.0.0.1:9",
        },
    )
    daemon.start()
    try:
        yield Told(daemon, caplog, capfd)
    finally:
        daemon.stop()


class Told:
    """Everything that daemon, workers and client say and show of themselves."""

    def __init__(
        self,
        daemon: TcpDaemon,
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        self.daemon, self._caplog, self._capfd = daemon, caplog, capfd
        self.errors: list[str] = []
        """What callers were told."""

    def everything(self) -> dict[str, str]:
        """By where it is."""
        home, process = self.daemon.home, self.daemon.process
        assert process is not None
        shown = {
            "daemon's log": self.daemon.log,
            "daemon.json": (home / "daemon.json").read_text(),
            "client's log": self._caplog.text,
            "client's output": "".join(self._capfd.readouterr()),
            "errors": "\n".join(self.errors),
            "daemon's command line": _proc(process.pid, "cmdline"),
        }
        for file in (home / "workers").rglob("*"):
            if file.is_file():
                shown[str(file.relative_to(home))] = file.read_bytes().decode("utf-8", "replace")
        for manifest in (home / "store").rglob("manifest.json"):
            shown[str(manifest.relative_to(home))] = manifest.read_text()
        pids = self.daemon.worker_pids()
        assert len(pids) >= 2
        for pid in pids:
            shown[f"command line of {pid}"] = _proc(pid, "cmdline")
            shown[f"environment of {pid}"] = "\n".join(
                line
                for line in _proc(pid, "environ").split("\n")
                # What the worker is given because it downloads with it.
                if line.partition("=")[0] not in HUB_TOKENS
            )
        for command in (["config"], ["status"], ["status", "--json"], ["ls"]):
            shown[" ".join(command)] = self._cli(command)
        return shown

    def _cli(self, command: list[str]) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "firetitan_daemon", *command],
            env={**os.environ, **VARIABLES, "FIRETITAN_HOME": str(self.daemon.home)},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return done.stdout + done.stderr

    def fails(self, call: object, *arguments: object) -> None:
        """Call something that fails, and keep what it says."""
        with pytest.raises(Exception) as caught:
            call(*arguments)  # type: ignore[operator]
        error = caught.value
        assert not isinstance(error, AttributeError | NameError), error  # of this test itself
        details = error.details() if isinstance(error, grpc.RpcError) else ""
        self.errors.append(f"{error!r} {error} {details} {vars(error)}")


def _proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_bytes().decode("utf-8", "replace").replace("\0", "\n")


def test_secrets_stay_out_of_what_is_written_down(
    told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    stubs = Stubs(told.daemon.address)
    _through_the_client(told)
    _through_the_protocol(told, stubs)
    _over_tcp(told, tmp_path / "copied")
    # A worker that dies leaves a log, and a replacement.
    (session,) = stubs.training.ListSessions(LIST_TOY).sessions
    lane = LaneClient(stubs, session.name)
    stubs.done(lane.save_state("before"))  # the new daemon has found the worker
    toy = trainer_service_pb2.GetTrainerRequest(name="trainers/toy")
    worker = stubs.trainers.GetTrainer(toy).trainer.worker_pid
    assert worker in told.daemon.worker_pids("trainer")
    os.kill(worker, signal.SIGKILL)
    stubs.done(lane.save_state("after"))
    shown = told.everything()
    assert "serving address=" in shown["daemon's log"] and len(told.errors) > 10
    secrets = [*ALL, *_of_the_daemon(told.daemon)]
    figure("R28", secrets=len(secrets), places=len(shown), errors=len(told.errors))
    leaks = [
        f"{one.rpartition('-')[0]} in {where}"
        for where, text in shown.items()
        for one in secrets
        if one in text
    ]
    assert not leaks, leaks
    for pid in told.daemon.worker_pids():
        assert VARIABLES["HF_TOKEN"] in _proc(pid, "environ"), "needed to download a gated model"
    stubs.channel.close()


def _of_the_daemon(daemon: TcpDaemon) -> list[str]:
    """Its token, and its keys' lines."""
    keys = [daemon.home / "ca.key", daemon.credentials / "client.key"]
    lines = [line for key in keys for line in key.read_text().split("\n")]
    return [daemon.token, *(line for line in lines if line and not line.startswith("-----"))]


def _through_the_client(told: Told) -> None:
    """Keys and headers as the documented calls take them, and calls that fail."""
    keys = {"api_key": API_KEY, "address": told.daemon.address}
    service = FiretitanServiceClient.from_firetitan_config(
        **keys, base_model=TOY, lora_rank=0, trainer_job_id="toy", deployment_id="toy",
        additional_headers=HEADERS, user_metadata={"note": NOTE},
    )  # fmt: skip
    policy = service.create_training_client()
    told.errors += [repr(service), repr(policy)]
    told.fails(lambda: policy.forward_backward([], "cross_entropy").result())
    told.fails(lambda: policy.load_state("nothing").result())
    told.fails(lambda: policy.save_state("../x").result())
    told.fails(lambda: service.create_sampling_client("nothing"))
    for manager in (
        TrainerJobManager(**keys, additional_headers=HEADERS),
        DeploymentManager(**keys, additional_headers=HEADERS),
        FireworksClient(**keys, additional_headers=HEADERS),
    ):
        told.errors.append(repr(manager))
    told.fails(lambda: TrainerJobManager(**keys).get("nothing"))
    told.fails(lambda: DeploymentManager(**keys).get("../x"))
    with FiretitanServiceClient.from_firetitan_config(
        **keys, base_model=TOY, lora_rank=0, deployment_id="toy", create_deployment=True
    ) as other:
        sampler = other.create_sampling_client()
        told.errors.append(repr(sampler))
    sampler = DeploymentSampler(
        inference_url=told.daemon.address, model="toy", api_key=API_KEY, additional_headers=HEADERS
    )
    told.errors.append(repr(sampler))
    told.fails(lambda: asyncio.run(sampler.sample_with_prompt_tokens([-1], max_tokens=1)))
    service.close()


def _through_the_protocol(told: Told, stubs: Stubs) -> None:
    """Addresses with passwords, models that cannot be fetched, metadata of a call."""
    assert not stubs.create_trainer("adapted", rank=4).HasField("error")
    lane = LaneClient(stubs, stubs.session("trainers/adapted"))
    for address in (
        f"http://user:{ADDRESS_PASSWORD}@127.0.0.1:9/adapter",
        f"https://127.0.0.1:9/adapter?X-Signature={ADDRESS_QUERY}",
        f"gopher://user:{ADDRESS_PASSWORD}@host/adapter",
        f"memory://user:{ADDRESS_PASSWORD}@nothing/here?sig={ADDRESS_QUERY}",
    ):
        ended = stubs.wait(lane.load_adapter(address).name)
        lane.seen_failure = ended.seq
        assert ended.HasField("error")
        told.errors.append(str(ended.error))
    ended = stubs.create_trainer("nobody", base_model="nobody/has-this-model")
    assert ended.HasField("error")
    told.errors.append(str(ended.error))
    metadata = (("authorization", f"Bearer {HEADER}"), ("x-api-key", API_KEY))
    request = trainer_service_pb2.GetTrainerRequest(name="../x")
    told.fails(lambda: stubs.trainers.GetTrainer(request, metadata=metadata))
    broken = checkpoint_service_pb2.SaveStateRequest(
        checkpoint_id="../x", user_metadata={"note": NOTE}
    )
    told.errors.append(str(stubs.wait(lane.send(broken).name).error))


def _over_tcp(told: Told, copied: Path) -> None:
    """Tokens that are right, another's, and none; keys that are none; a daemon that has none."""
    daemon = told.daemon
    shutil.copytree(daemon.credentials, copied)
    at = {"address": daemon.target, "credentials": copied}
    right = TrainerJobManager(**at, api_key=daemon.token)
    assert right.get("toy")
    told.errors.append(repr(right))
    told.fails(lambda: right.get("nothing"))
    for token in (TOKEN, f"ft_{API_KEY}\r\nx: {API_KEY}", f"ft_{API_KEY}\u20ac"):
        wrong = TrainerJobManager(**at, api_key=token)
        told.errors.append(repr(wrong))
        told.fails(wrong.get, "toy")
        told.fails(DeploymentManager(**at, api_key=token).get, "toy")
        told.fails(FiretitanServiceClient(**at, api_key=token).get_server_capabilities)
    shown: list[Any] = [
        (("authorization", TOKEN),),
        (("authorization", f"Basic {API_KEY}"),),
        (("authorization", f"Bearer {daemon.token}"), ("authorization", f"Bearer {HEADER}")),
        (("x-api-key", API_KEY),),
    ]
    with grpc.secure_channel(daemon.target, daemon.tls()) as channel:
        for metadata in shown:
            told.fails(raw_call, channel, "/firetitan.v1.TrainerService/ListTrainers", metadata)
        path = f"/firetitan.v1.TrainerService/{TOKEN}?authorization={HEADER}"
        told.fails(raw_call, channel, path)
        told.fails(raw_call, channel, path, (("authorization", f"Bearer {daemon.token}"),))
    for name in ("client.key", "client.crt", "ca.crt", "token"):
        (copied / name).write_text(f"-----BEGIN {TOKEN}\n{API_KEY}\n")
        told.fails(lambda: TrainerJobManager(**at).get("toy"))
    # The token's file is damaged: the next daemon does not start, and says why.
    told.daemon.kill()
    token = daemon.token
    (daemon.credentials / "token").write_text(f"{API_KEY}\n")
    told.fails(daemon.start)
    assert "holds no token" in daemon.log
    (daemon.credentials / "token").write_text(f"{token}\n")
    daemon.start()
