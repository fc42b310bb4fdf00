"""A service's training clients that begin with a checkpoint.

Knows: what a checkpoint says of the session it is for. Must not know: how commands travel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from firetitan.v1 import checkpoint_pb2

from firetitan_client import arguments, references
from firetitan_client.errors import Unsupported
from firetitan_client.futures import APIFuture, made
from firetitan_client.service_training import Begin, Resume, TrainingClients
from firetitan_client.sessions import Opened, Wanted, find_checkpoint
from firetitan_client.training import FiretitanTrainingClient


class ResumingClients(TrainingClients):
    """The part of a service that makes training clients from checkpoints."""

    def create_training_client_from_state(
        self,
        path: Any = None,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
        *,
        name: Any = None,
        base_model: str | None = None,
        optimizer: Any = None,
    ) -> FiretitanTrainingClient:
        """A client that begins with a checkpoint's weights and a fresh optimizer.

        Model and adapter are the service's; what that does not say, the checkpoint's own. Blocks
        as `create_training_client`.

        Args:
            path: A checkpoint's name, its `.path`, a `cross_job://trainer/name` reference, or
                what `save_state` gave.
            user_metadata: Your own notes.
            weights_access_token: Not supported.
            name: `path` by another name.
            base_model: Must be the service's; None: that.
            optimizer: AdamW's configuration, or None; others are refused.

        Raises:
            ValueError: Another model than the service's; the service has a client already.
            NotImplementedError: An access token, or a service with `max_lora_rank`.
            FiretitanError: No such checkpoint; it is of another model or adapter.
        """
        arguments.optimizer(optimizer)
        return self._create_from(
            path, name, weights_access_token, base_model, user_metadata, with_optimizer=False
        )

    def create_training_client_from_state_with_optimizer(
        self,
        path: Any = None,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
        *,
        name: Any = None,
        base_model: str | None = None,
    ) -> FiretitanTrainingClient:
        """As `create_training_client_from_state`, going on where the checkpoint was saved."""
        return self._create_from(
            path, name, weights_access_token, base_model, user_metadata, with_optimizer=True
        )

    def _create_from(
        self,
        path: Any,
        name: Any,
        token: str | None,
        base_model: str | None,
        user_metadata: Mapping[str, str] | None,
        *,
        with_optimizer: bool,
    ) -> FiretitanTrainingClient:
        references.refuse_token(token)
        if self._config.max_lora_rank is not None:
            raise Unsupported(
                "create_training_client_from_state: with max_lora_rank each client says what its "
                "adapter is; create_training_client() with that, then load_state()"
            )
        reference = references.checkpoint_reference(path, name)
        wanted = self._configured(user_metadata=user_metadata)

        def load(client: FiretitanTrainingClient) -> APIFuture[Any]:
            if with_optimizer:
                return client.load_state_with_optimizer(reference)
            return client.load_state(reference)

        resume = Resume(lambda begin: self._open_for(reference, wanted, begin), load)
        return self._create(base_model, None, wanted, None, resume)

    async def _open_for(self, reference: str, wanted: Wanted, begin: Begin) -> Opened:
        row = await find_checkpoint(self._transport, reference)
        wanted = wanted if row is None else self._as_saved(wanted, row)
        return await self._open(None, wanted, begin)

    def _as_saved(self, wanted: Wanted, row: checkpoint_pb2.Checkpoint) -> Wanted:
        """What was asked of a session, the checkpoint's own settings where nothing was."""
        config = self._config
        if config.trainer_job_id is None:
            config.base_model = config.base_model or row.base_model
            config.lora_rank = row.lora_rank if config.lora_rank is None else config.lora_rank
        if not row.HasField("lora"):
            return wanted
        saved = row.lora
        return replace(
            wanted,
            alpha=saved.alpha if wanted.alpha is None else wanted.alpha,
            train_attn=saved.train_attn if wanted.train_attn is None else wanted.train_attn,
            train_mlp=saved.train_mlp if wanted.train_mlp is None else wanted.train_mlp,
            train_unembed=(
                saved.train_unembed if wanted.train_unembed is None else wanted.train_unembed
            ),
        )

    # Twins: `await` them for the client

    async def create_training_client_from_state_async(
        self, *args: Any, **kwargs: Any
    ) -> FiretitanTrainingClient:
        """As `create_training_client_from_state`."""
        return await made(self.create_training_client_from_state, *args, **kwargs)

    async def create_training_client_from_state_with_optimizer_async(
        self, *args: Any, **kwargs: Any
    ) -> FiretitanTrainingClient:
        """As `create_training_client_from_state_with_optimizer`."""
        return await made(self.create_training_client_from_state_with_optimizer, *args, **kwargs)
