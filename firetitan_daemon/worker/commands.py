"""One command on the engine: request bytes in, result out, weights versions watched.

Knows: the methods of a session, the engine seam, spool files. Must not know: sockets, lanes, what
ran before. Everything here runs in the compute thread.
"""

from __future__ import annotations

import errno
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from blake3 import blake3
from firetitan.v1 import checkpoint_service_pb2, operation_pb2, training_service_pb2
from firetitan.v1.command_pb2 import CommandHeader
from firetitan.worker.v1 import worker_pb2
from google.protobuf.message import DecodeError, Message

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.failpoints import failpoint
from firetitan_daemon.durable import MANIFEST
from firetitan_daemon.engine.api import ExportPrecision, SavedSnapshot, SnapshotKind, TrainEngine
from firetitan_daemon.worker import convert

MAX_KNOWN_GRAPHS = 4096
APPLIED = "applied_commit_seq"
"""In a recovery point's manifest: the last command whose effect is in it."""

_PRECISIONS = {
    checkpoint_service_pb2.SaveSnapshotRequest.EXPORT_PRECISION_BF16: ExportPrecision.BF16,
}
REQUESTS: dict[str, type[Message]] = {
    "Forward": training_service_pb2.ForwardRequest,
    "Backward": training_service_pb2.BackwardRequest,
    "ForwardBackward": training_service_pb2.ForwardBackwardRequest,
    "OptimStep": training_service_pb2.OptimStepRequest,
    "SaveState": checkpoint_service_pb2.SaveStateRequest,
    "LoadState": checkpoint_service_pb2.LoadStateRequest,
    "LoadAdapter": checkpoint_service_pb2.LoadAdapterRequest,
    "SaveSnapshot": checkpoint_service_pb2.SaveSnapshotRequest,
}
"""The request message of each method; field 1 of all is the CommandHeader."""


@dataclass(frozen=True)
class Parsed:
    """A command, read and checked for form."""

    execute: worker_pb2.ExecuteRequest
    message: Message
    header: CommandHeader


def parse(request: worker_pb2.ExecuteRequest) -> Parsed:
    """Read a command's payload.

    Raises:
        FiretitanError: UNSUPPORTED for an unknown method, CHECKSUM_MISMATCH for a damaged or
            missing spool file, INVALID_ARGUMENT for bytes that are not the method's request.
    """
    kind = REQUESTS.get(request.method)
    if kind is None:
        raise FiretitanError(
            Reason.UNSUPPORTED,
            f"method {request.method!r} is unknown to this worker; it knows {', '.join(REQUESTS)}",
        )
    raw = request.request if request.HasField("request") else read_spooled(request.spooled)
    try:
        message = kind.FromString(raw)
    except DecodeError as error:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT, f"the payload is not a {kind.DESCRIPTOR.name}: {error}"
        ) from error
    header: CommandHeader = message.header  # type: ignore[attr-defined]  # field 1 of every request
    return Parsed(request, message, header)


def read_spooled(file: worker_pb2.SpoolFile) -> bytes:
    """The bytes of a spool file, verified before use.

    Raises:
        FiretitanError: CHECKSUM_MISMATCH naming the expected and the found size or digest;
            STATE_NOT_WRITABLE while the whole spool is away.
    """
    path = Path(file.path)
    if not path.parent.is_dir():
        raise FiretitanError(
            Reason.STATE_NOT_WRITABLE,
            f"the folder {path.parent} is gone; put it back",
            path=str(path.parent),
        )
    try:
        raw = durable.read_file(path, file.size_bytes)
    except OSError as error:
        raise _damaged(path, "a readable file", error.strerror or str(error)) from error
    if len(raw) != file.size_bytes:
        raise _damaged(path, f"{file.size_bytes} bytes", str(len(raw)))
    found = blake3(raw).hexdigest()
    if found != file.digest:
        raise _damaged(path, file.digest, found)
    return raw


class CommandRunner:
    """Runs commands of one session on its engine.

    Args:
        engine: With the session open.
        forward_only: Refuse everything but forwards that keep nothing.
    """

    def __init__(self, engine: TrainEngine, *, forward_only: bool = False) -> None:
        self._engine = engine
        self._forward_only = forward_only
        self._weights_version = 0
        """commit_seq of the command that last wrote weights: the same after a replay."""
        self._graphs: OrderedDict[str, tuple[str, int]] = OrderedDict()
        """By our handle, which a replay gives again: the engine's, and the weights' version."""
        self._last_snapshot = ""
        self._methods: dict[str, Callable[[Parsed], worker_pb2.ExecuteResponse]] = {
            "Forward": self._forward,
            "Backward": self._backward,
            "ForwardBackward": self._forward_backward,
            "OptimStep": self._optim_step,
            "SaveState": self._save_state,
            "LoadState": self._load_state,
            "LoadAdapter": self._load_adapter,
            "SaveSnapshot": self._save_snapshot,
        }

    def state(self, session: str, applied: int) -> worker_pb2.SessionState:
        """Where the session stands.

        Args:
            session: Its name.
            applied: Highest commit_seq that was run.
        """
        progress = self._engine.progress
        return worker_pb2.SessionState(
            session=session,
            applied_commit_seq=applied,
            step=progress.step,
            pending_backwards=progress.pending_backwards,
            forward_passes=progress.forward_passes,
            last_snapshot=self._last_snapshot,
            state_bytes=progress.state_bytes,
        )

    def run(self, command: Parsed) -> worker_pb2.ExecuteResponse:
        """Run one command; its outcome is set, the session is not.

        Raises:
            FiretitanError: The command failed and changed nothing.
        """
        method = command.execute.method
        if self._forward_only:
            check_forward_only(command)
        try:
            return self._methods[method](command)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise FiretitanError(
                Reason.STATE_DISK_FULL,
                f"{method}: the disk that holds {error.filename or 'the state'} is full; "
                "free some space and send it again",
            ) from error
        except MemoryError as error:
            raise FiretitanError(
                Reason.DEVICE_OUT_OF_MEMORY,
                f"{method}: memory does not suffice; send fewer or shorter sequences a call",
            ) from error

    def _forward(self, command: Parsed) -> worker_pb2.ExecuteResponse:
        request = command.message
        assert isinstance(request, training_service_pb2.ForwardRequest)
        data = convert.data_from_proto(request.data)
        config = convert.loss_config_from_proto(request.loss_fn_config)
        pooling = convert.pooling_from_proto(request.pooling)
        options = {
            "retain_graph": request.retain_graph,
            "base_only": request.base_only,
            "over_budget": command.execute.keep_graph,
        }
        if pooling is None:
            output = self._engine.forward(data, request.loss_fn, config, **options)
        else:
            output = self._engine.forward_embeddings(
                data, pooling, request.loss_fn, config, **options
            )
        if output.graph is None:
            return self._forwarded(convert.forward_result_to_proto(output, self._step))
        handle = f"graph-{command.execute.commit_seq}"
        self._graphs[handle] = (output.graph, self._weights_version)
        while len(self._graphs) > MAX_KNOWN_GRAPHS:
            self._graphs.popitem(last=False)
        output = replace(output, graph=handle)
        return self._forwarded(convert.forward_result_to_proto(output, self._step), handle)

    def _backward(self, command: Parsed) -> worker_pb2.ExecuteResponse:
        request = command.message
        assert isinstance(request, training_service_pb2.BackwardRequest)
        own, version = self._graphs.get(request.graph, (request.graph, self._weights_version))
        if not request.output_grads:
            self._engine.release_graph(own)
            self._graphs.pop(request.graph, None)
            return self._forwarded(operation_pb2.ForwardResult(step=self._step))
        if version != self._weights_version:
            raise FiretitanError(
                Reason.WEIGHTS_CHANGED,
                "the weights moved between the forward and this backward, so the gradients would "
                "be of other weights; nothing was accumulated: run the forward and the loss again",
                step=str(self._step),
            )
        grads = convert.output_grads_from_proto(request.output_grads)
        output = self._engine.backward(own, grads)
        self._graphs.pop(request.graph, None)
        result = convert.forward_result_to_proto(output, self._step)
        return _checked(self._forwarded(result, request.graph), output.metrics["loss:sum"])

    def _forward_backward(self, command: Parsed) -> worker_pb2.ExecuteResponse:
        request = command.message
        assert isinstance(request, training_service_pb2.ForwardBackwardRequest)
        self._check_weights(request, "expected_step", self._step)
        self._check_weights(request, "expected_weights_version", self._weights_version)
        data = convert.data_from_proto(request.data)
        config = convert.loss_config_from_proto(request.loss_fn_config)
        pooling = convert.pooling_from_proto(request.pooling)
        if pooling is None:
            output = self._engine.forward_backward(data, request.loss_fn, config)
        else:
            output = self._engine.forward_backward_embeddings(
                data, pooling, request.loss_fn, config
            )
        response = self._forwarded(convert.forward_result_to_proto(output, self._step))
        return _checked(response, output.metrics["loss:sum"])

    def _optim_step(self, command: Parsed) -> worker_pb2.ExecuteResponse:
        request = command.message
        assert isinstance(request, training_service_pb2.OptimStepRequest)
        metrics = self._engine.optim_step(
            convert.adam_params_from_proto(request),
            convert.normalization_from_proto(request.grad_acc_normalization),
            request.expected_step if request.HasField("expected_step") else None,
        )
        self._weights_version = command.execute.commit_seq
        result = operation_pb2.Operation(optim_step=operation_pb2.OptimStepResult(metrics=metrics))
        response = worker_pb2.ExecuteResponse(result=_serialized(result))
        return _checked(response, metrics["grad_norm"])

    def _save_state(self, command: Parsed) -> worker_pb2.ExecuteResponse:
        files = self._engine.save_state(_emptied(self._target(command)))
        failpoint("worker.saved")
        return worker_pb2.ExecuteResponse(
            saved=worker_pb2.SavedFiles(digest=files.digest, size_bytes=files.size_bytes)
        )

    def _load_state(self, command: Parsed) -> worker_pb2.ExecuteResponse:
        request = command.message
        assert isinstance(request, checkpoint_service_pb2.LoadStateRequest)
        folder = self._source(command)
        self._engine.load_state(folder, with_optimizer=request.with_optimizer)
        return self._loaded(command)

    def _load_adapter(self, command: Parsed) -> worker_pb2.ExecuteResponse:
        self._engine.load_adapter(self._source(command))
        return self._loaded(command)

    @staticmethod
    def _source(command: Parsed) -> Path:
        """The folder that a load reads, its manifest compared."""
        if not command.execute.HasField("load"):
            raise FiretitanError(
                Reason.INVALID_ARGUMENT, f"load: missing; {command.execute.method} needs a folder"
            )
        source = command.execute.load
        durable.check_manifest(Path(source.folder), source.digest)
        return Path(source.folder)

    def _loaded(self, command: Parsed) -> worker_pb2.ExecuteResponse:
        self._moved(command.execute.commit_seq)
        result = operation_pb2.Operation(load=operation_pb2.LoadResult(step=self._step))
        return _checked(worker_pb2.ExecuteResponse(result=_serialized(result)), 0.0)

    def load_point(self, folder: Path, digest: str, commit_seq: int) -> None:
        """Put the session where a recovery point was made.

        Raises:
            FiretitanError: CHECKSUM_MISMATCH for damaged files or a point of another command.
        """
        found = json.loads(durable.check_manifest(folder, digest)).get(APPLIED)
        if found != commit_seq:
            raise _damaged(folder / MANIFEST, f"{APPLIED} {commit_seq}", str(found))
        self._engine.load_state(folder, with_optimizer=True)
        self._moved(commit_seq)

    def _moved(self, commit_seq: int) -> None:
        """Other weights were loaded: no delta can stand on what was saved before."""
        self._weights_version = commit_seq
        self._last_snapshot = ""

    def _save_snapshot(self, command: Parsed) -> worker_pb2.ExecuteResponse:
        request = command.message
        assert isinstance(request, checkpoint_service_pb2.SaveSnapshotRequest)
        target = self._target(command)
        # A save that fails leaves no parent to build a delta on.
        self._last_snapshot = ""
        saved: SavedSnapshot = self._engine.save_snapshot(
            _emptied(target),
            target.name,
            _snapshot_kind(target.kind),
            target.parent or None,
            _PRECISIONS.get(request.export_precision, ExportPrecision.SOURCE),
        )
        self._last_snapshot = target.name
        failpoint("worker.saved")
        return worker_pb2.ExecuteResponse(
            saved=worker_pb2.SavedFiles(
                digest=saved.files.digest,
                size_bytes=saved.files.size_bytes,
                result_digest=saved.result_digest,
                kind=saved.kind.value,
                format=saved.format.value,
            )
        )

    @property
    def _step(self) -> int:
        return self._engine.progress.step

    def _check_weights(
        self, request: training_service_pb2.ForwardBackwardRequest, field: str, found: int
    ) -> None:
        """Refuse a backward that its sender meant for other weights."""
        wanted = getattr(request, field)
        if request.HasField(field) and wanted != found:  # type: ignore[arg-type]
            raise FiretitanError(
                Reason.WEIGHTS_CHANGED,
                f"{field}: the session is at {found}, not at {wanted}; nothing was accumulated",
                field=field,
                step=str(self._step),
            )

    @staticmethod
    def _target(command: Parsed) -> worker_pb2.SaveTarget:
        if not command.execute.HasField("save"):
            raise FiretitanError(
                Reason.INVALID_ARGUMENT,
                f"save: missing; {command.execute.method} needs a staging folder",
            )
        return command.execute.save

    def _forwarded(
        self, result: operation_pb2.ForwardResult, graph: str = ""
    ) -> worker_pb2.ExecuteResponse:
        result.weights_version = self._weights_version
        operation = operation_pb2.Operation(forward=result)
        return worker_pb2.ExecuteResponse(result=_serialized(operation), graph=graph)


def _serialized(result: operation_pb2.Operation) -> bytes:
    # The same result has to be the same bytes in every process: a replay is compared by them.
    return result.SerializeToString(deterministic=True)


def _checked(response: worker_pb2.ExecuteResponse, measure: float) -> worker_pb2.ExecuteResponse:
    """The response with what a replay of the command must come to."""
    response.check.digest = blake3(response.result).hexdigest()
    response.check.measure = measure
    return response


def _emptied(target: worker_pb2.SaveTarget) -> Path:
    """The folder of a save, empty: a worker that died in the same save may have left its files."""
    folder = Path(target.staging)
    durable.remove(folder)
    folder.mkdir(mode=0o700)
    return folder


def check_forward_only(command: Parsed) -> None:
    """Refuse what a session that trains nothing cannot run.

    Raises:
        FiretitanError: SESSION_FORWARD_ONLY.
    """
    message, what = command.message, command.execute.method
    if isinstance(message, training_service_pb2.ForwardRequest):
        if not message.retain_graph:
            return
        what = "Forward{retain_graph}"
    raise FiretitanError(
        Reason.SESSION_FORWARD_ONLY,
        f"{what}: the session runs a frozen model and trains nothing; send Forward without "
        "retain_graph, or use a trainer that is not forward-only",
        session=command.execute.session,
    )


def _snapshot_kind(kind: str) -> SnapshotKind:
    try:
        return SnapshotKind(kind)
    except ValueError:
        known = ", ".join(item.value for item in SnapshotKind)
        raise FiretitanError(
            Reason.INVALID_ARGUMENT, f"save.kind: {kind!r} is unknown; give one of {known}"
        ) from None


def _damaged(path: Path, expected: str, found: str) -> FiretitanError:
    return FiretitanError(
        Reason.CHECKSUM_MISMATCH,
        f"{path.parent.name}/{path.name} is damaged: expected {expected}, found {found}; "
        "nothing was used of it",
        file=f"{path.parent.name}/{path.name}",
        expected=expected,
        found=found,
    )
