"""Sessions, deployments and hotloads where callers go away, workers die and others come between."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from firetitan.v1 import training_service_pb2
from support.commands import GOOD, SESSION
from support.held_writes import HeldWrites

from firetitan_daemon.app import SystemClock
from firetitan_daemon.control.checkpoints import CheckpointManager
from firetitan_daemon.control.cleanup import Cleaner
from firetitan_daemon.control.codec import HotloadArguments
from firetitan_daemon.control.deployment_requests import DeploymentRequest
from firetitan_daemon.control.deployments import DeploymentManager
from firetitan_daemon.control.leases import LeaseManager
from firetitan_daemon.control.models import ModelRegistry
from firetitan_daemon.control.operations import OperationRegistry
from firetitan_daemon.control.removal import SavedRemover
from firetitan_daemon.control.replica_set import ReplicaSet
from firetitan_daemon.control.retention import Retention
from firetitan_daemon.control.services import Services
from firetitan_daemon.control.session_settings import Wanted
from firetitan_daemon.control.sessions import SessionManager
from firetitan_daemon.control.supervisor import Supervisor
from firetitan_daemon.control.switching import Switch
from firetitan_daemon.control.trainer_requests import TrainerRequest
from firetitan_daemon.control.trainers import TrainerManager
from firetitan_daemon.control.weight_sync import WeightSyncer
from firetitan_daemon.control.workers import WorkerPool
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.ports import Change, Limits
from firetitan_daemon.core.records import (
    Deployment,
    Operation,
    OperationState,
    ResourceState,
    Session,
    SessionState,
    Snapshot,
    Trainer,
    WorkerKind,
)
from firetitan_daemon.core.worker_ports import Worker
from firetitan_daemon.launch.in_process import InProcessLauncher
from firetitan_daemon.rpc.codec import ProtobufCodec, read_header
from firetitan_daemon.store.folders import FileFolders
from firetitan_daemon.store.memory import MemoryStore
from firetitan_daemon.store.spool import FileSpool

pytestmark = pytest.mark.timeout(30)
TOY = "firetitan/toy"


class Managers:
    """All managers of a daemon, on workers in this process."""

    def __init__(self, root: Path, run: Path) -> None:
        limits = Limits(gap_timeout_s=0.2)
        self.store, self.spool = MemoryStore(), FileSpool(root / "spool")
        self.services = services = Services(
            store=self.store,
            spool=self.spool,
            folders=FileFolders(root / "folders"),
            launcher=InProcessLauncher(run),
            clock=SystemClock(),
            codec=ProtobufCodec(),
            limits=limits,
            operations=OperationRegistry(self.store, self.spool, limits),
        )
        self.pool = WorkerPool(services)
        self.checkpoints = CheckpointManager(services)
        self.sessions = SessionManager(services, self.checkpoints)
        self.trainers = TrainerManager(services, self.pool, self.sessions)
        self.deployments = DeploymentManager(services, self.pool)
        self.syncer = WeightSyncer(services, self.deployments)
        self.deployments.connect(self.syncer.restore)
        self.remover = SavedRemover(services, self.checkpoints, self.sessions, self.deployments)
        cleaner = Cleaner(services, self.sessions, self.trainers, self.deployments)
        self.leases = LeaseManager(services, 60.0, cleaner.clean_up, self.syncer.release_pins)
        self.supervisor = Supervisor(
            services,
            self.pool,
            self.sessions,
            self.trainers,
            self.deployments,
            self.syncer,
            self.checkpoints,
            self.remover,
            ModelRegistry(services, self.trainers, self.deployments),
            self.leases,
            cleaner,
            Retention(services, self.leases, 60.0, 60.0),
        )

    async def done(self, operation: Operation) -> Operation:
        found = await self.services.operations.wait(operation.id, 10)
        assert found.done, found
        return found

    async def trainer(self, request_id: str = "make-t") -> tuple[Trainer, Worker]:
        request = TrainerRequest("t", TOY, 0, 0, "auto", request_id, "digest")
        assert (await self.done(await self.trainers.create(request))).error is None
        return await self.trainers.ready("t")

    async def deployment(self) -> Deployment:
        request = DeploymentRequest("d", TOY, 0, "", "auto", None, "make-d", "digest")
        assert (await self.done(await self.deployments.create(request))).error is None
        return self.deployments.get("d")

    async def snapshots(self, *ids: str) -> None:
        """Rows of snapshots; `Applied` workers need no files."""
        rows = [
            Snapshot(
                id=one,
                session=SESSION.name,
                base_model=TOY,
                lora_rank=0,
                kind="base",
                format="hf_full",
                parent=None,
                step=0,
                commit_seq=1,
                folder="/nowhere",
                digest="d",
                result_digest="r",
                size_bytes=1,
                create_time=0.0,
            )
            for one in ids
        ]
        await self.store.write(Change(snapshots=rows))

    async def hotload(self, snapshot: str, *, etag: str = "", request_id: str = "") -> Operation:
        arguments = HotloadArguments("deployments/d", snapshot, etag)
        return await self.syncer.hotload(arguments, request_id or snapshot, snapshot.encode())


@pytest.fixture
async def managers(tmp_path: Path) -> AsyncIterator[Managers]:
    # Sockets need a short path.
    with tempfile.TemporaryDirectory() as run:
        managers = Managers(tmp_path, Path(run))
        yield managers
        await managers.supervisor.stop(1.0)
        for spec in managers.pool.specs():
            await managers.pool.stop(spec.worker_id)


async def test_session_of_a_caller_that_went_away_is_there_for_the_next(
    managers: Managers,
) -> None:
    trainer, worker = await managers.trainer()
    opening = asyncio.Event()

    class Slow:
        def __getattr__(self, name: str) -> object:
            return getattr(worker, name)

        async def open_session(self, session: Session) -> object:
            answer = await worker.open_session(session)
            opening.set()
            await asyncio.sleep(0.1)
            return answer

    call = asyncio.create_task(managers.sessions.create(trainer, Slow(), Wanted(), "first"))
    await opening.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    session, _ = await managers.sessions.create(trainer, worker, Wanted(), "again")
    assert [one.name for one in managers.sessions.all("")] == [session.name]


async def test_a_session_that_opens_while_its_trainer_is_deleted_is_closed(
    managers: Managers,
) -> None:
    trainer, worker = await managers.trainer()
    opened, deleted = asyncio.Event(), asyncio.Event()

    class Slow:
        def __getattr__(self, name: str) -> object:
            return getattr(worker, name)

        async def open_session(self, session: Session) -> object:
            answer = await worker.open_session(session)
            opened.set()
            await deleted.wait()
            return answer

    call = asyncio.create_task(managers.sessions.create(trainer, Slow(), Wanted(), "request"))
    await opened.wait()
    await managers.trainers.delete("trainers/t")
    deleted.set()
    with pytest.raises(FiretitanError) as caught:
        await call
    assert caught.value.reason is Reason.CLOSED
    assert managers.sessions.all("") == []
    again, worker = await managers.trainer("make-t-again")
    session, created = await managers.sessions.create(again, worker, Wanted(), "another request")
    assert created and [one.name for one in managers.sessions.all("")] == [session.name]


async def test_opening_a_session_says_that_its_worker_does_not_answer(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firetitan_daemon.control.sessions._ANSWER_S", 0.05)
    trainer, worker = await managers.trainer()
    answers = asyncio.Event()

    class Hung:
        def __getattr__(self, name: str) -> object:
            return getattr(worker, name)

        async def open_session(self, session: Session) -> object:
            await answers.wait()
            return await worker.open_session(session)

    for _ in range(2):
        with pytest.raises(FiretitanError, match="has not answered") as caught:
            await managers.sessions.create(trainer, Hung(), Wanted(), "request")
        assert caught.value.reason is Reason.RECOVERING
        assert float(caught.value.metadata["retry_after_s"]) > 0
    answers.set()
    session, created = await managers.sessions.create(trainer, worker, Wanted(), "request")
    assert created and [one.name for one in managers.sessions.all("")] == [session.name]


async def test_of_two_hotloads_with_one_etag_one_is_refused(managers: Managers) -> None:
    deployment = await managers.deployment()
    await managers.snapshots("a-01234567", "b-01234567")
    await managers.hotload("a-01234567", etag=deployment.etag)
    with pytest.raises(FiretitanError) as caught:
        await managers.hotload("b-01234567", etag=deployment.etag)
    assert caught.value.reason is Reason.ETAG_MISMATCH


async def test_an_etag_is_compared_with_the_record_as_it_is_by_then(managers: Managers) -> None:
    deployment = await managers.deployment()
    await managers.snapshots("a-01234567")
    call = asyncio.create_task(managers.hotload("a-01234567", etag=deployment.etag))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await managers.deployments.update("d", trainer_id="other")
    with pytest.raises(FiretitanError) as caught:
        await call
    assert caught.value.reason is Reason.ETAG_MISMATCH


async def test_hotloads_apply_in_the_order_they_were_accepted(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await managers.deployment()
    await managers.snapshots("a-01234567", "b-01234567")
    applied: list[str] = []

    async def switch(deployment: Deployment, replicas: ReplicaSet, switch: Switch) -> None:
        applied.append(switch.snapshot_id)

    monkeypatch.setattr(managers.syncer._switcher, "switch", switch)
    await managers.deployments.update("d", state=ResourceState.RECOVERING)
    first = await managers.hotload("a-01234567")
    await asyncio.sleep(0.05)
    second = await managers.hotload("b-01234567")
    # Just after the second began to wait: its turn would come before the first's.
    await asyncio.sleep(0.07)
    await managers.deployments.update("d", state=ResourceState.ACTIVE)
    await managers.done(second)
    await managers.done(first)
    assert applied == ["a-01234567", "b-01234567"]
    assert managers.deployments.get("d").active_snapshot == "b-01234567"


async def test_hotloads_that_wait_are_limited(managers: Managers) -> None:
    await managers.deployment()
    await managers.snapshots("a-01234567")
    await managers.deployments.update("d", state=ResourceState.RECOVERING)
    allowed = managers.services.limits.max_session_operations
    for number in range(allowed):
        await managers.hotload("a-01234567", request_id=f"request-{number}")
    with pytest.raises(FiretitanError) as caught:
        await managers.hotload("a-01234567", request_id="one too many")
    assert caught.value.reason is Reason.QUEUE_FULL
    assert caught.value.metadata["limit"] == "max_session_operations"


async def test_a_full_disk_does_not_end_the_watch_over_lanes(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, again = 0, asyncio.Event()

    async def expire() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise FiretitanError(Reason.STATE_DISK_FULL, "the disk is full")
        again.set()

    monkeypatch.setattr(managers.sessions, "expire", expire)
    managers.supervisor.begin(await managers.store.load())
    await asyncio.wait_for(again.wait(), 5)


async def test_a_dead_worker_does_not_bring_a_deleted_deployment_back(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = await managers.deployment()
    forget, forgetting = managers.pool.forget, asyncio.Event()

    async def slow_forget(worker_id: str | None) -> None:
        if not forgetting.is_set():
            forgetting.set()
            await asyncio.sleep(0.2)
        await forget(worker_id)

    monkeypatch.setattr(managers.pool, "forget", slow_forget)
    worker = managers.pool.live(deployment.worker_ids[0])
    assert worker is not None
    worker._process.kill()
    await forgetting.wait()
    await managers.deployments.delete("d")
    await asyncio.sleep(0.5)
    assert not managers.deployments.all()
    assert not [spec for spec in managers.pool.specs() if spec.kind is WorkerKind.SAMPLER]


async def test_a_dead_worker_does_not_start_a_deployment_that_was_stopped(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = await managers.deployment()
    forget, forgetting = managers.pool.forget, asyncio.Event()

    async def slow_forget(worker_id: str | None) -> None:
        if not forgetting.is_set():
            forgetting.set()
            await asyncio.sleep(0.2)
        await forget(worker_id)

    monkeypatch.setattr(managers.pool, "forget", slow_forget)
    worker = managers.pool.live(deployment.worker_ids[0])
    assert worker is not None
    worker._process.kill()
    await forgetting.wait()
    await managers.deployments.scale("d", 0)
    await asyncio.sleep(0.5)
    assert managers.deployments.get("d").state is ResourceState.STOPPED


async def test_a_dead_worker_does_not_bring_a_deleted_trainer_back(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, worker = await managers.trainer()
    forget, forgetting = managers.pool.forget, asyncio.Event()

    async def slow_forget(worker_id: str | None) -> None:
        if not forgetting.is_set():
            forgetting.set()
            await asyncio.sleep(0.2)
        await forget(worker_id)

    monkeypatch.setattr(managers.pool, "forget", slow_forget)
    worker._process.kill()
    await forgetting.wait()
    await managers.trainers.delete("t")
    await asyncio.sleep(0.5)
    assert not managers.trainers.all()
    (row,) = (await managers.store.load()).trainers
    assert row.state is ResourceState.DELETING


async def test_who_asks_for_a_trainer_while_its_row_is_written_takes_nothing_back(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    active = HeldWrites(
        managers.store,
        monkeypatch,
        lambda change: any(one.state is ResourceState.ACTIVE for one in change.trainers),
    )
    first = await managers.trainers.create(TrainerRequest("t", TOY, 0, 0, "auto", "a", "digest"))
    await active.begun.wait()
    request = TrainerRequest("t", TOY, 0, 0, "auto", "b", "digest", inactivity_s=60.0)
    second = asyncio.create_task(managers.trainers.create(request))
    for _ in range(20):
        await asyncio.sleep(0)
    active.going.set()
    for operation in (first, await second):
        assert (await managers.done(operation)).error is None
    (row,) = (await managers.store.load()).trainers
    assert row == managers.trainers.get("t")
    assert (row.state, row.inactivity_s) == (ResourceState.ACTIVE, 60.0)


@pytest.mark.parametrize("inactivity_s", [None, 60.0])
async def test_who_asks_for_a_deployment_while_its_row_is_written_is_answered(
    managers: Managers, monkeypatch: pytest.MonkeyPatch, inactivity_s: float | None
) -> None:
    active = HeldWrites(
        managers.store,
        monkeypatch,
        lambda change: any(one.state is ResourceState.ACTIVE for one in change.deployments),
    )
    first = await managers.deployments.create(
        DeploymentRequest("d", TOY, 0, "", "auto", None, "a", "digest")
    )
    await active.begun.wait()
    request = DeploymentRequest(
        "d", TOY, 0, "", "auto", None, "b", "digest", inactivity_s=inactivity_s
    )
    second = asyncio.create_task(managers.deployments.create(request))
    for _ in range(20):
        await asyncio.sleep(0)
    active.going.set()
    for operation in (first, await second):
        assert (await managers.done(operation)).error is None
    (row,) = (await managers.store.load()).deployments
    assert row == managers.deployments.get("d") and row.state is ResourceState.ACTIVE


async def test_a_worker_that_is_slow_to_answer_while_it_loads_is_waited_for(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, worker = await managers.trainer()
    adopt, tries = managers.services.launcher.adopt, 0

    async def busy(spec: object) -> Worker | None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise FiretitanError(Reason.WORKER_UNAVAILABLE, "lives but did not answer")
        return await adopt(spec)

    managers.pool._live.clear()  # as a new daemon has it
    monkeypatch.setattr(managers.services.launcher, "adopt", busy)
    found, _ = await managers.pool.start(worker.spec)
    assert found.pid == worker.pid and tries == 2


async def test_a_full_disk_delays_what_has_happened_and_loses_none_of_it(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firetitan_daemon.control.services.DISK_RETRY_S", 0.02)
    write, refused = managers.store.write, 0

    async def full(change: Change) -> None:
        nonlocal refused
        ended = any(one.done for one in change.operations)
        lost = any(one.state is SessionState.LOST for one in change.sessions)
        if (ended or lost) and refused % 3 != 2:
            refused += 1
            raise FiretitanError(Reason.STATE_DISK_FULL, "the disk is full")
        refused += 1 if ended or lost else 0
        await write(change)

    monkeypatch.setattr(managers.store, "write", full)
    monkeypatch.setattr("firetitan_daemon.control.trainer_workers._MAX_RESTARTS", 0)
    trainer, worker = await managers.trainer()
    await managers.deployment()
    session, _ = await managers.sessions.create(trainer, worker, Wanted(), "s")
    worker._process.kill()
    for _ in range(250):
        if managers.trainers.get("t").state is ResourceState.FAILED:
            break
        await asyncio.sleep(0.02)
    assert managers.sessions.get(session.name).state is SessionState.LOST
    assert refused >= 9


async def test_a_full_disk_delays_a_new_worker_and_the_session_goes_on(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firetitan_daemon.control.services.DISK_RETRY_S", 0.02)
    write, refused = managers.store.write, 0

    async def full(change: Change) -> None:
        nonlocal refused
        if any(one.state is ResourceState.RECOVERING for one in change.trainers) and refused < 3:
            refused += 1
            raise FiretitanError(Reason.STATE_DISK_FULL, "the disk is full")
        await write(change)

    monkeypatch.setattr(managers.store, "write", full)
    trainer, worker = await managers.trainer()
    session, _ = await managers.sessions.create(trainer, worker, Wanted(), "s")
    first = await managers.sessions.submit(*_forward_backward(session, seq=1))
    assert (await managers.done(first)).state is OperationState.DONE
    worker._process.kill()
    for _ in range(250):
        if managers.trainers.get("t").worker_id != worker.spec.worker_id and (
            managers.sessions.get(session.name).state is SessionState.ACTIVE
        ):
            break
        await asyncio.sleep(0.02)
    assert refused == 3
    second = await managers.sessions.submit(*_forward_backward(session, seq=2))
    assert (await managers.done(second)).state is OperationState.DONE


async def test_a_cancellation_happens_even_if_its_caller_goes_away(managers: Managers) -> None:
    trainer, worker = await managers.trainer()
    session, _ = await managers.sessions.create(trainer, worker, Wanted(), "s")
    pipeline = managers.sessions._pipelines[session.name]
    writes = managers.store.write

    async def slow(change: Change) -> None:
        await asyncio.sleep(0.05)
        await writes(change)

    payload = _forward_backward(session, seq=2)
    held = await managers.sessions.submit(*payload)
    managers.store.write = slow  # type: ignore[method-assign]
    call = asyncio.create_task(managers.sessions.cancel(held))
    await asyncio.sleep(0.02)
    call.cancel()
    await asyncio.wait([call])
    first = await managers.sessions.submit(*_forward_backward(session, seq=1))
    await managers.done(first)
    assert (await managers.done(held)).state is OperationState.CANCELLED
    assert pipeline.attach("a").next_seq == 3


def _forward_backward(session: Session, *, seq: int) -> tuple[object, str, bytes]:
    message = training_service_pb2.ForwardBackwardRequest(data=[GOOD], loss_fn="cross_entropy")
    header = message.header
    header.session, header.epoch, header.client_id = session.name, 1, "a"
    header.seq, header.request_id = seq, f"r{seq}"
    payload = message.SerializeToString()
    return read_header(payload), "ForwardBackward", payload
