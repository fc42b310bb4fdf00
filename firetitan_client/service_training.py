"""A service's training clients: made and joined.

Knows: what a training client is asked for and what it must agree with. Must not know: how commands
travel.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from firetitan_client import arguments, transport
from firetitan_client.convert import whole_number
from firetitan_client.errors import FailedPrecondition, Unavailable, Unsupported
from firetitan_client.forward_only import ForwardOnlyClient
from firetitan_client.futures import APIFuture, made
from firetitan_client.lane import Lane
from firetitan_client.managed import check_same
from firetitan_client.provisioner import Kind, Provisioner, raise_first
from firetitan_client.sample_requests import follow
from firetitan_client.service_core import ServiceCore
from firetitan_client.sessions import (
    Opened,
    Wanted,
    attach,
    close_session,
    get_trainer,
    open_session,
)
from firetitan_client.training import FiretitanTrainingClient

if TYPE_CHECKING:
    from firetitan_client.service import FiretitanServiceClient

Client = TypeVar("Client", bound=FiretitanTrainingClient)
Begin: TypeAlias = Callable[[Opened], Awaitable[None]]
"""What is done in a session before it counts as opened."""


class _Unset:
    def __repr__(self) -> str:
        return "<as configured>"


UNSET = _Unset()
_GONE = ("WORKER_UNAVAILABLE", "RESOURCE_FAILED")


@dataclass(frozen=True)
class Resume:
    """How a client begins with a checkpoint."""

    open: Callable[[Begin], Coroutine[Any, Any, Opened]]
    """Opens the session the checkpoint is for; what it made is removed where beginning fails."""
    load: Callable[[FiretitanTrainingClient], APIFuture[Any]]
    """Loads it, once the session is open."""


class TrainingClients(ServiceCore):
    """The part of a service that makes training clients."""

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

        On a service with `max_lora_rank` each call makes another adapter on the one trainer.
        Blocks until it is ready, except inside a running event loop: there `await` the client.

        Args:
            base_model: Must be the service's; None: that.
            lora_rank: Must be the service's; None: that. With `max_lora_rank` at most that.
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
            ValueError: Another model or rank than the service's or trainer's, naming both; the
                service has such a client already; or, with `max_lora_rank`, a rank outside 1 to
                that.
            FiretitanError: By reason, e.g. no daemon, unknown model.
        """
        wanted = self._configured(
            lora_rank, lora_alpha, seed, train_mlp, train_attn, train_unembed, user_metadata
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
        rank: int | None = None,
        seed: int | None = None,
        train_mlp: bool | None = None,
        train_attn: bool | None = None,
        train_unembed: bool | None = None,
        user_metadata: Mapping[str, str] | None = None,
        alpha: float | _Unset = UNSET,
        *,
        optimizer: Any = None,
    ) -> FiretitanTrainingClient:
        """As `create_training_client`, in tinker's words; without a rank anywhere it is 32.

        Args:
            base_model: See there, and so the rest.
            rank: Of the adapter.
            seed: Of the adapter's first weights.
            train_mlp: Adapt the MLP projections.
            train_attn: Adapt the attention projections.
            train_unembed: Adapt the output head.
            user_metadata: Your own notes.
            alpha: Scale numerator.
            optimizer: AdamW's configuration, or None; others are refused.
        """
        arguments.optimizer(optimizer)
        if rank is None and self._config.lora_rank is None and self._config.trainer_job_id is None:
            rank = 32
        return self.create_training_client(
            base_model, rank, seed, train_mlp, train_attn, train_unembed, alpha, user_metadata
        )

    def _configured(
        self,
        lora_rank: int | None = None,
        lora_alpha: float | _Unset | None = UNSET,
        seed: int | None = None,
        train_mlp: bool | None = None,
        train_attn: bool | None = None,
        train_unembed: bool | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> Wanted:
        """What was asked of a session, the service's settings where nothing was."""
        config = self._config
        return self._wanted(
            lora_rank,
            lora_alpha,
            Wanted(
                seed=config.seed if seed is None else seed,
                train_mlp=config.train_mlp if train_mlp is None else train_mlp,
                train_attn=config.train_attn if train_attn is None else train_attn,
                train_unembed=config.train_unembed if train_unembed is None else train_unembed,
                user_metadata={**self._user_metadata, **arguments.notes(user_metadata)},
            ),
        )

    def _wanted(self, rank: int | None, alpha: float | _Unset | None, wanted: Wanted) -> Wanted:
        rank = self._config.lora_rank if rank is None else rank
        if rank is not None:
            whole_number(rank, "lora_rank", 0, 2**31 - 1)
        if wanted.seed is not None:
            whole_number(wanted.seed, "seed", -(2**63), 2**63 - 1)
        for name in ("train_mlp", "train_attn", "train_unembed"):
            arguments.switch(getattr(wanted, name), name)
        if rank == 0:
            return Wanted(rank=0, seed=wanted.seed, user_metadata=wanted.user_metadata)
        if wanted.train_mlp is wanted.train_attn is wanted.train_unembed is False:
            raise ValueError("train_mlp, train_attn and train_unembed: at least one must be True")
        twice = alpha is None
        if isinstance(alpha, _Unset):
            alpha = self._config.lora_alpha
        if alpha is not None:
            arguments.scale(alpha, "lora_alpha")
        return replace(wanted, rank=rank, alpha=alpha, alpha_is_twice_rank=twice)

    def _create(
        self,
        base_model: str | None,
        lora_rank: int | None,
        wanted: Wanted,
        session: str | None,
        resume: Resume | None = None,
        *,
        wait: bool = True,
    ) -> FiretitanTrainingClient:
        self._check_open()
        config = self._config
        if base_model is not None:
            base_model = arguments.model_name(base_model)
        trainer_id = self._trainer_of(session) or config.trainer_job_id
        self._agree("base_model", base_model, config.base_model)
        self._agree("lora_rank", lora_rank, config.lora_rank)
        base_model = config.base_model if base_model is None else base_model
        if base_model is None and trainer_id is None and resume is None:
            raise ValueError("base_model is required for a direct training client")
        if config.max_lora_rank is None:
            lora_rank = config.lora_rank if lora_rank is None else lora_rank
        elif session is None:
            self._check_rank(lora_rank or 0, config.max_lora_rank)
        with self._lock:
            if self._training and config.max_lora_rank is None:
                raise ValueError(
                    f"A training client for {config.base_model or 'the trainer'!r} (lora_rank="
                    f"{config.lora_rank or 0}) already exists on this service. Create a new "
                    "FiretitanServiceClient for a separate trainer."
                )
            before = config.base_model, config.lora_rank
            id_before = config.trainer_job_id
            config.base_model, config.trainer_job_id = base_model, trainer_id
            if config.max_lora_rank is None:
                config.lora_rank = lora_rank
            opened: APIFuture[Opened] = APIFuture("create_training_client")
            kind = ForwardOnlyClient if config.forward_only else FiretitanTrainingClient
            client = self._client(kind, opened)
            self._training.append(client)

        def restore(ready: Any) -> None:
            if not ready.cancelled() and ready.exception() is None:
                return  # made after all, behind a Ctrl-C
            config.base_model, config.lora_rank = before
            others = self._training or self._provisioner.trainer is not None
            if session is not None and not others:
                # An id that was chosen here stays: it finds what the first try made.
                config.trainer_job_id = id_before

        def failed() -> None:
            """Let the call be repeated, with other settings too."""
            self._training.remove(client)
            client._ready.add_done_callback(restore)

        if resume is None:
            follow(self._open(session, wanted), opened)
        else:
            client._ready = self._resumed(client, opened, resume)
        self._await_ready(client, "the trainer", failed, wait=wait)
        return client

    def _rejoin(self, session: str) -> FiretitanTrainingClient:
        """A client of a session that another process has one of; opened in the background."""
        return self._create(None, None, Wanted(), session, wait=False)

    @staticmethod
    def _check_rank(lora_rank: int, max_lora_rank: int) -> None:
        if not 1 <= lora_rank <= max_lora_rank:
            raise ValueError(
                f"lora_rank must be between 1 and max_lora_rank={max_lora_rank}, not {lora_rank}"
            )

    def _client(self, kind: type[Client], opened: APIFuture[Opened]) -> Client:
        """A client with a lane of its own on a session that is being opened."""
        lane = self._lane(opened)
        self._lanes.append(lane)
        label = self._config.base_model or self._config.trainer_job_id or ""
        return kind(cast("FiretitanServiceClient", self), lane, opened, label)

    @staticmethod
    def _resumed(
        client: FiretitanTrainingClient, opened: APIFuture[Opened], resume: Resume
    ) -> APIFuture[Opened]:
        """Opens and loads; `opened` is done in between, as loading needs it."""
        ready: APIFuture[Opened] = APIFuture("create_training_client_from_state")
        loading = resume.load(client)

        async def begin(place: Opened) -> None:
            transport.deliver(opened.finish, place)
            await loading

        def ended(done: Any) -> None:
            error = None if done.cancelled() else done.exception()
            if done.cancelled():
                opened.finish_cancelled()
            elif error is not None:
                opened.finish(error=error)
                # Whoever sees that the client failed need not hear of its load, too.
                loading.add_done_callback(lambda load: load.cancelled() or load.exception())

        ready.add_done_callback(ended)
        follow(resume.open(begin), ready)
        return ready

    def _trainer_of(self, session: str | None) -> str | None:
        if session is None:
            return None
        trainer = session.split("/")[1] if session.count("/") == 3 else ""
        if not trainer:
            raise ValueError(
                f"session: {session!r} is no session name; give trainers/<id>/sessions/<id>, the "
                "`session_name` of another client"
            )
        self._agree("trainer_job_id", trainer, self._config.trainer_job_id)
        return trainer

    async def _open(
        self, session: str | None, wanted: Wanted, begin: Begin | None = None
    ) -> Opened:
        provisioner = self._provisioner
        both = self._managed and self._config.create_deployment
        kinds: list[Kind] = ["trainer", "deployment"] if both else ["trainer"]
        async with provisioner.opening(*kinds):
            opened = await self._open_all(session, wanted, both)
            if begin is not None:
                await begin(opened)
            if both:
                await provisioner.attach_deployment()
        config, trainer = self._config, opened.trainer
        config.base_model, config.forward_only = opened.base_model, trainer.forward_only
        config.max_lora_rank = trainer.max_lora_rank or None
        config.lora_rank = None if trainer.max_lora_rank else opened.lora_rank
        return opened

    async def _open_all(self, session: str | None, wanted: Wanted, both: bool) -> Opened:
        """Make or find everything that is wanted, and open the session."""
        provisioner = self._provisioner
        made = await asyncio.gather(
            provisioner.get_trainer(),
            *([provisioner.get_deployment()] if both else []),
            return_exceptions=True,
        )
        raise_first(made)
        return await self._open_with(provisioner, session, wanted)

    async def _open_with(
        self, provisioner: Provisioner, session: str | None, wanted: Wanted
    ) -> Opened:
        request_id = uuid.uuid4().hex
        for pause_s in (0.1, 0.5):
            try:
                return await self._open_on(provisioner, session, wanted, request_id)
            except (Unavailable, FailedPrecondition) as error:
                if error.reason not in _GONE:
                    raise
                # Its worker died after it was looked at: making it again starts another.
                provisioner.trainer = None
                await asyncio.sleep(pause_s)
        return await self._open_on(provisioner, session, wanted, request_id)

    async def _open_on(
        self, provisioner: Provisioner, session: str | None, wanted: Wanted, request_id: str
    ) -> Opened:
        trainer = await provisioner.get_trainer()
        check_same(provisioner.config, trainer)
        async with self._opening:  # an interrupted call may still be opening the same session
            if session is None:
                trainer = await get_trainer(self._transport, trainer.name)
            return await open_session(self._transport, trainer, session, wanted, request_id)

    @property
    def _policy(self) -> FiretitanTrainingClient | None:
        """The training client of a service that has one, if it is made."""
        with self._lock:
            several = self._config.max_lora_rank is not None
            return None if several or not self._training else self._training[0]

    def _unload(self, client: FiretitanTrainingClient) -> APIFuture[None]:
        lane, session = client._lane, client.session_name
        lane.close()
        with self._lock:
            if client in self._training:
                self._training.remove(client)
        done: APIFuture[None] = APIFuture("unload_model")

        async def unload() -> None:
            await asyncio.to_thread(lane.wait_accepted)
            await close_session(self._transport, session)

        follow(unload(), done)
        return done

    def _lane(self, opened: APIFuture[Opened]) -> Lane:
        """A lane in a session that is being opened."""
        return Lane(
            self._transport,
            lambda client_id: self._attach(opened, client_id),
            lambda: self._lease.part("lane"),
        )

    async def _attach(self, opened: APIFuture[Opened], client_id: str) -> Any:
        session = (await opened).session
        await self._lease.hold(session)
        return await attach(self._transport, session, client_id)

    # Twins: `await` them for the client

    async def create_training_client_async(
        self, *args: Any, **kwargs: Any
    ) -> FiretitanTrainingClient:
        """As `create_training_client`."""
        return await made(self.create_training_client, *args, **kwargs)

    async def create_lora_training_client_async(
        self, *args: Any, **kwargs: Any
    ) -> FiretitanTrainingClient:
        """As `create_lora_training_client`."""
        return await made(self.create_lora_training_client, *args, **kwargs)
