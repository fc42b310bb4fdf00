"""SystemService: the daemon about itself.

Knows: messages, the supervisor, the pool. Must not know: rules.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from firetitan.v1 import system_service_pb2

from firetitan_daemon.control.recovery import RecoveryStats
from firetitan_daemon.control.services import Services
from firetitan_daemon.control.sessions import SessionManager
from firetitan_daemon.control.supervisor import Supervisor
from firetitan_daemon.control.workers import WorkerEnd, WorkerPool
from firetitan_daemon.core.records import Operation, Session, SessionState, WorkerSpec
from firetitan_daemon.host import max_connections, one_a_disk
from firetitan_daemon.places import Places
from firetitan_daemon.rpc import convert
from firetitan_daemon.rpc.errors import record_to_status

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Identity:
    """Who this daemon is."""

    version: str
    instance_id: str
    pid: int
    places: Places
    start_time: float


class SystemServicer:
    """Version, limits, workers, draining."""

    def __init__(
        self,
        identity: Identity,
        services: Services,
        supervisor: Supervisor,
        pool: WorkerPool,
        sessions: SessionManager,
        begin_drain: Callable[[], None],
        drain_timeout_s: float,
    ) -> None:
        self._identity = identity
        self._services = services
        self._supervisor = supervisor
        self._pool = pool
        self._sessions = sessions
        self._begin_drain = begin_drain
        self._drain_timeout_s = drain_timeout_s

    async def GetSystemInfo(
        self, request: system_service_pb2.GetSystemInfoRequest
    ) -> system_service_pb2.GetSystemInfoResponse:
        """Version, limits and what runs."""
        identity, services = self._identity, self._services
        limits, operations = services.limits, services.operations
        problems = await services.store.check() if request.check_ledger else ()
        return system_service_pb2.GetSystemInfoResponse(
            version=identity.version,
            instance_id=identity.instance_id,
            pid=identity.pid,
            home=str(identity.places.home),
            start_time=convert.timestamp(identity.start_time),
            draining=self._supervisor.draining,
            limits=system_service_pb2.Limits(
                max_message_bytes=limits.max_message_bytes,
                max_session_operations=limits.max_session_operations,
                max_operations=limits.max_operations,
                max_queued_bytes=limits.max_queued_bytes,
                max_streams=limits.max_streams,
                max_connections=max_connections(),
                max_replicas=limits.max_replicas,
            ),
            workers=[self._worker(spec) for spec in self._pool.specs()],
            recoveries=[
                _recovery(session, stats) for session, stats in self._sessions.recoveries()
            ],
            folders=_folders(identity.places),
            open_work=[_open_work(waiting) for waiting in operations.open_work().values()],
            failures=map(_failure, reversed(operations.failures)),
            ledger_problems=problems,
            worker_ends=map(_worker_end, reversed(self._pool.ends)),
            drain_timeout=convert.duration(self._drain_timeout_s),
            recovery_limits=system_service_pb2.RecoveryLimits(
                enabled=services.recovery.enabled,
                max_spool_bytes=services.recovery.max_spool_bytes,
            ),
        )

    async def Drain(
        self, request: system_service_pb2.DrainRequest
    ) -> system_service_pb2.DrainResponse:
        """Takes no new work and ends."""
        pending = self._supervisor.refuse_new_work()
        self._begin_drain()
        return system_service_pb2.DrainResponse(pending_operations=pending)

    def _worker(self, spec: WorkerSpec) -> system_service_pb2.WorkerInfo:
        pid = self._pool.pid(spec.worker_id)
        silent_s = self._pool.silent_s(spec.worker_id)
        problem = self._pool.problem(spec.worker_id)
        return system_service_pb2.WorkerInfo(
            id=spec.worker_id,
            kind=str(spec.kind),
            target=spec.target,
            pid=pid,
            state=self._state(spec, pid),
            memory_bytes=_resident_bytes(pid) if pid else 0,
            silent_for=None if silent_s is None else convert.duration(silent_s),
            problem=problem.message if problem is not None else "",
        )

    def _state(self, spec: WorkerSpec, pid: int) -> str:
        if self._pool.problem(spec.worker_id):
            return "unsupported"
        if not self._pool.answers(spec.worker_id):
            return "unresponsive"
        if self._pool.ended(spec.worker_id):
            return "gone"
        return "ready" if pid else "starting"


def _recovery(session: Session, stats: RecoveryStats) -> system_service_pb2.SessionRecovery:
    return system_service_pb2.SessionRecovery(
        session=session.name,
        recovering=session.state is SessionState.RECOVERING,
        recoveries=stats.recoveries,
        replayed=stats.replayed,
        to_replay=stats.to_replay,
        point_step=stats.point_step,
        kept_bytes=stats.kept_bytes,
        points=stats.points,
        point_cost=stats.point_cost,
        recovery_s=stats.recovery_s,
        replay_s=stats.replay_s,
        load_s=stats.load_s,
        point_time=convert.timestamp(stats.point_time) if stats.point_time else None,
        point_bytes=stats.point_bytes,
    )


def _worker_end(end: WorkerEnd) -> system_service_pb2.WorkerEnd:
    return system_service_pb2.WorkerEnd(
        kind=str(end.spec.kind),
        target=end.spec.target,
        cause=end.cause,
        time=convert.timestamp(end.time),
    )


def _folders(places: Places) -> list[system_service_pb2.StateFolder]:
    folders = (places.home, places.spool, places.store)
    found = [
        system_service_pb2.StateFolder(
            path=str(one.path),
            exists=one.exists,
            writable=one.writable,
            free_bytes=one.free_bytes,
        )
        for one in one_a_disk(folders)
    ]
    with contextlib.suppress(OSError):
        found[0].reserve_bytes = places.ballast.stat().st_size
    return found


def _open_work(waiting: Sequence[Operation]) -> system_service_pb2.OpenWork:
    oldest = min(waiting, key=lambda one: one.create_time)
    return system_service_pb2.OpenWork(
        target=oldest.target,
        operations=len(waiting),
        oldest=oldest.name,
        method=oldest.method,
        create_time=convert.timestamp(oldest.create_time),
        held=bool(oldest.client_id) and not oldest.commit_seq,
    )


def _failure(operation: Operation) -> system_service_pb2.Failure:
    assert operation.error is not None
    return system_service_pb2.Failure(
        operation=operation.name,
        method=operation.method,
        target=operation.target,
        finish_time=convert.timestamp(operation.finish_time),
        error=record_to_status(operation.error),
    )


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return 0
