"""What every worker answers: who it is, its model, its end.

Knows: the worker protocol, the engine factory by name. Must not know: commands (`trainer.py`),
sampling (`sampler.py`), how the process was started.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar, cast

import grpc
from firetitan.worker.v1 import worker_pb2, worker_pb2_grpc

from firetitan_daemon import handshake, status
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import ModelInfo, ModelSpec, TrainEngine
from firetitan_daemon.engine.sample_api import SampleEngine
from firetitan_daemon.worker import convert

EngineT = TypeVar("EngineT", bound=TrainEngine | SampleEngine)
ResultT = TypeVar("ResultT")

TrainFactory = Callable[[ModelSpec], TrainEngine]
SampleFactory = Callable[[ModelSpec], SampleEngine]


def make_train_engine(spec: ModelSpec) -> TrainEngine:
    """Load a model for training; what that needs is imported only now."""
    from firetitan_daemon.engine import factory

    return factory.make_train_engine(spec)


def make_sample_engine(spec: ModelSpec) -> SampleEngine:
    """Load a model for sampling; what that needs is imported only now."""
    from firetitan_daemon.engine import factory

    return factory.make_sample_engine(spec)


class EngineHost(Generic[EngineT]):
    """The one engine of a worker and the one thread that calls it.

    Args:
        make: Loads the engine; runs in the compute thread.
        computes_here: False for an engine with a compute thread of its own; callers then take
            turns by themselves, and each call has a thread that ends with it.
    """

    def __init__(self, make: Callable[[ModelSpec], EngineT], *, computes_here: bool = True) -> None:
        self._make = make
        self._computes_here = computes_here
        self._compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        self._engine: EngineT | None = None
        self._loading: asyncio.Task[EngineT] | None = None
        self._asked: worker_pb2.LoadModelRequest | None = None

    @property
    def model(self) -> ModelInfo | None:
        """The loaded model."""
        return None if self._engine is None else self._engine.info

    @property
    def base_model(self) -> str:
        """What was asked for; empty before."""
        return "" if self._asked is None else self._asked.base_model

    @property
    def engine(self) -> EngineT:
        """The loaded engine.

        Raises:
            FiretitanError: WORKER_UNAVAILABLE before LoadModel.
        """
        if self._engine is None:
            raise FiretitanError(
                Reason.WORKER_UNAVAILABLE, "the worker has no model yet; send LoadModel first"
            )
        return self._engine

    @property
    def loaded(self) -> EngineT | None:
        """The engine, or None before LoadModel."""
        return self._engine

    async def run(self, work: Callable[[], ResultT]) -> ResultT:
        """Run in the compute thread, after what is queued there."""
        done = asyncio.get_running_loop().run_in_executor(self._compute, work)
        if not self._computes_here:
            # A second thread's pool of kernel threads halves the speed of the engine's own one for
            # as long as the thread lives.
            self._compute.shutdown(wait=False)
            self._compute = ThreadPoolExecutor(max_workers=1, thread_name_prefix="compute")
        return await done

    async def load(self, request: worker_pb2.LoadModelRequest) -> EngineT:
        """Load the model once; calls meanwhile wait for it, a failed load can be tried again.

        Raises:
            FiretitanError: ALREADY_EXISTS where another model is loaded; what the engine raises.
        """
        if self._loading is not None and self._loading.done() and self._engine is None:
            self._loading = None
        if self._loading is None:
            self._asked = worker_pb2.LoadModelRequest()
            self._asked.CopyFrom(request)
            self._loading = asyncio.create_task(self._load(self._asked))
        elif request != self._asked:
            raise FiretitanError(
                Reason.ALREADY_EXISTS,
                f"the worker holds {self.base_model}; start another for {request.base_model}",
            )
        return await asyncio.shield(self._loading)

    async def _load(self, request: worker_pb2.LoadModelRequest) -> EngineT:
        spec = ModelSpec(
            base_model=request.base_model,
            dtype=request.dtype or "auto",
            max_context_length=request.max_context_length or None,
            device=request.device or "auto",
        )
        self._engine = await self.run(lambda: self._make(spec))
        return self._engine

    def close(self) -> None:
        """Free the engine once the running work is done, without waiting for it."""
        engine = self._engine
        if engine is not None:
            self._compute.submit(engine.close)
        self._compute.shutdown(wait=False)


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """Describe, LoadModel, Shutdown.

    Args:
        spec: What the worker was started for.
        host: Its engine.
        state: Adds what only this kind of worker knows to a description.
        stop: Called once when the worker is asked to end.
    """

    def __init__(
        self,
        spec: worker_pb2.WorkerSpec,
        host: EngineHost[TrainEngine] | EngineHost[SampleEngine],
        state: Callable[[worker_pb2.DescribeResponse], None],
        stop: Callable[[], None],
    ) -> None:
        self._spec = spec
        self._host = host
        self._state = state
        self._stop = stop

    async def Describe(
        self,
        request: worker_pb2.DescribeRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> worker_pb2.DescribeResponse:
        """Who the worker is and where it stands."""
        response = worker_pb2.DescribeResponse(
            protocol_version=handshake.PROTOCOL_VERSION,
            worker_id=self._spec.worker_id,
            incarnation=self._spec.incarnation,
            pid=os.getpid(),
            kind=self._spec.kind,
        )
        model = self._host.model
        if model is not None:
            response.model.CopyFrom(convert.model_info_to_proto(model, self._host.base_model))
        self._state(response)
        return response

    async def LoadModel(
        self,
        request: worker_pb2.LoadModelRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> worker_pb2.LoadModelResponse:
        """Loads the base model; a second call waits for the first."""
        engine = await self._host.load(request)
        model = convert.model_info_to_proto(engine.info, self._host.base_model)
        return worker_pb2.LoadModelResponse(model=model)

    async def Shutdown(
        self,
        request: worker_pb2.ShutdownRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> worker_pb2.ShutdownResponse:
        """Ends the process after the answer."""
        self._stop()
        return worker_pb2.ShutdownResponse()


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Sends every failure of a call as a Status with a reason; the worker lives on."""

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of one call."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method).rpartition("/")[2]
        if handler is not None and handler.unary_stream is not None:
            return _guarded_stream(handler, method)
        if handler is None or handler.unary_unary is None:
            return handler
        inner = cast(Callable[[Any, Any], Awaitable[Any]], handler.unary_unary)

        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                return await inner(request, context)
            except FiretitanError as error:
                failure = error
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # the one place where unforeseen errors of calls end
                failure = status.unforeseen(error, method)
            return await status.abort(context, failure)

        return grpc.unary_unary_rpc_method_handler(
            call,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _guarded_stream(
    handler: grpc.RpcMethodHandler[Any, Any], method: str
) -> grpc.RpcMethodHandler[Any, Any]:
    inner = cast(Callable[[Any, Any], AsyncGenerator[Any, None]], handler.unary_stream)

    async def stream(
        request: Any, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncGenerator[Any, None]:
        try:
            async with contextlib.aclosing(inner(request, context)) as responses:
                async for response in responses:
                    yield response
        except FiretitanError as error:
            failure = error
        except grpc.aio.AbortError:
            raise
        except Exception as error:  # as for unary calls
            failure = status.unforeseen(error, method)
        else:
            return
        await status.abort(context, failure)

    return grpc.unary_stream_rpc_method_handler(
        stream,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
