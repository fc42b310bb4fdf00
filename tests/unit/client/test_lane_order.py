"""What a lane does with calls when one of them fails, or the daemon goes away."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from firetitan.v1 import operation_pb2, training_service_pb2

from firetitan_client import lane as lanes
from firetitan_client import transport
from firetitan_client.attachment import Attachment, Command, Place
from firetitan_client.errors import InvalidArgument, NotFound, Unavailable
from firetitan_client.futures import APIFuture
from firetitan_client.lane import Lane

STEP = ("TrainingService/OptimStep", b"", training_service_pb2.OptimStepResponse)
PLACE = Place("trainers/t/sessions/s", 1)


def result_of(operation: operation_pb2.Operation) -> Any:
    return operation.optim_step


class Absent:
    """A transport whose calls never end, and that can open no stream."""

    def __init__(self) -> None:
        self.limits: list[float | None] = []

    async def call(self, method: str, *_: Any, timeout_s: float | None) -> Any:
        self.limits.append(timeout_s)
        await asyncio.Event().wait()

    @property
    def channel(self) -> Any:
        raise RuntimeError("can't start new thread")


class Told:
    """What an attachment tells its lane."""

    def __init__(self) -> None:
        self.lost: concurrent.futures.Future[tuple[list[Command], BaseException]]
        self.lost = concurrent.futures.Future()
        self.daemon = Absent()

    def attach(self) -> Attachment:
        def lost(_: Attachment, commands: list[Command], error: BaseException) -> None:
            self.lost.set_result((commands, error))

        return Attachment(
            self.daemon,  # type: ignore[arg-type]  # it does what is asked of it here
            "a",
            PLACE,
            settled=lambda *_: None,
            refused=lambda *_: None,
            lost=lost,
            moved=lambda: None,
        )


def step(body: bytes = b"") -> Command:
    return Command(STEP[0], body, STEP[2], result_of, APIFuture("optim_step"))


def wait_until(true: Any) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_whatever_ends_the_reading_of_results_is_told_and_nothing_is_sent_any_more() -> None:
    told = Told()
    attachment = told.attach()
    command = step()
    transport.loop().call_soon_threadsafe(attachment.send, command)
    commands, error = told.lost.result(10)
    assert commands == [command]
    assert isinstance(error, RuntimeError)
    wait_until(lambda: command.accepted is not None and command.accepted.cancelled())
    assert attachment.num_sending == 0


def test_a_large_command_may_take_as_long_as_the_network_needs() -> None:
    told = Told()
    attachment = told.attach()
    transport.loop().call_soon_threadsafe(attachment.send, step())
    wait_until(lambda: len(told.daemon.limits) == 1)
    transport.loop().call_soon_threadsafe(attachment.send, step(bytes(2 << 20)))
    wait_until(lambda: len(told.daemon.limits) == 2)
    assert told.daemon.limits == [transport.SLICE_S, None]


@pytest.fixture
def asked() -> list[str]:
    """The client ids under which a lane asked to be opened."""
    return []


@pytest.fixture
def lane(asked: list[str]) -> Iterator[Lane]:
    """A lane whose session does not answer during the test."""
    over = asyncio.Event()

    async def attach(client_id: str) -> Place:
        asked.append(client_id)
        await over.wait()
        raise NotFound("the test is over")

    lane = Lane(None, attach)  # type: ignore[arg-type]  # nothing is sent
    yield lane
    transport.loop().call_soon_threadsafe(over.set)
    assert lane.wait_accepted(10)


def leave(lane: Lane) -> Any:
    """Have a lane leave an attachment; returns that."""
    left: Any = SimpleNamespace(num_sending=0, num_open=0)
    lane._attachment = left
    lane._seen_failure = 7
    lane._leave(left, "the session lost work")
    return left


def test_what_was_seen_in_a_lane_that_was_left_excuses_nothing_in_the_next(lane: Lane) -> None:
    leave(lane)
    lane.submit(*STEP, result_of)
    (command,) = lane._queue
    assert command.seen_failure == 0
    hold = lane.hold()
    assert hold.seen_failure == 0
    hold.release()


@pytest.mark.parametrize("look", ["mark_seen", "forgive"])
def test_what_is_seen_after_its_lane_was_left_excuses_nothing_in_the_next(
    lane: Lane, look: str
) -> None:
    failed: APIFuture[Any] = APIFuture("forward")
    failed.finish(error=ValueError("token 99"))
    lane._places[failed] = (leave(lane), 7)
    getattr(lane, look)(failed)
    lane.submit(*STEP, result_of)
    (command,) = lane._queue
    assert (command.seen_failure, lane._forgiven) == (0, 0)


def test_a_new_lane_is_opened_behind_what_is_still_on_its_way_in_the_former(
    lane: Lane, asked: list[str]
) -> None:
    former: Any = SimpleNamespace(num_sending=1, num_open=1)
    lane._former = [former]
    lane.submit(*STEP, result_of)
    time.sleep(0.1)
    assert asked == []
    former.num_sending = 0
    transport.loop().call_soon_threadsafe(lane._pump)
    wait_until(lambda: len(asked) == 1)


def test_a_result_that_cannot_be_converted_ends_the_future(lane: Lane) -> None:
    def convert(_: operation_pb2.Operation) -> Any:
        raise ImportError("a tinker that does not fit")

    command = lane.make(*STEP, convert)
    operation = operation_pb2.Operation(name="operations/o", done=True, method="OptimStep")
    operation.optim_step.SetInParent()
    lane._finish(command, operation, None)  # type: ignore[arg-type]  # of no attachment
    with pytest.raises(ImportError, match="does not fit"):
        command.future.result(0)


def test_a_place_in_a_lane_that_cannot_be_opened_ends_what_is_sent_from_it(
    asked: list[str],
) -> None:
    async def attach(client_id: str) -> Place:
        asked.append(client_id)
        raise NotFound("no such session")

    lane = Lane(None, attach)  # type: ignore[arg-type]  # nothing is sent
    hold = lane.hold()
    first = hold.submit(*STEP, result_of)
    with pytest.raises(NotFound, match="no such session"):
        first.result(10)
    with pytest.raises(NotFound, match="no such session"):
        hold.submit(*STEP, result_of).result(10)
    hold.release()
    assert lane.wait_accepted(10)
    assert len(asked) == 1


def test_a_large_result_that_is_gone_takes_no_other_command_with_it() -> None:
    told = Told()

    async def gone(*_: Any, **__: Any) -> Any:
        raise NotFound("no such operation")

    told.daemon.call = gone  # type: ignore[method-assign]
    operation = operation_pb2.Operation(name="operations/o", done=True, result_omitted=True)
    assert transport.run(told.attach()._whole(operation)).result(10) is operation


def test_a_message_leaves_room_for_its_header(lane: Lane) -> None:
    with pytest.raises(InvalidArgument, match="one call may take 64 MiB"):
        lane.make(STEP[0], bytes(lanes.MAX_MESSAGE_BYTES - 100), STEP[2], result_of)


def test_where_nobody_answered_it_is_said_that_what_was_sent_may_run() -> None:
    attachment, gone, refused = Told().attach(), Unavailable("gone"), NotFound("no session")
    attachment.tell_what_may_run(gone, gone)
    attachment.tell_what_may_run(refused, refused)
    assert "may have been accepted" in gone.__notes__[0]
    assert not hasattr(refused, "__notes__")


def test_the_end_of_a_process_waits_once_for_all_its_lanes(
    lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "_EXIT_FLUSH_S", 0.3)
    others = [Lane(None, lane._attach) for _ in range(5)]  # type: ignore[arg-type]
    monkeypatch.setattr(lanes, "_lanes", [lane, *others])
    for one in (lane, *others):
        one.submit(*STEP, result_of)
    began = time.monotonic()
    lanes._flush_at_exit()
    assert 0.2 < time.monotonic() - began < 1.2


def test_a_finalizer_may_send_something_wherever_it_runs() -> None:
    """The collector runs it in the thread that holds the lock."""
    found: list[object] = []

    def collected() -> None:
        with transport._lock:
            found.append(transport.loop())

    thread = threading.Thread(target=collected, daemon=True)
    thread.start()
    thread.join(5)
    assert found == [transport.loop()] if found else pytest.fail("it waits for itself")
