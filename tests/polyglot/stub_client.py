"""A client for examples/polyglot/conformance.py, on generated stubs alone; its habits can be bad.

`python stub_client.py [HABIT] ADDRESS TRAINER_ID DEPLOYMENT_ID STEPS`
"""

from __future__ import annotations

import queue
import random
import sys
import threading
import time
import uuid
from typing import Any

import grpc
import numpy as np
from firetitan.v1 import (
    checkpoint_service_pb2,
    checkpoint_service_pb2_grpc,
    deployment_service_pb2,
    deployment_service_pb2_grpc,
    operation_service_pb2,
    operation_service_pb2_grpc,
    sampling_service_pb2,
    sampling_service_pb2_grpc,
    tensor_pb2,
    training_service_pb2,
    training_service_pb2_grpc,
)

HABIT = sys.argv[1] if len(sys.argv) == 6 else ""
ADDRESS, TRAINER, DEPLOYMENT, STEPS = sys.argv[-4:]
CHANNEL = grpc.insecure_channel(ADDRESS)
TRAINING = training_service_pb2_grpc.TrainingServiceStub(CHANNEL)
CHECKPOINTS = checkpoint_service_pb2_grpc.CheckpointServiceStub(CHANNEL)
OPERATIONS = operation_service_pb2_grpc.OperationServiceStub(CHANNEL)
DEPLOYMENTS = deployment_service_pb2_grpc.DeploymentServiceStub(CHANNEL)
SAMPLING = sampling_service_pb2_grpc.SamplingServiceStub(CHANNEL)
TOKENS = np.array([3, 1, 4, 1, 5], dtype="<i4")
QUEUE_PAUSE_S = 0.35
BROKEN_OFF = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED]
if HABIT == "no-retry-of-cancelled":
    BROKEN_OFF.remove(grpc.StatusCode.CANCELLED)


def call(rpc: Any, request: Any) -> Any:
    """Again while the daemon is away or full."""
    for _ in range(100):
        try:
            return rpc(request, timeout=30)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                time.sleep(0.0 if HABIT == "no-pause" else QUEUE_PAUSE_S)
            elif error.code() not in BROKEN_OFF:
                raise
            if HABIT == "new-request-id" and hasattr(request, "header"):
                request.header.request_id = uuid.uuid4().hex
    raise TimeoutError(str(request))


class Lane:
    """Numbers commands, reads their ends from one stream."""

    def __init__(self) -> None:
        self.client_id = uuid.uuid4().hex
        attached = call(
            TRAINING.AttachSession,
            training_service_pb2.AttachSessionRequest(
                name=f"trainers/{TRAINER}", client_id=self.client_id
            ),
        )
        self.session, self.seq, self.seen_failure = attached.session, attached.next_seq, 0
        self.ended: dict[int, queue.SimpleQueue[Any]] = {}
        threading.Thread(target=self.follow, args=[self.seq - 1], daemon=True).start()

    def send(self, rpc: Any, request: Any) -> int:
        header = request.header
        header.session, header.epoch = self.session.name, self.session.epoch
        header.client_id, header.seq = self.client_id, self.seq
        header.request_id = uuid.uuid4().hex
        header.seen_failure = 0 if HABIT == "not-seen" else self.seen_failure
        self.ended[self.seq] = queue.SimpleQueue()
        call(rpc, request)
        self.seq += 1
        return int(header.seq)

    def result(self, seq: int) -> Any:
        operation = self.ended[seq].get(timeout=60)
        if operation.HasField("error"):
            self.seen_failure = max(self.seen_failure, seq)
        return operation

    def follow(self, after: int) -> None:
        start = after
        while True:
            requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
            requests.put(
                operation_service_pb2.WatchOperationsRequest(
                    session=self.session.name,
                    client_id=self.client_id,
                    after_seq=start if HABIT == "from-the-start" else after,
                )
            )
            stream = OPERATIONS.WatchOperations(iter(requests.get, None))
            try:
                for response in stream:
                    after = response.operation.seq
                    self.ended[after].put(response.operation)
                    if HABIT != "no-acks":
                        requests.put(
                            operation_service_pb2.WatchOperationsRequest(acked_through=after)
                        )
            except grpc.RpcError:
                requests.put(None)
                time.sleep(0.05)


def datum() -> tensor_pb2.Datum:
    """Five tokens: four inputs, four targets."""
    made = tensor_pb2.Datum()
    made.model_input.chunks.add().encoded_text.token_ids = TOKENS[:-1].tobytes()
    targets = made.loss_fn_inputs["target_tokens"]
    targets.data_type = tensor_pb2.DATA_TYPE_INT64
    targets.shape.append(4)
    targets.data = TOKENS[1:].astype("<i8").tobytes()
    return made


def optim_step(**more: Any) -> training_service_pb2.OptimStepRequest:
    """A step with plain settings."""
    adam = training_service_pb2.AdamParams(learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8)
    return training_service_pb2.OptimStepRequest(adam_params=adam, **more)


def sample(snapshot: str) -> None:
    """Stream a few tokens; go on where the stream broke."""
    request = sampling_service_pb2.SampleStreamRequest()
    request.request.deployment = f"deployments/{DEPLOYMENT}"
    request.request.prompt.chunks.add().encoded_text.token_ids = TOKENS.tobytes()
    request.request.params.max_tokens = 16
    request.request.params.seed = 7
    request.request.params.ignore_eos = True
    while True:
        try:
            for response in SAMPLING.SampleStream(request):
                for tokens in response.tokens:
                    request.resume.snapshot = tokens.snapshot
                    came = tokens.first_token + len(tokens.token_ids) // 4
                    request.resume.received[:] = [came]
                if response.HasField("summary"):
                    assert response.summary.snapshot == snapshot
                    return
        except grpc.RpcError as error:
            if error.code() not in BROKEN_OFF:
                raise
            if HABIT == "new-seed":
                request.request.params.seed = random.randrange(8, 1 << 30)
                request.ClearField("resume")


def main() -> None:
    """What the script asks of every client."""
    lane = Lane()
    forward = {"data": [datum()], "loss_fn": "cross_entropy"}
    sent = []
    for _ in range(int(STEPS)):
        request = training_service_pb2.ForwardBackwardRequest(**forward)
        sent.append(lane.send(TRAINING.ForwardBackward, request))
        sent.append(lane.send(TRAINING.OptimStep, optim_step()))
    assert not any(lane.result(seq).HasField("error") for seq in sent)
    failing = lane.send(TRAINING.OptimStep, optim_step(expected_step=1_000_000))
    behind = lane.send(TRAINING.Forward, training_service_pb2.ForwardRequest(**forward))
    assert all(lane.result(seq).HasField("error") for seq in (failing, behind))
    good = lane.send(TRAINING.Forward, training_service_pb2.ForwardRequest(**forward))
    assert not lane.result(good).HasField("error")
    save = checkpoint_service_pb2.SaveSnapshotRequest(snapshot_id="from-stubs")
    snapshot = lane.result(lane.send(CHECKPOINTS.SaveSnapshot, save)).snapshot.name
    hotload = call(
        DEPLOYMENTS.HotloadSnapshot,
        deployment_service_pb2.HotloadSnapshotRequest(
            deployment=f"deployments/{DEPLOYMENT}",
            snapshot=snapshot,
            request_id=uuid.uuid4().hex,
        ),
    ).operation
    while not hotload.done:
        wait = operation_service_pb2.WaitOperationRequest(name=hotload.name)
        wait.timeout.FromSeconds(20)
        hotload = call(OPERATIONS.WaitOperation, wait).operation
    assert not hotload.HasField("error"), hotload.error
    sample(snapshot)


main()
