"""A service's samplers of other deployments: any that is served, or one made beside its own.

Knows: finding, making and cleaning up deployments such as a teacher's. Must not know: hotloading,
training, how samples travel.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from typing import Any

from firetitan.v1 import deployment_pb2, deployment_service_pb2

from firetitan_client import address as addresses
from firetitan_client import transport
from firetitan_client.deployment_config import STATES, DeploymentConfig, transition_of
from firetitan_client.deployment_sampler import DeploymentSampler
from firetitan_client.errors import (
    ClientClosed,
    FailedPrecondition,
    FiretitanError,
    InvalidArgument,
    NotFound,
)
from firetitan_client.futures import APIFuture
from firetitan_client.leases import DELETE, STOP, CleanupOutcome, Lease
from firetitan_client.managed import wait_operation
from firetitan_client.sample_requests import Target, follow
from firetitan_client.service_core import ServiceCore
from firetitan_client.transport import Transport

logger = logging.getLogger("firetitan")

_State = deployment_pb2.Deployment
_CLEANUPS = (None, "delete", "scale_to_zero")


class InferenceDeployments(ServiceCore):
    """The part of a service that samples from deployments other than its own."""

    def create_deployment_sampler_for_model(
        self,
        model: str,
        *,
        tokenizer: Any = None,
        concurrency_controller: Any = None,
        inference_url: str | None = None,
    ) -> DeploymentSampler:
        """A sampler of any deployment that is served; the service's own is not touched.

        Args:
            model: A deployment's id or name, or the model that one serves.
            tokenizer: Tokenizer, folder or id; None: the model's.
            concurrency_controller: As for `create_deployment_sampler`.
            inference_url: Address of another daemon; None: the service's.

        Raises:
            NotFound: No deployment has this name or serves this model.
        """
        self._check_open()
        if not model:
            raise ValueError("model: give a deployment's id, or the model that one serves")
        daemon = self._transport
        if inference_url is not None:
            other = addresses.resolve(inference_url).address
            daemon = daemon if other == daemon.address else transport.connect(other)
        work = _find(daemon, model)
        return self._native(
            "create_deployment_sampler_for_model", work, daemon, tokenizer, concurrency_controller
        )

    def create_inference_deployment_sampler(
        self,
        deployment_config: DeploymentConfig,
        *,
        timeout_s: float = 5400,
        cleanup_on_close: str | None = None,
        tokenizer: Any = None,
        concurrency_controller: Any = None,
    ) -> DeploymentSampler:
        """A sampler of one more deployment, e.g. a teacher's, made where it does not exist.

        Args:
            deployment_config: What it is to be.
            timeout_s: How long to wait until it serves.
            cleanup_on_close: "delete" or "scale_to_zero": what `close` does with it, if this call
                created it; one that exists is never cleaned up.
            tokenizer: Tokenizer, folder or id; None: the model's.
            concurrency_controller: As for `create_deployment_sampler`.

        Raises:
            ValueError: A wrong setting, by name; an existing one of another base model.
            RuntimeError: It failed or is being deleted; says why.
            TimeoutError: It does not serve in time; it goes on loading.
        """
        self._check_open()
        if cleanup_on_close not in _CLEANUPS:
            raise ValueError(
                f"cleanup_on_close: is {cleanup_on_close!r}; give 'scale_to_zero', 'delete' or None"
            )
        if not isinstance(deployment_config, DeploymentConfig):
            raise InvalidArgument(
                f"deployment_config: is a {type(deployment_config).__name__}; give a "
                "DeploymentConfig",
                field="deployment_config",
            )
        if deployment_config.max_replica_count <= 0:
            raise ValueError(
                f"max_replica_count: is {deployment_config.max_replica_count}; an inference "
                "deployment needs 1 or more"
            )
        deployment_config.validate()
        deployment_config.refuse_unsupported()
        work = self._provide(deployment_config, timeout_s, cleanup_on_close)
        return self._native(
            "create_inference_deployment_sampler",
            work,
            self._transport,
            tokenizer,
            concurrency_controller,
        )

    def _native(
        self,
        label: str,
        work: Any,
        daemon: Transport,
        tokenizer: Any,
        concurrency_controller: Any,
    ) -> DeploymentSampler:
        ready: APIFuture[Target] = APIFuture(label)
        sampler = DeploymentSampler(
            tokenizer=tokenizer, concurrency_controller=concurrency_controller, ready=ready
        )

        async def open_() -> Target:
            found: deployment_pb2.Deployment = await work
            return Target(
                daemon,
                found.name,
                base_model=found.base_model,
                tokenizer=found.model.path or found.base_model,
                lease=self._lease if daemon is self._transport else Lease(daemon),
            )

        follow(open_(), ready)
        self._await_ready(sampler, "the deployment")
        return sampler

    async def _provide(
        self, config: DeploymentConfig, timeout_s: float, cleanup: str | None
    ) -> deployment_pb2.Deployment:
        deployment_id = config.deployment_id.rpartition("/")[2]
        name = f"deployments/{deployment_id}"
        await self._lease.hold(name)
        with contextlib.suppress(NotFound):
            _check_alive(await _get(self._transport, name))
        request = deployment_service_pb2.CreateDeploymentRequest(
            deployment_id=deployment_id,
            base_model=config.base_model,
            deployment_shape=config.deployment_shape or "",
            request_id=uuid.uuid4().hex,
            replicas=config.max_replica_count,
            transition=transition_of(config.hot_load_transition_type),
        )
        try:
            async with self._lease.creating(name):
                answer = await self._transport.call(
                    "DeploymentService/CreateDeployment",
                    request,
                    deployment_service_pb2.CreateDeploymentResponse,
                )
                if answer.created and cleanup is not None:
                    self._inference[name] = cleanup
        except ClientClosed:
            await self._drop_inference()
            raise
        try:
            async with asyncio.timeout(timeout_s):
                operation = await wait_operation(self._transport, answer.operation)
        except TimeoutError:
            raise TimeoutError(
                f"{name} does not serve within {timeout_s:g} s; it goes on loading"
            ) from None
        except FiretitanError as error:
            raise FailedPrecondition(
                f"{name} is in a terminal state: {error}",
                reason=error.reason,
                metadata=error.metadata,
            ) from error
        made: deployment_pb2.Deployment = operation.deployment
        return made

    async def _drop_inference(self) -> list[CleanupOutcome]:
        """Clean up the deployments this service made beside its own."""
        uses = {
            name: DELETE if cleanup == "delete" else STOP
            for name, cleanup in self._inference.items()
        }
        self._inference.clear()
        return await self._lease.release(uses) if uses else []


async def _get(daemon: Transport, name: str) -> deployment_pb2.Deployment:
    answer = await daemon.call(
        "DeploymentService/GetDeployment",
        deployment_service_pb2.GetDeploymentRequest(name=name),
        deployment_service_pb2.GetDeploymentResponse,
    )
    found: deployment_pb2.Deployment = answer.deployment
    return found


async def _find(daemon: Transport, model: str) -> deployment_pb2.Deployment:
    """The deployment of that id or name, else one that serves that model."""
    served: list[deployment_pb2.Deployment] = []
    token = ""
    while True:
        page = await daemon.call(
            "DeploymentService/ListDeployments",
            deployment_service_pb2.ListDeploymentsRequest(page_token=token),
            deployment_service_pb2.ListDeploymentsResponse,
        )
        served.extend(page.deployments)
        token = page.next_page_token
        if not token:
            break
    wanted = f"deployments/{model.rpartition('#')[2].rpartition('/')[2]}"
    by_name = [one for one in served if one.name == wanted]
    for found in [*by_name, *(one for one in served if one.base_model == model)]:
        _check_alive(found)
        return found
    names = ", ".join(f"{one.name} ({one.base_model})" for one in served) or "none"
    raise NotFound(
        f"model: no deployment has the name {model!r} or serves it; there are: {names}",
        reason="DEPLOYMENT_NOT_FOUND",
    )


def _check_alive(deployment: deployment_pb2.Deployment) -> None:
    if deployment.state in (_State.STATE_FAILED, _State.STATE_DELETING):
        why = f": {deployment.error.message}" if deployment.HasField("error") else ""
        raise FailedPrecondition(
            f"{deployment.name} is in a terminal state, {STATES.get(deployment.state)}{why}; "
            "delete it, or use another id"
        )
