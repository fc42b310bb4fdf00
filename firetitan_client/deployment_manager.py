"""DeploymentManager: deployments made, kept and ended by hand, in the managed service's terms.

Knows: a deployment's life and its documented names. Must not know: how snapshots are brought to it
(`hotloading`), sessions.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Mapping
from typing import Any

from firetitan.v1 import deployment_pb2, deployment_service_pb2, sampling_service_pb2

from firetitan_client import types
from firetitan_client.control_client import deployment_id_of, job_id_of, pauses
from firetitan_client.deployment_config import (
    STATES,
    DeploymentConfig,
    DeploymentInfo,
    deployment_info,
    transition_of,
)
from firetitan_client.errors import (
    FailedPrecondition,
    FiretitanError,
    NotFound,
    Unsupported,
    from_status,
)
from firetitan_client.hotloading import Hotloading
from firetitan_client.sample_requests import build_request

logger = logging.getLogger("firetitan")

_State = deployment_pb2.Deployment
_AS_IT_IS = deployment_pb2.HOTLOAD_TRANSITION_UNSPECIFIED
_WARMUP_TRY_S = 60.0


class DeploymentManager(Hotloading):
    """Deployments of the local daemon.

    Every `deployment_id` may also be the deployment's name. A deployment stays until it is deleted,
    whatever becomes of this manager's process.

    Args:
        api_key: The daemon's token, over TCP; ignored on a Unix socket.
        base_url: None or a cloud URL (the local daemon serves, nothing is dialled), or an address.
        inference_url: Ignored.
        hotload_api_url: Ignored.
        additional_headers: Ignored.
        verify_ssl: Ignored.
        address: Of the daemon, `unix:/path` or `host:port`; None finds it.
        autostart: Start a daemon where none runs; None asks FIRETITAN_AUTOSTART.
        credentials: Folder of token and certificates, over TCP; None: FIRETITAN_CREDENTIALS, else
            FIRETITAN_HOME's.
    """

    def __init__(
        self,
        api_key: str | None = None,
        base_url: str | None = None,
        inference_url: str | None = None,
        hotload_api_url: str | None = None,
        additional_headers: Mapping[str, str] | None = None,
        verify_ssl: bool | None = None,
        *,
        address: str | None = None,
        autostart: bool | None = None,
        credentials: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(
            api_key,
            base_url,
            additional_headers,
            verify_ssl,
            address=address,
            autostart=autostart,
            credentials=credentials,
        )

    @property
    def inference_url(self) -> str:
        """As `base_url`, for `DeploymentSampler(inference_url=...)`."""
        return self.base_url

    def create_or_get(
        self, config: DeploymentConfig, force_recreate: bool = False
    ) -> DeploymentInfo:
        """Ask for a deployment; returns while it loads its model.

        An id that exists with the same base model is that deployment, attached to
        `hot_load_trainer_job` where one is given; a failed one is started again.

        Args:
            config: What it is to be.
            force_recreate: Delete one that exists first.

        Raises:
            ValueError: Contradicting settings, more samplers than the daemon allows, or the id
                serves another base model.
            NotFound: `hot_load_trainer_job` does not exist.
        """
        config.validate()
        config.refuse_unsupported()
        return self._run("create_or_get", self._create_or_get(config, force_recreate))

    def get(self, deployment_id: str) -> DeploymentInfo | None:
        """A deployment; None where there is none."""
        try:
            found = self._run("get", self._find_deployment(deployment_id_of(deployment_id)))
        except NotFound:
            return None
        return deployment_info(found)

    def delete(self, deployment_id: str) -> None:
        """End a deployment; one that is gone already is fine."""
        self._run("delete", self._delete(deployment_id_of(deployment_id)))

    def scale_to_zero(self, deployment_id: str) -> None:
        """Stop a deployment's workers; the record stays, the next use starts as many.

        Raises:
            NotFound: No such deployment.
        """
        self._run("scale_to_zero", self._scale(deployment_id_of(deployment_id), 0))

    def update(
        self, deployment_id: str, body: Mapping[str, Any], update_mask: str | list[str]
    ) -> DeploymentInfo:
        """Change the trainer a deployment is attached to, or how many samplers it has.

        Args:
            deployment_id: Id or name of the deployment.
            body: Values by field: `hotLoadTrainerJob`; `maxReplicaCount`: it has so many, 0 stops
                it; `minReplicaCount`: it gets as many where it has fewer.
            update_mask: Fields to change, in camelCase or snake_case, as list or comma-separated.

        Raises:
            ValueError: An empty mask, a field of it not in `body`, or a value out of range.
            NotFound: No such deployment or trainer.
            Unsupported: Another field.
        """
        fields = update_mask.split(",") if isinstance(update_mask, str) else list(update_mask)
        values = {_camel(name): value for name, value in body.items()}
        changes: dict[str, Any] = {}
        for name in (_camel(field) for field in fields if field.strip()):
            if name not in values:
                raise ValueError(f"update_mask: names {name!r}, which body does not hold")
            if name not in ("hotLoadTrainerJob", "minReplicaCount", "maxReplicaCount"):
                raise Unsupported(
                    f"update of {name!r} is not supported; hotLoadTrainerJob, minReplicaCount and "
                    "maxReplicaCount are",
                    field=name,
                )
            changes[name] = values[name]
        if not changes:
            raise ValueError("update_mask: names no field")
        _check_replicas(changes)
        work = self._update(deployment_id_of(deployment_id), changes)
        return self._run("update", work)

    def wait_for_ready(
        self, deployment_id: str, timeout_s: float = 5400.0, poll_interval_s: float = 5.0
    ) -> DeploymentInfo:
        """Wait until a deployment serves; one that is scaled to zero is started.

        Args:
            deployment_id: Id or name of the deployment.
            timeout_s: Seconds; it goes on loading after them.
            poll_interval_s: Longest pause between two looks.

        Raises:
            TimeoutError: Not ready in time.
            NotFound: No such deployment.
            RuntimeError: It failed, says why; or it is being deleted.
        """
        work = self._wait(deployment_id_of(deployment_id), timeout_s, poll_interval_s)
        return self._run("wait_for_ready", work)

    def reattach_trainer(
        self,
        deployment: DeploymentInfo | str,
        *,
        base_model: str,
        trainer_job_name: str,
        timeout_s: float,
        poll_interval_s: float = 5.0,
        hot_load_transition_type: str | None = None,
    ) -> DeploymentInfo:
        """Attach a deployment to another trainer and wait until it serves.

        It serves on what it served until the new trainer's first hotload.

        Args:
            deployment: It, or its id.
            base_model: Must be the deployment's and the trainer's.
            trainer_job_name: Id or name of the trainer.
            timeout_s: Seconds.
            poll_interval_s: Longest pause between two looks.
            hot_load_transition_type: SYNC, ASYNC, or None: as it is.

        Raises:
            ValueError: Another base model; nothing was changed.
            NotFound: No such deployment or trainer.
            TimeoutError: Attached, but not ready in time.
        """
        transition = transition_of(hot_load_transition_type)
        given = deployment if isinstance(deployment, str) else deployment.deployment_id
        deployment_id = deployment_id_of(given, "deployment")
        trainer_id = job_id_of(trainer_job_name, "trainer_job_name")

        async def work() -> DeploymentInfo:
            found = await self._find_deployment(deployment_id)
            self._agree(found, base_model)
            await self._attach(deployment_id, base_model, trainer_id, transition)
            return await self._wait(deployment_id, timeout_s, poll_interval_s)

        return self._run("reattach_trainer", work())

    def warmup(self, model: str, max_retries: int = 30, retry_interval_s: float = 10.0) -> bool:
        """Sample one token, which starts a deployment that is scaled to zero.

        Args:
            model: Id, name or `inference_model` of the deployment.
            max_retries: Tries.
            retry_interval_s: Seconds between them.

        Returns:
            Whether an answer came; why not is logged.

        Raises:
            NotFound: No such deployment.
        """
        name = f"deployments/{deployment_id_of(model, 'model')}"
        for attempt in range(1, max_retries + 1):
            try:
                self._run("warmup", self._sample_one(name))
            except NotFound:
                raise
            except FiretitanError as error:
                logger.warning("warmup of %s, try %d: %s", name, attempt, error)
                if attempt < max_retries:
                    time.sleep(retry_interval_s)
            else:
                return True
        return False

    async def _sample_one(self, name: str) -> None:
        request = build_request([0], 1, types.SamplingParams(max_tokens=1))
        request.deployment = name
        await self._transport.call(
            "SamplingService/Sample",
            request,
            sampling_service_pb2.SampleResponse,
            timeout_s=_WARMUP_TRY_S,
            patience_s=0.0,
        )

    async def _create_or_get(
        self, config: DeploymentConfig, force_recreate: bool
    ) -> DeploymentInfo:
        deployment_id = deployment_id_of(config.deployment_id)
        trainer_id = ""
        if config.hot_load_trainer_job:
            trainer_id = job_id_of(config.hot_load_trainer_job, "hot_load_trainer_job")
            await self._check_trainer(trainer_id, config.base_model)
        if force_recreate:
            await self._delete(deployment_id)
        shape = config.deployment_shape or ""
        transition = transition_of(config.hot_load_transition_type)
        await self._create(
            deployment_id,
            config.base_model,
            trainer_id,
            transition,
            shape,
            config.max_replica_count,
        )
        return deployment_info(await self._find_deployment(deployment_id))

    async def _attach(
        self,
        deployment_id: str,
        base_model: str,
        trainer_id: str,
        transition: deployment_pb2.HotloadTransition.ValueType = _AS_IT_IS,
    ) -> None:
        await self._check_trainer(trainer_id, base_model)
        await self._create(deployment_id, base_model, trainer_id, transition)

    async def _check_trainer(self, trainer_id: str, base_model: str) -> None:
        trainer = await self._find_trainer(trainer_id)
        if trainer.base_model != base_model:
            raise ValueError(
                f"base_model: {trainer.name} has {trainer.base_model!r}, this deployment "
                f"{base_model!r}; choose a trainer or a deployment of the same base model"
            )

    async def _create(
        self,
        deployment_id: str,
        base_model: str,
        trainer_id: str,
        transition: deployment_pb2.HotloadTransition.ValueType,
        shape: str = "",
        replicas: int = 0,
    ) -> None:
        await self._transport.call(
            "DeploymentService/CreateDeployment",
            deployment_service_pb2.CreateDeploymentRequest(
                deployment_id=deployment_id,
                base_model=base_model,
                trainer=f"trainers/{trainer_id}" if trainer_id else "",
                request_id=uuid.uuid4().hex,
                deployment_shape=shape,
                transition=transition,
                replicas=replicas,
            ),
            deployment_service_pb2.CreateDeploymentResponse,
        )

    async def _delete(self, deployment_id: str) -> None:
        await self._transport.call(
            "DeploymentService/DeleteDeployment",
            deployment_service_pb2.DeleteDeploymentRequest(name=f"deployments/{deployment_id}"),
            deployment_service_pb2.DeleteDeploymentResponse,
            timeout_s=None,
        )

    async def _scale(self, deployment_id: str, replicas: int) -> None:
        await self._transport.call(
            "DeploymentService/ScaleDeployment",
            deployment_service_pb2.ScaleDeploymentRequest(
                name=f"deployments/{deployment_id}", replicas=replicas
            ),
            deployment_service_pb2.ScaleDeploymentResponse,
            timeout_s=None,
        )

    async def _update(self, deployment_id: str, changes: Mapping[str, Any]) -> DeploymentInfo:
        found = await self._find_deployment(deployment_id)
        if "hotLoadTrainerJob" in changes:
            trainer_id = job_id_of(changes["hotLoadTrainerJob"], "hotLoadTrainerJob")
            await self._attach(deployment_id, found.base_model, trainer_id)
        running = 0 if found.state == _State.STATE_STOPPED else found.replicas
        wanted = changes.get("maxReplicaCount", max(running, changes.get("minReplicaCount", 0)))
        if wanted != running:
            await self._scale(deployment_id, wanted)
        return deployment_info(await self._find_deployment(deployment_id))

    async def _wait(
        self, deployment_id: str, timeout_s: float, poll_interval_s: float
    ) -> DeploymentInfo:
        async for left_s in pauses(poll_interval_s, timeout_s):
            found = await self._find_deployment(deployment_id, left_s)
            if found.state == _State.STATE_ACTIVE:
                return deployment_info(found)
            if found.state == _State.STATE_STOPPED:
                await self._scale(deployment_id, found.replicas)
            elif found.state in (_State.STATE_FAILED, _State.STATE_DELETING):
                cause = from_status(found.error)
                raise FailedPrecondition(
                    f"{found.name} is {STATES[found.state]}: {cause.message}; put it right, then "
                    "create_or_get",
                    reason=cause.reason,
                    field=cause.field,
                    metadata=cause.metadata,
                )
        raise TimeoutError(
            f"deployment {deployment_id!r}: not ready within {timeout_s:g} s; it goes on, wait "
            "again"
        )


def _camel(name: str) -> str:
    first, *rest = name.strip().split("_")
    return first + "".join(part.capitalize() for part in rest)


def _check_replicas(changes: Mapping[str, Any]) -> None:
    """Refuse numbers of samplers that contradict each other; how many there may be the daemon says.

    Raises:
        ValueError: Names the field.
    """
    for name in ("minReplicaCount", "maxReplicaCount"):
        count = changes.get(name, 0)
        if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < 2**31:
            raise ValueError(f"{name}: is {count!r}; give a whole number, 0 or more")
    least, most = changes.get("minReplicaCount", 0), changes.get("maxReplicaCount")
    if most is not None and least > most:
        raise ValueError(f"minReplicaCount: is {least}, above maxReplicaCount={most}")
