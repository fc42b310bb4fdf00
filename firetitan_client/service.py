"""FiretitanServiceClient: where everything begins.

Knows: how a service is configured and ended. Must not know: how commands or samples travel.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar

from firetitan_client import address as addresses
from firetitan_client import transport
from firetitan_client.credentials import access_of
from firetitan_client.errors import FiretitanError
from firetitan_client.futures import APIFuture, completed
from firetitan_client.leases import DELETE, STOP, Cleanup, report
from firetitan_client.managed import (
    CLEANUP_DEPLOYMENT_ON_CLOSE_DELETE,
    FiretitanProvisioningConfig,
    build_config,
)
from firetitan_client.sample_requests import follow, load_tokenizer
from firetitan_client.service_control import ControlCalls
from firetitan_client.service_core import SILENCE_S
from firetitan_client.service_inference import InferenceDeployments
from firetitan_client.service_references import ReferenceClients
from firetitan_client.service_resuming import ResumingClients
from firetitan_client.service_sampling import SamplingClients
from firetitan_client.sessions import checkpoint_names
from firetitan_client.tinker_calls import TinkerServiceCalls
from firetitan_client.training_profile import TrainingShapeProfile, profile_of

logger = logging.getLogger("firetitan")
T = TypeVar("T")
_ENDINGS = ("success", "errored", "interrupted")


class FiretitanServiceClient(
    ReferenceClients,
    ResumingClients,
    SamplingClients,
    InferenceDeployments,
    ControlCalls,
    TinkerServiceCalls,
):
    """One trainer and one deployment on the local daemon, and the clients that use them.

    Made lazily: nothing is asked of the daemon before the first client is created. Prefer
    `from_firetitan_config`; this constructor joins a trainer by its endpoint, or makes one.

    Args:
        base_url: None or a cloud URL (the local daemon serves, nothing is dialled), or an
            endpoint's `firetitan+unix:/path#trainer`.
        api_key: The daemon's token, over TCP; ignored on a Unix socket.
        default_headers: Ignored.
        user_metadata: Your own notes, kept with the session.
        project_id: Ignored.
        address: Of the daemon, `unix:/path` or `host:port`; None: FIRETITAN_ADDRESS, else
            FIRETITAN_HOME's.
        trainer_job_id: Trainer to join.
        autostart: Start a daemon where none runs; None asks FIRETITAN_AUTOSTART.
        credentials: Folder of token and certificates, over TCP; None: FIRETITAN_CREDENTIALS, else
            FIRETITAN_HOME's.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        default_headers: Mapping[str, str] | None = None,
        user_metadata: Mapping[str, str] | None = None,
        project_id: str | None = None,
        *,
        address: str | None = None,
        trainer_job_id: str | None = None,
        autostart: bool | None = None,
        credentials: str | os.PathLike[str] | None = None,
    ) -> None:
        endpoint = addresses.resolve(base_url, address)
        self._setup(
            endpoint,
            FiretitanProvisioningConfig(trainer_job_id=trainer_job_id or endpoint.trainer_id),
            user_metadata,
            autostart,
            access_of(api_key, credentials),
            managed=False,
        )

    @classmethod
    def from_firetitan_config(
        cls,
        *,
        api_key: str | None = None,
        managed_config: FiretitanProvisioningConfig | Mapping[str, Any] | None = None,
        base_url: str | None = None,
        inference_url: str | None = None,
        hotload_api_url: str | None = None,
        additional_headers: Any = None,
        verify_ssl: bool | None = None,
        user_metadata: Mapping[str, str] | None = None,
        project_id: str | None = None,
        address: str | None = None,
        autostart: bool | None = None,
        credentials: str | os.PathLike[str] | None = None,
        **managed_config_kwargs: Any,
    ) -> Self:
        """A service that creates or attaches its trainer and deployment on first use.

        Needs no daemon yet.

        Args:
            api_key: The daemon's token, over TCP; ignored on a Unix socket.
            managed_config: All settings at once, instead of one by one.
            base_url: None or a cloud URL: the local daemon.
            inference_url: Ignored.
            hotload_api_url: Ignored.
            additional_headers: Ignored.
            verify_ssl: Ignored.
            user_metadata: Your own notes, kept with the session.
            project_id: Ignored.
            address: Of the daemon; None finds it.
            autostart: Start a daemon where none runs; None asks FIRETITAN_AUTOSTART.
            credentials: As in the constructor.
            managed_config_kwargs: Fields of `FiretitanProvisioningConfig`: base_model, lora_rank,
                deployment_id, trainer_job_id, create_deployment, cleanup_trainer_on_close ...

        Raises:
            ValueError: A setting out of range.
            TypeError: An unknown setting with a value.
        """
        service = cls.__new__(cls)
        endpoint = addresses.resolve(base_url, address)
        config = build_config(managed_config, managed_config_kwargs)
        config.trainer_job_id = config.trainer_job_id or endpoint.trainer_id
        access = access_of(api_key, credentials)
        service._setup(endpoint, config, user_metadata, autostart, access, managed=True)
        return service

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as its settings: another process joins trainer and deployment by their ids.

        What this service created stays its own to clean up.
        """
        return _reopened, (self._transport, self.config, self._user_metadata, self._managed)

    # What was resolved; while a call still makes it, asking waits

    @property
    def trainer_job_id(self) -> str:
        """The trainer's id, for another process's `trainer_job_id=`."""
        return self._resolved("trainer_job_id", lambda: self.managed_trainer_job_id)

    @property
    def deployment_id(self) -> str:
        """The deployment's id."""
        if not self._config.create_deployment:
            raise RuntimeError("this service has no deployment (create_deployment=False)")
        return self._resolved("deployment_id", lambda: self.managed_deployment_id)

    @property
    def max_context_length(self) -> int:
        """Longest sequence, in tokens."""
        return self._resolved("max_context_length", lambda: self.managed_max_context_length)

    @property
    def deployment_shape(self) -> str:
        """The deployment's shape, without its version."""
        return self._resolved("deployment_shape", lambda: self.managed_deployment_shape)

    @property
    def managed_trainer_job_id(self) -> str | None:
        """As `trainer_job_id`; None before the trainer exists."""
        trainer = self._provisioner.trainer
        return trainer.name.rpartition("/")[2] if trainer else None

    @property
    def managed_deployment_id(self) -> str | None:
        """As `deployment_id`; None before the deployment exists."""
        deployment = self._provisioner.deployment
        return deployment.name.rpartition("/")[2] if deployment else None

    @property
    def managed_max_context_length(self) -> int | None:
        """As `max_context_length`; None before the trainer exists."""
        trainer = self._provisioner.trainer
        if trainer is None:
            return None
        return trainer.max_context_length or int(trainer.model.max_context_length) or None

    @property
    def managed_deployment_shape(self) -> str | None:
        """As `deployment_shape`; None before the deployment, or its trainer, exists."""
        deployment, trainer = self._provisioner.deployment, self._provisioner.trainer
        name = deployment.shape.name if deployment else ""
        name = name or (trainer.shape.deployment_shape if trainer else "")
        return name.partition("/versions/")[0] or None

    @property
    def config(self) -> FiretitanProvisioningConfig:
        """A copy of the settings in effect, those without effect here too."""
        return copy.copy(self._config)

    @property
    def training_profile(self) -> TrainingShapeProfile | None:
        """The trainer's shape: the one named, or derived from model and host; None before."""
        trainer = self._provisioner.trainer
        return profile_of(trainer.shape) if trainer and trainer.shape.name else None

    @property
    def accelerator_type(self) -> None:
        """None: nothing was scheduled."""

    @property
    def accelerator_count(self) -> None:
        """None: nothing was scheduled."""

    @property
    def training_session_id(self) -> None:
        """None: there are no serverless sessions."""

    @property
    def training_session_name(self) -> None:
        """None: there are no serverless sessions."""

    @property
    def reference_client_job_id(self) -> str:
        """Id of the trainer that serves the reference: its own, or the policy's."""
        return self.reference_trainer_job_id or self.trainer_job_id

    @property
    def base_url(self) -> str:
        """Address and trainer, for another process's `FiretitanServiceClient(base_url=...)`."""
        trainer = self.managed_trainer_job_id or self._config.trainer_job_id
        return addresses.Endpoint(self._transport.address, trainer).base_url

    def _resolved(self, name: str, find: Callable[[], T | None]) -> T:
        found = find()
        if found is None:
            self._wait_until_made()
            found = find()
        if found is None:
            raise RuntimeError(f"{name} is not known yet; create a client first")
        return found

    def _tokenizer(self, path: str) -> Any:
        return load_tokenizer(self._config.tokenizer_model or path)

    def _checkpoint_names(self, parent: str) -> list[str]:
        names: APIFuture[list[str]] = APIFuture("list_checkpoints")
        follow(checkpoint_names(self._transport, parent), names)
        return names.result()

    # The end

    def close(self, status: str = "success", detail: str | None = None) -> APIFuture[None]:
        """End this service: what was called still runs, then what it created is cleaned up.

        A trainer or deployment that existed before is never touched. One that others use too stays
        until the last of them has left; the log says so. The first error is raised at the end,
        further ones are logged. Ctrl-C stops the waiting, not the clean-up. Again is fine.

        Args:
            status: tinker's word for how it ended, for the log: "success", "errored" or
                "interrupted".
            detail: Further words, for the log.

        Returns:
            A future that is done, for code that waits for it.
        """
        if status not in _ENDINGS:
            raise ValueError(f"status: is {status!r}; give one of {_ENDINGS}")
        if status != "success" or detail:
            logger.info("closing, %s: %s", status, detail or "no details")
        self._closed = True
        self._closing.run(
            ("what is being made", self._finish_making),
            ("the references", self._leave_references),
            ("the inference deployments", self._leave_inference),
            ("the calls that were made", self._finish_calls),
            ("the clean-up", self._leave),
            wait=not transport.in_own_thread(),  # who is at it may wait for this thread
        )
        return completed(None, "close")

    @property
    def _cleanups(self) -> dict[str, Cleanup]:
        """What to do with what this service created, in order."""
        provisioner, config = self._provisioner, self._config
        found: dict[str, Cleanup] = {}
        if self._pid != os.getpid():
            return found  # a forked child: what the parent made is the parent's
        if provisioner.deployment_created and config.cleanup_deployment_on_close is not None:
            delete = config.cleanup_deployment_on_close == CLEANUP_DEPLOYMENT_ON_CLOSE_DELETE
            found[provisioner.deployment_name] = DELETE if delete else STOP
        if provisioner.trainer_created and config.cleanup_trainer_on_close:
            found[provisioner.trainer_name] = DELETE
        return found

    def _finish_making(self) -> None:
        """Let what calls wait for be made, and ask for nothing else."""
        if not all(lane.wait_accepted(0) for lane in self._lanes):
            self._wait_until_made()
        transport.run(self._lease.settle()).result()

    def _leave_references(self) -> None:
        try:
            self._release_references()
        except FiretitanError as error:  # what matters more comes after it
            logger.warning("close: %s", error)

    def _leave_inference(self) -> None:
        if self._pid == os.getpid():
            report(transport.run(self._drop_inference()).result(), "close")

    def _finish_calls(self) -> None:
        for lane in self._lanes:
            lane.close()
        deletes_trainer = self._cleanups.get(self._provisioner.trainer_name) == DELETE
        for lane in self._lanes:
            if deletes_trainer:
                lane.wait_finished()
            else:
                lane.wait_accepted(SILENCE_S)
            for failure in lane.take_unseen():
                logger.warning("%s failed, unnoticed: %s", failure.label, failure.error)

    def _leave(self) -> None:
        """Ask for the clean-ups and give the lease back, in one request."""
        if not self._lease.held:
            self._lease.end()
            return
        outcomes = transport.run(self._lease.release(self._cleanups, everything=True)).result()
        report(outcomes, "close")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def __repr__(self) -> str:
        state = "closed" if self._closed else (self.managed_trainer_job_id or "nothing created yet")
        model = self._config.base_model or ""
        return f"<FiretitanServiceClient {self._transport.address} {model} {state}>"


def _reopened(
    transport: transport.Transport,
    config: FiretitanProvisioningConfig,
    user_metadata: Mapping[str, str],
    managed: bool,
) -> FiretitanServiceClient:
    service = FiretitanServiceClient.__new__(FiretitanServiceClient)
    endpoint = addresses.Endpoint(transport.address)
    service._setup(
        endpoint, config, user_metadata, transport.autostart, transport.access, managed=managed
    )
    return service
