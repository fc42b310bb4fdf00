"""What `firetitand ls` and `firetitand rm` say to a running daemon.

Knows: the public services. Must not know: the command line, how the daemon does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import grpc
from firetitan.v1 import (
    deployment_service_pb2,
    deployment_service_pb2_grpc,
    lease_service_pb2,
    lease_service_pb2_grpc,
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
    error: str = ""


class Resources:
    """Everything a daemon has, by its public services.

    Args:
        channel: To the daemon.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self._trainers = trainer_service_pb2_grpc.TrainerServiceStub(channel)
        self._training = training_service_pb2_grpc.TrainingServiceStub(channel)
        self._deployments = deployment_service_pb2_grpc.DeploymentServiceStub(channel)
        self._leases = lease_service_pb2_grpc.LeaseServiceStub(channel)

    def rows(self) -> list[Row]:
        """Trainers with their sessions, then deployments, by name.

        Raises:
            grpc.RpcError: The daemon does not answer.
        """
        answer = self._leases.ListLeases(lease_service_pb2.ListLeasesRequest(), timeout=_TIMEOUT_S)
        users: dict[str, set[str]] = {}
        for lease in answer.leases:
            for use in lease.uses:
                for name in (use.name, use.name.partition("/sessions/")[0]):
                    users.setdefault(name, set()).add(lease.label)
        waiting = {
            one.name: lease_service_pb2.Cleanup.Name(one.cleanup).removeprefix("CLEANUP_").lower()
            for one in answer.cleanups
        }
        sessions: dict[str, list[Row]] = {}
        for session in self._pages(
            self._training.ListSessions, training_service_pb2.ListSessionsRequest(), "sessions"
        ):
            rank = f"rank {session.lora.rank}" if session.lora.rank else "full-parameter"
            row = _row(session, f"{rank}, step {session.step}", users, waiting)
            sessions.setdefault(session.name.partition("/sessions/")[0], []).append(row)
        rows = []
        for trainer in self._pages(
            self._trainers.ListTrainers, trainer_service_pb2.ListTrainersRequest(), "trainers"
        ):
            rows.append(_row(trainer, trainer.base_model, users, waiting))
            rows += sessions.get(trainer.name, [])
        for deployment in self._pages(
            self._deployments.ListDeployments,
            deployment_service_pb2.ListDeploymentsRequest(),
            "deployments",
        ):
            serves = deployment.active_snapshot or "the base model"
            what = f"{deployment.base_model}: {serves}"
            if deployment.replicas > 1:
                what += f", {deployment.ready_replicas} of {deployment.replicas} samplers"
            rows.append(_row(deployment, what, users, waiting))
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

    @staticmethod
    def _pages(call: Callable[..., Any], request: Any, field: str) -> Iterator[Any]:
        while True:
            answer = call(request, timeout=_TIMEOUT_S)
            yield from getattr(answer, field)
            request.page_token = answer.next_page_token
            if not request.page_token:
                return


def _row(message: Any, what: str, users: dict[str, set[str]], waiting: dict[str, str]) -> Row:
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
        error=message.error.message if "error" in fields else "",
    )
