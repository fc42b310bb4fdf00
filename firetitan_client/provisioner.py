"""Creating or finding a service's trainer and deployment, and taking back what a failed call made.

Knows: resource lifecycles, the lease that says what is used. Must not know: sessions, lanes,
clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from typing import Literal, TypeAlias

from firetitan.v1 import (
    deployment_pb2,
    deployment_service_pb2,
    operation_pb2,
    shape_service_pb2,
    trainer_pb2,
    trainer_service_pb2,
)

from firetitan_client import inactivity
from firetitan_client.deployment_config import transition_of
from firetitan_client.errors import FiretitanError, NotFound, Unsupported
from firetitan_client.leases import DELETE, KEEP, Cleanup, Lease
from firetitan_client.managed import (
    FiretitanProvisioningConfig,
    check_same,
    default_deployment_id,
    wait_operation,
)
from firetitan_client.transport import Transport

logger = logging.getLogger("firetitan")
Kind: TypeAlias = Literal["trainer", "deployment"]


class Provisioner:
    """Creates or finds one trainer and one deployment. Belongs to the background loop.

    Args:
        transport: The daemon.
        config: What is wanted; ids chosen here are written back before anything is created, so
            that a second try finds what the first one made.
        lease: Says what is used, before it is looked for.
        at_death: What is done with a trainer that was created here when this client dies.
    """

    def __init__(
        self,
        transport: Transport,
        config: FiretitanProvisioningConfig,
        lease: Lease,
        at_death: Cleanup = KEEP,
    ) -> None:
        self.transport = transport
        self.config = config
        self.lease = lease
        self._at_death = at_death
        self.trainer: trainer_pb2.Trainer | None = None
        self.deployment: deployment_pb2.Deployment | None = None
        self.trainer_created = False
        self.deployment_created = False
        self.needs_sync = False
        """Whether the attached deployment serves another trainer's weights."""
        self._joined_for = ""
        """The trainer the deployment was asked for; empty: for its base model alone."""
        self._kept: set[Kind] = set()
        """What a call made or found and then succeeded with."""
        self._begin()

    def _begin(self) -> None:
        self._trainer_task: asyncio.Task[trainer_pb2.Trainer] | None = None
        self._trainer_known = asyncio.Event()
        self._deployment_task: asyncio.Task[deployment_pb2.Deployment] | None = None
        self._openers: Counter[Kind] = Counter()

    def _after_fork(self) -> None:
        """In a child: the parent's calls go on there, and what it made is its own to remove."""
        self.trainer_created = self.deployment_created = False
        self._begin()

    @contextlib.asynccontextmanager
    async def opening(self, *kinds: Kind) -> AsyncIterator[None]:
        """Around a call that makes or finds some of these.

        Where it fails, what it created is removed again and what it found is let go, unless another
        call uses it.
        """
        self._openers.update(kinds)
        try:
            yield
        except BaseException:
            self._openers.subtract(kinds)
            await self._roll_back(kinds)
            raise
        self._openers.subtract(kinds)
        self._kept.update(kinds)

    async def _roll_back(self, kinds: Iterable[Kind]) -> None:
        left = {one for one in kinds if not self._openers[one]} - self._kept
        if self._trainer_task is not None and "trainer" in left:
            await asyncio.wait([self._trainer_task])
        uses: dict[str, Cleanup] = {}
        if "deployment" in left and self.config.deployment_id is not None:
            uses[self.deployment_name] = DELETE if self.deployment_created else KEEP
            self.deployment, self.deployment_created = None, False
        if "trainer" in left and self.config.trainer_job_id is not None:
            uses[self.trainer_name] = DELETE if self.trainer_created else KEEP
            self.trainer, self.trainer_created = None, False
        if not uses or not self.lease.held:
            return
        try:
            outcomes = await self.lease.release(uses)
        except FiretitanError as error:
            logger.warning("what was created could not be removed: %s", error)
        else:
            for outcome in outcomes:
                if outcome.error is not None:
                    logger.warning("%s could not be removed: %s", outcome.name, outcome.error)

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

    def check_deployment(self) -> None:
        """Refuse what needs a deployment where the service shall have none.

        Raises:
            Unsupported: It shall have none.
        """
        if not self.config.create_deployment:
            raise Unsupported(
                "this service has no deployment (create_deployment=False); create one without it, "
                "or sample with another service on the same trainer_job_id"
            )

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

    async def attach_deployment(self) -> deployment_pb2.Deployment:
        """The deployment, attached to the trainer where one is wanted.

        Apart from making it, as this changes what others see: it is the last thing a call does.
        """
        deployment = await self.get_deployment()
        if self._joined_for and deployment.trainer != self._joined_for:
            self.deployment = deployment = await self._ask_for_deployment(
                deployment.base_model, self._joined_for
            )
        return deployment

    async def scale_deployment(self, replicas: int) -> deployment_pb2.Deployment:
        """Have so many samplers; 0 stops them."""
        answer = await self.transport.call(
            "DeploymentService/ScaleDeployment",
            deployment_service_pb2.ScaleDeploymentRequest(
                name=self.deployment_name, replicas=replicas
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
                trainer_service_pb2.GetTrainerRequest(name=self.trainer_name),
                trainer_service_pb2.GetTrainerResponse,
            )
        except NotFound:
            if self.config.base_model is None:
                raise
            return None
        found: trainer_pb2.Trainer = answer.trainer
        return found

    @property
    def trainer_name(self) -> str:
        """`trainers/{trainer}` of the configured id."""
        return f"trainers/{self.config.trainer_job_id}"

    @property
    def deployment_name(self) -> str:
        """`deployments/{deployment}` of the configured id."""
        return f"deployments/{self.config.deployment_id}"

    async def _make_trainer(self) -> trainer_pb2.Trainer:
        config = self.config
        if config.trainer_job_id is None:
            if config.base_model is None:
                raise ValueError("base_model is required for a direct training client")
            kind = "reference" if config.forward_only else "training-api-service"
            config.trainer_job_id = f"{kind}-{uuid.uuid4().hex[:8]}"
        await self.lease.hold(self.trainer_name)
        found = await self.find_trainer()
        if found is not None:
            check_same(config, found)
        if config.create_deployment and config.deployment_id is not None:
            # Before anything is changed: what does not fit is refused as a whole.
            await self._find_deployment(found.base_model if found else config.base_model or "")
        if found is not None and found.state == trainer_pb2.Trainer.STATE_ACTIVE:
            self._trainer_known.set()
            return found
        operation = await wait_operation(self.transport, await self._ask_for_trainer(found))
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

    async def _ask_for_trainer(self, found: trainer_pb2.Trainer | None) -> operation_pb2.Operation:
        """Create the trainer, or start one that was found without a worker."""
        config = self.config
        request = trainer_service_pb2.CreateTrainerRequest(
            trainer_id=config.trainer_job_id or "",
            base_model=found.base_model if found else config.base_model or "",
            lora_rank=found.lora_rank if found else config.lora_rank or 0,
            max_context_length=config.max_context_length or 0,
            forward_only=found.forward_only if found else config.forward_only,
            max_lora_rank=found.max_lora_rank if found else config.max_lora_rank or 0,
            training_shape="" if found else config.training_shape_id or "",
            request_id=uuid.uuid4().hex,
            inactivity_timeout=inactivity.to_proto(
                config.inactivity_timeout, config.disable_inactivity_cleanup
            ),
        )
        async with self.lease.creating("the trainer"):
            answer = await self.transport.call(
                "TrainerService/CreateTrainer", request, trainer_service_pb2.CreateTrainerResponse
            )
            if answer.created:
                self.trainer_created = True
                await self.lease.hold(self.trainer_name, self._at_death)
        self._trainer_known.set()
        operation: operation_pb2.Operation = answer.operation
        return operation

    async def _make_deployment(self) -> deployment_pb2.Deployment:
        config = self.config
        self.check_deployment()
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
        joined_for = self.trainer_name if trainer is not None else ""
        if config.deployment_id is None:
            config.deployment_id = default_deployment_id(base_model)
        await self.lease.hold(self.deployment_name)
        existing = await self._find_deployment(base_model)
        if existing is not None:
            # It stays with its trainer: as it is then, unless it has to be made anew.
            failed = existing.state == deployment_pb2.Deployment.STATE_FAILED
            made = await self._ask_for_deployment(base_model, existing.trainer if failed else "")
        else:
            made = await self._ask_for_deployment(base_model, joined_for)
        if trainer is not None:
            await trainer
        self._joined_for = joined_for
        return made

    async def _ask_for_deployment(
        self, base_model: str, trainer_name: str
    ) -> deployment_pb2.Deployment:
        """Create the deployment, or join one that exists; no trainer leaves it with its own."""
        config = self.config
        request = deployment_service_pb2.CreateDeploymentRequest(
            deployment_id=config.deployment_id or "",
            base_model=base_model,
            max_context_length=config.max_context_length or 0,
            trainer=trainer_name,
            deployment_shape=await self._deployment_shape(),
            request_id=uuid.uuid4().hex,
            transition=transition_of(config.hot_load_transition_type),
            replicas=config.replica_count or 1,
            inactivity_timeout=inactivity.to_proto(
                config.inactivity_timeout, config.disable_inactivity_cleanup
            ),
        )
        async with self.lease.creating("the deployment"):
            answer = await self.transport.call(
                "DeploymentService/CreateDeployment",
                request,
                deployment_service_pb2.CreateDeploymentResponse,
            )
            self.deployment_created = self.deployment_created or answer.created
        operation = await wait_operation(self.transport, answer.operation)
        made: deployment_pb2.Deployment = operation.deployment
        if made.state == deployment_pb2.Deployment.STATE_STOPPED:
            made = await self.scale_deployment(made.replicas)
        self.needs_sync = made.requires_sync
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

    async def _find_deployment(self, base_model: str) -> deployment_pb2.Deployment | None:
        """The deployment of the configured id, if there is one.

        Raises:
            ValueError: It is not what was asked for.
        """
        config = self.config
        try:
            answer = await self.transport.call(
                "DeploymentService/GetDeployment",
                deployment_service_pb2.GetDeploymentRequest(name=self.deployment_name),
                deployment_service_pb2.GetDeploymentResponse,
            )
        except NotFound:
            return None
        found: deployment_pb2.Deployment = answer.deployment
        length = found.max_context_length
        shape, asked = found.shape.name, await self._deployment_shape()
        for name, has, wanted in (
            ("base_model", found.base_model, base_model),
            ("max_context_length", length, (length and config.max_context_length) or length),
            ("deployment_shape", _shape_id(shape), _shape_id((shape and asked) or shape)),
        ):
            if has != wanted:
                raise ValueError(
                    f"{name}: this service has {wanted!r}, but deployment_id="
                    f"{config.deployment_id!r} exists with {has!r}; choose another deployment_id, "
                    f"or leave {name} out"
                )
        return found


def _shape_id(name: str) -> str:
    """The last part of a shape's name; versions may differ."""
    return name.partition("/versions/")[0].rpartition("/")[2]


def raise_first(outcomes: Iterable[object]) -> None:
    """Raise the first failure of an `asyncio.gather` that returned its exceptions."""
    for one in outcomes:
        if isinstance(one, BaseException):
            raise one
