"""FiretitanTrainingClient: tinker's training calls, as commands on one session.

Knows: which call is which command, what users may pass. Must not know: how commands are ordered
and sent, where the session comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from firetitan.v1 import operation_pb2, training_service_pb2

from firetitan_client import convert, custom_loss, precomputed, types
from firetitan_client.errors import Unsupported
from firetitan_client.futures import APIFuture, made
from firetitan_client.tinker_calls import TinkerTrainingCalls
from firetitan_client.weights import WeightsCalls

if TYPE_CHECKING:
    from firetitan_client.service import FiretitanServiceClient


class FiretitanTrainingClient(WeightsCalls, TinkerTrainingCalls):
    """Trains one session. Made by `FiretitanServiceClient.create_training_client`.

    Calls return futures at once and run in call order. The client is also the future of itself:
    `client.result(timeout)`, `await client` and `client.future()` wait until it is ready.

    Args:
        service: Whose client this is; it opens snapshots for sampling.
        lane: Where the commands go.
        ready: Done once the session is open.
        label: What was asked for, for `repr`.
    """

    _base_only = False
    """Whether forwards leave the session's adapter out."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles as service and session: another process joins it, with a lane of its own."""
        return _rejoined, (self._service, self.session_name)

    @property
    def service(self) -> FiretitanServiceClient:
        """The service that made this client."""
        return self._service

    @property
    def session_name(self) -> str:
        """The session, for another process's `create_training_client(session=...)`."""
        return self._opened.session

    @property
    def user_metadata(self) -> dict[str, str]:
        """The notes of whoever created the session."""
        return dict(self._opened.user_metadata)

    @property
    def trainer_job_id(self) -> str:
        """Id of the trainer the session is on."""
        return self._opened.trainer.name.rpartition("/")[2]

    def __repr__(self) -> str:
        if not self._ready.done():
            return f"<FiretitanTrainingClient {self._label} opening>"
        error = self._ready.exception(0)
        if error is not None:
            return f"<FiretitanTrainingClient {self._label} failed: {error}>"
        opened = self._ready.result(0)
        kind = f"LoRA rank {opened.lora_rank}" if opened.lora_rank else "full-parameter"
        return f"<FiretitanTrainingClient {opened.session} {opened.base_model} {kind}>"

    # Passes and steps

    def forward(
        self, data: Any, loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> APIFuture[Any]:
        """Logprobs and loss; gradients stay as they are.

        Args:
            data: `tinker.Datum`s; unknown loss inputs are ignored.
            loss_fn: Name of a built-in loss, e.g. "cross_entropy".
            loss_fn_config: Its settings. With `{"output": "embedding", "pooling": "mean"}` (or
                "last") no loss is computed and embeddings come back. With `{"top_k": K}` of
                "cross_entropy" also `top_k_indices` and `top_k_logprobs` [N, K]: the likeliest
                tokens of each position.

        Returns:
            A future of `ForwardBackwardOutput`: `loss_fn_outputs[i]["logprobs"]` in the shape of
            datum i's target_tokens, `metrics["loss:sum"]`; or `loss_fn_outputs[i]["embedding"]`.

        Raises:
            ValueError: No data, or malformed data; names the field.
        """
        config = convert.loss_config(loss_fn_config)
        output, pooling = config.pop("output", "logprobs"), config.pop("pooling", "mean")
        if output == "logprobs":
            request = training_service_pb2.ForwardRequest(
                data=convert.data_to_proto(data),
                loss_fn=_loss_name(loss_fn),
                loss_fn_config=convert.loss_config_to_proto(config),
                base_only=self._base_only,
            )
        elif output == "embedding":
            request = training_service_pb2.ForwardRequest(
                data=convert.sequences_to_proto(data),
                pooling=convert.pooling_to_proto(pooling),
                base_only=self._base_only,
            )
        else:
            raise convert.invalid(
                'loss_fn_config["output"]', f"is {output!r}; give 'logprobs' or 'embedding'"
            )

        def finish(operation: operation_pb2.Operation) -> Any:
            result = convert.forward_output(operation.forward)
            version = None if self._base_only else operation.forward.weights_version
            precomputed.remember(result, version)
            return result

        return self._submit(
            "TrainingService/Forward", request, training_service_pb2.ForwardResponse, finish
        )

    def forward_backward(
        self, data: Any, loss_fn: str, loss_fn_config: Mapping[str, Any] | None = None
    ) -> APIFuture[Any]:
        """As `forward`, and adds to the gradients; unknown loss inputs are refused by name."""
        messages = convert.data_to_proto(data)
        request = training_service_pb2.ForwardBackwardRequest(
            data=messages,
            loss_fn=_loss_name(loss_fn),
            loss_fn_config=convert.loss_config_to_proto(loss_fn_config),
        )
        counts = loss_fn == "cross_entropy"

        def finish(operation: operation_pb2.Operation) -> Any:
            output = convert.forward_output(operation.forward)
            if counts:
                output.metrics.setdefault("response_tokens", convert.response_tokens(messages))
            return output

        return self._submit(
            "TrainingService/ForwardBackward",
            request,
            training_service_pb2.ForwardBackwardResponse,
            finish,
        )

    def forward_backward_custom(
        self,
        data: Any,
        loss_fn: custom_loss.LossFn,
        *,
        loss_type_input: str = "logprobs",
        output: str = "logprobs",
        pooling: str = "mean",
        precomputed_forward: Any = None,
    ) -> APIFuture[Any]:
        """Forward, your loss in torch, backward: one forward a call.

        Returns once your loss has run and its gradients are on their way. Where another client
        steps in between, your loss may run a second time.

        Args:
            data: `tinker.Datum`s. Only the tokens and `target_tokens` leave this process; without
                target_tokens each position's target is the next token. Embeddings need no targets.
            loss_fn: `loss_fn(data, outputs) -> (loss, metrics)`; `outputs[i]` is a float32 tensor
                for datum i: logprobs in the shape of its targets, its embedding [H], or its row [B]
                of the batch's cosine matrix. The loss must use each.
            loss_type_input: "logprobs".
            output: "logprobs", "embedding" or "cos_similarity_matrix".
            pooling: Of the last hidden states into an embedding: "mean" or "last".
            precomputed_forward: What `forward` returned for this data: spares the forward here. If
                the weights have moved since, it is not used.

        Returns:
            A future of `ForwardBackwardOutput`; `metrics` hold yours, `loss:sum` (your loss) and
            `surrogate_loss:sum`.

        Raises:
            Exception: Whatever your loss raised; nothing was accumulated.
            WeightsChanged: (from the future) another client stepped twice in between.
        """
        return custom_loss.CustomLossCall(
            self._lane,
            data,
            loss_fn,
            loss_type_input=loss_type_input,
            output=output,
            pooling=pooling,
            precomputed_forward=precomputed_forward,
        ).begin()

    def forward_backward_contrastive(
        self,
        data: Any,
        *,
        num_queries: int,
        temperature: float,
        pooling: str = "last",
        num_extra_negatives: int = 0,
    ) -> APIFuture[Any]:
        """Bidirectional InfoNCE over embeddings, and adds to the gradients.

        Args:
            data: The queries, then as many documents in the same order, then extra negatives. Loss
                inputs are not read.
            num_queries: How many queries.
            temperature: Cosines are divided by it; above 0.
            pooling: Of the last hidden states: "mean" or "last".
            num_extra_negatives: Documents that belong to no query.

        Returns:
            A future of `ForwardBackwardOutput` with `metrics["loss"]`, the mean over the queries,
            and `loss_fn_outputs[i]["embedding"]`.

        Raises:
            ValueError: A wrong number of datums, or another field, named.
        """
        messages = convert.sequences_to_proto(data)
        queries = convert.whole_number(num_queries, "num_queries", 1, 2**31)
        negatives = convert.whole_number(num_extra_negatives, "num_extra_negatives", 0, 2**31)
        scale = convert.real_number(temperature, "temperature")
        if not 0 < scale < float("inf"):
            raise convert.invalid("temperature", f"is {temperature!r}; give a number above 0")
        wanted = 2 * queries + negatives
        if len(messages) != wanted:
            raise convert.invalid(
                "data",
                f"has {len(messages)} datums; 2 * num_queries + num_extra_negatives = {wanted}",
            )
        settings = {
            "num_queries": queries,
            "temperature": scale,
            "num_extra_negatives": negatives,
        }
        return self._submit(
            "TrainingService/ForwardBackward",
            training_service_pb2.ForwardBackwardRequest(
                data=messages,
                loss_fn="contrastive",
                loss_fn_config=convert.loss_config_to_proto(settings),
                pooling=convert.pooling_to_proto(pooling),
            ),
            training_service_pb2.ForwardBackwardResponse,
            lambda operation: convert.forward_output(operation.forward),
        )

    def optim_step(
        self,
        adam_params: Any = None,
        grad_accumulation_normalization: types.GradAccNormalization | str | None = None,
        emit_grad_norm_metrics: Any = None,
        *,
        optim_params: Any = None,
    ) -> APIFuture[Any]:
        """Normalise the gradients, clip them, apply AdamW, zero them.

        Args:
            adam_params: `tinker.AdamParams`.
            grad_accumulation_normalization: How the accumulated sum is scaled; None: not at all.
            emit_grad_norm_metrics: More about the gradients: "basic" or True their `grad_rms`,
                "detailed" both by part of the model (`grad_norm/attn`, ...), "off" or False
                nothing; None: as `adam_params` says.
            optim_params: tinker's newer name of `adam_params`.

        Returns:
            A future of `OptimStepResponse`; its metrics hold `step` and `grad_norm`, normalised
            and before clipping.

        Raises:
            ValueError: Both or a malformed one given.
            TypeError: Neither given.
        """
        if adam_params is not None and optim_params is not None:
            raise ValueError("Pass either adam_params or optim_params, not both")
        params = adam_params if adam_params is not None else optim_params
        if params is None:
            raise TypeError("optim_step() needs adam_params, e.g. tinker.AdamParams()")
        if emit_grad_norm_metrics is None:
            emit_grad_norm_metrics = getattr(params, "emit_grad_norm_metrics", None)
        request = training_service_pb2.OptimStepRequest(
            adam_params=convert.adam_params_to_proto(params),
            grad_acc_normalization=convert.normalization_to_proto(grad_accumulation_normalization),
        )
        request.adam_params.grad_norm_metrics = convert.grad_norm_metrics_to_proto(
            emit_grad_norm_metrics
        )
        return self._submit(
            "TrainingService/OptimStep",
            request,
            training_service_pb2.OptimStepResponse,
            lambda operation: convert.optim_step_response(operation.optim_step),
        )

    # What it is

    def get_tokenizer(self) -> Any:
        """The Hugging Face tokenizer: the service's `tokenizer_model`, else the base model's."""
        return self._service._tokenizer(self._opened.trainer.model.path)

    def create_base_training_client(
        self, base_model: str | None = None, user_metadata: Mapping[str, str] | None = None
    ) -> FiretitanTrainingClient:
        """A client of this session with the adapter left out; only `forward` works on it.

        Args:
            base_model: Must be the service's; None: that.
            user_metadata: Accepted, without effect: the session has its notes.

        Raises:
            ValueError: Another model, or a full-parameter session.
        """
        return self._service._create_base(base_model, self)

    async def create_base_training_client_async(
        self, base_model: str | None = None, user_metadata: Mapping[str, str] | None = None
    ) -> FiretitanTrainingClient:
        """As `create_base_training_client`."""
        return await made(self.create_base_training_client, base_model, user_metadata)

    def unload_model(self) -> APIFuture[None]:
        """End the session: what was called still runs, then its adapter's memory is freed.

        What was saved stays. The client is closed; the service can create another one.

        Returns:
            A future that is done when the memory is free.

        Raises:
            NotImplementedError: It trains every parameter: delete its trainer instead.
        """
        if self._opened.lora_rank == 0:
            raise Unsupported(
                "unload_model: this session trains every parameter, so the model is its trainer; "
                "delete that (cleanup_trainer_on_close, or TrainerJobManager.delete)"
            )
        return self._service._unload(self)

    async def unload_model_async(self) -> APIFuture[None]:
        """As `unload_model`."""
        await self
        return self.unload_model()

    # Twins: `await` them for the future, await that for the result

    async def forward_async(self, *args: Any, **kwargs: Any) -> APIFuture[Any]:
        """As `forward`."""
        return self.forward(*args, **kwargs)

    async def forward_backward_async(self, *args: Any, **kwargs: Any) -> APIFuture[Any]:
        """As `forward_backward`."""
        return self.forward_backward(*args, **kwargs)

    async def forward_backward_custom_async(
        self,
        data: Any,
        loss_fn: custom_loss.LossFn,
        *,
        loss_type_input: str = "logprobs",
        output: str = "logprobs",
        pooling: str = "mean",
        precomputed_forward: Any = None,
    ) -> APIFuture[Any]:
        """As `forward_backward_custom`; the loss runs in another thread, the loop goes on.

        Cancelling the wait does not stop the call.
        """
        call = custom_loss.CustomLossCall(
            self._lane,
            data,
            loss_fn,
            loss_type_input=loss_type_input,
            output=output,
            pooling=pooling,
            precomputed_forward=precomputed_forward,
        )
        return await call.begin_apart()

    async def forward_backward_contrastive_async(self, *args: Any, **kwargs: Any) -> APIFuture[Any]:
        """As `forward_backward_contrastive`."""
        return self.forward_backward_contrastive(*args, **kwargs)

    async def optim_step_async(self, *args: Any, **kwargs: Any) -> APIFuture[Any]:
        """As `optim_step`."""
        return self.optim_step(*args, **kwargs)


def _loss_name(loss_fn: Any) -> str:
    if not isinstance(loss_fn, str):
        raise convert.invalid(
            "loss_fn",
            f"is a {type(loss_fn).__name__}; give the name of a built-in loss, or use "
            "forward_backward_custom",
        )
    return loss_fn


def _rejoined(service: FiretitanServiceClient, session: str) -> FiretitanTrainingClient:
    return service._rejoin(session)
