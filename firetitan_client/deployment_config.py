"""What a deployment made by hand is asked for and described as.

Knows: the documented settings and states. Must not know: the daemon.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from firetitan.v1 import deployment_pb2

from firetitan_client.control_client import ACCOUNT, job_name_of

_State = deployment_pb2.Deployment
STATES = {
    _State.STATE_CREATING: "CREATING",
    _State.STATE_ACTIVE: "READY",
    _State.STATE_RECOVERING: "UPDATING",
    _State.STATE_FAILED: "FAILED",
    _State.STATE_DELETING: "DELETING",
    _State.STATE_STOPPED: "STOPPED",
}
"""States as the managed service calls them; STOPPED is ours: scaled to zero."""


_TRANSITIONS = {
    "SYNC": deployment_pb2.HOTLOAD_TRANSITION_SYNC,
    "ASYNC": deployment_pb2.HOTLOAD_TRANSITION_ASYNC,
}


@dataclass
class DeploymentInfo:
    """A deployment, as the managed service describes one."""

    deployment_id: str
    name: str
    """`accounts/local/deployments/<id>`."""
    state: str
    """CREATING, READY, UPDATING, FAILED, DELETING, or STOPPED: the next use starts it."""
    hot_load_bucket_url: str | None = None
    """None: snapshots lie in the daemon's store."""
    hot_load_trainer_job: str | None = None
    """Name of the trainer whose snapshots it serves."""
    hot_load_transition_type: str | None = None
    """SYNC or ASYNC; None: running sequences end on the weights they began with."""
    deployment_shape_version: str | None = None
    inference_model: str | None = None
    """What `DeploymentSampler(model=...)` takes."""
    base_model: str | None = None


def deployment_info(deployment: deployment_pb2.Deployment) -> DeploymentInfo:
    """A deployment of the daemon in documented terms."""
    deployment_id = deployment.name.rpartition("/")[2]
    name = f"accounts/{ACCOUNT}/deployments/{deployment_id}"
    trainer = deployment.trainer.rpartition("/")[2]
    return DeploymentInfo(
        deployment_id=deployment_id,
        name=name,
        state=STATES.get(deployment.state, "STATE_UNSPECIFIED"),
        hot_load_trainer_job=job_name_of(trainer) if trainer else None,
        deployment_shape_version=deployment.shape.name or None,
        hot_load_transition_type=next(
            (name for name, value in _TRANSITIONS.items() if value == deployment.transition), None
        ),
        inference_model=name,
        base_model=deployment.base_model,
    )


@dataclass
class DeploymentConfig:
    """What a deployment is to be. Settings without a remark have no effect on one machine."""

    deployment_id: str
    base_model: str
    """Hugging Face id or local folder."""
    description: str | None = None
    deployment_shape: str | None = None
    """Name of a deployment shape; None: derived from model and host."""
    expected_deployment_shape: str | None = None
    """What `deployment_shape` must be; a guard against mixing two profiles."""
    region: str | None = None
    min_replica_count: int = 0
    """At most `max_replica_count`; without effect: as many samplers run, or none."""
    max_replica_count: int = 1
    """Samplers. A deployment that exists and has more keeps them."""
    accelerator_type: str = "NVIDIA_H200_141GB"
    hot_load_bucket_type: str | None = "FW_HOSTED"
    hot_load_trainer_job: str | None = None
    """Id or name of the trainer whose snapshots it serves."""
    enable_hot_load: bool = True
    hot_load_transition_type: str | None = None
    """SYNC, ASYNC or None: running sequences end on the weights they began with."""
    skip_shape_validation: bool = False
    accept_shapeless_risk: bool = False
    disable_speculative_decoding: bool = False
    extra_args: list[str] | None = None
    extra_values: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    for_training: bool = False
    preemptible: bool = False

    @classmethod
    def from_training_profile(
        cls, *, deployment_id: str, base_model: str, profile: Any, **settings: Any
    ) -> Self:
        """A deployment of the shape that belongs to a training shape.

        Args:
            deployment_id: Its id.
            base_model: Hugging Face id or local folder.
            profile: A `TrainingShapeProfile`.
            settings: Further fields.

        Raises:
            ValueError: The profile names no deployment shape.
        """
        shape = getattr(profile, "deployment_shape", None) or getattr(
            profile, "deployment_shape_version", None
        )
        if not shape:
            raise ValueError("profile: names no deployment shape; make a DeploymentConfig directly")
        return cls(
            deployment_id=deployment_id,
            base_model=base_model,
            deployment_shape=shape,
            expected_deployment_shape=shape,
            **settings,
        )

    def validate(self) -> None:
        """Refuse settings that contradict each other.

        Raises:
            ValueError: Names the setting.
        """
        for name in ("deployment_id", "base_model"):
            if not getattr(self, name):
                raise ValueError(f"{name} is required")
        shape = (self.deployment_shape or "").strip()
        expected = (self.expected_deployment_shape or "").strip()
        if self.accept_shapeless_risk and shape:
            raise ValueError(
                f"accept_shapeless_risk cannot be combined with deployment_shape {shape!r}; leave "
                "one of them out"
            )
        if expected and shape != expected:
            raise ValueError(
                f"deployment_shape: is {shape!r}, the training profile's is {expected!r}; use "
                "DeploymentConfig.from_training_profile(...)"
            )
        if self.max_replica_count <= 0 or not 0 <= self.min_replica_count <= self.max_replica_count:
            raise ValueError(
                f"min_replica_count={self.min_replica_count}, max_replica_count="
                f"{self.max_replica_count}: give 1 or more, and a minimum of 0 up to that; "
                "scale_to_zero stops a deployment"
            )
        transition_of(self.hot_load_transition_type)

    def refuse_unsupported(self) -> None:
        """Refuse what the daemon cannot do rather than ignore it: there is nothing now."""


def transition_of(transition: str | None) -> deployment_pb2.HotloadTransition.ValueType:
    """What becomes of running sequences, as requests name it.

    Args:
        transition: SYNC (they end, then the weights change), ASYNC (they go over between two
            tokens), in any case, or None: they end on the weights they began with, beside new ones
            on the new weights.

    Raises:
        ValueError: Anything else.
    """
    if transition is None:
        return deployment_pb2.HOTLOAD_TRANSITION_UNSPECIFIED
    found = _TRANSITIONS.get(str(transition).strip().upper())
    if found is None:
        raise ValueError(f"hot_load_transition_type: is {transition!r}; give SYNC or ASYNC")
    return found
