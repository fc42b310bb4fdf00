"""Hostile messages of any client: refused by reason, with nothing changed and nobody dead."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from firetitan.v1 import (
    checkpoint_service_pb2,
    deployment_service_pb2,
    operation_service_pb2,
    sampling_service_pb2,
    tensor_pb2,
    trainer_service_pb2,
    training_service_pb2,
)
from google.protobuf import struct_pb2
from google.rpc import error_details_pb2, status_pb2
from support.commands import GOOD
from support.daemon import DaemonProcess
from support.stubs import TOY, LaneClient, Stubs, optim_request

pytestmark = pytest.mark.timeout(90)

SERVICES = ("training", "checkpoint", "operation", "sampling", "deployment", "trainer", "system")
METHODS = [
    (f"/{service.full_name}/{method.name}", method.server_streaming)
    for name in SERVICES
    for service in importlib.import_module(
        f"firetitan.v1.{name}_service_pb2"
    ).DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
MALFORMED = (
    b"\xff\xff\xff",  # no field's tag
    b"\x0a\xff\xff\xff\xff\x0f",  # a field of 4 GiB in six bytes
    b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # an overlong varint
    b"\x00",  # field 0
)
REFUSALS = {"INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "NOT_FOUND", "UNIMPLEMENTED", "ABORTED"}
TEN_MB = "x" * 10_000_000


class World:
    """A daemon with a toy session, a gradient pending, and a toy deployment."""

    def __init__(self, daemon: DaemonProcess) -> None:
        self.daemon = daemon
        self.stubs = Stubs(daemon.address)
        self.stubs.create_trainer()
        self.stubs.create_deployment()
        self.lane = LaneClient(self.stubs, self.stubs.session())
        self.lane.step()
        self.stubs.done(self.lane.forward_backward())

    def state(self) -> tuple[str, list[int]]:
        """Digest of weights, optimizer and gradients; the daemon and its workers."""
        saved = self.stubs.done(self.lane.save_state("probe")).checkpoint
        return saved.digest, [self.daemon.process.pid, *sorted(self.daemon.worker_pids())]

    def refused(self, message: Any) -> tuple[str, str, str]:
        """Reason, field and text of a command that was accepted and failed."""
        operation = self.lane.send(message)
        ended = self.stubs.wait(operation.name)
        self.lane.seen_failure = operation.seq
        return told(ended.error)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    daemon = DaemonProcess(tmp_path_factory.mktemp("bad-bytes") / "home")
    daemon.start()
    try:
        world = World(daemon)
        yield world
        world.stubs.channel.close()
    finally:
        daemon.stop()


@pytest.fixture(autouse=True)
def unharmed(world: World) -> Iterator[None]:
    """What was there before is there after, and the next good calls work."""
    before = world.state()
    yield
    assert world.state() == before
    world.lane.step()
    world.stubs.done(world.lane.forward_backward())
    assert len(world.stubs.sample().sequences[0].token_ids) == 8 * 4


def told(status: status_pb2.Status) -> tuple[str, str, str]:
    info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(info) or detail.Unpack(request)
    text = str(status)
    for internal in ("Traceback", 'File \\"', "site-packages", "firetitan_daemon", "/home/"):
        assert internal not in text
    assert len(text) < 8000 and info.reason not in ("", "INTERNAL"), text[:500]
    field = request.field_violations[0].field if request.field_violations else ""
    return info.reason, field, status.message


def call_refused(call: Any, request: Any) -> tuple[str, str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        answer = call(request, timeout=20)
        list(answer) if hasattr(answer, "__next__") else None
    for key, value in caught.value.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            return told(status_pb2.Status.FromString(value))
    raise AssertionError(f"without details: {caught.value}")


@pytest.mark.parametrize(("path", "stream"), METHODS)
def test_malformed_bytes(world: World, path: str, stream: bool) -> None:
    for raw in MALFORMED:
        if stream:
            got = call_refused(world.stubs.channel.stream_stream(path), iter([raw]))
        else:
            got = call_refused(world.stubs.channel.unary_unary(path), raw)
        assert got[0] == "INVALID_ARGUMENT" and "the request's bytes are not a" in got[2]


def tensor(kind: int, shape: list[int], raw: bytes) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(data_type=kind, shape=shape, data=raw)


F32, I64, I32 = 1, 2, 3
TARGETS = 'data[0].loss_fn_inputs["target_tokens"]'
WEIGHTS = 'data[0].loss_fn_inputs["weights"]'


@pytest.mark.parametrize(
    ("name", "wrong", "text"),
    [
        ("target_tokens", tensor(0, [3], bytes(12)), "data_type 0; give one of"),
        ("target_tokens", tensor(99, [3], bytes(12)), "data_type 99"),
        ("target_tokens", tensor(F32, [3], bytes(12)), "float32; send it as int64"),
        ("target_tokens", tensor(I32, [3], bytes(12)), "int32; send it as int64"),
        ("target_tokens", tensor(I64, [3], bytes(23)), "23 bytes, shape [3] of int64 takes 24"),
        ("target_tokens", tensor(I64, [-3], bytes(24)), "extents are 0 or more"),
        ("target_tokens", tensor(I64, [-1, -3], bytes(24)), "extents are 0 or more"),
        ("target_tokens", tensor(I64, [2**31], bytes(24)), "takes 17179869184"),
        ("target_tokens", tensor(I64, [2**62, 4], bytes(24)), "24 bytes"),
        ("target_tokens", tensor(I64, [3, 1, 1], bytes(24)), "give [N] or [N, K]"),
        ("target_tokens", tensor(I64, [], bytes(8)), "give [N] or [N, K]"),
        ("target_tokens", tensor(I64, [1] * 99, bytes(8)), "99 dimensions; give [N] or [N, K]"),
        ("target_tokens", tensor(I64, [3, 0], b""), "target_tokens"),
        ("target_tokens", tensor(I64, [2**40, 0], b""), "target_tokens"),
        ("weights", tensor(F32, [2**31], bytes(12)), "takes 8589934592"),
        ("weights", tensor(I64, [3], bytes(24)), "int64; send it as float32"),
        ("weights", tensor(F32, [1, 3], bytes(12)), "weights"),
    ],
    ids=lambda value: str(value)[-60:].replace("\n", " "),
)
def test_wrong_tensors(world: World, name: str, wrong: tensor_pb2.Tensor, text: str) -> None:
    message = training_service_pb2.ForwardBackwardRequest(
        data=[GOOD, GOOD], loss_fn="cross_entropy"
    )
    message.data[0].loss_fn_inputs[name].CopyFrom(wrong)
    reason, field, said = world.refused(message)
    assert (reason, field) == ("INVALID_DATUM", TARGETS if name != "weights" else WEIGHTS)
    assert text in said


def test_wrong_chunks(world: World) -> None:
    for chunk, text in (
        (tensor_pb2.InputChunk(), "holds nothing known here; give encoded_text"),
        (
            tensor_pb2.InputChunk(encoded_text=tensor_pb2.EncodedText(token_ids=b"\1\2\3")),
            "3 bytes, not a multiple of 4",
        ),
    ):
        message = training_service_pb2.ForwardBackwardRequest(data=[GOOD], loss_fn="cross_entropy")
        message.data[0].model_input.chunks.insert(0, chunk)
        reason, field, said = world.refused(message)
        assert reason == "INVALID_DATUM" and text in said
        assert field.startswith("data[0].model_input.chunks[0]")


def test_wrong_settings(world: World) -> None:
    nested = struct_pb2.Struct()
    nested["beta"] = {"a": [1.0, True, None]}
    dro = training_service_pb2.ForwardBackwardRequest(
        data=[GOOD], loss_fn="dro", loss_fn_config=nested
    )
    unknown = optim_request()
    unknown.grad_acc_normalization = 77  # type: ignore[assignment]
    empty = training_service_pb2.ForwardBackwardRequest()
    for message, reason, field, text in (
        (dro, "INVALID_ARGUMENT", 'loss_fn_config["beta"]', "is a struct; give a number"),
        (unknown, "INVALID_ARGUMENT", "grad_acc_normalization", "77"),
        (training_service_pb2.OptimStepRequest(), "INVALID_ARGUMENT", "adam_params", "missing"),
        (empty, None, None, "loss_fn"),
        (
            training_service_pb2.BackwardRequest(
                graph=TEN_MB, output_grads=[tensor(F32, [3], bytes(12))]
            ),
            "GRAPH_EXPIRED", "graph", "run forward again",
        ),
        (
            checkpoint_service_pb2.SaveSnapshotRequest(snapshot_id="s", kind=9),  # type: ignore[arg-type]
            "INVALID_ARGUMENT", None, "9",
        ),
        (checkpoint_service_pb2.SaveStateRequest(), "NAME_INVALID", "checkpoint_id", "''"),
        (
            checkpoint_service_pb2.SaveStateRequest(checkpoint_id="../../x"),
            "NAME_INVALID", "checkpoint_id", "'../../x' is not a valid name",
        ),
        (
            checkpoint_service_pb2.SaveSnapshotRequest(snapshot_id="a\0b"),
            "NAME_INVALID", "snapshot_id", "letters",
        ),
        (checkpoint_service_pb2.LoadStateRequest(), "NAME_INVALID", "checkpoint", "empty"),
    ):  # fmt: skip
        got = world.refused(message)
        assert got[0] == reason or reason is None, got
        assert got[1] == field or field is None, got
        assert text in got[2]


def test_wrong_gradients_of_a_kept_graph(world: World) -> None:
    forward = training_service_pb2.ForwardRequest(
        data=[GOOD], loss_fn="cross_entropy", retain_graph=True
    )
    graph = world.stubs.done(world.lane.send(forward)).forward.graph
    nan = np.array([0, np.nan, 0], "<f4").tobytes()
    for wrong, reason, field in (
        ([tensor(F32, [2], bytes(8))], "INVALID_ARGUMENT", "output_grads[0]"),
        ([tensor(F32, [2**31], bytes(8))], "INVALID_DATUM", "output_grads[0]"),
        ([tensor(F32, [1] * 99, bytes(4))], "INVALID_DATUM", "output_grads[0]"),
        ([tensor(F32, [3], nan)], "NON_FINITE", ""),
        ([tensor(F32, [3], bytes(12))] * 2, "INVALID_ARGUMENT", "output_grads"),
    ):
        message = training_service_pb2.BackwardRequest(graph=graph, output_grads=wrong)
        got = world.refused(message)
        assert got[0] == reason and got[1].startswith(field), got
    world.stubs.done(world.lane.send(training_service_pb2.BackwardRequest(graph=graph)))


@pytest.mark.parametrize(
    ("change", "reason", "field"),
    [
        ({"session": ""}, "NAME_INVALID", "header.session"),
        ({"session": "trainers/../sessions/x"}, "NAME_INVALID", "header.session"),
        ({"session": "trainers/t/sessions/00000000"}, "SESSION_NOT_FOUND", "header.session"),
        ({"session": TEN_MB}, "NAME_INVALID", "header.session"),
        ({"client_id": ""}, "INVALID_ARGUMENT", "header.client_id"),
        ({"client_id": TEN_MB}, "INVALID_ARGUMENT", "header.client_id"),
        ({"seq": 0}, "INVALID_ARGUMENT", "header.seq"),
        ({"seq": 2**64 - 1}, "INVALID_ARGUMENT", "header.seq"),
        ({"request_id": ""}, "INVALID_ARGUMENT", "header.request_id"),
        ({"request_id": TEN_MB}, "INVALID_ARGUMENT", "header.request_id"),
        ({"epoch": 99}, "SESSION_RESTARTED", "header.epoch"),
        ({"epoch": 2**64 - 1}, "SESSION_RESTARTED", "header.epoch"),
        ({"parts": 2}, "UNSUPPORTED", "header.parts"),
        ({"part": 2**32 - 1}, "UNSUPPORTED", "header.parts"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_headers(world: World, change: dict[str, Any], reason: str, field: str) -> None:
    message = world.lane.header(optim_request())
    world.lane.seq -= 1
    for name, value in change.items():
        setattr(message.header, name, value)
    got = call_refused(world.stubs.training.OptimStep, message)
    assert got[:2] == (reason, field), got


def test_wrong_names_everywhere(world: World) -> None:
    stubs = world.stubs
    calls = {
        stubs.trainers.GetTrainer: (trainer_service_pb2.GetTrainerRequest, "trainers"),
        stubs.trainers.DeleteTrainer: (trainer_service_pb2.DeleteTrainerRequest, "trainers"),
        stubs.training.GetSession: (training_service_pb2.GetSessionRequest, "trainers/t/sessions"),
        stubs.operations.GetOperation: (operation_service_pb2.GetOperationRequest, "operations"),
        stubs.operations.CancelOperation: (
            operation_service_pb2.CancelOperationRequest, "operations",
        ),
        stubs.checkpoints.GetSnapshot: (checkpoint_service_pb2.GetSnapshotRequest, "snapshots"),
        stubs.checkpoints.GetCheckpoint: (checkpoint_service_pb2.GetCheckpointRequest, None),
        stubs.deployments.GetDeployment: (
            deployment_service_pb2.GetDeploymentRequest, "deployments",
        ),
        stubs.deployments.ScaleDeployment: (
            deployment_service_pb2.ScaleDeploymentRequest, "deployments",
        ),
    }  # fmt: skip
    for call, (request, collection) in calls.items():
        for name in ("", "..", "../x", f"{collection}/../x", f"{collection}/a/b", "a\0b", TEN_MB,
                     "🦊" * 100_000, "%2e%2e"):  # fmt: skip
            got = call_refused(call, request(name=name))
            assert got[0] == "NAME_INVALID", (request, name[:20], got)
        if collection is not None and request is not trainer_service_pb2.DeleteTrainerRequest:
            got = call_refused(call, request(name=f"{collection}/nothing"))
            assert got[0].endswith("_NOT_FOUND") and "nothing" in got[2]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"trainer_id": "../x"}, "trainer_id"),
        ({"trainer_id": TEN_MB}, "trainer_id"),
        ({"base_model": ""}, "base_model"),
        ({"base_model": "m\0"}, "base_model"),
        ({"base_model": TEN_MB}, "base_model"),
        ({"lora_rank": -1}, "lora_rank"),
        ({"lora_rank": 2**31 - 1}, "lora_rank"),
        ({"max_context_length": -1}, "max_context_length"),
        ({"dtype": "int3"}, "dtype"),
        ({"dtype": TEN_MB}, "dtype"),
        ({"request_id": TEN_MB}, "request_id"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_trainers(world: World, change: dict[str, Any], field: str) -> None:
    request = trainer_service_pb2.CreateTrainerRequest(
        **{"trainer_id": "new", "base_model": TOY, "request_id": "r", **change}
    )
    got = call_refused(world.stubs.trainers.CreateTrainer, request)
    assert got[0] in ("INVALID_ARGUMENT", "NAME_INVALID") and got[1] == field, got


def sample_request(**params: Any) -> sampling_service_pb2.SampleRequest:
    request = sampling_service_pb2.SampleRequest(deployment="deployments/d")
    chunk = request.prompt.chunks.add()
    chunk.encoded_text.token_ids = np.array([1, 2], "<i4").tobytes()
    request.params.max_tokens = 4
    for name, value in params.items():
        setattr(request.params, name, value)
    return request


def test_wrong_samples(world: World) -> None:
    huge, half, nowhere, other = (sample_request() for _ in range(4))
    huge.num_samples = 2**31 - 1
    half.prompt.chunks[0].encoded_text.token_ids = b"\1\2\3"
    nowhere.deployment = "deployments/none"
    other.snapshot = "snapshots/none"
    negative = sample_request()
    negative.num_samples = -1
    for request, reason, text in (
        (huge, "INVALID_ARGUMENT", "num_samples: is 2147483647; at most 4096"),
        (negative, "INVALID_ARGUMENT", "num_samples"),
        (half, "INVALID_ARGUMENT", "not a multiple of 4"),
        (nowhere, "DEPLOYMENT_NOT_FOUND", "deployments/none"),
        (other, "SNAPSHOT_NOT_ACTIVE", "none"),
        (sampling_service_pb2.SampleRequest(), "NAME_INVALID", ""),
        (sample_request(max_tokens=2**31 - 1), "INVALID_ARGUMENT", "max_tokens"),
        (sample_request(max_tokens=-(2**31)), "INVALID_ARGUMENT", "max_tokens"),
        (sample_request(temperature=float("nan")), "INVALID_ARGUMENT", "temperature"),
        (sample_request(top_p=-1.0), "INVALID_ARGUMENT", "top_p"),
    ):
        got = call_refused(world.stubs.sampling.Sample, request)
        assert got[0] == reason and text in got[2], got


def test_bodies_behind_a_good_header(world: World) -> None:
    """Accepted by their header, read by whoever runs them."""
    deep = b""
    for _ in range(300):
        deep = (
            b"\x32"
            + varint(len(b"\x0a" + varint(len(deep)) + deep))
            + (b"\x0a" + varint(len(deep)) + deep)
        )
    bodies = (b"\xff\xff\xff", b"\x12\xff\xff\xff\xff\x0f", b"\x1a\x02\xff\xfe", deep_struct(deep))
    for message in (
        training_service_pb2.ForwardRequest(),
        training_service_pb2.ForwardBackwardRequest(),
        checkpoint_service_pb2.SaveStateRequest(),
        checkpoint_service_pb2.LoadStateRequest(),
    ):
        method = type(message).__name__.removesuffix("Request")
        service = "Checkpoint" if method.endswith("State") else "Training"
        call = world.stubs.channel.unary_unary(
            f"/firetitan.v1.{service}Service/{method}",
            response_deserializer=training_service_pb2.ForwardResponse.FromString,
        )
        for body in bodies:
            header = world.lane.header(type(message)())
            try:
                operation = call(header.SerializeToString() + body).operation
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
                world.lane.seq -= 1
                continue
            world.lane.seen_failure = operation.seq
            assert told(world.stubs.wait(operation.name).error)[0] != "PRECEDING_FAILED"


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def deep_struct(value: bytes) -> bytes:
    """Field 4, a Struct with one entry of a deeply nested value."""
    entry = b"\x0a\x01a\x12" + varint(len(value)) + value
    struct = b"\x0a" + varint(len(entry)) + entry
    return b"\x22" + varint(len(struct)) + struct


def test_mutations_of_good_requests(world: World) -> None:
    """A byte changed, cut or added: whatever comes of it is an answer or a reason."""
    generator = random.Random(20)
    forward = training_service_pb2.ForwardRequest(data=[GOOD], loss_fn="cross_entropy")
    body = forward.SerializeToString()
    call = world.stubs.channel.unary_unary(
        "/firetitan.v1.TrainingService/Forward",
        response_deserializer=training_service_pb2.ForwardResponse.FromString,
    )
    failed = 0
    for _ in range(150):
        header = world.lane.header(training_service_pb2.ForwardRequest()).SerializeToString()
        try:
            operation = call(header + mutated(generator, body)).operation
        except grpc.RpcError as error:
            assert error.code().name in REFUSALS, error
            world.lane.seq -= 1
            continue
        ended = world.stubs.wait(operation.name)
        if ended.HasField("error"):
            failed += 1
            told(ended.error)
            world.lane.seen_failure = operation.seq
    assert failed > 20
    prompt = sample_request().SerializeToString()
    sample = world.stubs.channel.unary_unary("/firetitan.v1.SamplingService/Sample")
    for _ in range(100):
        try:
            sample(mutated(generator, prompt), timeout=20)
        except grpc.RpcError as error:
            assert error.code().name in REFUSALS, error


def mutated(generator: random.Random, raw: bytes) -> bytes:
    changed = bytearray(raw)
    for _ in range(generator.randint(1, 3)):
        place = generator.randrange(len(changed))
        match generator.randrange(3):
            case 0:
                changed[place] = generator.randrange(256)
            case 1:
                del changed[place]
            case _:
                changed.insert(place, generator.randrange(256))
    return bytes(changed)
