"""A program that forks in every way there is while it holds clients: `python -m support.forking`.

Knows: the Python client. Must not know: pytest. Prints what each way came to, as JSON; one that
takes longer than the watchdog allows ends the program with the stacks of its threads.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import tinker
from firetitan.v1 import system_service_pb2, training_service_pb2

from firetitan_client import FiretitanServiceClient, FixedConcurrencyController

WATCHDOG_S = 30
TOY = "firetitan/toy"
PARAMS = tinker.SamplingParams(max_tokens=6, seed=5, stop=[])
HERE: dict[str, Any] = {}
"""The clients, where a forked child finds them."""


def datum() -> tinker.Datum:
    """One short sequence."""
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1, 2, 3]),
        loss_fn_inputs={"target_tokens": [2, 3, 4], "weights": [1.0, 1.0, 1.0]},
    )


def make_clients(address: str) -> None:
    """Clients that were used, one that was not, and one whose window is full."""
    service = FiretitanServiceClient.from_firetitan_config(
        address=address, base_model=TOY, lora_rank=0
    )
    policy = service.create_training_client()
    sampler = service.create_sampling_client()
    controller = FixedConcurrencyController(1)
    narrow = service.create_sampling_client(concurrency_controller=controller)
    asyncio.run(controller.acquire())
    unused = FiretitanServiceClient.from_firetitan_config(
        address=address, trainer_job_id=service.trainer_job_id, create_deployment=False
    )
    HERE.update(service=service, policy=policy, sampler=sampler, narrow=narrow, unused=unused)
    use_inherited(0)


def use(policy: Any, sampler: Any) -> list[Any]:
    """One command of training, and a sample; what came of it."""
    loss = policy.forward_backward([datum()], "cross_entropy").result().metrics["loss:sum"]
    return [sampler.sample([1, 2], 1, PARAMS).result().sequences[0].tokens, round(loss, 6)]


def use_inherited(_: int) -> list[Any]:
    """As `use`, in a child that has its parent's clients."""
    HERE["service"].stubs.system.GetSystemInfo(system_service_pb2.GetSystemInfoRequest())
    if HERE["pid"] != os.getpid():
        HERE["narrow"].sample([1, 2], 1, PARAMS).result()
        if "other" not in HERE:
            HERE["other"] = HERE["unused"].create_training_client()
        HERE["other"].forward_backward([datum()], "cross_entropy").result()
    return use(HERE["policy"], HERE["sampler"])


def use_given(clients: tuple[Any, Any, Any]) -> list[Any]:
    """As `use`, in a process that was given clients by pickle."""
    policy, sampler, service = clients
    assert policy.result().service is service and service.deployment_id
    return use(policy, sampler)


def loader() -> list[Any]:
    """torch's DataLoader, four forked workers."""
    import torch

    class Samples(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> list[Any]:
            return use_inherited(index)

    made = torch.utils.data.DataLoader(
        Samples(),
        num_workers=4,
        batch_size=None,
        collate_fn=list,
        multiprocessing_context="fork",
        timeout=WATCHDOG_S,
    )
    return list(made)


def pool(method: str) -> Callable[[], list[Any]]:
    """A pool of `multiprocessing`."""

    def run() -> list[Any]:
        with multiprocessing.get_context(method).Pool(2) as made:
            if method == "fork":
                return made.map(use_inherited, range(4), 1)
            clients = HERE["policy"], HERE["sampler"], HERE["service"]
            return made.map(use_given, [clients] * 4, 1)

    return run


def executor() -> list[Any]:
    """A forked `ProcessPoolExecutor`."""
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as made:
        return list(made.map(use_inherited, range(4)))


def what_is_said(pending: Any, stream: Any) -> list[bool]:
    """Whether a child that waits for its parent's calls is told whose they are."""
    told = []
    for wait in (
        pending.result,
        lambda: concurrent.futures.wait([pending]).done.pop().result(),
        lambda: asyncio.run(pending.result_async()),
        lambda: next(stream),
    ):
        try:
            wait()
        except RuntimeError as error:
            told.append("before the fork" in str(error))
    return told


def plain_forks() -> list[Any]:
    """os.fork while a call runs, from a program with threads; one child ends as scripts do."""
    sampler = HERE["sampler"]
    found = []
    for ends in (os._exit, sys.exit):
        stream = sampler.sample_stream([1, 2], 1, tinker.SamplingParams(max_tokens=4000, stop=[]))
        next(stream)
        pending = sampler.sample([1, 2], 4, tinker.SamplingParams(max_tokens=2000, seed=1, stop=[]))
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            told = what_is_said(pending, stream)
            os.write(writer, json.dumps([told, use_inherited(0)]).encode())
            ends(0)
        os.close(writer)
        with os.fdopen(reader) as answer:
            told, used = json.loads(answer.read())
        assert told == [True] * 4, told
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(pending.result().sequences) == 4
        assert len(next(stream).tokens) > 0
        stream.close()
        found.append(used)
    return found


@contextmanager
def busy(wanted: bool) -> Iterator[list[Any]]:
    """Threads of this program that train and sample all the while; what came of it."""
    stop = threading.Event()
    found: list[Any] = []

    def go_on() -> None:
        while not stop.is_set():
            found.append(use(HERE["policy"], HERE["sampler"]))

    threads = [threading.Thread(target=go_on) for _ in range(2 * wanted)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        stop.set()
        for thread in threads:
            thread.join()


WAYS: dict[str, Callable[[], list[Any]]] = {
    "DataLoader": loader,
    "fork": pool("fork"),
    "executor": executor,
    "os.fork": plain_forks,
    "spawn": pool("spawn"),
    "forkserver": pool("forkserver"),
}
GIVEN = (WAYS["spawn"], WAYS["forkserver"])


def main(address: str, ways: str, is_busy: bool) -> None:
    """Go every way; between them and afterwards the parent's clients work as before."""
    faulthandler.register(signal.SIGALRM, chain=True)
    HERE["pid"] = os.getpid()
    make_clients(address)
    wanted = use(HERE["policy"], HERE["sampler"])
    sent = 2
    with busy(is_busy) as beside:
        for way in ways.split(","):
            signal.alarm(WATCHDOG_S)
            began = time.monotonic()
            found = WAYS[way]()
            took_s = time.monotonic() - began
            sent += len(found) * (1 if WAYS[way] in GIVEN else 2) + 1
            alike = all(one == wanted for one in [*found, use(HERE["policy"], HERE["sampler"])])
            print(json.dumps({"way": way, "n": len(found), "alike": alike, "s": took_s}))
    signal.alarm(0)
    assert all(one == wanted for one in beside)
    request = training_service_pb2.GetSessionRequest(name=HERE["policy"].session_name)
    session = HERE["service"].stubs.training.GetSession(request).session
    accepted = session.commit_seq - sent - len(beside)
    print(json.dumps({"beside": len(beside), "doubled_or_lost": accepted}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "busy")
