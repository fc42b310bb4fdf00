"""What `firetitand` asks a running daemon: all it has, and to remove some of it.

Knows: the public services. Must not know: the command line, how the daemon does it.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import grpc
from firetitan.v1 import (
    deployment_pb2,
    deployment_service_pb2,
    deployment_service_pb2_grpc,
    lease_service_pb2,
    lease_service_pb2_grpc,
    session_pb2,
    system_service_pb2,
    system_service_pb2_grpc,
    trainer_pb2,
    trainer_service_pb2,
    trainer_service_pb2_grpc,
    training_service_pb2,
    training_service_pb2_grpc,
)

_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Row:
    """One trainer, session or deployment."""

    name: str
    state: str
    what: str
    """Its model and what it trains or serves."""
    idle_s: float | None
    """Since it was last used; None for sessions."""
    used_by: tuple[str, ...]
    """Clients that are there, for people."""
    cleanup: str
    """`stop` or `delete` where that waits for the last of them, else empty."""
    memory_bytes: int = 0
    """Of its worker processes."""
    error: str = ""


@dataclass(frozen=True)
class View:
    """A running daemon, as it tells of itself."""

    info: system_service_pb2.GetSystemInfoResponse
    trainers: Sequence[trainer_pb2.Trainer]
    sessions: Sequence[session_pb2.Session]
    deployments: Sequence[deployment_pb2.Deployment]
    leases: Sequence[lease_service_pb2.Lease]
    cleanups: Sequence[lease_service_pb2.DeferredCleanup]


class Resources:
    """Everything a daemon has, by its public services.

    Args:
        channel: To the daemon.
        timeout_s: For each question.
    """

    def __init__(self, channel: grpc.Channel, timeout_s: float = _TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._system = system_service_pb2_grpc.SystemServiceStub(channel)
        self._trainers = trainer_service_pb2_grpc.TrainerServiceStub(channel)
        self._training = training_service_pb2_grpc.TrainingServiceStub(channel)
        self._deployments = deployment_service_pb2_grpc.DeploymentServiceStub(channel)
        self._leases = lease_service_pb2_grpc.LeaseServiceStub(channel)

    def view(self) -> View:
        """All that a daemon tells of itself without looking its ledger over.

        Raises:
            grpc.RpcError: The daemon does not answer.
        """
        info = self._system.GetSystemInfo(
            system_service_pb2.GetSystemInfoRequest(), timeout=self._timeout_s
        )
        leases = self._leases.ListLeases(
            lease_service_pb2.ListLeasesRequest(), timeout=self._timeout_s
        )
        trainers = trainer_service_pb2.ListTrainersRequest()
        sessions = training_service_pb2.ListSessionsRequest()
        deployments = deployment_service_pb2.ListDeploymentsRequest()
        return View(
            info,
            list(self._pages(self._trainers.ListTrainers, trainers, "trainers")),
            list(self._pages(self._training.ListSessions, sessions, "sessions")),
            list(self._pages(self._deployments.ListDeployments, deployments, "deployments")),
            leases.leases,
            leases.cleanups,
        )

    def ledger_problems(self, timeout_s: float) -> Sequence[str]:
        """What a daemon finds wrong with its ledger, which takes seconds where that is large.

        Args:
            timeout_s: For the answer.

        Raises:
            grpc.RpcError: The daemon does not answer, or could not look.
        """
        request = system_service_pb2.GetSystemInfoRequest(check_ledger=True)
        return self._system.GetSystemInfo(request, timeout=timeout_s).ledger_problems

    def rows(self) -> list[Row]:
        """Trainers with their sessions, then deployments, by name.

        Raises:
            grpc.RpcError: The daemon does not answer.
        """
        view = self.view()
        users: dict[str, set[str]] = {}
        for lease in view.leases:
            for use in lease.uses:
                for name in (use.name, use.name.partition("/sessions/")[0]):
                    users.setdefault(name, set()).add(lease.label)
        waiting = {
            one.name: lease_service_pb2.Cleanup.Name(one.cleanup).removeprefix("CLEANUP_").lower()
            for one in view.cleanups
        }
        memory: Counter[str] = Counter()
        for worker in view.info.workers:
            memory[worker.target] += worker.memory_bytes
        make = functools.partial(_row, users=users, waiting=waiting, memory=memory)
        sessions: dict[str, list[Row]] = {}
        for session in view.sessions:
            rank = f"rank {session.lora.rank}" if session.lora.rank else "full-parameter"
            row = make(session, f"{rank}, step {session.step}")
            sessions.setdefault(session.name.partition("/sessions/")[0], []).append(row)
        rows = []
        for trainer in view.trainers:
            rows.append(make(trainer, trainer.base_model))
            rows += sessions.get(trainer.name, [])
        for deployment in view.deployments:
            serves = deployment.active_snapshot or "the base model"
            what = f"{deployment.base_model}: {serves}"
            if deployment.replicas > 1:
                what += f", {deployment.ready_replicas} of {deployment.replicas} samplers"
            rows.append(make(deployment, what))
        return rows

    def remove(self, name: str) -> None:
        """Delete a trainer or a deployment and end its worker, or close a session.

        Raises:
            ValueError: The name of something else.
            grpc.RpcError: It could not be.
        """
        kind, _, rest = name.partition("/")
        if kind == "trainers" and "/sessions/" in name:
            self._training.CloseSession(training_service_pb2.CloseSessionRequest(name=name))
        elif kind == "trainers" and rest:
            self._trainers.DeleteTrainer(trainer_service_pb2.DeleteTrainerRequest(name=name))
        elif kind == "deployments" and rest:
            self._deployments.DeleteDeployment(
                deployment_service_pb2.DeleteDeploymentRequest(name=name)
            )
        else:
            raise ValueError(f"{name}: give a name as `firetitand ls` shows it")

    def _pages(self, call: Callable[..., Any], request: Any, field: str) -> Iterator[Any]:
        while True:
            answer = call(request, timeout=self._timeout_s)
            yield from getattr(answer, field)
            request.page_token = answer.next_page_token
            if not request.page_token:
                return


def _row(
    message: Any,
    what: str,
    users: Mapping[str, set[str]],
    waiting: Mapping[str, str],
    memory: Mapping[str, int],
) -> Row:
    fields = message.DESCRIPTOR.fields_by_name
    idle_s = None
    if "last_use_time" in fields:
        last = message.last_use_time.ToDatetime(tzinfo=UTC)
        idle_s = max(0.0, (datetime.now(UTC) - last).total_seconds())
    return Row(
        name=message.name,
        state=message.State.Name(message.state).removeprefix("STATE_").lower(),
        what=what,
        idle_s=idle_s,
        used_by=tuple(sorted(users.get(message.name, ()))),
        cleanup=waiting.get(message.name, ""),
        memory_bytes=memory.get(message.name, 0),
        error=message.error.message if "error" in fields else "",
    )
