"""No secret is in a log, a command line or a worker's environment (R28), whatever goes wrong."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from firetitan.v1 import checkpoint_service_pb2, trainer_service_pb2, training_service_pb2
from support.stubs import TOY, LaneClient, Stubs
from support.tcp import TcpDaemon

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
LIST_TOY = training_service_pb2.ListSessionsRequest(parent="trainers/toy")
ALL = [*VARIABLES.values(), API_KEY, HEADER, NOTE, ADDRESS_PASSWORD, ADDRESS_QUERY]


@pytest.fixture
def told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Told]:
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
        yield Told(daemon, caplog)
    finally:
        daemon.stop()


class Told:
    """Everything that daemon, workers and client say and show of themselves."""

    def __init__(self, daemon: TcpDaemon, caplog: pytest.LogCaptureFixture) -> None:
        self.daemon, self._caplog = daemon, caplog
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
        details = error.details() if isinstance(error, grpc.RpcError) else ""
        self.errors.append(f"{error!r} {error} {details} {vars(error)}")


def _proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_bytes().decode("utf-8", "replace").replace("\0", "\n")


def test_secrets_stay_out_of_what_is_written_down(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    stubs = Stubs(told.daemon.address)
    _through_the_client(told)
    _through_the_protocol(told, stubs)
    _over_tcp(told)
    # A worker that dies leaves a log, and a replacement.
    toy = trainer_service_pb2.GetTrainerRequest(name="trainers/toy")
    os.kill(stubs.trainers.GetTrainer(toy).trainer.worker_pid, signal.SIGKILL)
    (session,) = stubs.training.ListSessions(LIST_TOY).sessions
    lane = LaneClient(stubs, session.name)
    stubs.done(lane.save_state("after"))
    shown = told.everything()
    assert "serving address=" in shown["daemon's log"] and len(told.errors) > 10
    leaks = [
        f"{one.rpartition('-')[0]} in {where}"
        for where, text in shown.items()
        for one in [*ALL, told.daemon.token]
        if one in text
    ]
    assert not leaks, leaks
    for pid in told.daemon.worker_pids():
        assert VARIABLES["HF_TOKEN"] in _proc(pid, "environ"), "needed to download a gated model"
    stubs.channel.close()


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
    told.fails(lambda: DeploymentManager(**keys).get_info("../x"))
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


def _over_tcp(told: Told) -> None:
    """The daemon's own token, right and wrong, by calls that work and calls that fail."""
    daemon = told.daemon
    over_tcp = daemon.stubs()
    request = trainer_service_pb2.GetTrainerRequest(name="trainers/toy")
    assert over_tcp.trainers.GetTrainer(request).trainer.name == "trainers/toy"
    nothing = trainer_service_pb2.GetTrainerRequest(name="../x")
    told.fails(lambda: over_tcp.trainers.GetTrainer(nothing))
    over_tcp.channel.close()
    wrong = grpc.composite_channel_credentials(
        daemon.tls(certificate=True), grpc.access_token_call_credentials(HEADER)
    )
    with grpc.secure_channel(daemon.target, wrong) as channel:
        call = channel.unary_unary("/firetitan.v1.TrainerService/GetTrainer")
        told.fails(lambda: call(nothing.SerializeToString(), timeout=20))
    keys = {"address": daemon.target, "credentials": str(daemon.credentials)}
    for token in (daemon.token, f"ft_{API_KEY}"):
        manager = TrainerJobManager(api_key=token, **keys)
        told.errors.append(repr(manager))
        told.fails(lambda manager=manager: manager.get("nothing"))
