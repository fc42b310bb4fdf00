"""What a trainer made by hand is asked for and answered with.

Knows: the documented settings. Must not know: the daemon.
"""

from __future__ import annotations

from dataclasses import dataclass

from firetitan_client.errors import InvalidArgument
from firetitan_client.inactivity import InactivityTimeout, inactivity_s
from firetitan_client.managed import refuse_ranks

_DISPLAY_NAME_LENGTH = 64
_LONGEST_INACTIVITY_S = 3 * 3600


@dataclass(frozen=True)
class CreatedTrainerJob:
    """A trainer that was asked for; it may still be loading its model."""

    job_name: str
    """`accounts/local/rlorTrainerJobs/<id>`."""
    job_id: str


@dataclass(frozen=True)
class TrainerServiceEndpoint:
    """A trainer that is ready."""

    job_name: str
    """`accounts/local/rlorTrainerJobs/<id>`."""
    job_id: str
    base_url: str
    """For `FiretitanServiceClient(base_url=...)`, in this and any other process."""
    max_context_length: int | None = None
    """Longest sequence, in tokens."""


@dataclass
class TrainerJobConfig:
    """What a trainer is to be. Settings without a remark have no effect on one machine."""

    base_model: str
    """Hugging Face id or local folder."""
    lora_rank: int = 0
    """0 trains every parameter."""
    max_context_length: int | None = None
    """Tokens; None: the model's own limit."""
    learning_rate: float = 1e-5
    """For information: each optim_step carries its own."""
    gradient_accumulation_steps: int | None = None
    """1 or None: accumulate with several backward calls a step."""
    node_count: int | None = None
    trainer_replica_count: int | None = None
    """1 or None; more is refused."""
    display_name: str | None = None
    hot_load_deployment_id: str | None = None
    """Deployment that shall serve this trainer's snapshots; it must exist."""
    region: str | None = None
    custom_image_tag: str | None = None
    extra_args: list[str] | None = None
    extra_values: dict[str, str] | None = None
    accelerator_type: str | None = None
    accelerator_count: int | None = None
    training_shape_ref: str | None = None
    """Name of a training shape; None: derived from model and host."""
    forward_only: bool = False
    """Run the frozen model and train nothing; lora_rank must be 0."""
    auto_select_training_shape: bool = False
    inactivity_timeout: InactivityTimeout | None = None
    """How long it may be unused before its worker is stopped; the next use starts it where it was.
    None: as the daemon is set; at most 3 hours."""
    disable_inactivity_cleanup: bool = False
    """Never stop it for being unused."""
    skip_validations: bool = False
    purpose: str | None = None
    preemptible: bool = False
    managed_by: str | None = None
    requested_job_id: str | None = None
    """The trainer's id; one that exists with equal settings is used. None: one is made up."""
    use_reservation: bool = True
    reservation_target: str | None = None

    def validate(self) -> None:
        """Refuse settings that contradict each other.

        Raises:
            ValueError: Names every one, a line each.
        """
        problems: list[str] = []
        if not self.base_model:
            problems.append("base_model is required")
        for name in ("lora_rank", "max_context_length"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and 0 <= value < 2**31):
                problems.append(f"{name} must be a whole number of at least 0, is {value!r}")
        if self.gradient_accumulation_steps not in (None, 1):
            problems.append(
                "gradient_accumulation_steps must be 1; accumulate with several forward_backward "
                "calls before an optim_step"
            )
        if self.display_name is not None and len(self.display_name) >= _DISPLAY_NAME_LENGTH:
            problems.append(f"display_name must be fewer than {_DISPLAY_NAME_LENGTH} characters")
        if self.inactivity_timeout is not None:
            problems += _check_inactivity(self.inactivity_timeout)
        if self.forward_only and self.lora_rank:
            problems.append("lora_rank must be 0 with forward_only: it runs the base model")
        if self.training_shape_ref and self.auto_select_training_shape:
            problems.append("training_shape_ref and auto_select_training_shape cannot both be set")
        if self.training_shape_ref or self.auto_select_training_shape:
            problems += [
                f"{name} cannot be set together with a training shape; leave one of them out"
                for name in ("accelerator_type", "accelerator_count", "node_count")
                if getattr(self, name)
            ]
        if problems:
            raise ValueError("\n".join(problems))

    def refuse_unsupported(self) -> None:
        """Refuse what the daemon cannot do rather than ignore it.

        Raises:
            Unsupported: Names the setting.
        """
        refuse_ranks(self.trainer_replica_count)


def _check_inactivity(value: InactivityTimeout) -> list[str]:
    try:
        seconds = inactivity_s(value)
    except InvalidArgument as error:
        return [str(error)]
    if seconds > _LONGEST_INACTIVITY_S:
        return ["inactivity_timeout must be at most 3 hours"]
    return []
