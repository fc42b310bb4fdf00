"""Calls that clients written for tinker or newer SDKs make beside training and sampling.

Knows: what they mean where there are no accounts and no cloud. Must not know: how training,
checkpoints or samples work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from firetitan_client import tinker_losses, types
from firetitan_client.errors import Unsupported
from firetitan_client.futures import APIFuture, SelfFuture, completed
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

    @property
    def holder(self) -> None:
        """None: connections are not handed out."""

    def get_console_url(self) -> str:
        """There is no console: the daemon's address, for `firetitand status`."""
        return self._transport.address

    def create_custom_loss(self, fn: Any, input_ranks: Mapping[str, int]) -> APIFuture[Any]:
        """A loss of one datum at a time, traced by tinker, for `forward_backward_custom`.

        Args:
            fn: `fn(logprobs, *inputs) -> (loss, metrics)`, in torch, without branching on values.
            input_ranks: Dimensions of logprobs and of each further loss input it reads.

        Returns:
            A future of tinker's `LossHandle`; it runs in this process.

        Raises:
            ValueError: It cannot be traced, or the ranks do not fit its arguments.
            NotImplementedError: The installed tinker has none.
        """
        return completed(tinker_losses.trace(fn, input_ranks), "create_custom_loss")

    def copy_weights(self, *_: Any, **__: Any) -> NoReturn:
        """Not supported."""
        raise Unsupported(
            "copy_weights has no meaning for a daemon of your own; every trainer reads every "
            "checkpoint: load_state('cross_job://<trainer>/<name>')"
        )


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

    def get_console_url(self) -> str:
        """There is no console: the session's name, for `firetitand ls`."""
        return self._opened.session

    def save_weights_external(self, *_: Any, **__: Any) -> NoReturn:
        """Not supported."""
        raise Unsupported(
            "save_weights_external is not supported; save_weights_for_sampler(name), then "
            "FireworksClient().export_checkpoint(name, folder) writes a Hugging Face or PEFT folder"
        )

    async def save_weights_external_async(self, *_: Any, **__: Any) -> NoReturn:
        """Not supported."""
        self.save_weights_external()
