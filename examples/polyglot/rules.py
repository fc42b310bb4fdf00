"""What a client in any language must do, judged from what it said to the daemon.

Each rule is one function of the record of a run; it yields what is wrong, in words that name the
call. docs/protocol.md says the same for people.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import grpc
from google.rpc import error_details_pb2
from proxy import QUEUE_PAUSE_S, Call

COMMANDS = (
    "Forward",
    "Backward",
    "ForwardBackward",
    "OptimStep",
    "SaveState",
    "LoadState",
    "SaveSnapshot",
    "LoadAdapter",
)
AGAIN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)
Rule = Callable[[list[Call]], Iterator[str]]


def _commands(calls: list[Call]) -> list[Call]:
    return [call for call in calls if call.method in COMMANDS]


def _header(call: Call) -> Any:
    return call.sent()[0].header


def _first_tries(calls: list[Call]) -> list[Call]:
    seen: set[int] = set()
    first = []
    for call in _commands(calls):
        if _header(call).seq not in seen:
            seen.add(_header(call).seq)
            first.append(call)
    return first


def _operations(calls: list[Call]) -> dict[int, Any]:
    """The lane's operations that the client was told have ended, by seq."""
    return {
        response.operation.seq: response.operation
        for call in calls
        if call.method == "WatchOperations"
        for response in call.received()
    } | {
        response.operation.seq: response.operation
        for call in calls
        if call.method in ("WaitOperation", "GetOperation")
        for response in call.received()
        if response.operation.done and response.operation.seq
    }


def lane(calls: list[Call]) -> Iterator[str]:
    """Attach first; every command names the lane, the session and the epoch of the answer."""
    attached = [
        call for call in calls if call.method == "AttachSession" and call.code is grpc.StatusCode.OK
    ]
    if not attached:
        yield "AttachSession was never answered: nothing attached"
        return
    lane, answer = attached[0].sent()[0], attached[0].received()[0]
    if len({call.sent()[0].client_id for call in calls if call.method == "AttachSession"}) > 1:
        yield "AttachSession was tried again under another client_id"
    for call in _commands(calls):
        header = _header(call)
        found = (header.client_id, header.session, header.epoch)
        expected = (lane.client_id, answer.session.name, answer.session.epoch)
        if found != expected:
            yield f"{call.method}: lane, session, epoch are {found}, attached was {expected}"


def seq(calls: list[Call]) -> Iterator[str]:
    """Commands are numbered from next_seq without gaps; a refused number is used again."""
    answers = [c.received()[0] for c in calls if c.method == "AttachSession" and c.responses]
    numbers = [_header(call).seq for call in _first_tries(calls)]
    if not answers or not numbers:
        yield "no command was sent"
        return
    expected = list(range(answers[0].next_seq, answers[0].next_seq + len(numbers)))
    if sorted(numbers) != expected:
        yield f"seqs are {numbers}, expected {expected}"


def request_id(calls: list[Call]) -> Iterator[str]:
    """One request_id a command, another for every command; a retry is the same bytes."""
    by_id: dict[str, bytes] = {}
    for call in _commands(calls):
        request = call.requests[0]
        identifier = _header(call).request_id
        if not identifier:
            yield f"{call.method} seq {_header(call).seq}: no request_id"
        elif by_id.setdefault(identifier, request) != request:
            yield f"{call.method} seq {_header(call).seq}: request_id {identifier} with other bytes"
    for number in {_header(call).seq for call in _commands(calls)}:
        tries = [call for call in _commands(calls) if _header(call).seq == number]
        for before, after in pairwise(tries):
            if before.code in AGAIN and before.requests != after.requests:
                yield f"{after.method} seq {number}: the retry is not the same bytes"


def retry(calls: list[Call]) -> Iterator[str]:
    """UNAVAILABLE and CANCELLED are retried; QUEUE_FULL after the time that RetryInfo names."""
    for index, call in enumerate(calls):
        if call.fault not in ("unreached", "answer_lost", "cancelled", "queue_full"):
            continue
        again = [
            later
            for later in calls[index + 1 :]
            if later.method == call.method and later.requests == call.requests
        ]
        if not again:
            yield f"{call.method}: never sent again after {call.fault}"
        elif call.fault == "queue_full" and again[0].at - call.at < QUEUE_PAUSE_S:
            yield f"{call.method}: sent again {again[0].at - call.at:.3f} s after QUEUE_FULL"


def seen_failure(calls: list[Call]) -> Iterator[str]:
    """Sent ahead of a failure: PRECEDING_FAILED. Shown to the user: seen_failure says so."""
    ended = _operations(calls)
    failed = [number for number, operation in ended.items() if operation.HasField("error")]
    if not failed:
        yield "no command failed: the scenario was not run"
        return
    root = min(failed)
    behind = [n for n in failed if n > root and _reason(ended[n]) == "PRECEDING_FAILED"]
    if not behind:
        yield f"nothing was sent behind seq {root} before its failure was seen"
    later = [call for call in _first_tries(calls) if _header(call).seq > max(failed)]
    if not later:
        yield "no command was sent after the failure had been seen"
    for call in later:
        if _header(call).seen_failure < root:
            yield f"{call.method} seq {_header(call).seq}: seen_failure is below {root}"


def acknowledgement(calls: list[Call]) -> Iterator[str]:
    """Results are read in one stream, gone on with where it broke, and acknowledged."""
    watches = [call for call in calls if call.method == "WatchOperations"]
    if not watches:
        yield "WatchOperations was never opened"
        return
    for before, after in pairwise(watches):
        had = max((answer.operation.seq for answer in before.received()), default=0)
        if had and after.sent()[0].after_seq != had:
            yield f"WatchOperations was opened again after {after.sent()[0].after_seq}, not {had}"
    told = max((a.operation.seq for call in watches for a in call.received()), default=0)
    acked = max((r.acked_through for call in watches for r in call.sent()), default=0)
    if acked < told - 1:
        yield f"results through {told} were told, only those through {acked} acknowledged"


def sampling(calls: list[Call]) -> Iterator[str]:
    """A broken answer is asked for again with the same seed, a stream behind what it brought."""
    streams = [call for call in calls if call.method == "SampleStream"]
    for before, after in pairwise(streams):
        first, second = before.sent()[0], after.sent()[0]
        if first.request != second.request:
            yield "SampleStream: the request changed between tries; draw the seed before the first"
        came = sum(
            len(tokens.token_ids) // 4 for answer in before.received() for tokens in answer.tokens
        )
        resumed = sum(second.resume.received)
        if second.resume.received and resumed != came:
            yield f"SampleStream: resumed behind {resumed} tokens, had {came}"


def _reason(operation: Any) -> str:
    info = error_details_pb2.ErrorInfo()
    for detail in operation.error.details:
        if detail.Unpack(info):
            return str(info.reason)
    return ""


RULES: tuple[Rule, ...] = (
    lane,
    seq,
    request_id,
    retry,
    seen_failure,
    acknowledgement,
    sampling,
)


def judge(calls: list[Call]) -> dict[str, list[str]]:
    """What each rule finds wrong; empty lists where nothing is."""
    return {rule.__name__: list(rule(calls)) for rule in RULES}
