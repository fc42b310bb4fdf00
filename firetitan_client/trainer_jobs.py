"""TrainerJobManager: trainers made and kept by hand, in the managed service's terms.

Knows: a trainer's life and its documented names and states. Must not know: sessions, commands.
"""

from __future__ import annotations

import logging
import uuid
from typing import Any

from firetitan.v1 import (
    deployment_pb2,
    deployment_service_pb2,
    trainer_pb2,
    trainer_service_pb2,
)

from firetitan_client import address as addresses
from firetitan_client import inactivity
from firetitan_client.control_client import (
    deployment_id_of,
    job_id_of,
    job_name_of,
    pauses,
    rfc3339,
)
from firetitan_client.errors import AlreadyExists, FailedPrecondition, NotFound, from_status
from firetitan_client.fireworks_client import FireworksClient
from firetitan_client.references import check_name
from firetitan_client.trainer_job_config import (
    CreatedTrainerJob,
    TrainerJobConfig,
    TrainerServiceEndpoint,
)

logger = logging.getLogger("firetitan")

_State = trainer_pb2.Trainer
_JOB_STATES = {
    _State.STATE_CREATING: "JOB_STATE_CREATING",
    _State.STATE_ACTIVE: "JOB_STATE_RUNNING",
    _State.STATE_RECOVERING: "JOB_STATE_CREATING",
    _State.STATE_STOPPED: "JOB_STATE_PAUSED",
    _State.STATE_FAILED: "JOB_STATE_FAILED",
    _State.STATE_DELETING: "JOB_STATE_DELETING",
}


class TrainerJobManager(FireworksClient):
    """Trainers of the local daemon.

    Every `job_id` may also be the trainer's name. A trainer stays until it is deleted, whatever
    becomes of this manager's process.
    """

    def create(self, config: TrainerJobConfig) -> CreatedTrainerJob:
        """Ask for a trainer; returns while it loads its model.

        An id that exists with equal settings is that trainer; a failed one is started again.

        Raises:
            ValueError: Contradicting settings, or another trainer has this id.
            NotFound: `hot_load_deployment_id` does not exist.
            Unsupported: More than one replica.
        """
        config.validate()
        config.refuse_unsupported()
        return self._run("create", self._create(config))

    def create_and_wait(
        self,
        config: TrainerJobConfig,
        poll_interval_s: float = 5.0,
        timeout_s: float = 900.0,
        pending_timeout_s: float = 48 * 3600.0,
    ) -> TrainerServiceEndpoint:
        """As `create`, then `wait_for_ready`."""
        created = self.create(config)
        return self.wait_for_ready(
            created.job_id, created.job_name, poll_interval_s, timeout_s, pending_timeout_s
        )

    def wait_for_ready(
        self,
        job_id: str,
        job_name: str | None = None,
        poll_interval_s: float = 5.0,
        timeout_s: float = 900.0,
        pending_timeout_s: float = 48 * 3600.0,
    ) -> TrainerServiceEndpoint:
        """Wait until a trainer has loaded its model.

        Args:
            job_id: Id or name of the trainer.
            job_name: Ignored.
            poll_interval_s: Longest pause between two looks.
            timeout_s: Seconds; the trainer goes on loading after them.
            pending_timeout_s: Ignored: nothing waits for capacity here.

        Raises:
            TimeoutError: Not ready in time.
            NotFound: No such trainer.
            RuntimeError: It failed, says why; or it is being deleted.
        """
        work = self._wait(job_id_of(job_id), poll_interval_s, timeout_s)
        return self._endpoint(self._run("wait_for_ready", work))

    def wait_for_existing(
        self,
        job_id: str,
        poll_interval_s: float = 5.0,
        timeout_s: float = 900.0,
        pending_timeout_s: float = 48 * 3600.0,
    ) -> TrainerServiceEndpoint:
        """As `wait_for_ready`; starts nothing."""
        return self.wait_for_ready(job_id, None, poll_interval_s, timeout_s, pending_timeout_s)

    def resume_and_wait(
        self,
        job_id: str,
        poll_interval_s: float = 5.0,
        timeout_s: float = 900.0,
        pending_timeout_s: float = 48 * 3600.0,
    ) -> TrainerServiceEndpoint:
        """Start a failed trainer's worker again and wait for it; one that runs is left alone.

        A worker started again has no session: load a checkpoint to go on.

        Raises:
            TimeoutError: Not ready in time.
            NotFound: No such trainer.
            RuntimeError: It failed again, says why; or it is being deleted.
        """
        return self.reconnect_and_wait(job_id, poll_interval_s, timeout_s, 0.0, pending_timeout_s)

    def reconnect_and_wait(
        self,
        job_id: str,
        poll_interval_s: float = 5.0,
        timeout_s: float = 600.0,
        max_wait_for_resumable_s: float = 120.0,
        pending_timeout_s: float = 48 * 3600.0,
    ) -> TrainerServiceEndpoint:
        """Whatever state a trainer is in, make it ready: wait for it, or start it again.

        Args:
            job_id: Id or name of the trainer.
            poll_interval_s: Longest pause between two looks.
            timeout_s: Seconds until it is ready, from its being loading or started again.
            max_wait_for_resumable_s: Seconds for one that is loading or sought to become ready or
                failed, before `timeout_s` begins.
            pending_timeout_s: Ignored: nothing waits for capacity here.

        Raises:
            TimeoutError: Not ready in time.
            NotFound: No such trainer.
            RuntimeError: It failed again, says why; or it is being deleted.
        """
        work = self._reconnect(
            job_id_of(job_id), poll_interval_s, timeout_s, max_wait_for_resumable_s
        )
        return self._endpoint(self._run("reconnect_and_wait", work))

    def get(self, job_id: str) -> dict[str, Any]:
        """A trainer, as the managed service describes one.

        Returns:
            `name`, `state` (`JOB_STATE_...`), `createTime`, `trainingConfig` with `baseModel`,
            `loraRank` and `maxContextLength`, `directRouteHandle` (its base_url), and `status`
            with code and message where it failed.

        Raises:
            NotFound: No such trainer.
        """
        return self._describe(self._run("get", self._find_trainer(job_id_of(job_id))))

    def try_get(self, job_id: str) -> dict[str, Any] | None:
        """As `get`; None where there is no such trainer."""
        try:
            return self.get(job_id)
        except NotFound:
            return None

    def delete(self, job_id: str) -> None:
        """End a trainer; what it accepted still runs, what it saved stays.

        One that is gone already is fine.
        """
        self._run("delete", self._delete(job_id_of(job_id)))

    async def _create(self, config: TrainerJobConfig) -> CreatedTrainerJob:
        trainer_id = config.requested_job_id or f"training-api-service-{uuid.uuid4().hex[:8]}"
        check_name(trainer_id, "requested_job_id")
        deployment = await self._deployment(config)
        await self._start(
            trainer_service_pb2.CreateTrainerRequest(
                trainer_id=trainer_id,
                base_model=config.base_model,
                lora_rank=config.lora_rank,
                max_context_length=config.max_context_length or 0,
                forward_only=config.forward_only,
                training_shape=config.training_shape_ref or "",
                inactivity_timeout=inactivity.to_proto(
                    config.inactivity_timeout, config.disable_inactivity_cleanup
                ),
            )
        )
        if deployment is not None:
            await self._transport.call(
                "DeploymentService/CreateDeployment",
                deployment_service_pb2.CreateDeploymentRequest(
                    deployment_id=deployment.name.rpartition("/")[2],
                    base_model=deployment.base_model,
                    trainer=f"trainers/{trainer_id}",
                    request_id=uuid.uuid4().hex,
                ),
                deployment_service_pb2.CreateDeploymentResponse,
            )
        return CreatedTrainerJob(job_name_of(trainer_id), trainer_id)

    async def _start(self, request: trainer_service_pb2.CreateTrainerRequest) -> None:
        request.request_id = uuid.uuid4().hex
        await self._transport.call(
            "TrainerService/CreateTrainer", request, trainer_service_pb2.CreateTrainerResponse
        )

    async def _start_again(self, trainer: trainer_pb2.Trainer) -> None:
        request = trainer_service_pb2.CreateTrainerRequest(
            trainer_id=trainer.name.rpartition("/")[2],
            base_model=trainer.base_model,
            lora_rank=trainer.lora_rank,
            max_context_length=trainer.max_context_length,
            forward_only=trainer.forward_only,
            max_lora_rank=trainer.max_lora_rank,
        )
        try:
            await self._start(request)
        except AlreadyExists as error:
            if error.field != "max_context_length":
                raise
            # What it shows is the model's own limit, not one that was asked for.
            request.max_context_length = 0
            await self._start(request)

    async def _deployment(self, config: TrainerJobConfig) -> deployment_pb2.Deployment | None:
        """The deployment to attach, looked at before anything is made."""
        if not config.hot_load_deployment_id:
            return None
        name = deployment_id_of(config.hot_load_deployment_id, "hot_load_deployment_id")
        answer = await self._transport.call(
            "DeploymentService/GetDeployment",
            deployment_service_pb2.GetDeploymentRequest(name=f"deployments/{name}"),
            deployment_service_pb2.GetDeploymentResponse,
        )
        found: deployment_pb2.Deployment = answer.deployment
        if found.base_model != config.base_model:
            raise ValueError(
                f"hot_load_deployment_id: {name!r} serves {found.base_model!r}, this trainer has "
                f"{config.base_model!r}; choose another deployment"
            )
        return found

    async def _wait(
        self, trainer_id: str, poll_interval_s: float, timeout_s: float
    ) -> trainer_pb2.Trainer:
        async for left_s in pauses(poll_interval_s, timeout_s):
            trainer = await self._find_trainer(trainer_id, left_s)
            if trainer.state == _State.STATE_ACTIVE:
                return trainer
            if trainer.state in (_State.STATE_FAILED, _State.STATE_DELETING):
                raise _not_ready(trainer)
        raise TimeoutError(
            f"trainer {trainer_id!r}: not ready within {timeout_s:g} s; it goes on, wait again"
        )

    async def _reconnect(
        self, trainer_id: str, poll_interval_s: float, timeout_s: float, settle_s: float
    ) -> trainer_pb2.Trainer:
        trainer = await self._find_trainer(trainer_id)
        if trainer.state in (_State.STATE_CREATING, _State.STATE_RECOVERING):
            async for left_s in pauses(poll_interval_s, settle_s):
                trainer = await self._find_trainer(trainer_id, left_s)
                if trainer.state not in (_State.STATE_CREATING, _State.STATE_RECOVERING):
                    break
        if trainer.state == _State.STATE_FAILED:
            logger.warning(
                "trainer %s failed and is started again without a session; load a checkpoint to "
                "go on. It failed because: %s",
                trainer_id,
                trainer.error.message,
            )
        if trainer.state in (_State.STATE_FAILED, _State.STATE_STOPPED):
            await self._start_again(trainer)
        return await self._wait(trainer_id, poll_interval_s, timeout_s)

    async def _delete(self, trainer_id: str) -> None:
        await self._transport.call(
            "TrainerService/DeleteTrainer",
            trainer_service_pb2.DeleteTrainerRequest(name=f"trainers/{trainer_id}"),
            trainer_service_pb2.DeleteTrainerResponse,
            timeout_s=None,
        )

    def _endpoint(self, trainer: trainer_pb2.Trainer) -> TrainerServiceEndpoint:
        trainer_id = trainer.name.rpartition("/")[2]
        return TrainerServiceEndpoint(
            job_name=job_name_of(trainer_id),
            job_id=trainer_id,
            base_url=addresses.Endpoint(self._transport.address, trainer_id).base_url,
            max_context_length=_length(trainer) or None,
        )

    def _describe(self, trainer: trainer_pb2.Trainer) -> dict[str, Any]:
        endpoint = self._endpoint(trainer)
        job: dict[str, Any] = {
            "name": endpoint.job_name,
            "state": _JOB_STATES.get(trainer.state, "JOB_STATE_UNSPECIFIED"),
            "createTime": rfc3339(trainer.create_time),
            "trainingConfig": {
                "baseModel": trainer.base_model,
                "loraRank": trainer.lora_rank,
                "maxContextLength": _length(trainer),
            },
            "directRouteHandle": endpoint.base_url,
        }
        if trainer.state == _State.STATE_FAILED:
            job["status"] = {"code": trainer.error.code, "message": trainer.error.message}
        return job


def _length(trainer: trainer_pb2.Trainer) -> int:
    return trainer.max_context_length or int(trainer.model.max_context_length)


def _not_ready(trainer: trainer_pb2.Trainer) -> FailedPrecondition:
    if trainer.state == _State.STATE_DELETING:
        return FailedPrecondition(f"{trainer.name} is being deleted", reason="CLOSED")
    cause = from_status(trainer.error)
    return FailedPrecondition(
        f"{trainer.name} failed: {cause.message}; put it right, then resume_and_wait",
        reason=cause.reason,
        field=cause.field,
        metadata=cause.metadata,
    )
