"""forward_backward_custom: the user's loss runs here, the model's passes in the worker.

Knows: torch (imported when called), the Forward / Backward commands, which failures allow another
way. Must not know: queues, sequence numbers, threads other than its own.

    Forward (graph kept) -> outputs -> the user's loss, differentiated here -> Backward (dC/doutput)

One forward a call. Where the worker let go of the graph and the weights are the same, the linear
surrogate sum(dC/doutput * output) has the same gradient. Where another client moved the weights in
between, forward and loss run once more, then WeightsChanged is raised.
Source: the algorithm of tinker's `forward_backward_custom`, without its second forward.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from firetitan.v1 import operation_pb2, training_service_pb2

from firetitan_client import convert, precomputed, tinker_losses
from firetitan_client.errors import GraphExpired, PrecedingFailed, WeightsChanged
from firetitan_client.futures import APIFuture
from firetitan_client.loss_space import Embeddings, Logprobs, choose_space, output_arrays

if TYPE_CHECKING:
    from firetitan_client.lane import Hold, Lane

LossFn = Callable[[Any, list[Any]], tuple[Any, dict[str, float]]]


@dataclass(frozen=True)
class Loss:
    """What the user's loss gave."""

    value: float
    metrics: dict[str, float]
    grads: list[npt.NDArray[np.float32]]
    """dC/doutputs, one array a datum."""
    surrogate: float
    """sum(outputs * dC/doutputs): what tinker reports as the surrogate's loss."""


class CustomLossCall:
    """One call. `begin` runs in the caller's thread and returns once Backward is submitted.

    Args:
        lane: Where its commands go; the calls behind it wait until it is through.
        data: The user's datums, handed to the loss as they are.
        loss_fn: `(data, outputs) -> (scalar loss, metrics)`, in torch.
        loss_type_input: "logprobs".
        output: What the loss is over.
        pooling: Of embeddings.
        precomputed_forward: What `forward` returned for this data, to spare the forward here.

    Raises:
        ValueError: An unknown option, or malformed data.
    """

    def __init__(
        self,
        lane: Lane,
        data: Any,
        loss_fn: LossFn,
        *,
        loss_type_input: str | None = "logprobs",
        output: str = "logprobs",
        pooling: str = "mean",
        precomputed_forward: Any = None,
    ) -> None:
        _torch()
        data = convert.checked_data(data)  # the loss reads it a second time
        loss_fn = tinker_losses.as_function(loss_fn, data) or loss_fn
        if not callable(loss_fn):
            raise convert.invalid(
                "loss_fn", f"is {loss_fn!r}; give a function, or call forward_backward for a name"
            )
        self._lane = lane
        self._data = data
        self._loss_fn = loss_fn
        self._waited_for: APIFuture[Any] | None = None
        self._handed_over = False
        """Whether the rest is done where Backward ends."""
        self._space = choose_space(data, loss_type_input, output, pooling)
        self._body = self._space.forward().SerializeToString()
        self._precomputed: _Forward | None = None
        if precomputed_forward is not None:
            self._precomputed = _precomputed(precomputed_forward, self._space)
        self._second_try = False
        self._last: APIFuture[Any] | None = None
        self.future: APIFuture[Any] = APIFuture("forward_backward_custom")
        self._hold: Hold = lane.hold()

    def begin(self) -> APIFuture[Any]:
        """Forward, loss, then submit Backward.

        Raises:
            Exception: Whatever the user's loss raised; nothing was accumulated.
            FiretitanError: The forward failed.
        """
        try:
            self._forward_and_loss()
        except BaseException as error:
            if isinstance(error, Exception) and self._last is not None:
                self._lane.mark_seen(self._last)
            self._hold.fail_behind(error)
            forward = self._waited_for
            if forward is not None:  # Ctrl-C: it goes on
                forward.add_done_callback(lambda _: self._unwanted(forward))
            elif not self._handed_over:
                self._hold.release()
            raise
        return self.future

    def begin_apart(self) -> APIFuture[APIFuture[Any]]:
        """As `begin`, in a thread of its own: whoever stops waiting for it stops nothing else.

        Returns:
            A future of what `begin` returns; what it fails with is raised by the next call, too,
            unless somebody looked at it.
        """
        begun: APIFuture[APIFuture[Any]] = APIFuture("forward_backward_custom")

        def begin() -> None:
            self._forward_and_loss()
            begun.finish(self.future)

        def failed(error: BaseException) -> None:
            self._fail(error)
            begun._on_seen = self.future._on_seen
            begun.finish(error=error)

        _apart(begin, failed)
        return begun

    def _unwanted(self, forward: APIFuture[Any]) -> None:
        """A forward has ended that nobody waits for any more."""
        if not forward.cancelled():
            error = forward.exception(0)
            if error is None:
                self._drop(forward.result(0).graph)
            elif not isinstance(error, PrecedingFailed):
                self._lane.report("forward_backward_custom", error, forward)
        self._hold.release()

    def _forward_and_loss(self) -> None:
        forward, self._precomputed = self._precomputed or self._forward(), None
        try:
            loss = self._run_loss(forward.result)
        except BaseException:
            self._drop(forward.result.graph)
            raise
        if forward.result.graph:
            self._backward(forward, loss)
        else:
            self._surrogate(forward, loss)

    def _forward(self) -> _Forward:
        answer = self._submit("Forward", self._body, training_service_pb2.ForwardResponse)
        self._waited_for = answer
        try:
            result: operation_pb2.ForwardResult = answer.result()
        except Exception:
            self._waited_for = None
            raise
        self._waited_for = None
        return _Forward(result, result.weights_version)

    def _submit(self, method: str, body: bytes, response: type[Any]) -> APIFuture[Any]:
        self._last = self._hold.submit(
            f"TrainingService/{method}", body, response, lambda operation: operation.forward
        )
        return self._last

    def _run_loss(self, result: operation_pb2.ForwardResult) -> Loss:
        torch = _torch()
        arrays = output_arrays(result, self._space)
        leaves = [torch.from_numpy(array.copy()).requires_grad_() for array in arrays]
        returned = self._loss_fn(self._data, self._space.shown(torch, leaves))
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise TypeError(f"loss_fn: returned {type(returned).__name__}; return (loss, metrics)")
        value, metrics = returned
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            raise TypeError("loss_fn: the loss must be a torch tensor with one element")
        if value.requires_grad:
            value.backward()
        grads = []
        for index, leaf in enumerate(leaves):
            if leaf.grad is None:
                raise ValueError(
                    f"No gradient computed for {self._space.name} tensor {index}: the loss must "
                    "depend on that of every datum (times 0 where it should not count)"
                )
            grads.append(leaf.grad.numpy())
        surrogate = sum(
            float(np.sum(array.astype(np.float64) * grad))
            for array, grad in zip(arrays, grads, strict=True)
        )
        return Loss(float(value.detach()), dict(metrics or {}), grads, surrogate)

    def _backward(self, forward: _Forward, loss: Loss) -> None:
        body = training_service_pb2.BackwardRequest(
            graph=forward.result.graph,
            output_grads=[convert.tensor_to_proto(convert.float32(grad)) for grad in loss.grads],
        ).SerializeToString()
        backward = self._submit("Backward", body, training_service_pb2.BackwardResponse)
        self._wait_apart(backward, forward, loss)

    def _surrogate(self, forward: _Forward, loss: Loss) -> None:
        request = self._space.surrogate(loss.grads)
        if forward.weights_version is not None:
            request.expected_weights_version = forward.weights_version
        backward = self._submit(
            "ForwardBackward",
            request.SerializeToString(),
            training_service_pb2.ForwardBackwardResponse,
        )
        self._wait_apart(backward, forward, loss)

    def _wait_apart(self, backward: APIFuture[Any], forward: _Forward, loss: Loss) -> None:
        backward.add_done_callback(lambda _: self._done(backward, forward, loss))
        self._handed_over = True

    def _done(self, backward: APIFuture[Any], forward: _Forward, loss: Loss) -> None:
        """Backward has ended: finish, or go on where another way is left.

        The caller has left, and this thread delivers results: the work has one of its own.
        """
        self.future.operation = backward.operation
        try:
            backward.result(0)
            output = self._output(forward.result, loss)
        except GraphExpired:
            self._hold.forgive(backward)
            _apart(lambda: self._surrogate(forward, loss), self._fail)
        except Exception as error:  # a cancelled Backward, a tinker that does not fit: its future's
            if not isinstance(error, WeightsChanged) or self._second_try:
                self._fail(error)
                return
            self._second_try = True
            self._hold.forgive(backward)
            _apart(self._forward_and_loss, self._fail)
        else:
            self._hold.release()
            self.future.finish(output)

    def _fail(self, error: BaseException) -> None:
        if not isinstance(error, PrecedingFailed):
            failure = self._lane.report("forward_backward_custom", error, self._last)
            self.future._on_seen = lambda: self._lane.see(failure)
        self._hold.fail_behind(error)
        self._hold.release()
        self.future.finish(error=error)

    def _drop(self, graph: str) -> None:
        """Let the worker free a graph that will not be used."""
        if not graph:
            return
        dropped = self._hold.submit(
            "TrainingService/Backward",
            training_service_pb2.BackwardRequest(graph=graph).SerializeToString(),
            training_service_pb2.BackwardResponse,
            lambda operation: operation.forward,
        )
        dropped.add_done_callback(lambda _: self._hold.forgive(dropped))

    def _output(self, result: operation_pb2.ForwardResult, loss: Loss) -> Any:
        output = convert.forward_output(result)
        output.metrics.clear()
        output.metrics.update(
            {name: value for name, value in result.metrics.items() if name != "loss:sum"}
        )
        output.metrics.update(loss.metrics)
        output.metrics["loss:sum"] = loss.value
        output.metrics["surrogate_loss:sum"] = loss.surrogate
        return output


@dataclass(frozen=True)
class _Forward:
    """A forward pass, and the weights it was of; None: not known, and not compared."""

    result: operation_pb2.ForwardResult
    weights_version: int | None


def _precomputed(output: Any, space: Logprobs | Embeddings) -> _Forward:
    if not isinstance(space, Logprobs):
        raise convert.invalid("precomputed_forward", "is only taken with output='logprobs'")
    result = precomputed.as_forward_result(output, space.shapes)
    return _Forward(result, precomputed.version_of(output))


def _apart(work: Callable[[], None], failed: Callable[[BaseException], None]) -> None:
    """Work in a thread of its own, in the caller's context."""

    def run() -> None:
        try:
            work()
        except BaseException as error:  # the user's loss may raise anything; its future says so
            failed(error)

    context = contextvars.copy_context()
    thread = threading.Thread(
        target=context.run, args=(run,), name="firetitan-custom-loss", daemon=True
    )
    try:
        thread.start()
    except RuntimeError as error:  # no further thread can be had
        failed(error)


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise ImportError("PyTorch is not installed. Cannot run custom forward_backward.") from None
    return torch
