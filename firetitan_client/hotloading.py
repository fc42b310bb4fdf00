"""Bringing snapshots to a deployment by hand, and telling how far one is.

Knows: HotloadSnapshot, the documented status. Must not know: how deployments are made.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from firetitan.v1 import (
    deployment_pb2,
    deployment_service_pb2,
    operation_pb2,
    operation_service_pb2,
)

from firetitan_client.control_client import ControlClient, deployment_id_of, pauses
from firetitan_client.deployment_config import STATES
from firetitan_client.errors import FiretitanError, NotFound, Unsupported, from_status
from firetitan_client.managed import wait_operation
from firetitan_client.references import snapshot_reference
from firetitan_client.sessions import find_snapshot

logger = logging.getLogger("firetitan")

_State = deployment_pb2.Deployment


@dataclass(frozen=True)
class _Hotload:
    snapshot: str
    """`snapshots/{snapshot}`."""
    operation: operation_pb2.Operation


class Hotloading(ControlClient):
    """The part of a deployment manager that brings snapshots to deployments.

    The chain from what is loaded to what is wanted is the daemon's: nothing about it is passed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._hotloads: dict[str, _Hotload] = {}
        self._last_error: str | None = None

    @property
    def last_hotload_error_message(self) -> str | None:
        """Why the last hotload waited for did not come to its end; None: it did."""
        return self._last_error

    def hotload(
        self,
        deployment_id: str,
        base_model: str,
        snapshot_identity: str,
        incremental_snapshot_metadata: Mapping[str, Any] | None = None,
        reset_prompt_cache: bool = True,
        timeout: float = 60,
        path: str | None = None,
        cmek_resource: str | None = None,
    ) -> dict[str, Any]:
        """Begin to bring a snapshot to a deployment; `wait_for_hotload` waits for the end.

        Args:
            deployment_id: Id or name of the deployment.
            base_model: The deployment's; empty: not compared.
            snapshot_identity: What `save_weights_for_sampler` returned.
            incremental_snapshot_metadata: Ignored: the daemon knows the chain.
            reset_prompt_cache: Forget every computed prompt; False keeps those of snapshots that
                stay loaded. What other weights computed is never used in either case.
            timeout: Seconds to wait for a daemon that is away.
            path: Not supported.
            cmek_resource: Not supported.

        Returns:
            `identity` of the snapshot and the daemon's `operation`.

        Raises:
            NotFound: No such deployment or snapshot.
            ValueError: Another base model, naming both.
        """
        for name, value in (("path", path), ("cmek_resource", cmek_resource)):
            if value is not None:
                raise Unsupported(f"{name} is not supported; leave it out", field=name)
        work = self._hotload(
            deployment_id_of(deployment_id),
            base_model,
            snapshot_identity,
            float(timeout),
            reset_prompt_cache,
        )
        begun = self._run("hotload", work)
        return {
            "identity": begun.snapshot.rpartition("/")[2],
            "operation": begun.operation.name,
        }

    def hotload_check_status(
        self, deployment_id: str, base_model: str, timeout: float = 30
    ) -> dict[str, Any]:
        """What a deployment serves, and how far this manager's last hotload of it is.

        Args:
            deployment_id: Id or name of the deployment.
            base_model: The deployment's; empty: not compared.
            timeout: Seconds to wait for a daemon that is away.

        Returns:
            `replicas`, none where it is scaled to zero, else one a sampler, each with
            `current_snapshot_identity` (empty: the base model), `readiness`, `loading_state` of
            `stage` ("done", "loading" or "error") and `target_snapshot_identity`, and
            `loaded_adapters`.
        """
        work = self._status(deployment_id_of(deployment_id), base_model, float(timeout))
        return self._run("hotload_check_status", work)

    def wait_for_hotload(
        self,
        deployment_id: str,
        base_model: str,
        expected_identity: str,
        timeout_seconds: float = 400,
        poll_interval: float = 5,
    ) -> bool:
        """Wait until a deployment serves a snapshot.

        Args:
            deployment_id: Id or name of the deployment.
            base_model: The deployment's; empty: not compared.
            expected_identity: The snapshot.
            timeout_seconds: The hotload goes on after them.
            poll_interval: Longest pause between two looks, in seconds, where another process
                hotloads.

        Returns:
            Whether it does; `last_hotload_error_message` says why not.
        """
        work = self._wait_hotload(
            deployment_id_of(deployment_id),
            base_model,
            expected_identity,
            float(timeout_seconds),
            float(poll_interval),
        )
        self._last_error = self._run("wait_for_hotload", work)
        if self._last_error is not None:
            logger.warning("%s", self._last_error)
        return self._last_error is None

    def hotload_and_wait(
        self,
        deployment_id: str,
        base_model: str,
        snapshot_identity: str,
        incremental_snapshot_metadata: Mapping[str, Any] | None = None,
        reset_prompt_cache: bool = True,
        timeout_seconds: float = 400,
        path: str | None = None,
        cmek_resource: str | None = None,
    ) -> bool:
        """`hotload`, then `wait_for_hotload`.

        Returns:
            Whether the deployment serves it; `last_hotload_error_message` says why not.

        Raises:
            NotFound: No such deployment or snapshot.
            ValueError: Another base model, naming both.
        """
        begun = self.hotload(
            deployment_id,
            base_model,
            snapshot_identity,
            incremental_snapshot_metadata,
            reset_prompt_cache,
            timeout_seconds,
            path,
            cmek_resource,
        )
        return self.wait_for_hotload(deployment_id, base_model, begun["identity"], timeout_seconds)

    async def _find_deployment(
        self, deployment_id: str, patience_s: float | None = None
    ) -> deployment_pb2.Deployment:
        answer = await self._transport.call(
            "DeploymentService/GetDeployment",
            deployment_service_pb2.GetDeploymentRequest(name=f"deployments/{deployment_id}"),
            deployment_service_pb2.GetDeploymentResponse,
            patience_s=patience_s,
        )
        found: deployment_pb2.Deployment = answer.deployment
        return found

    @staticmethod
    def _agree(deployment: deployment_pb2.Deployment, base_model: str) -> None:
        if base_model and base_model != deployment.base_model:
            raise ValueError(
                f"base_model: {base_model!r} was given, {deployment.name} serves "
                f"{deployment.base_model!r}; give that, or another deployment"
            )

    async def _hotload(
        self,
        deployment_id: str,
        base_model: str,
        identity: str,
        patience_s: float,
        reset_prompt_cache: bool,
    ) -> _Hotload:
        self._agree(await self._find_deployment(deployment_id, patience_s), base_model)
        snapshot = await find_snapshot(self._transport, snapshot_reference(identity))
        answer = await self._transport.call(
            "DeploymentService/HotloadSnapshot",
            deployment_service_pb2.HotloadSnapshotRequest(
                deployment=f"deployments/{deployment_id}",
                snapshot=snapshot,
                request_id=uuid.uuid4().hex,
                keep_prompt_cache=not reset_prompt_cache,
            ),
            deployment_service_pb2.HotloadSnapshotResponse,
            patience_s=patience_s,
        )
        begun = self._hotloads[deployment_id] = _Hotload(snapshot, answer.operation)
        return begun

    async def _status(
        self, deployment_id: str, base_model: str, patience_s: float
    ) -> dict[str, Any]:
        deployment = await self._find_deployment(deployment_id, patience_s)
        self._agree(deployment, base_model)
        if deployment.state == _State.STATE_STOPPED:
            return {"replicas": []}
        stage, target = "done", deployment.active_snapshot
        begun = self._hotloads.get(deployment_id)
        if begun is not None:
            answer = await self._transport.call(
                "OperationService/GetOperation",
                operation_service_pb2.GetOperationRequest(name=begun.operation.name),
                operation_service_pb2.GetOperationResponse,
            )
            if not answer.operation.done:
                stage, target = "loading", begun.snapshot
            elif answer.operation.HasField("error"):
                stage, target = "error", begun.snapshot
        elif deployment.HasField("error"):
            stage, target = "error", ""
        # One that is not there yet, or was given up, is not ready.
        missing = max(1, deployment.replicas) - len(deployment.workers)
        ready = [one.state == _State.STATE_ACTIVE for one in deployment.workers] + [False] * missing
        return {
            "replicas": [
                {
                    "current_snapshot_identity": deployment.active_snapshot.rpartition("/")[2],
                    "readiness": is_ready,
                    "loading_state": {
                        "stage": stage,
                        "target_snapshot_identity": target.rpartition("/")[2],
                    },
                    "loaded_adapters": [],
                }
                for is_ready in ready
            ]
        }

    async def _wait_hotload(
        self,
        deployment_id: str,
        base_model: str,
        identity: str,
        timeout_s: float,
        poll_interval_s: float,
    ) -> str | None:
        """None once the snapshot is served, else why it is not."""
        self._agree(await self._find_deployment(deployment_id, timeout_s), base_model)
        try:
            snapshot = await find_snapshot(self._transport, snapshot_reference(identity))
        except NotFound as error:
            return f"Hotload of {identity!r} into {deployment_id!r}: {error}"
        begun = self._hotloads.get(deployment_id)
        if begun is not None and begun.snapshot == snapshot:
            started = time.monotonic()
            failure = await self._wait_own(deployment_id, begun, timeout_s)
            if failure is not None:
                return failure
            found = await self._find_deployment(deployment_id)
            if found.state == _State.STATE_ACTIVE and found.active_snapshot != snapshot:
                current = found.active_snapshot or "the base model"
                return f"{snapshot} was loaded into {found.name}, which serves {current} since"
            timeout_s = max(0.0, timeout_s - (time.monotonic() - started))
        return await self._wait_foreign(deployment_id, snapshot, timeout_s, poll_interval_s)

    async def _wait_own(self, deployment_id: str, begun: _Hotload, timeout_s: float) -> str | None:
        try:
            async with asyncio.timeout(timeout_s):
                await wait_operation(self._transport, begun.operation)
        except TimeoutError:
            found = await self._find_deployment(deployment_id)
            return _late(found, begun.snapshot, timeout_s)
        except FiretitanError as error:
            return f"Hotload of {begun.snapshot} into {deployment_id!r} failed: {error}"
        return None

    async def _wait_foreign(
        self, deployment_id: str, snapshot: str, timeout_s: float, poll_interval_s: float
    ) -> str | None:
        async for left_s in pauses(poll_interval_s, timeout_s):
            found = await self._find_deployment(deployment_id, left_s)
            ready = found.state == _State.STATE_ACTIVE
            if ready and found.active_snapshot == snapshot:
                return None
            if found.state in (_State.STATE_FAILED, _State.STATE_DELETING):
                break
        return _late(found, snapshot, timeout_s)


def _late(deployment: deployment_pb2.Deployment, snapshot: str, timeout_s: float) -> str:
    current = deployment.active_snapshot or "the base model"
    why = ""
    if deployment.HasField("error"):
        why = f"; its last failure: {from_status(deployment.error)}"
    return (
        f"Hotload of {snapshot} into {deployment.name} did not complete within {timeout_s:g} s: it "
        f"is {STATES.get(deployment.state, 'unknown')} and serves {current}{why}"
    )
