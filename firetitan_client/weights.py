"""Saving and loading: snapshots to serve, checkpoints to resume from.

Knows: which call is which command. Must not know: how commands are ordered and sent.
"""

from __future__ import annotations

import concurrent.futures
import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from firetitan.v1 import checkpoint_pb2, checkpoint_service_pb2, operation_pb2

from firetitan_client import arguments, convert, references, types
from firetitan_client.futures import APIFuture, SelfFuture, made
from firetitan_client.lane import Lane
from firetitan_client.sample_requests import follow
from firetitan_client.sessions import Opened
from firetitan_client.types import SaveSamplerResult

if TYPE_CHECKING:
    from firetitan_client.sampling import FiretitanSamplingClient
    from firetitan_client.service import FiretitanServiceClient

logger = logging.getLogger("firetitan")

_UNNAMED_TTL_S = 3600
"""Of snapshots that nobody gave a name: made for the moment, a step each."""


class WeightsCalls(SelfFuture[Opened]):
    """The part of a training client that saves and loads.

    Args:
        service: Whose client this is; it opens snapshots for sampling.
        lane: Where the commands go.
        ready: Done once the session is open.
        label: What was asked for, for `repr`.
    """

    def __init__(
        self,
        service: FiretitanServiceClient,
        lane: Lane,
        ready: APIFuture[Opened],
        label: str,
    ) -> None:
        self._service = service
        self._lane = lane
        self._ready = ready
        self._label = label
        self._num_samplers = 0

    # Snapshots, to serve

    def save_weights_for_sampler(
        self,
        name: str,
        ttl_seconds: int | None = None,
        checkpoint_type: str | None = None,
        export_precision: str | None = None,
        *,
        user_metadata: Mapping[str, str] | None = None,
    ) -> APIFuture[Any]:
        """Save the weights as an immutable snapshot to serve.

        Args:
            name: Wanted name; the session's suffix is appended.
            ttl_seconds: Seconds after which it is deleted, or once it is in use no more; None: it
                stays until it is deleted.
            checkpoint_type: "base", "delta", or of a LoRA session "merged_base": the whole model
                with the adapter merged into it. None: LoRA a base, full-parameter first a base,
                then deltas.
            export_precision: Of a "merged_base": "source", the base model's stored data types (the
                default), or "bf16".
            user_metadata: Your own notes.

        Returns:
            A future with `.path`, the snapshot's public name.
        """
        return self._save_snapshot(
            name, ttl_seconds, checkpoint_type, export_precision, _sampler, user_metadata
        )

    def save_weights_for_sampler_ext(
        self,
        name: str,
        checkpoint_type: str | None = None,
        ttl_seconds: int | None = None,
        export_precision: str | None = None,
    ) -> SaveSamplerResult:
        """As `save_weights_for_sampler`, waiting for it; serves nothing by itself."""
        saved = self._save_snapshot(
            name,
            ttl_seconds,
            checkpoint_type,
            export_precision,
            lambda snapshot: SaveSamplerResult(*[_identity(snapshot)] * 2),
        )
        result: SaveSamplerResult = saved.result()
        return result

    def _save_snapshot(
        self,
        name: str,
        ttl_seconds: int | None,
        checkpoint_type: str | None,
        export_precision: str | None,
        make: Callable[[checkpoint_pb2.Snapshot], Any],
        user_metadata: Mapping[str, str] | None = None,
    ) -> APIFuture[Any]:
        kind = references.snapshot_kind(checkpoint_type)
        opened = self._ready.done() and self._ready.exception(0) is None
        if kind == checkpoint_pb2.Snapshot.KIND_MERGED_BASE and opened:
            references.check_adapted(self._opened.lora_rank)
        request = checkpoint_service_pb2.SaveSnapshotRequest(
            snapshot_id=references.check_name(name),
            kind=kind,
            ttl=references.time_to_live(ttl_seconds),
            export_precision=references.export_precision(export_precision, kind),
            user_metadata=arguments.notes(user_metadata),
        )

        def finish(operation: operation_pb2.Operation) -> Any:
            snapshot: checkpoint_pb2.Snapshot = operation.snapshot
            for note in snapshot.notes:
                logger.warning("%s: %s", snapshot.name, note)
            return make(snapshot)

        return self._submit(
            "CheckpointService/SaveSnapshot",
            request,
            checkpoint_service_pb2.SaveSnapshotResponse,
            finish,
        )

    def save_weights_and_get_sampling_client(
        self,
        name: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
        kind: str = "snapshot",
    ) -> FiretitanSamplingClient:
        """Save, load into the deployment, and get a client of that snapshot.

        Args:
            name: Of the snapshot; None chooses one, and it is removed as `weight_sync`'s.
            retry_config: Ignored: retries need no settings here.
            record_stability_info: Not supported.
            kind: "snapshot": the client stays with these weights; "inflight": it goes over to newer
                ones as the deployment does.
        """
        saved, pinned = self._save_for_sampling(name, record_stability_info, kind)
        return self._service._sampling_after(saved, pinned=pinned)

    def save_weights_and_get_sampling_client_submit(
        self,
        name: str | None = None,
        retry_config: Any = None,
        record_stability_info: bool = False,
        kind: str = "snapshot",
    ) -> concurrent.futures.Future[FiretitanSamplingClient]:
        """As `save_weights_and_get_sampling_client`, returning a future of the client at once."""
        saved, pinned = self._save_for_sampling(name, record_stability_info, kind)
        return self._service._sampling_after(saved, pinned=pinned, wait=False).future()

    def _save_for_sampling(
        self, name: str | None, record_stability_info: bool, kind: str
    ) -> tuple[APIFuture[Any], bool]:
        """The save, and whether its client stays with it."""
        arguments.stability_info(record_stability_info)
        if kind not in ("snapshot", "inflight"):
            raise convert.invalid("kind", f"is {kind!r}; give 'snapshot' or 'inflight'")
        self._num_samplers += 1
        saved = self.save_weights_for_sampler(
            name or f"sampler-{self._num_samplers}", None if name else _UNNAMED_TTL_S
        )
        return saved, kind == "snapshot"

    async def save_weights_and_get_sampling_client_async(
        self, *args: Any, **kwargs: Any
    ) -> FiretitanSamplingClient:
        """As `save_weights_and_get_sampling_client`, for coroutines."""
        return await made(self.save_weights_and_get_sampling_client, *args, **kwargs)

    def weight_sync(self) -> APIFuture[types.WeightSyncResponse]:
        """Bring the weights as they are now to the service's deployment.

        Saves a snapshot, a base or a delta as the chain goes, and hotloads it. The snapshot is
        removed an hour later, or once it is served no more and no delta stands on it.

        Returns:
            A future of `WeightSyncResponse`, done once the deployment serves them.

        Raises:
            NotImplementedError: The service has no deployment.
            RuntimeError: (from the future) `Hotload failed ...`; what was served is served on.
        """
        self._num_samplers += 1
        self._service._provisioner.check_deployment()
        began = time.monotonic()
        saving = self._save_snapshot(
            f"weight-sync-{self._num_samplers}", _UNNAMED_TTL_S, None, None, lambda made: made
        )
        done: APIFuture[types.WeightSyncResponse] = APIFuture("weight_sync")

        async def sync() -> types.WeightSyncResponse:
            snapshot = await saving
            saved_s = time.monotonic() - began
            await self._service._open_target(_identity(snapshot))
            return types.WeightSyncResponse(
                _identity(snapshot),
                snapshot.step,
                {"save_s": saved_s, "hotload_s": time.monotonic() - began - saved_s},
            )

        follow(sync(), done)
        return done

    async def weight_sync_async(self) -> APIFuture[types.WeightSyncResponse]:
        """As `weight_sync`."""
        return self.weight_sync()

    def create_sampling_client(
        self, model_path: Any, retry_config: Any = None, **options: Any
    ) -> FiretitanSamplingClient:
        """See `FiretitanServiceClient.create_sampling_client`."""
        return self._service.create_sampling_client(
            model_path, retry_config=retry_config, **options
        )

    async def create_sampling_client_async(
        self, model_path: Any, retry_config: Any = None, **options: Any
    ) -> FiretitanSamplingClient:
        """As `create_sampling_client`, for coroutines."""
        return await made(self.create_sampling_client, model_path, retry_config, **options)

    # Checkpoints, to resume from

    def save_state(
        self,
        name: str,
        ttl_seconds: int | None = None,
        timeout: float | None = None,
        *,
        overwrite: bool = True,
        user_metadata: Mapping[str, str] | None = None,
    ) -> APIFuture[Any]:
        """Save weights and optimizer.

        Args:
            name: The checkpoint's name, kept as it is.
            ttl_seconds: Seconds after which it is deleted, or once it is in use no more; None: it
                stays until it is deleted.
            timeout: Seconds to wait here; None returns at once.
            overwrite: Replace a checkpoint of this name once the new one is complete.
            user_metadata: Your own notes.

        Returns:
            A future with `.path`.

        Raises:
            TimeoutError: Not saved within `timeout`; the save goes on.
        """
        if timeout is not None:
            convert.real_number(timeout, "timeout")
        request = checkpoint_service_pb2.SaveStateRequest(
            checkpoint_id=references.check_name(name),
            user_metadata=arguments.notes(user_metadata),
            keep_existing=not overwrite,
            ttl=references.time_to_live(ttl_seconds),
        )
        future = self._submit(
            "CheckpointService/SaveState",
            request,
            checkpoint_service_pb2.SaveStateResponse,
            lambda operation: types.result_type("SaveWeightsResponse")(
                path=operation.checkpoint.name
            ),
        )
        if timeout is not None:
            future.result(timeout)
        return future

    def load_state(
        self, path: Any = None, weights_access_token: str | None = None, *, name: Any = None
    ) -> APIFuture[Any]:
        """Load weights; the optimizer starts anew and pending gradients go.

        Args:
            path: A checkpoint's name, its `.path`, a `cross_job://trainer/name` reference, or
                what `save_state` gave.
            weights_access_token: Not supported.
            name: The same by another name.
        """
        return self._load(path, name, weights_access_token, with_optimizer=False)

    def load_state_with_optimizer(
        self, path: Any = None, weights_access_token: str | None = None, *, name: Any = None
    ) -> APIFuture[Any]:
        """As `load_state`, with moments and steps: training goes on as if never interrupted."""
        return self._load(path, name, weights_access_token, with_optimizer=True)

    def _load(
        self, path: Any, name: Any, token: str | None, *, with_optimizer: bool
    ) -> APIFuture[Any]:
        references.refuse_token(token)
        request = checkpoint_service_pb2.LoadStateRequest(
            checkpoint=references.checkpoint_reference(path, name), with_optimizer=with_optimizer
        )
        return self._submit(
            "CheckpointService/LoadState",
            request,
            checkpoint_service_pb2.LoadStateResponse,
            lambda operation: types.result_type("LoadWeightsResponse")(
                path=operation.load.checkpoint.name
            ),
        )

    def load_adapter(self, adapter_path: str) -> APIFuture[Any]:
        """Load a PEFT LoRA adapter's weights; the optimizer starts anew, pending gradients go.

        Rank, alpha, rslora and target modules are honoured; what this session cannot compute is
        refused by name. A rank below the session's is filled up.

        Args:
            adapter_path: A folder with adapter_config.json and adapter_model.safetensors, a
                `file://` address, another whose fsspec driver is installed with the daemon, or a
                promoted model, `accounts/local/models/<id>`. A relative path is this process's.

        Returns:
            A future of `{"model_id", "adapter_path", "type": "load_adapter"}`.

        Raises:
            ValueError: Not a text, or blank.
        """
        request = checkpoint_service_pb2.LoadAdapterRequest(
            adapter=references.adapter_reference(adapter_path)
        )
        return self._submit(
            "CheckpointService/LoadAdapter",
            request,
            checkpoint_service_pb2.LoadAdapterResponse,
            lambda operation: {
                "model_id": operation.target.split("/")[1],
                "adapter_path": operation.load.adapter,
                "type": "load_adapter",
            },
        )

    def list_checkpoints(self) -> list[str]:
        """Names of this trainer's checkpoints, `step-2` before `step-10`.

        Where the trainer has many sessions, of this one's.

        Raises:
            FiretitanError: The daemon could not say.
        """
        opened = self._opened
        parent = opened.session if opened.trainer.max_lora_rank else opened.trainer.name
        return self._service._checkpoint_names(parent)

    def resolve_checkpoint_path(
        self, checkpoint_name: str, source_job_id: str | None = None
    ) -> str:
        """A reference to a checkpoint, of another trainer where `source_job_id` is given."""
        return references.cross_job(checkpoint_name, source_job_id)

    async def save_weights_for_sampler_async(self, *args: Any, **kwargs: Any) -> APIFuture[Any]:
        """As `save_weights_for_sampler`."""
        return self.save_weights_for_sampler(*args, **kwargs)

    async def save_state_async(
        self, name: str, ttl_seconds: int | None = None, timeout: float | None = None, **kwargs: Any
    ) -> APIFuture[Any]:
        """As `save_state`."""
        future = self.save_state(name, ttl_seconds, **kwargs)
        if timeout is not None:
            await future.result_async(timeout)
        return future

    async def load_state_async(self, *args: Any, **kwargs: Any) -> APIFuture[Any]:
        """As `load_state`."""
        return self.load_state(*args, **kwargs)

    async def load_adapter_async(self, adapter_path: str) -> APIFuture[Any]:
        """As `load_adapter`."""
        return self.load_adapter(adapter_path)

    async def load_state_with_optimizer_async(self, *args: Any, **kwargs: Any) -> APIFuture[Any]:
        """As `load_state_with_optimizer`."""
        return self.load_state_with_optimizer(*args, **kwargs)

    def _submit(
        self,
        method: str,
        request: Any,
        response: type[Any],
        finish: Callable[[operation_pb2.Operation], Any],
    ) -> APIFuture[Any]:
        if self._ready.done() and self._ready.exception(0) is not None:
            self._ready.result(0)
        return self._lane.submit(method, request.SerializeToString(), response, finish)


def _sampler(snapshot: checkpoint_pb2.Snapshot) -> Any:
    return types.result_type("SaveWeightsForSamplerResponse")(path=_identity(snapshot))


def _identity(snapshot: checkpoint_pb2.Snapshot) -> str:
    """The public name."""
    return snapshot.name.rpartition("/")[2]
