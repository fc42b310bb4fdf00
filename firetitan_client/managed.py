"""The settings of a managed service, and whether a trainer fits them.

Knows: every documented setting. Must not know: how what is asked for is made (`provisioner`).
"""

from __future__ import annotations

import dataclasses
import logging
import re
import time
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from firetitan.v1 import (
    operation_pb2,
    operation_service_pb2,
    trainer_pb2,
)

from firetitan_client import arguments, convert, references
from firetitan_client.accepted_settings import AcceptedSettings
from firetitan_client.deployment_config import transition_of
from firetitan_client.errors import Unsupported, from_status
from firetitan_client.inactivity import InactivityTimeout, inactivity_s
from firetitan_client.transport import Transport

logger = logging.getLogger("firetitan")
T = TypeVar("T")

_IDS = ("trainer_job_id", "reference_trainer_job_id", "deployment_id")
_COUNTS = (
    "lora_rank",
    "max_lora_rank",
    "max_context_length",
    "replica_count",
    "trainer_replica_count",
)
_SWITCHES = (
    "train_mlp",
    "train_attn",
    "train_unembed",
    "create_deployment",
    "reference_required",
    "cleanup_trainer_on_close",
    "cleanup_reference_trainer_on_close",
    "forward_only",
    "disable_inactivity_cleanup",
)

DeploymentCleanupOnClose = Literal["delete", "scale_to_zero"]
CLEANUP_DEPLOYMENT_ON_CLOSE_DELETE: DeploymentCleanupOnClose = "delete"
CLEANUP_DEPLOYMENT_ON_CLOSE_SCALE_TO_ZERO: DeploymentCleanupOnClose = "scale_to_zero"


@dataclass
class FiretitanProvisioningConfig(AcceptedSettings):
    """What a managed service works with. None: chosen, or taken from what exists."""

    base_model: str | None = None
    """Hugging Face id or local folder."""
    tokenizer_model: str | None = None
    """Id or folder of the tokenizer; None: the base model's."""
    lora_rank: int | None = None
    """0 trains every parameter; None: the trainer's, 0 for a new one."""
    lora_alpha: float | None = None
    """Scale numerator; None: 32."""
    seed: int | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None
    train_unembed: bool | None = None
    max_context_length: int | None = None
    """Tokens; None: the model's own limit."""
    trainer_job_id: str | None = None
    """Joined where it exists, else created under this id."""
    create_deployment: bool = True
    deployment_id: str | None = None
    """Attached where it exists, else created under this id."""
    training_shape_id: str | None = None
    """Of a new trainer; None: derived from model and host. See `docs/operations.md`."""
    deployment_shape: str | None = None
    """Of the deployment; None: the one that belongs to `training_shape_id`, or derived."""
    reference_training_shape_id: str | None = None
    """Set: the reference has a forward-only trainer of its own, of this shape."""
    reference_trainer_job_id: str | None = None
    """Set: the reference is this forward-only trainer; joined where it exists, else created."""
    reference_required: bool = False
    """Make a separate reference trainer together with the policy's, not at its first use."""
    learning_rate: float = 1e-5
    """For information: each optim_step carries its own."""
    trainer_replica_count: int | None = None
    replica_count: int | None = 1
    """Samplers of the deployment. One that exists and has more keeps them."""
    cleanup_trainer_on_close: bool = False
    """Delete the trainer on close, if this service created it."""
    cleanup_reference_trainer_on_close: bool = True
    """Delete a separate reference trainer on release or close, if this service created it."""
    cleanup_deployment_on_close: DeploymentCleanupOnClose | None = None
    """What to do with the deployment on close, if this service created it."""
    max_lora_rank: int | None = None
    """Set: many training clients, each an adapter of at most this rank, on one trainer."""
    hot_load_transition_type: str | None = None
    """SYNC, ASYNC or None: what becomes of running sequences at a hotload."""
    forward_only: bool = False
    """The trainer runs the frozen model and trains nothing."""
    inactivity_timeout: InactivityTimeout | None = None
    """How long trainer and deployment may be unused before their workers are stopped; the next use
    starts them where they were. Seconds, a timedelta or "1800s"; None: as the daemon is set."""
    disable_inactivity_cleanup: bool = False
    """Never stop them for being unused."""
    trainer_timeout_s: float = 3600.0
    deployment_timeout_s: float = 5400.0
    hotload_timeout_s: float | None = 600.0
    projection_head_dim: int | None = None

    def __post_init__(self) -> None:
        self._check_values()
        if self.max_lora_rank is not None:
            if self.lora_rank is not None or self.lora_alpha is not None:
                raise ValueError(
                    "max_lora_rank cannot be combined with service-level lora_rank or lora_alpha; "
                    "pass LoRA configuration to create_training_client"
                )
            if self.forward_only:
                raise ValueError("max_lora_rank cannot be combined with forward_only")
            if self.max_lora_rank == 0:
                raise ValueError("max_lora_rank: is 0; give a rank above 0, or leave it out")
        if self.inactivity_timeout is not None:
            inactivity_s(self.inactivity_timeout)
        if self.cleanup_deployment_on_close not in (None, "delete", "scale_to_zero"):
            raise ValueError(
                f"cleanup_deployment_on_close: is {self.cleanup_deployment_on_close!r}; give "
                "'scale_to_zero', 'delete' or None"
            )
        if self.replica_count == 0:
            logger.warning("replica_count=0: taken as 1")
        self.replica_count = self.replica_count or 1
        refuse_ranks(self.trainer_replica_count)
        transition_of(self.hot_load_transition_type)
        if self.forward_only and self.lora_rank:
            raise ValueError(
                f"lora_rank: {self.lora_rank} with forward_only=True; a forward-only trainer runs "
                "the base model and has no adapter, leave lora_rank out"
            )
        if self.projection_head_dim is not None:
            raise Unsupported(
                "projection_head_dim is not supported; leave it out", field="projection_head_dim"
            )
        if self.hotload_timeout_s is None:
            self.hotload_timeout_s = 600.0

    def _check_values(self) -> None:
        """Refuse what could not be sent, by name, before anything is asked of a daemon."""
        if self.base_model is not None:
            self.base_model = arguments.model_name(self.base_model)
        for name in _IDS:
            if getattr(self, name) is not None:
                references.check_name(getattr(self, name), name)
        for name in _COUNTS:
            if getattr(self, name) is not None:
                convert.whole_number(getattr(self, name), name, 0, 2**31 - 1)
        for name in _SWITCHES:
            arguments.switch(getattr(self, name), name)
        if self.seed is not None:
            convert.whole_number(self.seed, "seed", -(2**63), 2**63 - 1)
        if self.lora_alpha is not None:
            arguments.scale(self.lora_alpha, "lora_alpha")


def refuse_ranks(trainer_replica_count: int | None) -> None:
    """Refuse more than one data-parallel rank rather than ignore it.

    Raises:
        Unsupported: More than one was asked for.
    """
    if trainer_replica_count not in (None, 0, 1):
        raise Unsupported(
            f"trainer_replica_count={trainer_replica_count}: a trainer is one worker process on "
            "one device, nothing sums gradients over several yet; leave it out: gradients of "
            "several forward_backward calls add up before an optim_step",
            field="trainer_replica_count",
        )


_ALIASES = {
    "model_name": "base_model",
    "training_shape": "training_shape_id",
    "training_shape_ref": "training_shape_id",
    "trainer_id": "trainer_job_id",
    "deployment_replica_count": "replica_count",
}
_DEPRECATED = ("accelerator_type", "accelerator_count", "node_count")


def build_config(
    managed_config: FiretitanProvisioningConfig | Mapping[str, Any] | None, given: dict[str, Any]
) -> FiretitanProvisioningConfig:
    """The settings of `from_firetitan_config`.

    Args:
        managed_config: All at once.
        given: Or one by one, aliases included. None means the default.

    Raises:
        ValueError: Both, a value out of range, or a name and its alias.
        TypeError: An unknown name with a value.
    """
    if managed_config is not None:
        if any(value is not None for value in given.values()):
            raise ValueError(
                "Pass either managed_config or managed config keyword arguments, not both"
            )
        if isinstance(managed_config, FiretitanProvisioningConfig):
            return dataclasses.replace(managed_config)
        if not isinstance(managed_config, Mapping):
            raise TypeError(
                f"managed_config: is a {type(managed_config).__name__}; give a "
                "FiretitanProvisioningConfig or a dict of its fields"
            )
        given = dict(managed_config)
    known = {entry.name for entry in dataclasses.fields(FiretitanProvisioningConfig)}
    values: dict[str, Any] = {}
    by_alias: dict[str, str] = {}
    for name, value in given.items():
        target = _ALIASES.get(name, name)
        if name in _DEPRECATED and value is not None:
            warnings.warn(f"{name} has no effect", DeprecationWarning, stacklevel=3)
        if target in known:
            if value is None:
                continue
            if name != target and given.get(target) is not None:
                raise ValueError(f"Pass either '{target}' or alias '{name}', not both")
            if name != target and target in by_alias:
                raise ValueError(f"Pass only one alias for '{target}'")
            if name != target:
                by_alias[target] = name
            if not (value == "" and target.endswith("_id")):
                values[target] = value
        elif value is not None:
            raise TypeError(f"from_firetitan_config() got an unexpected keyword argument {name!r}")
    return FiretitanProvisioningConfig(**values)


def check_same(config: FiretitanProvisioningConfig, trainer: trainer_pb2.Trainer) -> None:
    """Refuse a trainer that is not what was asked for.

    Raises:
        ValueError: Another base model or rank, naming both.
    """
    if config.base_model is not None and config.base_model != trainer.base_model:
        raise ValueError(
            f"base_model: {config.base_model!r} was asked for, trainer {config.trainer_job_id!r} "
            f"has {trainer.base_model!r}; leave base_model out to join it"
        )
    if config.max_lora_rank is not None and config.max_lora_rank != trainer.max_lora_rank:
        raise ValueError(
            f"max_lora_rank: {config.max_lora_rank} was asked for, trainer "
            f"{config.trainer_job_id!r} has {trainer.max_lora_rank or 'one session'}; leave "
            "max_lora_rank out to join it"
        )
    one_session = not trainer.max_lora_rank
    if one_session and config.lora_rank is not None and config.lora_rank != trainer.lora_rank:
        raise ValueError(
            f"lora_rank: {config.lora_rank} was asked for, trainer {config.trainer_job_id!r} has "
            f"{trainer.lora_rank}; leave lora_rank out to join it"
        )
    if config.forward_only and not trainer.forward_only:
        raise ValueError(
            f"trainer {config.trainer_job_id!r} trains, a forward-only one was asked for; give the "
            "id of a forward-only trainer, or leave it out to get one"
        )
    length = trainer.max_context_length
    if config.max_context_length and length and config.max_context_length != length:
        raise ValueError(
            f"max_context_length: {config.max_context_length} was asked for, trainer "
            f"{config.trainer_job_id!r} has {length}; leave max_context_length out to join it"
        )


def default_deployment_id(base_model: str) -> str:
    """`<model>-<unix time>-<4 hex>` in the letters names may have."""
    last = base_model.rstrip("/").rpartition("/")[2].lower()
    short = re.sub(r"[^a-z0-9-]+", "-", last).strip("-")[:40] or "model"
    return f"{short}-{int(time.time())}-{uuid.uuid4().hex[:4]}"


async def wait_operation(
    transport: Transport, operation: operation_pb2.Operation
) -> operation_pb2.Operation:
    """Wait until an operation is done, in slices.

    Raises:
        FiretitanError: It failed, by reason.
    """
    while not operation.done:
        request = operation_service_pb2.WaitOperationRequest(name=operation.name)
        request.timeout.FromSeconds(20)
        answer = await transport.call(
            "OperationService/WaitOperation",
            request,
            operation_service_pb2.WaitOperationResponse,
        )
        operation = answer.operation
    if operation.result_omitted:
        got = await transport.call(
            "OperationService/GetOperation",
            operation_service_pb2.GetOperationRequest(name=operation.name),
            operation_service_pb2.GetOperationResponse,
        )
        operation = got.operation
    if operation.HasField("error"):
        raise from_status(operation.error)
    return operation
