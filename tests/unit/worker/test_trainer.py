"""A trainer whose engine is slow, broken or out of disk: the worker itself stays well."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from pathlib import Path

import pytest
from support.commands import SESSION, TRAINER_SPEC, CommandWriter

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.worker_ports import Worker
from firetitan_daemon.engine.api import (
    AdamParams,
    ModelSpec,
    Normalization,
    SavedFiles,
    TrainEngine,
)
from firetitan_daemon.engine.toy import ToyTrainEngine
from firetitan_daemon.launch.in_process import InProcessLauncher
from firetitan_daemon.launch.remote import RemoteWorker

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def write(tmp_path: Path) -> CommandWriter:
    return CommandWriter(tmp_path)


class GatedEngine(ToyTrainEngine):
    """The toy, whose step waits until the test opens the gate."""

    gate = threading.Event()
    steps = 0

    def optim_step(
        self, params: AdamParams, normalization: Normalization, expected_step: int | None = None
    ) -> dict[str, float]:
        assert self.gate.wait(10)
        type(self).steps += 1
        return super().optim_step(params, normalization, expected_step)


class TidyEngine(GatedEngine):
    """Counts how often it is asked to let old graphs go."""

    tidied = 0

    def expire_graphs(self) -> None:
        type(self).tidied += 1


class Forever:
    """A process that does not end."""

    pid = 1
    alive = True

    async def wait(self) -> str:
        await asyncio.Event().wait()
        return ""

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class BusyEngine(ToyTrainEngine):
    """The toy, whose step holds the interpreter until it is let go."""

    released = threading.Event()

    def optim_step(
        self, params: AdamParams, normalization: Normalization, expected_step: int | None = None
    ) -> dict[str, float]:
        end = time.monotonic() + 20.0
        while not self.released.is_set() and time.monotonic() < end:
            pass
        return super().optim_step(params, normalization, expected_step)


class BrokenEngine(ToyTrainEngine):
    """The toy, whose saves and steps break in ways of the system."""

    def save_state(self, staging: Path) -> SavedFiles:
        raise OSError(errno.ENOSPC, "No space left on device", str(staging))

    def optim_step(
        self, params: AdamParams, normalization: Normalization, expected_step: int | None = None
    ) -> dict[str, float]:
        raise ZeroDivisionError("secret detail")

    def forward(self, *arguments: object, **more: object) -> object:  # type: ignore[override]
        raise MemoryError


async def opened(launcher: InProcessLauncher) -> Worker:
    worker = await launcher.launch(TRAINER_SPEC)
    await worker.load_model()
    await worker.open_session(SESSION)
    return worker


async def test_old_graphs_go_while_nobody_calls_and_nobody_waits_for_it(
    tmp_path: Path, write: CommandWriter
) -> None:
    """The daemon asks its workers now and then whether they are there."""
    TidyEngine.gate.clear()
    worker = await opened(InProcessLauncher(tmp_path / "run", train=TidyEngine))
    assert TidyEngine.tidied == 0
    await worker.describe()
    await worker.execute(write.forward_backward())
    assert TidyEngine.tidied == 1
    step = asyncio.create_task(worker.execute(write.optim_step()))
    await asyncio.sleep(0.05)
    for _ in range(5):
        await asyncio.wait_for(worker.describe(), 5)
    assert TidyEngine.tidied == 1 and not step.done()
    TidyEngine.gate.set()
    await step
    await worker.execute(write.forward_backward())
    assert TidyEngine.tidied == 2
    await worker.shutdown()


async def test_a_repeat_joins_the_run_in_progress(tmp_path: Path, write: CommandWriter) -> None:
    GatedEngine.gate.clear()
    GatedEngine.steps = 0
    worker = await opened(InProcessLauncher(tmp_path / "run", train=GatedEngine))
    await worker.execute(write.forward_backward())
    step = write.optim_step()
    first = asyncio.create_task(worker.execute(step))
    await asyncio.sleep(0.05)
    second = asyncio.create_task(worker.execute(step))
    left = asyncio.create_task(worker.execute(step))
    await asyncio.sleep(0.05)
    left.cancel()
    assert await worker.fetch_result(SESSION.name, step.commit_seq) is None
    assert (await worker.describe()).sessions[0].applied_commit_seq == 1
    assert not first.done() and not second.done()
    GatedEngine.gate.set()
    assert await first == await second
    assert GatedEngine.steps == 1
    await worker.shutdown()


class CuttingProxy:
    """Passes bytes to a worker's socket until told to cut every connection."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._writers: list[asyncio.StreamWriter] = []
        self.connections = 0

    async def serve(self, client: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        self.connections += 1
        worker, requests = await asyncio.open_unix_connection(self._target)
        self._writers += [answers, requests]
        await asyncio.gather(self._pump(client, requests), self._pump(worker, answers))

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        except ConnectionError:
            pass
        finally:
            sink.close()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()


async def test_a_lost_connection_is_tried_again_and_nothing_runs_twice(
    tmp_path: Path, write: CommandWriter
) -> None:
    GatedEngine.gate.clear()
    GatedEngine.steps = 0
    worker = await opened(InProcessLauncher(tmp_path / "run", train=GatedEngine))
    (path,) = (tmp_path / "run").iterdir()
    proxy = CuttingProxy(path)
    server = await asyncio.start_unix_server(proxy.serve, tmp_path / "proxy")
    forever = Forever()
    through = RemoteWorker(TRAINER_SPEC, forever, f"unix:{tmp_path / 'proxy'}")
    await through.execute(write.forward_backward())
    call = asyncio.create_task(through.execute(write.optim_step()))
    for _ in range(3):
        await asyncio.sleep(0.2)
        proxy.cut()
    assert not call.done()
    GatedEngine.gate.set()
    assert (await call).session.step == 1
    assert GatedEngine.steps == 1 and proxy.connections > 1
    await through.close()
    server.close()
    await worker.shutdown()


async def test_the_worker_answers_while_it_computes(tmp_path: Path, write: CommandWriter) -> None:
    BusyEngine.released.clear()
    worker = await opened(InProcessLauncher(tmp_path / "run", train=BusyEngine))
    await worker.execute(write.forward_backward())
    step = asyncio.create_task(worker.execute(write.optim_step()))
    await asyncio.sleep(0.1)
    await worker.describe()
    assert not step.done()
    BusyEngine.released.set()
    assert (await step).session.step == 1
    await worker.shutdown()


async def test_a_broken_engine_fails_its_command_only(
    tmp_path: Path, write: CommandWriter, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await opened(InProcessLauncher(tmp_path / "run", train=BrokenEngine))
    full = (await worker.execute(write.save_state(tmp_path))).error
    assert full is not None and full.reason == Reason.STATE_DISK_FULL
    assert str(tmp_path) in full.message
    broken = (await worker.execute(write.optim_step(seen_failure=1))).error
    assert broken is not None and broken.reason == Reason.INTERNAL
    assert "secret" not in broken.message
    assert broken.metadata["error_id"] in caplog.text and "secret detail" in caplog.text
    memory = (await worker.execute(write.forward(lane="b"))).error
    assert memory is not None and memory.reason == Reason.DEVICE_OUT_OF_MEMORY
    outcome = await worker.execute(write.forward_backward(seen_failure=2))
    assert outcome.error is None and outcome.session.applied_commit_seq == 4
    await worker.shutdown()


async def test_one_load_serves_all_who_ask_and_a_failed_one_can_be_tried_again(
    tmp_path: Path,
) -> None:
    loads = []

    def make(spec: ModelSpec) -> TrainEngine:
        loads.append(spec)
        time.sleep(0.05)
        if len(loads) == 1:
            raise FiretitanError(Reason.MODEL_NOT_FOUND, "not yet")
        return ToyTrainEngine(spec)

    worker = await InProcessLauncher(tmp_path / "run", train=make).launch(TRAINER_SPEC)
    with pytest.raises(FiretitanError, match="not yet"):
        await worker.load_model()
    infos = await asyncio.gather(*(worker.load_model() for _ in range(5)))
    assert infos == [infos[0]] * 5 and len(loads) == 2
    await worker.shutdown()
