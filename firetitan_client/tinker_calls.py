"""Calls that clients written for tinker or newer SDKs make beside training and sampling.

Knows: what they mean where there are no accounts and no cloud. Must not know: how training,
checkpoints or samples work.
"""

from __future__ import annotations

from typing import Any

from firetitan_client import types
from firetitan_client.errors import Unsupported
from firetitan_client.futures import APIFuture, SelfFuture
from firetitan_client.rest_client import RestClient, server_capabilities
from firetitan_client.sample_requests import follow
from firetitan_client.service_core import ServiceCore
from firetitan_client.sessions import Opened


class TinkerServiceCalls(ServiceCore):
    """The part of a service that tinker's loops ask for facts."""

    def create_rest_client(self) -> RestClient:
        """Runs and checkpoints of the daemon, in tinker's types."""
        self._check_open()
        return RestClient(self._transport)

    def get_server_capabilities(self) -> Any:
        """The base models that are loaded: tinker's `GetServerCapabilitiesResponse`."""
        answer: APIFuture[Any] = APIFuture("get_server_capabilities")
        follow(server_capabilities(self._transport), answer)
        return answer.result()

    async def get_server_capabilities_async(self) -> Any:
        """As `get_server_capabilities`, for coroutines."""
        answer: APIFuture[Any] = APIFuture("get_server_capabilities")
        follow(server_capabilities(self._transport), answer)
        return await answer

    def get_telemetry(self) -> None:
        """There is none."""


class TinkerTrainingCalls(SelfFuture[Opened]):
    """The part of a training client that tinker's loops ask for facts."""

    @property
    def model_id(self) -> str:
        """What tinker calls the model: the trainer's id."""
        return self._opened.trainer.name.rpartition("/")[2]

    @property
    def run_id(self) -> str:
        """As `model_id`: a run is a trainer."""
        return self.model_id

    @property
    def run_name(self) -> str:
        """The session's name."""
        return self._opened.session

    @property
    def holder(self) -> None:
        """None: connections are not handed out."""

    def _guaranteed_model_id(self) -> str:
        return self.model_id

    def get_info(self) -> Any:
        """A `tinker.GetInfoResponse`."""
        opened = self._opened
        data = types.result_type("ModelData")(
            arch=opened.trainer.model.architecture,
            model_name=opened.base_model,
            tokenizer_id=opened.trainer.model.path or opened.base_model,
        )
        return types.result_type("GetInfoResponse")(
            model_data=data,
            model_id=self.model_id,
            is_lora=opened.lora_rank > 0,
            lora_rank=opened.lora_rank or None,
            model_name=opened.base_model,
        )

    async def get_info_async(self) -> Any:
        """As `get_info`, for coroutines."""
        await self
        return self.get_info()

    def get_telemetry(self) -> None:
        """There is none."""

    def weight_sync(self) -> APIFuture[Any]:
        """Not supported."""
        raise Unsupported(
            "weight_sync is not supported; save_weights_for_sampler(name) and "
            "service.hotload_sampler_snapshot(path) bring the weights to the deployment"
        )
