"""Trainers and deployments: what was asked for, and creating or finding it.

Knows: every documented setting, resource lifecycles. Must not know: sessions, lanes, clients.
"""

from __future__ import annotations

import asyncio
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
    deployment_pb2,
    deployment_service_pb2,
    operation_pb2,
    operation_service_pb2,
    shape_service_pb2,
    trainer_pb2,
    trainer_service_pb2,
)

from firetitan_client.accepted_settings import AcceptedSettings
from firetitan_client.deployment_config import transition_of
from firetitan_client.errors import NotFound, Unsupported, from_status
from firetitan_client.transport import Transport

logger = logging.getLogger("firetitan")
T = TypeVar("T")

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
    trainer_timeout_s: float = 3600.0
    deployment_timeout_s: float = 5400.0
    hotload_timeout_s: float | None = 600.0
    projection_head_dim: int | None = None

    def __post_init__(self) -> None:
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
        for name in ("lora_rank", "max_lora_rank", "max_context_length"):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or int(value) != value or not 0 <= value < 2**31
            ):
                raise ValueError(f"{name}: is {value!r}; give a whole number from 0 to 2147483647")
        if self.cleanup_deployment_on_close not in (None, "delete", "scale_to_zero"):
            raise ValueError(
                f"cleanup_deployment_on_close: is {self.cleanup_deployment_on_close!r}; give "
                "'scale_to_zero', 'delete' or None"
            )
        if self.replica_count == 0:
            logger.warning("replica_count=0: taken as 1")
        self.replica_count = self.replica_count or 1
        if self.replica_count != 1:
            raise Unsupported(f"replica_count={self.replica_count}: one is supported on this host")
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
        if given:
            raise ValueError(
                "Pass either managed_config or managed config keyword arguments, not both"
            )
        if isinstance(managed_config, FiretitanProvisioningConfig):
            return dataclasses.replace(managed_config)
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


@dataclass(frozen=True)
class Found:
    """A trainer and whether this service created it."""

    trainer: trainer_pb2.Trainer
    created: bool


class Provisioner:
    """Creates or finds one trainer and one deployment. Belongs to the background loop.

    Args:
        transport: The daemon.
        config: What is wanted; ids chosen here are written back before anything is created, so
            that a second try finds what the first one made.
    """

    def __init__(self, transport: Transport, config: FiretitanProvisioningConfig) -> None:
        self.transport = transport
        self.config = config
        self.trainer: trainer_pb2.Trainer | None = None
        self.deployment: deployment_pb2.Deployment | None = None
        self.trainer_created = False
        self.deployment_created = False
        self.needs_sync = False
        """Whether the attached deployment serves another trainer's weights."""
        self._trainer_task: asyncio.Task[trainer_pb2.Trainer] | None = None
        self._trainer_known = asyncio.Event()
        self._deployment_task: asyncio.Task[deployment_pb2.Deployment] | None = None
        self._joined_for = ""
        """The trainer the deployment was asked for; empty: for its base model alone."""

    async def get_trainer(self) -> trainer_pb2.Trainer:
        """The trainer, ready."""
        if self.trainer is not None:
            return self.trainer
        if self._trainer_task is None:
            self._trainer_task = asyncio.get_running_loop().create_task(self._make_trainer())
        task = self._trainer_task
        try:
            self.trainer = await asyncio.shield(task)
        finally:
            if task.done() and self._trainer_task is task:
                self._trainer_task = None
        return self.trainer

    async def get_deployment(self) -> deployment_pb2.Deployment:
        """The deployment, ready; its trainer is made beside it where one is wanted."""
        if self.deployment is not None and (self._joined_for or not self._wants_trainer):
            return self.deployment
        if self._deployment_task is None:
            self._deployment_task = asyncio.get_running_loop().create_task(self._make_deployment())
        task = self._deployment_task
        try:
            self.deployment = await asyncio.shield(task)
        finally:
            if task.done() and self._deployment_task is task:
                self._deployment_task = None
        return self.deployment

    async def roll_back(self) -> None:
        """Remove what this service created, after provisioning failed half-way."""
        if self._trainer_task is not None:
            await asyncio.wait([self._trainer_task])
        if self.deployment_created and self.config.deployment_id:
            await self.delete_deployment()
        if self.trainer_created and self.config.trainer_job_id:
            await self.delete_trainer()

    async def delete_trainer(self) -> None:
        """Delete the trainer; its checkpoints stay."""
        await self.transport.call(
            "TrainerService/DeleteTrainer",
            trainer_service_pb2.DeleteTrainerRequest(name=self._trainer_name()),
            trainer_service_pb2.DeleteTrainerResponse,
            timeout_s=None,
        )
        self.trainer, self.trainer_created = None, False

    async def delete_deployment(self) -> None:
        """Delete the deployment."""
        await self.transport.call(
            "DeploymentService/DeleteDeployment",
            deployment_service_pb2.DeleteDeploymentRequest(name=self._deployment_name()),
            deployment_service_pb2.DeleteDeploymentResponse,
            timeout_s=None,
        )
        self.deployment, self.deployment_created = None, False

    async def scale_deployment(self, replicas: int) -> deployment_pb2.Deployment:
        """Stop the deployment's worker, or start it."""
        answer = await self.transport.call(
            "DeploymentService/ScaleDeployment",
            deployment_service_pb2.ScaleDeploymentRequest(
                name=self._deployment_name(), replicas=replicas
            ),
            deployment_service_pb2.ScaleDeploymentResponse,
            timeout_s=None,
        )
        scaled: deployment_pb2.Deployment = answer.deployment
        return scaled

    async def find_trainer(self) -> trainer_pb2.Trainer | None:
        """The trainer of the configured id, if there is one."""
        if not self.config.trainer_job_id:
            return None
        try:
            answer = await self.transport.call(
                "TrainerService/GetTrainer",
                trainer_service_pb2.GetTrainerRequest(name=self._trainer_name()),
                trainer_service_pb2.GetTrainerResponse,
            )
        except NotFound:
            if self.config.base_model is None:
                raise
            return None
        found: trainer_pb2.Trainer = answer.trainer
        return found

    def _trainer_name(self) -> str:
        return f"trainers/{self.config.trainer_job_id}"

    def _deployment_name(self) -> str:
        return f"deployments/{self.config.deployment_id}"

    async def _make_trainer(self) -> trainer_pb2.Trainer:
        config = self.config
        found = await self.find_trainer()
        if found is not None:
            check_same(config, found)
            if found.state == trainer_pb2.Trainer.STATE_ACTIVE:
                self._trainer_known.set()
                return found
        elif config.base_model is None:
            raise ValueError("base_model is required for a direct training client")
        if config.trainer_job_id is None:
            kind = "reference" if config.forward_only else "training-api-service"
            config.trainer_job_id = f"{kind}-{uuid.uuid4().hex[:8]}"
        self.trainer_created = self.trainer_created or found is None
        answer = await self.transport.call(
            "TrainerService/CreateTrainer",
            trainer_service_pb2.CreateTrainerRequest(
                trainer_id=config.trainer_job_id,
                base_model=found.base_model if found else config.base_model or "",
                lora_rank=found.lora_rank if found else config.lora_rank or 0,
                max_context_length=config.max_context_length or 0,
                forward_only=found.forward_only if found else config.forward_only,
                max_lora_rank=found.max_lora_rank if found else config.max_lora_rank or 0,
                training_shape="" if found else config.training_shape_id or "",
                request_id=uuid.uuid4().hex,
            ),
            trainer_service_pb2.CreateTrainerResponse,
        )
        self._trainer_known.set()
        operation = await wait_operation(self.transport, answer.operation)
        made: trainer_pb2.Trainer = operation.trainer
        logger.info(
            "trainer %s: %s from %s, shape %s (%d tokens, %s on %s)",
            made.name,
            made.base_model,
            made.model.source,
            made.shape.name,
            made.shape.max_context_length,
            made.shape.dtype,
            made.shape.device,
        )
        return made

    async def _make_deployment(self) -> deployment_pb2.Deployment:
        config = self.config
        if not config.create_deployment:
            raise Unsupported(
                "this service has no deployment (create_deployment=False); create one without it, "
                "or sample with another service on the same trainer_job_id"
            )
        trainer: asyncio.Task[trainer_pb2.Trainer] | None = None
        base_model = config.base_model
        if self._wants_trainer:
            # The deployment names its trainer, which need not be ready yet.
            trainer = asyncio.get_running_loop().create_task(self.get_trainer())
            known = asyncio.get_running_loop().create_task(self._trainer_known.wait())
            await asyncio.wait([trainer, known], return_when=asyncio.FIRST_COMPLETED)
            known.cancel()
            if trainer.done():
                trainer.result()
            base_model = base_model or (await trainer).base_model
        elif base_model is None:
            raise ValueError("base_model: missing; name the model to sample from")
        joined_for = self._trainer_name() if trainer is not None else ""
        found = await self._find_deployment(base_model, joined_for)
        if config.deployment_id is None:
            config.deployment_id = default_deployment_id(base_model)
        self.deployment_created = self.deployment_created or found is None
        answer = await self.transport.call(
            "DeploymentService/CreateDeployment",
            deployment_service_pb2.CreateDeploymentRequest(
                deployment_id=config.deployment_id,
                base_model=base_model,
                max_context_length=config.max_context_length or 0,
                trainer=joined_for,
                deployment_shape=await self._deployment_shape(),
                request_id=uuid.uuid4().hex,
                transition=transition_of(config.hot_load_transition_type),
            ),
            deployment_service_pb2.CreateDeploymentResponse,
        )
        operation = await wait_operation(self.transport, answer.operation)
        made: deployment_pb2.Deployment = operation.deployment
        if made.state == deployment_pb2.Deployment.STATE_STOPPED:
            made = await self.scale_deployment(1)
        if trainer is not None:
            await trainer
        self._joined_for = joined_for
        return made

    async def _deployment_shape(self) -> str:
        """The shape asked for, or the one that belongs to the named training shape."""
        config = self.config
        if config.deployment_shape or not config.training_shape_id:
            return config.deployment_shape or ""
        answer = await self.transport.call(
            "ShapeService/GetShape",
            shape_service_pb2.GetShapeRequest(name=config.training_shape_id),
            shape_service_pb2.GetShapeResponse,
        )
        return str(answer.shape.deployment_shape)

    @property
    def _wants_trainer(self) -> bool:
        """Whether anyone asked for training: a base model alone can be sampled without."""
        config = self.config
        settings = (config.trainer_job_id, config.lora_rank, config.max_lora_rank)
        asked = any(one is not None for one in settings)
        return asked or self.trainer is not None or self._trainer_task is not None

    async def _find_deployment(
        self, base_model: str, trainer: str
    ) -> deployment_pb2.Deployment | None:
        if self.config.deployment_id is None:
            return None
        try:
            answer = await self.transport.call(
                "DeploymentService/GetDeployment",
                deployment_service_pb2.GetDeploymentRequest(name=self._deployment_name()),
                deployment_service_pb2.GetDeploymentResponse,
            )
        except NotFound:
            return None
        found: deployment_pb2.Deployment = answer.deployment
        if found.base_model != base_model:
            raise ValueError(
                f"deployment_id: {self.config.deployment_id!r} serves {found.base_model!r}, this "
                f"service has {base_model!r}; choose another deployment_id"
            )
        if trainer and not self.deployment_created:
            self.needs_sync = found.trainer != trainer
        return found


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
