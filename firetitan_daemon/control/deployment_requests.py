"""What a deployment is asked to be, and whether that is one that exists.

Knows: records. Must not know: workers, the manager.
"""

from __future__ import annotations

from dataclasses import dataclass

from firetitan_daemon.control import provisioning
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.model_records import Shape
from firetitan_daemon.core.ports import Limits
from firetitan_daemon.core.records import Deployment, HotloadTransition
from firetitan_daemon.core.shapes import unversioned


@dataclass(frozen=True)
class DeploymentRequest:
    """What a deployment is to be."""

    deployment_id: str
    """Empty: chosen here."""
    base_model: str
    max_context_length: int
    trainer: str
    """`trainers/{trainer}`, or empty."""
    dtype: str
    transition: HotloadTransition | None
    """Of hotloads that name none; None leaves that of a deployment that exists as it is."""
    request_id: str
    payload_digest: str
    shape_name: str = ""
    """Of its deployment shape; empty: derived."""
    shape: Shape | None = None
    """Set by the manager."""
    inactivity_s: float | None = None
    """None: the setting for a new one, what it was for one that exists; 0: never stopped."""
    replicas: int = 0
    """Samplers it is to have at least; 0: one, or as many as one that exists has."""


def check_replicas(replicas: int, limits: Limits) -> None:
    """Refuse a number of samplers that no deployment can have.

    Raises:
        FiretitanError: INVALID_ARGUMENT naming the limit.
    """
    if not 0 <= replicas <= limits.max_replicas:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"replicas: {replicas}; a deployment has 0 to {limits.max_replicas} samplers here, "
            "each with a copy of what it serves; ask for fewer, or raise limits.max_replicas",
            field="replicas",
            limit=str(limits.max_replicas),
        )


def check_same(existing: Deployment, request: DeploymentRequest) -> None:
    """Refuse to join a deployment that is not what was asked for; versions of shapes may differ.

    Raises:
        FiretitanError: ALREADY_EXISTS naming the field that differs; CLOSED while it is deleted.
    """
    shapes: list[tuple[str, object, object]] = []
    if request.shape_name and existing.shape and request.shape:
        found, asked = unversioned(existing.shape.name), unversioned(request.shape.name)
        shapes = [("deployment_shape", found, asked)]
    provisioning.check_same(
        existing,
        request.base_model,
        request.dtype,
        request.max_context_length,
        "deployment_id",
        *shapes,
    )
