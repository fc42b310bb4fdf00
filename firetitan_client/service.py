"""FiretitanServiceClient: where everything begins.

Knows: which clients there are and what they share. Must not know: how commands or samples travel.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Self

from firetitan.v1 import deployment_pb2, deployment_service_pb2

from firetitan_client import address as addresses
from firetitan_client import references, transport
from firetitan_client.deployment_sampler import DeploymentSampler
from firetitan_client.errors import FailedPrecondition, FiretitanError, Unsupported
from firetitan_client.futures import APIFuture, SelfFuture, in_event_loop
from firetitan_client.lane import Lane
from firetitan_client.managed import (
    FiretitanProvisioningConfig,
    Provisioner,
    build_config,
    check_same,
    wait_operation,
)
from firetitan_client.sample_requests import Target, follow, load_tokenizer
from firetitan_client.sampling import FiretitanSamplingClient
from firetitan_client.sessions import (
    Opened,
    Wanted,
    attach,
    checkpoint_names,
    get_trainer,
    open_session,
)
from firetitan_client.stubs import Stubs
from firetitan_client.training import FiretitanTrainingClient

logger = logging.getLogger("firetitan")

_SILENCE_S = 10.0


class _Unset:
    def __repr__(self) -> str:
        return "<as configured>"


UNSET = _Unset()


class FiretitanServiceClient:
    """One trainer and one deployment on the local daemon, and the clients that use them.

    Made lazily: nothing is asked of the daemon before the first client is created. Prefer
    `from_firetitan_config`; this constructor joins a trainer by its endpoint, or makes one.

    Args:
        base_url: None or a cloud URL (the local daemon serves, nothing is dialled), or an
            endpoint's `firetitan+unix:/path#trainer`.
        api_key: Ignored on a Unix socket.
        default_headers: Ignored.
        user_metadata: Your own notes, kept with the session.
        project_id: Ignored.
        address: Of the daemon, `unix:/path`; None: FIRETITAN_ADDRESS, else FIRETITAN_HOME's.
        trainer_job_id: Trainer to join.
        autostart: Start a daemon where none runs; None asks FIRETITAN_AUTOSTART.
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
    ) -> None:
        endpoint = addresses.resolve(base_url, address)
        self._setup(
            endpoint,
            FiretitanProvisioningConfig(trainer_job_id=trainer_job_id or endpoint.trainer_id),
            user_metadata,
            autostart,
            managed=False,
        )

    def _setup(
        self,
        endpoint: addresses.Endpoint,
        config: FiretitanProvisioningConfig,
        user_metadata: Mapping[str, str] | None,
        autostart: bool | None,
        *,
        managed: bool,
    ) -> None:
        self._config = config
        self._managed = managed
        self._user_metadata = dict(user_metadata or {})
        self._transport = transport.connect(endpoint.address, autostart)
        self._provisioner = Provisioner(self._transport, config)
        self._lock = threading.Lock()
        self._training: dict[tuple[str | None, int | None], FiretitanTrainingClient] = {}
        self._lanes: list[Lane] = []
        self._closed = False
        self.stubs = Stubs(self._transport)
        """The raw services, for what is not wrapped."""

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
        **managed_config_kwargs: Any,
    ) -> Self:
        """A service that creates or attaches its trainer and deployment on first use.

        Needs no daemon yet.

        Args:
            api_key: Ignored on a Unix socket.
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
        service._setup(endpoint, config, user_metadata, autostart, managed=True)
        return service

    # Training clients

    def create_training_client(
        self,
        base_model: str | None = None,
        lora_rank: int | None = None,
        seed: int | None = None,
        train_mlp: bool | None = None,
        train_attn: bool | None = None,
        train_unembed: bool | None = None,
        lora_alpha: float | _Unset | None = UNSET,
        user_metadata: Mapping[str, str] | None = None,
        projection_head_dim: int | None = None,
        lora_init_method: str | None = None,
        *,
        session: str | None = None,
    ) -> FiretitanTrainingClient:
        """Create the trainer's session, or join it, and return a client of it.

        Blocks until it is ready, except inside a running event loop: there `await` the client.

        Args:
            base_model: Must be the service's; None: that.
            lora_rank: Must be the service's; None: that.
            seed: Of the adapter's first weights; None: drawn and recorded.
            train_mlp: Adapt the MLP projections.
            train_attn: Adapt the attention projections.
            train_unembed: Adapt the output head.
            lora_alpha: Scale numerator; left out 32, None twice the rank.
            user_metadata: Your own notes.
            projection_head_dim: Not supported.
            lora_init_method: Not supported.
            session: Join this session (`other_client.session_name`) instead of the trainer's own.

        Raises:
            ValueError: Another model or rank than the service's or trainer's, naming both; or the
                service has such a client already.
            FiretitanError: By reason, e.g. no daemon, unknown model.
        """
        wanted = self._wanted(
            lora_rank,
            lora_alpha,
            Wanted(
                seed=self._config.seed if seed is None else seed,
                train_mlp=self._config.train_mlp if train_mlp is None else train_mlp,
                train_attn=self._config.train_attn if train_attn is None else train_attn,
                train_unembed=(
                    self._config.train_unembed if train_unembed is None else train_unembed
                ),
                user_metadata={**self._user_metadata, **(user_metadata or {})},
            ),
        )
        for name, value in (
            ("projection_head_dim", projection_head_dim),
            ("lora_init_method", lora_init_method),
        ):
            if value is not None:
                raise Unsupported(f"{name} is not supported; leave it out", field=name)
        return self._create(base_model, lora_rank, wanted, session)

    def create_lora_training_client(
        self,
        base_model: str | None = None,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        user_metadata: Mapping[str, str] | None = None,
        alpha: float = 32,
    ) -> FiretitanTrainingClient:
        """As `create_training_client`, in tinker's words."""
        return self.create_training_client(
            base_model, rank, seed, train_mlp, train_attn, train_unembed, alpha, user_metadata
        )

    def create_training_client_from_state(
        self,
        path: Any = None,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
        *,
        name: Any = None,
    ) -> FiretitanTrainingClient:
        """A client that begins with a checkpoint's weights and a fresh optimizer."""
        reference = references.checkpoint_reference(path, name)
        return self._create_from(
            lambda client: client.load_state(reference, weights_access_token), user_metadata
        )

    def create_training_client_from_state_with_optimizer(
        self,
        path: Any = None,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
        *,
        name: Any = None,
    ) -> FiretitanTrainingClient:
        """A client that goes on where a checkpoint was saved."""
        reference = references.checkpoint_reference(path, name)
        return self._create_from(
            lambda client: client.load_state_with_optimizer(reference, weights_access_token),
            user_metadata,
        )

    def _create_from(
        self,
        load: Callable[[FiretitanTrainingClient], APIFuture[Any]],
        user_metadata: Mapping[str, str] | None,
    ) -> FiretitanTrainingClient:
        metadata = {**self._user_metadata, **(user_metadata or {})}
        return self._create(None, None, Wanted(user_metadata=metadata), None, load)

    def _wanted(self, rank: int | None, alpha: float | _Unset | None, wanted: Wanted) -> Wanted:
        rank = self._config.lora_rank if rank is None else rank
        if rank == 0:
            return Wanted(seed=wanted.seed, user_metadata=wanted.user_metadata)
        if wanted.train_mlp is wanted.train_attn is wanted.train_unembed is False:
            raise ValueError("train_mlp, train_attn and train_unembed: at least one must be True")
        if isinstance(alpha, _Unset):
            alpha = self._config.lora_alpha
        elif alpha is None and rank is not None:
            alpha = 2.0 * rank
        if alpha is not None and not alpha > 0:
            raise ValueError(f"lora_alpha: is {alpha}; give a number above 0")
        return Wanted(
            wanted.seed,
            alpha,
            wanted.train_attn,
            wanted.train_mlp,
            wanted.train_unembed,
            wanted.user_metadata,
        )

    def _create(
        self,
        base_model: str | None,
        lora_rank: int | None,
        wanted: Wanted,
        session: str | None,
        load: Callable[[FiretitanTrainingClient], APIFuture[Any]] | None = None,
    ) -> FiretitanTrainingClient:
        self._check_open()
        config = self._config
        if session is not None:
            self._bind_to_session(session)
        self._agree("base_model", base_model, config.base_model)
        self._agree("lora_rank", lora_rank, config.lora_rank)
        base_model = config.base_model if base_model is None else base_model
        lora_rank = config.lora_rank if lora_rank is None else lora_rank
        if base_model is None and config.trainer_job_id is None:
            raise ValueError("base_model is required for a direct training client")
        key = (base_model, lora_rank)
        with self._lock:
            if self._training:
                first_model, first_rank = next(iter(self._training))
                raise ValueError(
                    f"A training client for {first_model or 'the trainer'!r} (lora_rank="
                    f"{first_rank or 0}) already exists on this service. Create a new "
                    "FiretitanServiceClient for a separate trainer."
                )
            config.base_model, config.lora_rank = base_model, lora_rank
            opened: APIFuture[Opened] = APIFuture("create_training_client")
            lane = Lane(self._transport, lambda client_id: self._attach(opened, client_id))
            client = FiretitanTrainingClient(
                self, lane, opened, f"{base_model or config.trainer_job_id}"
            )
            self._training[key] = client
            self._lanes.append(lane)
        follow(self._open(session, wanted), opened)
        if load is not None:
            client._ready = self._loaded(client, opened, load)
        self._await_ready(client, "the trainer", lambda: self._training.pop(key, None))
        return client

    def _loaded(
        self,
        client: FiretitanTrainingClient,
        opened: APIFuture[Opened],
        load: Callable[[FiretitanTrainingClient], APIFuture[Any]],
    ) -> APIFuture[Opened]:
        ready: APIFuture[Opened] = APIFuture("create_training_client_from_state")
        loading = load(client)

        async def both() -> Opened:
            place = await opened
            await loading
            return place

        follow(both(), ready)
        return ready

    def _bind_to_session(self, session: str) -> None:
        trainer = session.split("/")[1] if session.count("/") == 3 else ""
        if not trainer:
            raise ValueError(
                f"session: {session!r} is no session name; give trainers/<id>/sessions/<id>, the "
                "`session_name` of another client"
            )
        self._agree("trainer_job_id", trainer, self._config.trainer_job_id)
        self._config.trainer_job_id = trainer

    @staticmethod
    def _agree(name: str, given: Any, configured: Any) -> None:
        if given is not None and configured is not None and given != configured:
            raise ValueError(
                f"{name}: {given!r} was given, this service has {configured!r}; leave it out, or "
                "create a new FiretitanServiceClient"
            )

    async def _open(self, session: str | None, wanted: Wanted) -> Opened:
        provisioner = self._provisioner
        both = self._managed and self._config.create_deployment
        made = await asyncio.gather(
            provisioner.get_trainer(),
            *([provisioner.get_deployment()] if both else []),
            return_exceptions=True,
        )
        failures = [one for one in made if isinstance(one, BaseException)]
        if failures:
            await self._roll_back()
            raise failures[0]
        trainer = provisioner.trainer
        assert trainer is not None
        check_same(self._config, trainer)
        if session is None and not provisioner.trainer_created:
            trainer = await get_trainer(self._transport, trainer.name)
        opened = await open_session(self._transport, trainer, session, wanted)
        self._config.base_model, self._config.lora_rank = opened.base_model, opened.lora_rank
        return opened

    async def _roll_back(self) -> None:
        try:
            await self._provisioner.roll_back()
        except FiretitanError as error:
            logger.warning("what was created could not be removed: %s", error)

    async def _attach(self, opened: APIFuture[Opened], client_id: str) -> Any:
        return await attach(self._transport, (await opened).session, client_id)

    def create_base_training_client(
        self, base_model: str | None = None, user_metadata: Mapping[str, str] | None = None
    ) -> FiretitanTrainingClient:
        """Not supported yet."""
        raise Unsupported(
            "create_base_training_client is not supported yet; for reference logprobs use a second "
            "service with a trainer of its own and only forward()"
        )

    def create_reference_client(
        self,
        base_model: str | None = None,
        lora_rank: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
        *,
        policy_client: Any = None,
    ) -> FiretitanTrainingClient:
        """Not supported yet."""
        raise Unsupported(
            "create_reference_client is not supported yet; for reference logprobs use a second "
            "service with a trainer of its own and only forward()"
        )

    # Sampling clients

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
    ) -> FiretitanSamplingClient:
        """A tinker-shaped client of the deployment.

        Args:
            model_path: Snapshot to bring to the deployment first; None: whatever it serves.
            base_model: Must be the service's.
            retry_config: Ignored: retries need no settings here.
            deployment_sampler: Sample from where this one does.
            tokenizer: Tokenizer, folder or id; None: the service's.
            concurrency_controller: Ignored; the daemon batches what it gets.
            training_client: Ignored.
            pinned: Stay with `model_path` instead of following the deployment.

        Raises:
            RuntimeError: The snapshot could not be brought to the deployment; says why.
        """
        self._check_open()
        if pinned and model_path is None:
            raise ValueError("pinned=True needs model_path, the snapshot to stay with")
        self._agree("base_model", base_model, self._config.base_model)
        if base_model is not None:
            self._config.base_model = base_model
        if deployment_sampler is not None:
            ready = deployment_sampler._ready
            return FiretitanSamplingClient(ready, tokenizer=tokenizer, label="")
        path = None if model_path is None else references.snapshot_reference(model_path)
        return self._sampling(lambda: self._path(path), tokenizer, pinned)

    def _sampling_after(self, saved: APIFuture[Any]) -> FiretitanSamplingClient:
        async def path() -> str:
            return references.snapshot_reference(await saved)

        return self._sampling(path, None, pinned=True)

    @staticmethod
    async def _path(path: str | None) -> str | None:
        return path

    def _sampling(
        self, path: Callable[[], Any], tokenizer: Any, pinned: bool
    ) -> FiretitanSamplingClient:
        ready: APIFuture[Target] = APIFuture("create_sampling_client")
        client = FiretitanSamplingClient(
            ready, tokenizer=tokenizer or self._config.tokenizer_model, pinned=pinned
        )

        async def open_() -> Target:
            target = await self._open_target(await path(), pinned=pinned)
            if pinned:
                await client.hold_snapshot(target)
            return target

        follow(open_(), ready)
        self._await_ready(client, "the deployment")
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
        """Whether the attached deployment still serves another trainer's weights."""
        return self._provisioner.needs_sync

    async def _open_target(self, path: str | None, *, pinned: bool = False) -> Target:
        deployment = await self._provisioner.get_deployment()
        if path is not None:
            deployment = await self._hotload(deployment.name, path)
        return Target(
            self._transport,
            deployment.name,
            deployment.active_snapshot if pinned else "",
            deployment.base_model,
            deployment.model.path or deployment.base_model,
        )

    async def _hotload(self, deployment: str, path: str) -> deployment_pb2.Deployment:
        try:
            answer = await self._transport.call(
                "DeploymentService/HotloadSnapshot",
                deployment_service_pb2.HotloadSnapshotRequest(
                    deployment=deployment, snapshot=path, request_id=uuid.uuid4().hex
                ),
                deployment_service_pb2.HotloadSnapshotResponse,
            )
            operation = await wait_operation(self._transport, answer.operation)
        except FiretitanError as error:
            raise FailedPrecondition(
                f"Hotload failed for sampler snapshot {path!r}: {error}",
                reason=error.reason,
                field=error.field,
                metadata=error.metadata,
            ) from error
        self._provisioner.needs_sync = False
        loaded: deployment_pb2.Deployment = operation.deployment
        return loaded

    # Twins: `await` them for the client

    async def create_training_client_async(
        self, *args: Any, **kwargs: Any
    ) -> FiretitanTrainingClient:
        """As `create_training_client`."""
        return await self.create_training_client(*args, **kwargs)

    async def create_lora_training_client_async(
        self, *args: Any, **kwargs: Any
    ) -> FiretitanTrainingClient:
        """As `create_lora_training_client`."""
        return await self.create_lora_training_client(*args, **kwargs)

    async def create_training_client_from_state_async(
        self, *args: Any, **kwargs: Any
    ) -> FiretitanTrainingClient:
        """As `create_training_client_from_state`."""
        return await self.create_training_client_from_state(*args, **kwargs)

    async def create_training_client_from_state_with_optimizer_async(
        self, *args: Any, **kwargs: Any
    ) -> FiretitanTrainingClient:
        """As `create_training_client_from_state_with_optimizer`."""
        return await self.create_training_client_from_state_with_optimizer(*args, **kwargs)

    async def create_sampling_client_async(
        self, *args: Any, **kwargs: Any
    ) -> FiretitanSamplingClient:
        """As `create_sampling_client`."""
        return await self.create_sampling_client(*args, **kwargs)

    async def create_deployment_sampler_async(
        self, *args: Any, **kwargs: Any
    ) -> DeploymentSampler:
        """As `create_deployment_sampler`."""
        return await self.create_deployment_sampler(*args, **kwargs)

    # What was resolved

    @property
    def trainer_job_id(self) -> str:
        """The trainer's id, for another process's `trainer_job_id=`."""
        return str(self._resolved("trainer_job_id", self.managed_trainer_job_id))

    @property
    def deployment_id(self) -> str:
        """The deployment's id."""
        return str(self._resolved("deployment_id", self.managed_deployment_id))

    @property
    def max_context_length(self) -> int:
        """Longest sequence, in tokens."""
        trainer = self._provisioner.trainer
        length = (trainer.max_context_length or trainer.model.max_context_length) if trainer else 0
        return int(self._resolved("max_context_length", length or None))

    @property
    def deployment_shape(self) -> str:
        """The shape as configured; this machine serves any."""
        return self._config.deployment_shape or "local"

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
    def reference_trainer_job_id(self) -> str | None:
        """None: there is no separate reference trainer."""
        return None

    @property
    def base_url(self) -> str:
        """Address and trainer, for another process's `FiretitanServiceClient(base_url=...)`."""
        trainer = self.managed_trainer_job_id or self._config.trainer_job_id
        return addresses.Endpoint(self._transport.address, trainer).base_url

    @staticmethod
    def _resolved(name: str, value: Any) -> Any:
        if value is None:
            raise RuntimeError(f"{name} is not known yet; create a client first")
        return value

    def _tokenizer(self, path: str) -> Any:
        return load_tokenizer(self._config.tokenizer_model or path)

    def _checkpoint_names(self, parent: str) -> list[str]:
        names: APIFuture[list[str]] = APIFuture("list_checkpoints")
        follow(checkpoint_names(self._transport, parent), names)
        return names.result()

    # The end

    def close(self) -> None:
        """End this service: what was called still runs, then what it created is cleaned up.

        A trainer or deployment that existed before is never touched. The first error is raised at
        the end, further ones are logged.
        """
        if self._closed:
            return
        self._closed = True
        provisioner, config = self._provisioner, self._config
        deletes_trainer = provisioner.trainer_created and config.cleanup_trainer_on_close
        for lane in self._lanes:
            lane.close()
            if deletes_trainer:
                lane.wait_finished()
            else:
                lane.wait_accepted(_SILENCE_S)
        work: list[Callable[[], Any]] = []
        if provisioner.deployment_created and config.cleanup_deployment_on_close == "delete":
            work.append(provisioner.delete_deployment)
        elif provisioner.deployment_created and config.cleanup_deployment_on_close is not None:
            work.append(lambda: provisioner.scale_deployment(0))
        if deletes_trainer:
            work.append(provisioner.delete_trainer)
        first: FiretitanError | None = None
        for one in work:
            try:
                transport.run(one()).result()
            except FiretitanError as error:
                logger.warning("close: %s", error)
                first = first or error
        if first is not None:
            raise first

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("FiretitanServiceClient is closed")

    def _await_ready(
        self,
        client: SelfFuture[Any],
        what: str,
        failed: Callable[[], object] = lambda: None,
    ) -> None:
        """Block until a client is ready, unless that would block an event loop."""

        def check(ready: Any) -> None:
            if ready.cancelled() or ready.exception() is not None:
                failed()

        if in_event_loop():
            client._ready.add_done_callback(check)
            return
        try:
            try:
                client.result(_SILENCE_S)
            except TimeoutError:
                if client._ready.done():
                    raise
                logger.warning("%s at %s: still waiting", what, self._transport.address)
                client.result()
        except Exception:
            failed()
            raise

    def __repr__(self) -> str:
        state = "closed" if self._closed else (
            self.managed_trainer_job_id or "nothing created yet"
        )
        model = self._config.base_model or ""
        return f"<FiretitanServiceClient {self._transport.address} {model} {state}>"
