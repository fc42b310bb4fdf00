"""A service's clients of the frozen model, for reference logprobs.

Knows: when the policy's own trainer can serve as a reference. Must not know: how commands travel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from firetitan_client.errors import InvalidArgument, Unsupported
from firetitan_client.forward_only import ForwardOnlyClient
from firetitan_client.futures import APIFuture
from firetitan_client.lane import Lane
from firetitan_client.sample_requests import follow
from firetitan_client.service_training import TrainingClients
from firetitan_client.sessions import Opened
from firetitan_client.training import FiretitanTrainingClient

if TYPE_CHECKING:
    from firetitan_client.service import FiretitanServiceClient


class ReferenceClients(TrainingClients):
    """The part of a service that makes clients of the frozen model."""

    def create_base_training_client(
        self, base_model: str | None = None, user_metadata: Mapping[str, str] | None = None
    ) -> FiretitanTrainingClient:
        """A client that runs the base model on the LoRA policy's trainer, its adapter left out.

        Only `forward` works on it. Without a training client yet the trainer's session is joined,
        or opened with the service's settings. Blocks as `create_training_client`.

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
        if config.lora_rank == 0 or (config.lora_rank is None and config.trainer_job_id is None):
            raise _no_adapter()
        opened: APIFuture[Opened] = APIFuture("create_base_training_client")
        lane = Lane(self._transport, lambda client_id: self._attach(opened, client_id))
        client = ForwardOnlyClient(
            cast("FiretitanServiceClient", self),
            lane,
            opened,
            config.base_model or config.trainer_job_id or "",
            base_only=True,
        )
        self._lanes.append(lane)
        follow(self._open_base(policy), opened)
        self._await_ready(client, "the trainer")
        return client

    async def _open_base(self, policy: FiretitanTrainingClient | None) -> Opened:
        opened = await (policy._ready if policy else self._open(None, self._configured()))
        if opened.lora_rank == 0:
            raise _no_adapter()
        return replace(opened, lora_rank=0)

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
            "create_reference_client is not supported yet; a LoRA policy's base model runs with "
            "create_base_training_client(), for a full-parameter one use a second service with a "
            "trainer of its own and only forward()"
        )

    async def create_base_training_client_async(
        self, base_model: str | None = None, user_metadata: Mapping[str, str] | None = None
    ) -> FiretitanTrainingClient:
        """As `create_base_training_client`."""
        return await self.create_base_training_client(base_model, user_metadata)


def _no_adapter() -> InvalidArgument:
    return InvalidArgument(
        "create_base_training_client: a full-parameter trainer (lora_rank=0) has no adapter to "
        "leave out; create_reference_client() runs the base model in a trainer of its own",
        field="lora_rank",
    )
