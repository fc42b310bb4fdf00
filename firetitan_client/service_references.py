"""A service's clients of the frozen model, for reference logprobs.

Knows: when the policy's own trainer serves as a reference, and the separate one where it does not.
Must not know: how commands travel.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from firetitan_client import arguments, transport
from firetitan_client.errors import InvalidArgument
from firetitan_client.forward_only import ForwardOnlyClient
from firetitan_client.futures import APIFuture, made
from firetitan_client.leases import DELETE, KEEP, CleanupOutcome, report
from firetitan_client.managed import FiretitanProvisioningConfig
from firetitan_client.provisioner import Provisioner, raise_first
from firetitan_client.sample_requests import follow
from firetitan_client.service_core import SILENCE_S
from firetitan_client.service_training import TrainingClients
from firetitan_client.sessions import Opened, Wanted
from firetitan_client.training import FiretitanTrainingClient


class ReferenceClients(TrainingClients):
    """The part of a service that makes clients of the frozen model."""

    def create_base_training_client(
        self, base_model: str | None = None, user_metadata: Mapping[str, str] | None = None
    ) -> FiretitanTrainingClient:
        """A client that runs the base model on the LoRA policy's trainer, its adapter left out.

        Only `forward` works on it. Without a training client yet the trainer's session is joined,
        or opened with the service's settings; with `max_lora_rank` it has a session of its own
        that trains nothing. Blocks as `create_training_client`.

        Args:
            base_model: Must be the service's; None: that.
            user_metadata: Accepted, without effect: the session has its notes.

        Raises:
            ValueError: Another model than the service's, or a full-parameter trainer, which has no
                adapter to leave out.
        """
        return self._create_base(base_model, self._policy)

    def _create_base(
        self, base_model: str | None, policy: FiretitanTrainingClient | None
    ) -> FiretitanTrainingClient:
        self._check_open()
        config = self._config
        self._agree("base_model", base_model, config.base_model)
        unknown = config.lora_rank is None and config.trainer_job_id is not None
        frozen = config.forward_only or config.max_lora_rank
        if not config.lora_rank and not unknown and not frozen:
            raise _no_adapter()
        opened: APIFuture[Opened] = APIFuture("create_base_training_client")
        client = self._client(ForwardOnlyClient, opened)
        follow(self._open_base(policy), opened)
        self._await_ready(client, "the trainer")
        return client

    async def _open_base(self, policy: FiretitanTrainingClient | None) -> Opened:
        if policy is not None:
            opened = await policy._ready
        elif self._config.max_lora_rank is not None:
            return await self._open(None, Wanted(rank=0, forward_only=True))
        else:
            opened = await self._open(None, self._configured())
        if opened.lora_rank == 0 and not opened.trainer.forward_only:
            raise _no_adapter()
        return replace(opened, lora_rank=0)

    def create_reference_client(
        self,
        base_model: str | None = None,
        lora_rank: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
        *,
        policy_client: FiretitanTrainingClient | None = None,
    ) -> FiretitanTrainingClient:
        """The frozen base model, for the reference logprobs of KL and DPO; only `forward` works.

        A LoRA policy's trainer is shared, its adapter left out. A full-parameter policy, or
        `reference_training_shape_id` or `reference_trainer_job_id` among the service's settings,
        has a forward-only trainer beside it. Called again (for the same policy, where the service
        has several), the same client comes back. Blocks as `create_training_client`.

        Args:
            base_model: Must be the service's; None: that.
            lora_rank: Must be the policy's; None or 0: that.
            user_metadata: Your own notes, kept with the session of a separate trainer.
            policy_client: Whose reference it is to be; None: this service's training client.
                Needed with `max_lora_rank`.

        Raises:
            ValueError: Another model or rank than the service's, naming both; a policy of another
                service, or none where there are several.
        """
        self._check_open()
        config = self._config
        self._agree("base_model", base_model, config.base_model)
        self._agree("lora_rank", lora_rank or None, config.lora_rank)
        if policy_client is not None and cast(Any, policy_client.service) is not self:
            raise ValueError("policy_client: is a client of another service; create it with this")
        if base_model is None and config.base_model is None and config.trainer_job_id is None:
            raise ValueError("base_model is required for a direct reference client")
        if policy_client is None and config.max_lora_rank is not None:
            raise ValueError(
                "policy_client: needed on a service with max_lora_rank; give the training client "
                "whose reference this is to be"
            )
        notes = {**self._user_metadata, **arguments.notes(user_metadata)}
        policy = policy_client or self._policy
        shared = config.max_lora_rank is not None and not self._reference_is_separate
        key = policy if shared else None
        opened: APIFuture[Opened] = APIFuture("create_reference_client")
        before = config.base_model, config.lora_rank
        with self._lock:
            client = self._reference_clients.get(key)
            if client is None:
                config.base_model = base_model or config.base_model
                config.lora_rank = lora_rank or config.lora_rank
                client = self._client(ForwardOnlyClient, opened)
                self._reference_clients[key] = client
                follow(self._open_reference(policy, Wanted(user_metadata=notes)), opened)

        def failed() -> None:
            """Let the call be repeated."""
            if self._reference_clients.get(key) is client:
                del self._reference_clients[key]
                config.base_model, config.lora_rank = before

        self._await_ready(client, "the reference", failed)
        return client

    async def _open_reference(
        self, policy: FiretitanTrainingClient | None, wanted: Wanted
    ) -> Opened:
        config = self._config
        if not self._reference_is_separate:
            rank = config.lora_rank
            if policy is not None:
                rank = (await policy._ready).lora_rank
            elif rank is None and config.trainer_job_id is not None:
                rank = (await self._provisioner.get_trainer()).lora_rank
            if rank or config.forward_only:
                return await self._open_base(policy)
        reference = await self._get_reference()
        try:
            async with reference.opening("trainer"):
                return await self._open_with(reference, None, wanted)
        except BaseException:
            self._reference = None  # the next call may want another one
            raise

    @property
    def _reference_is_separate(self) -> bool:
        """Whether the settings ask for a trainer of the reference's own."""
        config = self._config
        return bool(config.reference_training_shape_id or config.reference_trainer_job_id)

    async def _get_reference(self) -> Provisioner:
        config = self._config
        base_model = config.base_model
        if base_model is None:
            base_model = (await self._provisioner.get_trainer()).base_model
        if self._reference is None:
            wanted = FiretitanProvisioningConfig(
                base_model=base_model,
                trainer_job_id=config.reference_trainer_job_id,
                max_context_length=config.max_context_length,
                training_shape_id=config.reference_training_shape_id,
                create_deployment=False,
                forward_only=True,
            )
            at_death = DELETE if config.cleanup_reference_trainer_on_close else KEEP
            self._reference = Provisioner(self._transport, wanted, self._lease, at_death)
        return self._reference

    async def _open_all(self, session: str | None, wanted: Wanted, both: bool) -> Opened:
        config = self._config
        separate = self._reference_is_separate or config.lora_rank == 0
        if not config.reference_required or not separate or config.forward_only:
            return await super()._open_all(session, wanted, both)
        reference = await self._get_reference()
        async with reference.opening("trainer"):
            opened, made = await asyncio.gather(
                super()._open_all(session, wanted, both),
                reference.get_trainer(),
                return_exceptions=True,
            )
            raise_first((opened, made))
        return cast(Opened, opened)

    def release_references(self) -> None:
        """Let go of the reference clients; again is fine.

        A separate trainer that this service created is deleted, unless
        `cleanup_reference_trainer_on_close` is False; one that existed stays, and one that others
        use until the last of them has left.
        """
        self._wait_until_made()
        self._release_references()

    def _release_references(self) -> None:
        with self._lock:
            clients = list(self._reference_clients.values())
            self._reference_clients.clear()
        for client in clients:
            client._lane.close()
            client._lane.wait_accepted(SILENCE_S)
        report(transport.run(self._drop_references()).result(), "release_references")

    async def _drop_references(self) -> list[CleanupOutcome]:
        reference, self._reference = self._reference, None
        if reference is None or reference.config.trainer_job_id is None:
            return []
        deletes = reference.trainer_created and self._config.cleanup_reference_trainer_on_close
        cleanup = DELETE if deletes and self._pid == os.getpid() else KEEP
        return await self._lease.release({reference.trainer_name: cleanup})

    @property
    def reference_trainer_job_id(self) -> str | None:
        """Id of the separate reference trainer; None where the policy's is shared, or none yet."""
        self._wait_until_made()
        trainer = self._reference.trainer if self._reference is not None else None
        return None if trainer is None else trainer.name.rpartition("/")[2]

    # Twins: `await` them for the client

    async def create_base_training_client_async(
        self, *args: Any, **kwargs: Any
    ) -> FiretitanTrainingClient:
        """As `create_base_training_client`."""
        return await made(self.create_base_training_client, *args, **kwargs)

    async def create_reference_client_async(
        self, *args: Any, **kwargs: Any
    ) -> FiretitanTrainingClient:
        """As `create_reference_client`."""
        return await made(self.create_reference_client, *args, **kwargs)


def _no_adapter() -> InvalidArgument:
    return InvalidArgument(
        "create_base_training_client: a full-parameter trainer (lora_rank=0) has no adapter to "
        "leave out; create_reference_client() runs the base model in a trainer of its own",
        field="lora_rank",
    )
