"""LeaseService.

Knows: messages, the manager. Must not know: rules.
"""

from __future__ import annotations

from collections.abc import Iterable

from firetitan.v1 import lease_service_pb2
from google.rpc import status_pb2

from firetitan_daemon.control.leases import LeaseManager, Outcome
from firetitan_daemon.control.services import Services
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.records import Cleanup
from firetitan_daemon.rpc import convert
from firetitan_daemon.rpc.errors import to_status

_CLEANUPS = {
    lease_service_pb2.CLEANUP_UNSPECIFIED: Cleanup.KEEP,
    lease_service_pb2.CLEANUP_STOP: Cleanup.STOP,
    lease_service_pb2.CLEANUP_DELETE: Cleanup.DELETE,
}
_NUMBERS = {cleanup: number for number, cleanup in _CLEANUPS.items()}


class LeaseServicer:
    """Holds, releases and lists leases."""

    def __init__(self, leases: LeaseManager, services: Services) -> None:
        self._leases = leases
        self._clock = services.clock

    async def HoldLease(
        self, request: lease_service_pb2.HoldLeaseRequest
    ) -> lease_service_pb2.HoldLeaseResponse:
        """Begins or renews a client's lease."""
        ttl_s = await self._leases.hold(
            request.client_id,
            request.label,
            _uses(request.uses),
            convert.seconds(request.ttl) if request.HasField("ttl") else None,
        )
        return lease_service_pb2.HoldLeaseResponse(ttl=convert.duration(ttl_s))

    async def ReleaseLease(
        self, request: lease_service_pb2.ReleaseLeaseRequest
    ) -> lease_service_pb2.ReleaseLeaseResponse:
        """Leaves what a client uses."""
        outcomes = await self._leases.release(
            request.client_id, _uses(request.uses), everything=request.all
        )
        return lease_service_pb2.ReleaseLeaseResponse(outcomes=map(_outcome, outcomes))

    async def ListLeases(
        self, request: lease_service_pb2.ListLeasesRequest
    ) -> lease_service_pb2.ListLeasesResponse:
        """Who uses what."""
        response = lease_service_pb2.ListLeasesResponse()
        for lease, left_s in self._leases.leases():
            response.leases.add(
                client_id=lease.client_id,
                label=lease.label,
                uses=[
                    lease_service_pb2.Use(name=name, cleanup=_NUMBERS[cleanup])
                    for name, cleanup in lease.uses.items()
                ],
                expire_time=convert.timestamp(self._clock.now() + left_s),
            )
        for one in self._leases.cleanups():
            response.cleanups.add(
                name=one.name,
                cleanup=_NUMBERS[one.cleanup],
                asked_by=one.asked_by,
                create_time=convert.timestamp(one.create_time),
                error=_status(self._leases.failure(one.name)),
            )
        return response


def _uses(messages: Iterable[lease_service_pb2.Use]) -> dict[str, Cleanup]:
    found = {}
    for index, message in enumerate(messages):
        cleanup = _CLEANUPS.get(message.cleanup)
        if cleanup is None:
            raise FiretitanError(
                Reason.INVALID_ARGUMENT,
                f"uses[{index}].cleanup: {message.cleanup} is not known; use 0, 1 or 2",
                field=f"uses[{index}].cleanup",
            )
        found[message.name] = cleanup
    return found


def _outcome(outcome: Outcome) -> lease_service_pb2.CleanupOutcome:
    message = lease_service_pb2.CleanupOutcome(
        name=outcome.name,
        cleanup=_NUMBERS[outcome.cleanup],
        used_by=outcome.used_by,
        error=_status(outcome.error),
    )
    return message


def _status(error: FiretitanError | None) -> status_pb2.Status | None:
    return None if error is None else to_status(error)
