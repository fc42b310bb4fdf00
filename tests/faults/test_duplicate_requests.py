"""One request sent many times, at once, over the death of the daemon, by several: applied once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from firetitan.v1 import operation_pb2
from support.daemon import DaemonProcess
from support.history_client import digest_of, list_operations
from support.stubs import LaneClient, Stubs, optim_request, reason

pytestmark = pytest.mark.timeout(120)

COPIES = 20


def send_copies(lanes: list[LaneClient], message: Any) -> list[operation_pb2.Operation]:
    """The same message, from each lane in turn, all at once."""
    gate = threading.Barrier(COPIES)

    def send(index: int) -> operation_pb2.Operation:
        stubs = lanes[index % len(lanes)].stubs
        gate.wait()
        return stubs.retry(stubs.training.OptimStep, message).operation

    with ThreadPoolExecutor(COPIES) as pool:
        return list(pool.map(send, range(COPIES)))


def test_it_is_applied_once_and_answered_alike(daemon: DaemonProcess) -> None:
    stubs = [Stubs(daemon.address), Stubs(daemon.address)]
    stubs[0].create_trainer()
    session = stubs[0].session()
    # Two clients that both hold the lane, as a program and its restart may.
    lanes = [LaneClient(one, session, "lane") for one in stubs]
    stubs[0].done(lanes[0].forward_backward())
    message = lanes[0].header(optim_request())
    first = send_copies(lanes, message)
    assert len({one.name for one in first}) == 1
    ended = stubs[1].done(first[0])
    assert ended.optim_step.metrics["step"] == 1
    daemon.kill()
    daemon.start()
    again = send_copies(lanes, message)
    assert {digest_of(one) for one in again} == {digest_of(ended)}
    # While the daemon is away: whoever starts it finds all of them at the door.
    stubs[0].done(lanes[0].forward_backward())
    later = lanes[0].header(optim_request())
    daemon.kill()
    sending = threading.Thread(target=lambda: late.extend(send_copies(lanes, later)))
    late: list[operation_pb2.Operation] = []
    sending.start()
    daemon.start()
    sending.join(60)
    assert len(late) == COPIES and len({one.name for one in late}) == 1
    assert stubs[1].done(late[0]).optim_step.metrics["step"] == 2
    assert len(list_operations(daemon.address, session)) == 4
    for one in stubs:
        one.channel.close()


def test_its_id_is_refused_with_another_content(daemon: DaemonProcess) -> None:
    stubs = Stubs(daemon.address)
    stubs.create_trainer()
    session = stubs.session()
    lane, other = LaneClient(stubs, session, "lane"), LaneClient(stubs, session, "other")
    stubs.done(lane.forward_backward())
    message = lane.header(optim_request())
    stubs.done(stubs.training.OptimStep(message).operation)

    def changed(**header: Any) -> Any:
        copy = type(message).FromString(message.SerializeToString())
        for name, value in header.items():
            setattr(copy.header, name, value)
        return copy

    content = changed()
    content.adam_params.learning_rate *= 2
    for refused in (
        content,
        changed(client_id=other.client_id, seq=other.seq),
        changed(seq=lane.seq),
    ):
        for _ in range(2):
            with pytest.raises(grpc.RpcError) as caught:
                stubs.retry(stubs.training.OptimStep, refused)
            assert reason(caught.value) == "REQUEST_ID_REUSED"
        daemon.kill()
        daemon.start()
    assert stubs.retry(stubs.training.OptimStep, message).operation.optim_step.metrics["step"] == 1
    # Neither lane has a gap.
    stubs.done(other.forward_backward())
    assert stubs.done(lane.optim_step()).optim_step.metrics["step"] == 2
    stubs.channel.close()
