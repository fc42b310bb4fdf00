"""Serving over TCP: encrypted, with a token, beyond loopback with a certificate; no paths."""

from __future__ import annotations

import os
import queue
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from firetitan.v1 import checkpoint_service_pb2, model_service_pb2, trainer_service_pb2
from google.protobuf import descriptor_pool
from google.rpc import error_details_pb2, status_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from support.adapters import write_toy
from support.stubs import LaneClient, Stubs, reason, status_reason
from support.tcp import TcpDaemon, raw_call

from firetitan_daemon import certificates
from firetitan_daemon.rpc.tcp import LOCATIONS

pytestmark = pytest.mark.timeout(120)

GARBAGE = b"\xff\xff\xff"
COMPARED = {"AttachSession": "base_model", "CreateSession": "base_model"}
COMPARED |= {"PromoteCheckpoint": "base_model"}
"""Fields that could be paths and are only compared with what is known."""


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("roots")


@pytest.fixture(scope="module")
def daemon(roots: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TcpDaemon]:
    home = tmp_path_factory.mktemp("tcp") / "home"
    daemon = TcpDaemon(home, environment={"FIRETITAN_TCP_ROOTS": f"/nonexistent:{roots}"})
    daemon.start()
    yield daemon
    daemon.stop()


@pytest.fixture(scope="module")
def wide_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TcpDaemon]:
    """One that other machines can reach."""
    daemon = TcpDaemon(tmp_path_factory.mktemp("wide") / "home", host="0.0.0.0")
    daemon.start()
    yield daemon
    daemon.stop()


def methods(address: str) -> list[str]:
    """Every RPC there is, as the daemon itself says over its socket."""
    found = []
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = descriptor_pool.DescriptorPool(database)
        for name in database.get_services():
            service = pool.FindServiceByName(name)
            found += [f"/{name}/{method.name}" for method in service.methods]
    return found


def code_of(
    channel: grpc.Channel, method: str, metadata: Any = (), request: bytes = GARBAGE
) -> grpc.StatusCode:
    try:
        raw_call(channel, method, metadata, request)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_every_rpc_wants_the_token_before_anything_else(daemon: TcpDaemon) -> None:
    every = methods(daemon.address)
    assert len(every) > 45
    assert {name.split("/")[1] for name in every} >= {
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "firetitan.v1.TrainingService",
    }
    token = daemon.token
    wrong: list[Any] = [
        (),
        (("authorization", ""),),
        (("authorization", token),),
        (("authorization", f"Basic {token}"),),
        (("authorization", f"bearer {token}"),),
        (("authorization", f"Bearer {token[:-1]}"),),
        (("authorization", f"Bearer {token}x"),),
        (("authorization", f"Bearer {token}"), ("authorization", f"Bearer {token}")),
        (("x-api-key", token),),
        (("cookie", f"authorization=Bearer {token}"),),
    ]
    refused = grpc.StatusCode.UNAUTHENTICATED
    with grpc.secure_channel(daemon.target, daemon.tls()) as channel:
        for method in [*every, "/firetitan.v1.TrainingService/Nothing", "/nothing.Nothing/Nothing"]:
            for metadata in wrong[:1] + wrong[5:6]:
                assert code_of(channel, method, metadata) is refused, (method, metadata)
            assert code_of(channel, f"{method}?authorization=Bearer%20{token}") is refused
            # With the token the handler is reached: it says what it thinks of the bytes.
            right = (("authorization", f"Bearer {token}"),)
            if not method.endswith("/Drain"):
                assert code_of(channel, method, right) is not refused, method
        for metadata in wrong:
            assert code_of(channel, every[0], metadata) is refused, metadata
    assert token not in daemon.log


def test_a_refusal_waits_for_no_byte_of_the_request(daemon: TcpDaemon) -> None:
    with grpc.secure_channel(daemon.target, daemon.tls()) as channel:
        never: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        call = channel.stream_unary("/firetitan.v1.TrainerService/CreateTrainer")
        with pytest.raises(grpc.RpcError) as refused:
            call(iter(never.get, b""), timeout=10)
        never.put(b"")
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert reason(refused.value) == "UNAUTHENTICATED"
    assert "authorization: Bearer" in str(refused.value.details())


def test_the_socket_asks_for_nothing(daemon: TcpDaemon) -> None:
    stubs = Stubs(daemon.address)
    request = trainer_service_pb2.ListTrainersRequest()
    assert stubs.trainers.ListTrainers(request, metadata=(("authorization", "Bearer x"),))
    stubs.channel.close()


def test_secrets_are_their_owners_and_stay_over_a_restart(daemon: TcpDaemon) -> None:
    names = {one.name for one in daemon.credentials.iterdir()}
    assert names == {"token", "ca.crt", "client.crt", "client.key"}
    for one in (*daemon.credentials.iterdir(), daemon.home / "ca.key"):
        assert stat.S_IMODE(one.stat().st_mode) == 0o600
    assert stat.S_IMODE(daemon.credentials.stat().st_mode) == 0o700
    before = {one.name: one.read_bytes() for one in daemon.credentials.iterdir()}
    assert len(daemon.token) == len("ft_") + 43
    daemon.kill()
    daemon.start()
    assert {one.name: one.read_bytes() for one in daemon.credentials.iterdir()} == before
    daemon.kill()
    (daemon.credentials / "token").unlink()
    daemon.start()
    assert daemon.token != before["token"].decode().strip()
    assert (daemon.credentials / "ca.crt").read_bytes() == before["ca.crt"]


def listed(daemon: TcpDaemon, credentials: grpc.ChannelCredentials, host: str = "") -> Any:
    """The trainers, by a call with the token; UNAVAILABLE where there is no connection."""
    both = grpc.composite_channel_credentials(
        credentials, grpc.access_token_call_credentials(daemon.token)
    )
    target = daemon.target.replace("127.0.0.1", host) if host else daemon.target
    stubs = Stubs(target, both)
    try:
        return stubs.trainers.ListTrainers(trainer_service_pb2.ListTrainersRequest(), timeout=10)
    except grpc.RpcError as error:
        return error.code()
    finally:
        stubs.channel.close()


def test_only_this_daemons_certificate_is_believed(daemon: TcpDaemon) -> None:
    other = certificates.new_authority("other").certificate
    assert listed(daemon, grpc.ssl_channel_credentials(other)) is grpc.StatusCode.UNAVAILABLE
    assert listed(daemon, grpc.ssl_channel_credentials()) is grpc.StatusCode.UNAVAILABLE
    # A client's certificate is signed by the same authority, and is none to serve with.
    assert listed(daemon, daemon.tls()).trainers is not None
    assert listed(daemon, daemon.tls(), "localhost").trainers is not None


def test_without_encryption_there_is_no_answer(daemon: TcpDaemon, wide_daemon: TcpDaemon) -> None:
    for one in (daemon, wide_daemon):
        stubs = Stubs(one.target)
        with pytest.raises(grpc.RpcError) as refused:
            stubs.trainers.ListTrainers(
                trainer_service_pb2.ListTrainersRequest(),
                metadata=(("authorization", f"Bearer {one.token}"),),
                timeout=10,
            )
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        stubs.channel.close()


def test_beyond_loopback_a_certificate_is_needed_too(wide_daemon: TcpDaemon) -> None:
    unavailable = grpc.StatusCode.UNAVAILABLE
    assert listed(wide_daemon, wide_daemon.tls(certificate=True)).trainers is not None
    assert listed(wide_daemon, wide_daemon.tls()) is unavailable
    ca = (wide_daemon.credentials / "ca.crt").read_bytes()
    other = certificates.for_client(certificates.new_authority("other"))
    theirs = grpc.ssl_channel_credentials(ca, other.key, other.certificate)
    assert listed(wide_daemon, theirs) is unavailable
    authority = certificates.Pair(ca, (wide_daemon.home / "ca.key").read_bytes())
    servers = certificates.for_server(authority, ["localhost"])
    wrong_kind = grpc.ssl_channel_credentials(ca, servers.key, servers.certificate)
    assert listed(wide_daemon, wrong_kind) is unavailable
    with grpc.secure_channel(wide_daemon.target, wide_daemon.tls(certificate=True)) as channel:
        method = "/firetitan.v1.SystemService/GetSystemInfo"
        assert code_of(channel, method, request=b"") is grpc.StatusCode.UNAUTHENTICATED


def test_the_fields_that_name_paths_are_known(daemon: TcpDaemon) -> None:
    suspects = {
        "base_model",
        "adapter",
        "folder",
        "path",
        "file",
        "location",
        "tokenizer",
        "source",
    }
    found = {"GetModel": "name"}
    with grpc.insecure_channel(daemon.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = descriptor_pool.DescriptorPool(database)
        for name in database.get_services():
            for method in pool.FindServiceByName(name).methods:
                named = suspects & {field.name for field in method.input_type.fields}
                found.update((method.name, field) for field in named)
    assert found == {**LOCATIONS, **COMPARED}


def refusal(call: Any, request: Any) -> tuple[str, str]:
    """Reason and field of what a call is refused for."""
    with pytest.raises(grpc.RpcError) as refused:
        call(request, timeout=20)
    for key, value in refused.value.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status = status_pb2.Status.FromString(value)
            violations = error_details_pb2.BadRequest()
            for detail in status.details:
                detail.Unpack(violations)
            fields = [one.field for one in violations.field_violations]
            return status_reason(status), fields[0] if fields else ""
    raise AssertionError(refused.value)


def test_paths_are_below_the_roots_or_refused(
    daemon: TcpDaemon, roots: Path, tmp_path: Path
) -> None:
    inside, outside = write_toy(roots / "adapter"), write_toy(tmp_path / "adapter")
    (roots / "link").symlink_to(outside)
    there, here = daemon.stubs(), Stubs(daemon.address)
    here.create_trainer(rank=4)
    lane = LaneClient(there, here.session())
    elsewhere = [outside, roots / "link", roots / ".." / outside.name, f"{roots}x", "/", "~", "."]
    elsewhere += [f"file://{inside}", f"file://{outside}", "./adapter", "../adapter", "memory://a"]
    create = trainer_service_pb2.CreateTrainerRequest
    load = checkpoint_service_pb2.LoadAdapterRequest
    export = model_service_pb2.ExportCheckpointRequest
    for one in map(str, elsewhere):
        request = create(trainer_id="x", base_model=one, request_id=one)
        wanted = ("INVALID_ARGUMENT", "base_model")
        assert refusal(there.trainers.CreateTrainer, request) == wanted
        request = lane.header(load(adapter=one), seq=lane.seq)
        assert refusal(there.checkpoints.LoadAdapter, request) == ("INVALID_ARGUMENT", "adapter")
        request = export(checkpoint="snapshots/none", folder=one)
        assert refusal(there.models.ExportCheckpoint, request) == ("INVALID_ARGUMENT", "folder")
        request = model_service_pb2.GetModelRequest(name=one)
        assert refusal(there.models.GetModel, request) == ("INVALID_ARGUMENT", "name")
    # Below a root, or over the socket, they are taken.
    request = export(checkpoint="snapshots/none", folder=str(roots / "new"))
    assert refusal(there.models.ExportCheckpoint, request)[0] == "SNAPSHOT_NOT_FOUND"
    request = export(checkpoint="snapshots/none", folder=str(tmp_path / "new"))
    assert refusal(here.models.ExportCheckpoint, request)[0] == "SNAPSHOT_NOT_FOUND"
    there.done(lane.load_adapter(str(inside)))
    there.done(LaneClient(here, lane.session).load_adapter(str(outside)))
    found = there.models.GetModel(model_service_pb2.GetModelRequest(name=str(inside)))
    assert found.model.location == str(inside)
    there.channel.close()
    here.channel.close()


def test_without_roots_no_path_is_taken(wide_daemon: TcpDaemon, tmp_path: Path) -> None:
    stubs = wide_daemon.stubs()
    request = trainer_service_pb2.CreateTrainerRequest(
        trainer_id="x", base_model=str(tmp_path), request_id="x"
    )
    assert refusal(stubs.trainers.CreateTrainer, request) == ("INVALID_ARGUMENT", "base_model")
    assert not stubs.create_trainer().HasField("error")
    stubs.channel.close()


def test_the_command_line_stays_on_the_socket(wide_daemon: TcpDaemon) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "firetitan_daemon", "status", "--home", str(wide_daemon.home)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    port = wide_daemon.target.rpartition(":")[2]
    assert f"{wide_daemon.address} and 0.0.0.0:{port}" in shown.stdout


@pytest.mark.parametrize(
    ("address", "code", "said"),
    [
        ("7465", 2, "must be host:port"),
        ("unix-abstract:name", 2, "must be host:port"),
        ("127.0.0.1:70000", 2, "must be host:port"),
        ("{taken}", 1, "cannot listen on {taken} (tcp.address)"),
    ],
)
def test_an_address_that_cannot_be_served_at(
    wide_daemon: TcpDaemon, tmp_path: Path, address: str, code: int, said: str
) -> None:
    taken = wide_daemon.target
    served = subprocess.run(
        [sys.executable, "-m", "firetitan_daemon", "serve", "--tcp", address.format(taken=taken)],
        env={**os.environ, "FIRETITAN_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (served.returncode, said.format(taken=taken) in served.stderr) == (code, True), served
    assert "Traceback" not in served.stderr
