"""A service's sampling clients: the deployment, brought to a snapshot where one is named.

Knows: hotloading, pinning. Must not know: how samples travel.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from firetitan.v1 import deployment_service_pb2

from firetitan_client import arguments, references
from firetitan_client.deployment_sampler import DeploymentSampler
from firetitan_client.errors import (
    FailedPrecondition,
    FiretitanError,
    InvalidArgument,
    NotFound,
    SnapshotNotActive,
)
from firetitan_client.futures import APIFuture, made
from firetitan_client.managed import wait_operation
from firetitan_client.sample_requests import Target, follow
from firetitan_client.sampling import FiretitanSamplingClient
from firetitan_client.service_core import ServiceCore
from firetitan_client.sessions import find_snapshot
from firetitan_client.transport import Transport

logger = logging.getLogger("firetitan")


class SamplingClients(ServiceCore):
    """The part of a service that makes sampling clients."""

    def create_sampling_client(
        self,
        model_path: Any = None,
        base_model: str | None = None,
        retry_config: Any = None,
        deployment_sampler: DeploymentSampler | None = None,
        *,
        tokenizer: Any = None,
        concurrency_controller: Any = None,
        training_client: Any = None,
        pinned: bool = False,
        record_stability_info: bool = False,
    ) -> FiretitanSamplingClient:
        """A tinker-shaped client of the deployment.

        Args:
            model_path: Snapshot to bring to the deployment first; None: whatever it serves.
            base_model: Must be the service's.
            retry_config: Ignored, with a warning: retries need no settings here.
            deployment_sampler: Sample from where this one does; `model_path` is brought there.
            tokenizer: Tokenizer, folder or id; None: the service's.
            concurrency_controller: Its `acquire` and `release` surround each request; None: all
                run at once, the daemon batches them.
            training_client: Ignored.
            pinned: Stay with `model_path` instead of following the deployment.
            record_stability_info: Not supported.

        Raises:
            RuntimeError: The snapshot could not be brought to the deployment; says why.
        """
        self._check_open()
        arguments.stability_info(record_stability_info)
        if pinned and model_path is None:
            raise ValueError("pinned=True needs model_path, the snapshot to stay with")
        if retry_config is not None:
            logger.warning("retry_config is ignored: retries need no settings here")
        self._agree("base_model", base_model, self._config.base_model)
        path = None if model_path is None else references.snapshot_reference(model_path)
        return self._sampling(
            lambda: self._path(path),
            tokenizer,
            pinned,
            controller=concurrency_controller,
            of=deployment_sampler,
            base_model=base_model,
        )

    def _sampling_after(
        self, saved: APIFuture[Any], *, pinned: bool, wait: bool = True
    ) -> FiretitanSamplingClient:
        async def path() -> str:
            return references.snapshot_reference(await saved)

        return self._sampling(path, None, pinned=pinned, wait=wait)

    @staticmethod
    async def _path(path: str | None) -> str | None:
        return path

    def _sampling(
        self,
        path: Callable[[], Any],
        tokenizer: Any,
        pinned: bool,
        wait: bool = True,
        controller: Any = None,
        of: DeploymentSampler | None = None,
        base_model: str | None = None,
    ) -> FiretitanSamplingClient:
        config, before = self._config, self._config.base_model
        config.base_model = base_model or before
        ready: APIFuture[Target] = APIFuture("create_sampling_client")
        client = FiretitanSamplingClient(
            ready,
            tokenizer=tokenizer or self._config.tokenizer_model,
            concurrency_controller=controller,
        )

        async def open_() -> Target:
            snapshot = await path()
            if not pinned:
                return await self._open_target(snapshot, of)
            return await self._open_pinned(snapshot, client, of)

        def restore(_: Any) -> None:
            if self._training or self._provisioner.trainer or self._provisioner.deployment:
                return  # others go by it
            if ready.cancelled() or ready.exception() is not None:
                config.base_model = before

        follow(open_(), ready)
        if wait:
            self._await_ready(client, "the deployment", lambda: ready.add_done_callback(restore))
        return client

    def create_deployment_sampler(
        self, model_path: Any = None, tokenizer: Any = None, concurrency_controller: Any = None
    ) -> DeploymentSampler:
        """FireTitan's own sampler of the deployment.

        Args:
            model_path: Snapshot to bring to the deployment first; None: whatever it serves.
            tokenizer: Tokenizer, folder or id; None: the service's.
            concurrency_controller: Its `acquire` and `release` surround each request.
        """
        self._check_open()
        path = None if model_path is None else references.snapshot_reference(model_path)
        ready: APIFuture[Target] = APIFuture("create_deployment_sampler")
        sampler = DeploymentSampler(
            tokenizer=tokenizer or self._config.tokenizer_model,
            concurrency_controller=concurrency_controller,
            ready=ready,
        )
        follow(self._open_target(path), ready)
        self._await_ready(sampler, "the deployment")
        return sampler

    def hotload_sampler_snapshot(self, model_path: Any) -> None:
        """Bring a snapshot to the deployment; new requests are answered by it.

        Raises:
            RuntimeError: It could not be; what was served before is served on.
        """
        self._check_open()
        done: APIFuture[Target] = APIFuture("hotload_sampler_snapshot")
        follow(self._open_target(references.snapshot_reference(model_path)), done)
        done.result()

    async def hotload_sampler_snapshot_async(self, model_path: Any) -> None:
        """As `hotload_sampler_snapshot`, for coroutines."""
        self._check_open()
        done: APIFuture[Target] = APIFuture("hotload_sampler_snapshot")
        follow(self._open_target(references.snapshot_reference(model_path)), done)
        await done

    def requires_initial_sampler_sync(self) -> bool:
        """Whether the attached deployment still serves another trainer's weights.

        While a call still attaches it, asking waits.
        """
        self._wait_until_made()
        return self._provisioner.needs_sync

    async def _open_target(self, path: str | None, of: DeploymentSampler | None = None) -> Target:
        """What to sample from, a snapshot brought to it: the service's deployment, or another."""
        if of is not None:
            target = await of._ready
            if path is not None:
                await self._hotload(target.transport, target.deployment, path)
            return replace(target, snapshot="")
        provisioner = self._provisioner
        provisioner.check_deployment()
        if path is not None and provisioner.deployment is None:
            # Before anything is made for it.
            with _hotload_failure(path, NotFound, InvalidArgument):
                await find_snapshot(self._transport, path)
        async with provisioner.opening("deployment", "trainer"):
            deployment = await provisioner.attach_deployment()
            if path is not None:
                await self._hotload(self._transport, deployment.name, path)
        return Target(
            self._transport,
            deployment.name,
            base_model=deployment.base_model,
            tokenizer=deployment.model.path or deployment.base_model,
            lease=self._lease,
        )

    async def _open_pinned(
        self, path: str, client: FiretitanSamplingClient, of: DeploymentSampler | None
    ) -> Target:
        daemon = self._transport if of is None else (await of._ready).transport
        snapshot = await find_snapshot(daemon, path)
        for last in (False, False, True):
            target = replace(await self._open_target(snapshot, of), snapshot=snapshot)
            try:
                await client.hold_snapshot(target)
            except SnapshotNotActive:  # another client's hotload came in between
                if last:
                    raise
            else:
                break
        return target

    async def _hotload(self, daemon: Transport, deployment: str, path: str) -> None:
        with _hotload_failure(path, FiretitanError):
            answer = await daemon.call(
                "DeploymentService/HotloadSnapshot",
                deployment_service_pb2.HotloadSnapshotRequest(
                    deployment=deployment, snapshot=path, request_id=uuid.uuid4().hex
                ),
                deployment_service_pb2.HotloadSnapshotResponse,
            )
            await wait_operation(daemon, answer.operation)
        if daemon is self._transport and deployment == self._provisioner.deployment_name:
            self._provisioner.needs_sync = False

    # Twins: `await` them for the client

    async def create_sampling_client_async(
        self, *args: Any, **kwargs: Any
    ) -> FiretitanSamplingClient:
        """As `create_sampling_client`."""
        return await made(self.create_sampling_client, *args, **kwargs)

    async def create_deployment_sampler_async(self, *args: Any, **kwargs: Any) -> DeploymentSampler:
        """As `create_deployment_sampler`."""
        return await made(self.create_deployment_sampler, *args, **kwargs)


@contextlib.contextmanager
def _hotload_failure(path: str, *kinds: type[FiretitanError]) -> Iterator[None]:
    """Raises errors of some kinds as the documented RuntimeError."""
    try:
        yield
    except kinds as error:
        raise FailedPrecondition(
            f"Hotload failed for sampler snapshot {path!r}: {error}",
            reason=error.reason,
            field=error.field,
            metadata=error.metadata,
        ) from error
