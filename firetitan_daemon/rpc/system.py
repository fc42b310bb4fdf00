"""SystemService: the daemon about itself.

Knows: messages, the supervisor, the pool. Must not know: rules.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from firetitan.v1 import system_service_pb2

from firetitan_daemon.control.recovery import RecoveryStats
from firetitan_daemon.control.sessions import SessionManager
from firetitan_daemon.control.supervisor import Supervisor
from firetitan_daemon.control.workers import WorkerPool
from firetitan_daemon.core.ports import Limits
from firetitan_daemon.core.records import Session, SessionState, WorkerSpec
from firetitan_daemon.host import max_connections
from firetitan_daemon.rpc import convert

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Identity:
    """Who this daemon is."""

    version: str
    instance_id: str
    pid: int
    home: Path
    start_time: float


class SystemServicer:
    """Version, limits, workers, draining."""

    def __init__(
        self,
        identity: Identity,
        limits: Limits,
        supervisor: Supervisor,
        pool: WorkerPool,
        sessions: SessionManager,
        begin_drain: Callable[[], None],
    ) -> None:
        self._identity = identity
        self._limits = limits
        self._supervisor = supervisor
        self._pool = pool
        self._sessions = sessions
        self._begin_drain = begin_drain

    async def GetSystemInfo(
        self, request: system_service_pb2.GetSystemInfoRequest
    ) -> system_service_pb2.GetSystemInfoResponse:
        """Version, limits and what runs."""
        identity, limits = self._identity, self._limits
        return system_service_pb2.GetSystemInfoResponse(
            version=identity.version,
            instance_id=identity.instance_id,
            pid=identity.pid,
            home=str(identity.home),
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
        return system_service_pb2.WorkerInfo(
            id=spec.worker_id,
            kind=str(spec.kind),
            target=spec.target,
            pid=pid,
            state=self._state(spec, pid),
            memory_bytes=_resident_bytes(pid) if pid else 0,
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
    )


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return 0
