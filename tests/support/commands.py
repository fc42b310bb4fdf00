"""Commands for a worker, built as the daemon builds them: a request in a spool file."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from firetitan.v1 import (
    checkpoint_service_pb2,
    sampling_service_pb2,
    tensor_pb2,
    training_service_pb2,
)

from firetitan_daemon.core.records import (
    LoraSettings,
    Session,
    SessionState,
    SpoolRef,
    WorkerKind,
    WorkerSpec,
)
from firetitan_daemon.core.worker_ports import Command, LoadSource, SaveTarget

SESSION = Session(
    name="trainers/t/sessions/s",
    trainer_id="t",
    base_model="firetitan/toy",
    lora=LoraSettings(rank=0),
    seed=7,
    suffix="0123abcd",
    state=SessionState.ACTIVE,
    create_time=0.0,
)
TRAINER_SPEC = WorkerSpec(
    worker_id="trainer-1",
    kind=WorkerKind.TRAINER,
    target="trainers/t",
    base_model="firetitan/toy",
    dtype="auto",
    max_context_length=128,
    num_threads=1,
)
SAMPLER_SPEC = replace(
    TRAINER_SPEC, worker_id="sampler-1", kind=WorkerKind.SAMPLER, target="deployments/d"
)


def toy_datum(tokens: Sequence[int], targets: Sequence[int]) -> tensor_pb2.Datum:
    """One sequence with cross-entropy targets."""
    datum = tensor_pb2.Datum()
    chunk = datum.model_input.chunks.add()
    chunk.encoded_text.token_ids = np.array(tokens, dtype="<i4").tobytes()
    tensor = datum.loss_fn_inputs["target_tokens"]
    tensor.data_type = tensor_pb2.DATA_TYPE_INT64
    tensor.shape.append(len(targets))
    tensor.data = np.array(targets, dtype="<i8").tobytes()
    return datum


GOOD = toy_datum([1, 2, 3], [2, 3, 4])
BAD = toy_datum([1, 2, 3], [2, 3, 4000])


class CommandWriter:
    """Builds commands of one session; each lane's seq and the commit_seq count up by themselves."""

    def __init__(self, folder: Path, session: str = SESSION.name) -> None:
        self._folder = folder
        self._session = session
        self._seqs: dict[str, itertools.count[int]] = {}
        self._commit_seqs = itertools.count(1)

    def _write(
        self, method: str, message: Any, lane: str, seen_failure: int, **more: Any
    ) -> Command:
        commit_seq = next(self._commit_seqs)
        seq = next(self._seqs.setdefault(lane, itertools.count(1)))
        message.header.session = self._session
        message.header.client_id = lane
        message.header.seq = seq
        message.header.seen_failure = seen_failure
        raw = message.SerializeToString()
        path = self._folder / f"payload-{commit_seq}"
        path.write_bytes(raw)
        return Command(
            session=self._session,
            commit_seq=commit_seq,
            request_id=f"request-{commit_seq}",
            method=method,
            payload=SpoolRef(str(path), len(raw), blake3(raw).hexdigest()),
            client_id=lane,
            seq=seq,
            **more,
        )

    def forward(self, *, retain_graph: bool = False, lane: str = "a") -> Command:
        """A Forward of one good sequence."""
        message = training_service_pb2.ForwardRequest(
            data=[GOOD], loss_fn="cross_entropy", retain_graph=retain_graph
        )
        return self._write("Forward", message, lane, 0)

    def backward(self, graph: str, grads: Sequence[Sequence[float]], *, lane: str = "a") -> Command:
        """A Backward with dC/dlogprobs; no grads at all drops the graph."""
        message = training_service_pb2.BackwardRequest(graph=graph)
        for row in grads:
            message.output_grads.add(
                data_type=tensor_pb2.DATA_TYPE_FLOAT32,
                shape=[len(row)],
                data=np.array(row, dtype="<f4").tobytes(),
            )
        return self._write("Backward", message, lane, 0)

    def forward_backward(
        self,
        datum: tensor_pb2.Datum = GOOD,
        *,
        lane: str = "a",
        seen_failure: int = 0,
        expected_step: int | None = None,
    ) -> Command:
        """A ForwardBackward of one sequence."""
        message = training_service_pb2.ForwardBackwardRequest(
            data=[datum], loss_fn="cross_entropy", expected_step=expected_step
        )
        return self._write("ForwardBackward", message, lane, seen_failure)

    def optim_step(self, *, lane: str = "a", seen_failure: int = 0) -> Command:
        """An OptimStep with plain settings."""
        message = training_service_pb2.OptimStepRequest()
        message.adam_params.learning_rate = 0.1
        message.adam_params.beta1 = 0.9
        message.adam_params.beta2 = 0.95
        message.adam_params.eps = 1e-8
        return self._write("OptimStep", message, lane, seen_failure)

    def save_state(self, staging: Path, *, lane: str = "a") -> Command:
        """A SaveState into an empty folder."""
        message = checkpoint_service_pb2.SaveStateRequest(checkpoint_id="c")
        save = SaveTarget(staging=staging, name="c")
        return self._write("SaveState", message, lane, 0, save=save)

    def load_state(self, folder: Path, digest: str, *, lane: str = "a") -> Command:
        """A LoadState with the optimizer."""
        message = checkpoint_service_pb2.LoadStateRequest(checkpoint="c", with_optimizer=True)
        load = LoadSource(folder=folder, digest=digest)
        return self._write("LoadState", message, lane, 0, load=load)

    def save_snapshot(
        self, staging: Path, name: str, kind: str, parent: str = "", *, lane: str = "a"
    ) -> Command:
        """A SaveSnapshot into an empty folder."""
        message = checkpoint_service_pb2.SaveSnapshotRequest(snapshot_id=name)
        save = SaveTarget(staging=staging, name=name, kind=kind, parent=parent)
        return self._write("SaveSnapshot", message, lane, 0, save=save)


def sample_request(
    *, seed: int = 1, max_tokens: int = 4, snapshot: str = "", num_samples: int = 1
) -> bytes:
    """A SampleRequest as the daemon hands it on."""
    message = sampling_service_pb2.SampleRequest(snapshot=snapshot, num_samples=num_samples)
    chunk = message.prompt.chunks.add()
    chunk.encoded_text.token_ids = np.array([1, 2], dtype="<i4").tobytes()
    message.params.seed = seed
    message.params.max_tokens = max_tokens
    message.params.ignore_eos = True
    return message.SerializeToString()
