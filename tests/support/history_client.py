"""Clients that train without pause and write down what they see: threads, or processes.

`python tests/support/history_client.py ADDRESS SESSION NAME FILE wait|stream` runs one until it is
killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
from firetitan.v1 import (
    checkpoint_service_pb2,
    operation_pb2,
    operation_service_pb2,
    tensor_pb2,
    training_service_pb2,
)

sys.path[:0] = [] if __package__ else [str(Path(__file__).parents[1])]

from support.commands import toy_datum  # noqa: E402
from support.history import (  # noqa: E402
    CANCELLED,
    COMMITTED,
    FAILED,
    LOST,
    READ,
    STEP,
    Call,
    History,
    Recorder,
    judge,
    load,
)
from support.stubs import (  # noqa: E402
    LaneClient,
    Stubs,
    optim_request,
    retry_delay_s,
    status_reason,
)

WAIT_S = 120.0
EXPECTED = ("NO_GRADIENTS", "PRECEDING_FAILED", "CANCELLED")


def datum_of(client: str, seq: int) -> tensor_pb2.Datum:
    """The data of the ForwardBackward at a place of a lane: no two are the same."""
    mixed = int(hashlib.blake2b(f"{client}-{seq}".encode(), digest_size=4).hexdigest(), 16)
    tokens = [(mixed >> shift) % 32 for shift in (0, 5, 10, 15)]
    return toy_datum(tokens[:3], tokens[1:])


def message_of(method: str, client: str, seq: int) -> object:
    """The command at a place of a lane, without its header."""
    if method == "ForwardBackward":
        return training_service_pb2.ForwardBackwardRequest(
            data=[datum_of(client, seq)], loss_fn="cross_entropy"
        )
    if method == STEP:
        return optim_request()
    if method == "SaveSnapshot":
        return checkpoint_service_pb2.SaveSnapshotRequest(snapshot_id=f"{client}-{seq}")
    return checkpoint_service_pb2.SaveStateRequest(checkpoint_id=f"{client}-{seq}")


def call_of(operation: operation_pb2.Operation) -> Call:
    """An operation as the session itself tells of it."""
    return Call(
        client=operation.client_id,
        method=operation.method,
        request_id=f"{operation.client_id}-{operation.seq}",
        invoked=0.0,
        outcome=_outcome(operation),
        seq=operation.seq,
        commit_seq=operation.commit_seq,
        step=_step(operation),
        digest=digest_of(operation),
        operation=operation.name,
        reason=_reason(operation),
    )


def _outcome(operation: operation_pb2.Operation) -> str:
    if not operation.HasField("error"):
        return COMMITTED
    return {"SESSION_LOSS": LOST, "CANCELLED": CANCELLED}.get(_reason(operation), FAILED)


def _reason(operation: operation_pb2.Operation) -> str:
    return status_reason(operation.error) if operation.HasField("error") else ""


def _step(operation: operation_pb2.Operation) -> int:
    if operation.method == STEP and operation.HasField("optim_step"):
        return int(operation.optim_step.metrics["step"])
    return 0


def digest_of(operation: operation_pb2.Operation) -> str:
    """Of everything an ended operation says."""
    return hashlib.blake2b(
        operation.SerializeToString(deterministic=True), digest_size=16
    ).hexdigest()


class TrainingClient(threading.Thread):
    """One lane: two backward passes and a step, over and over, and a look at the step between.

    Args:
        address: Of the daemon.
        session: Its name.
        name: Of the lane.
        recorder: Takes what is sent and what comes back.
        save_every: Steps between two saves of the state; 0: none.
        waiting: `wait` for each operation by itself, or for all of the lane in a `stream`.
    """

    def __init__(
        self,
        address: str,
        session: str,
        name: str,
        recorder: Recorder,
        *,
        save_every: int = 0,
        waiting: str = "wait",
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.address = address
        self.session = session
        self.recorder = recorder
        self.save_every = save_every
        self.waiting = waiting
        self.stopping = threading.Event()
        self.steps = 0
        self.refused = 0
        """How often a command was refused for now."""
        self.answered: list[float] = []
        """When calls came back, on the monotonic clock."""
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Train until told to stop."""
        try:
            self.open()
            while not self.stopping.is_set():
                self.send("ForwardBackward", "ForwardBackward", STEP)
                self.read()
                self.steps += 1
                if self.save_every and self.steps % self.save_every == 0:
                    self.send("SaveState")
            self.close()
        except BaseException as error:
            self.failure = error

    def open(self) -> None:
        """Take a lane; for one that is used without `start`."""
        self.stubs = Stubs(self.address)
        self.lane = LaneClient(self.stubs, self.session, self.name)

    def close(self) -> None:
        """Close the connection."""
        self.stubs.channel.close()

    def send(
        self, *methods: str, cancel_within_s: float | None = None
    ) -> list[operation_pb2.Operation]:
        """Send commands without waiting in between, then wait for each; returns how they ended.

        Args:
            methods: The commands.
            cancel_within_s: Try to cancel each, at a moment so soon after it was sent; None: not.
        """
        sent, all_ended = [], []
        for method in methods:
            lane, seq = self.lane, self.lane.seq
            key = self.recorder.invoked(
                lane.client_id, method, f"{lane.client_id}-{seq}", seq, lane.seen_failure
            )
            sent.append((key, self.submit(message_of(method, lane.client_id, seq))))
            if cancel_within_s is not None:
                time.sleep(random.uniform(0.0, cancel_within_s))
                self.cancel(sent[-1][1])
        for key, operation in sent:
            ended = self.wait(operation)
            self.answered.append(time.monotonic())
            note(self.recorder, key, ended)
            if ended.HasField("error"):
                # Another client's step may have taken the gradients of this one.
                assert status_reason(ended.error) in EXPECTED, ended.error
                # A cancelled one is no failure: those behind it run without having seen it.
                if _outcome(ended) != CANCELLED:
                    self.lane.seen_failure = ended.seq
            all_ended.append(ended)
        return all_ended

    def cancel(self, operation: operation_pb2.Operation) -> None:
        """Try to cancel a command, and write down where the answer says that it is."""
        request = operation_service_pb2.CancelOperationRequest(name=operation.name)
        answer = self.stubs.retry(self.stubs.operations.CancelOperation, request).operation
        if _outcome(answer) == CANCELLED:
            self.recorder.cancelled(answer.name)

    def submit(self, message: object) -> operation_pb2.Operation:
        """Send a command; again where it is refused for now, as a RetryInfo says."""
        seq = self.lane.seq
        self.lane.seq += 1
        while True:
            try:
                return self.lane.send(message, seq=seq)
            except grpc.RpcError as error:
                pause_s = retry_delay_s(error)
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED or not pause_s:
                    raise
                self.refused += 1
                time.sleep(pause_s * random.uniform(1.0, 1.2))

    def wait(self, operation: operation_pb2.Operation) -> operation_pb2.Operation:
        """The operation when it has ended, by whatever way this client waits."""
        if self.waiting == "wait":
            return self.stubs.wait(operation.name, WAIT_S)
        with self.lane.watch(after_seq=operation.seq - 1) as watch:
            return watch.next()

    def read(self) -> None:
        """Look at the session's step."""
        key = self.recorder.invoked(self.name, READ, uuid.uuid4().hex)
        request = training_service_pb2.GetSessionRequest(name=self.session)
        found = self.stubs.retry(self.stubs.training.GetSession, request).session
        self.recorder.returned(key, COMMITTED, step=found.step)


def note(recorder: Recorder, key: str, operation: operation_pb2.Operation) -> None:
    """Write down how a command ended."""
    recorder.returned(
        key,
        _outcome(operation),
        commit_seq=operation.commit_seq,
        step=_step(operation),
        digest=digest_of(operation),
        operation=operation.name,
        reason=_reason(operation),
    )


class Training:
    """Clients of one session at work, and the history they write; see `training`."""

    def __init__(self, address: str, session: str, path: Path) -> None:
        self.address = address
        self.session = session
        self.recorder = Recorder(path)
        self.clients: list[TrainingClient] = []
        for one in list_operations(address, session):
            request_id = f"{one.client_id}-{one.seq}"
            key = self.recorder.invoked(one.client_id, one.method, request_id, one.seq)
            note(self.recorder, key, one)

    def add(self, name: str, *, save_every: int = 0) -> TrainingClient:
        """A client that is to be started, or used by hand after `open`."""
        client = TrainingClient(
            self.address, self.session, name, self.recorder, save_every=save_every
        )
        self.clients.append(client)
        return client

    def stop(self) -> None:
        """Let every client end what it began."""
        for client in self.clients:
            client.stopping.set()
        for client in self.clients:
            if client.ident is not None:
                client.join(WAIT_S)

    def judge(self) -> History:
        """The whole history, which is that of a right session.

        Raises:
            AssertionError: It is not, or a client failed.
        """
        failures = [one.failure for one in self.clients if one.failure is not None]
        assert not failures and not any(one.is_alive() for one in self.clients), failures
        self.recorder.listed(listed_calls(self.address, self.session))
        self.recorder.close()
        path = self.recorder.path
        history = load(path)
        assert judge(history) == [], f"judge again: python tests/support/history.py {path}"
        return history


@contextlib.contextmanager
def training(
    address: str, session: str, folder: Path, count: int, *, save_every: int = 0
) -> Iterator[Sequence[TrainingClient]]:
    """Clients that train while the block runs; afterwards what they saw has been judged.

    The session may have run commands before; clients see them.

    Raises:
        AssertionError: A client failed, or the history is not that of a right session.
    """
    work = Training(address, session, folder / "history.jsonl")
    for index in range(count):
        work.add(f"client-{index}", save_every=save_every).start()
    try:
        yield work.clients
    finally:
        work.stop()
    work.judge()


def list_operations(address: str, session: str) -> list[operation_pb2.Operation]:
    """Every operation of a session when it has ended, with its result, in the session's order."""
    stubs = Stubs(address)
    request = operation_service_pb2.ListOperationsRequest(parent=session, page_size=1000)
    found: list[operation_pb2.Operation] = []
    while True:
        page = stubs.retry(stubs.operations.ListOperations, request)
        found += [stubs.wait(one.name, WAIT_S) for one in page.operations]
        request.page_token = page.next_page_token
        if not request.page_token:
            stubs.channel.close()
            return sorted(found, key=lambda one: one.commit_seq)


def listed_calls(address: str, session: str) -> list[Call]:
    """The same as calls of a history."""
    return [call_of(one) for one in list_operations(address, session)]


def run_again(stubs: Stubs, session: str, history: History) -> str:
    """Run what was committed in its order, and nothing else; returns the digest of the state.

    What failed changed nothing, so it is left out.
    """
    lane = LaneClient(stubs, session, "again")
    sent = []
    for call in sorted(history.listed, key=lambda one: one.commit_seq):
        if call.outcome == COMMITTED:
            sent.append(lane.send(message_of(call.method, call.client, call.seq)))
            if len(sent) % 32 == 0:
                stubs.done(sent[-1])
    for operation in sent:
        stubs.done(operation)
    return str(stubs.done(lane.save_state("end")).checkpoint.digest)


def main() -> None:
    """Train until killed."""
    address, session, name, path, waiting = sys.argv[1:]
    client = TrainingClient(address, session, name, Recorder(Path(path)), waiting=waiting)
    client.run()
    if client.failure is not None:
        raise client.failure


if __name__ == "__main__":
    main()
