"""RestClient: tinker's look at runs and checkpoints, in what it means for a local daemon.

Knows: which call is which question to the daemon. Must not know: sessions, samples, accounts.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Coroutine
from typing import Any

from firetitan.v1 import (
    checkpoint_service_pb2,
    deployment_service_pb2,
    trainer_pb2,
    trainer_service_pb2,
    training_service_pb2,
)

from firetitan_client.errors import InvalidArgument, NotFound, Unsupported
from firetitan_client.futures import APIFuture
from firetitan_client.references import parse_tinker_path
from firetitan_client.sample_requests import follow
from firetitan_client.transport import Transport
from firetitan_client.types import accepted_fields, tinker_type

_WITHOUT_MEANING = frozenset(
    """assign_session_project copy_weights export_session_trace get_audit_log get_billing_usage
    get_checkpoint_archive_url get_checkpoint_archive_url_from_tinker_path
    get_current_checkpoint_storage_usage get_external_weights_urls get_sampler get_session
    list_sessions publish_checkpoint_from_tinker_path search_sessions
    set_checkpoint_ttl_from_tinker_path unpublish_checkpoint_from_tinker_path whoami""".split()
)
"""Calls of accounts, projects and sharing, which a local daemon has not."""


class RestClient:
    """Runs and checkpoints of the daemon, in tinker's types; a training run is a trainer.

    Every call gives a future; its twin with `_async` is awaited for the answer. Calls of tinker's
    that have no local meaning raise `Unsupported`.

    Args:
        transport: The daemon.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def get_server_capabilities(self) -> APIFuture[Any]:
        """The base models that are loaded: `GetServerCapabilitiesResponse`."""
        return self._start("get_server_capabilities", server_capabilities(self._transport))

    async def get_server_capabilities_async(self) -> Any:
        """As `get_server_capabilities`."""
        return await self.get_server_capabilities()

    def get_training_run(self, training_run_id: str, access_scope: str = "owned") -> APIFuture[Any]:
        """A trainer as a `TrainingRun`.

        Args:
            training_run_id: The trainer's id.
            access_scope: Without effect: everything is yours.

        Raises:
            NotFound: (from the future) no such trainer.
        """
        return self._start("get_training_run", self._run(training_run_id))

    async def get_training_run_async(self, *args: Any, **kwargs: Any) -> Any:
        """As `get_training_run`."""
        return await self.get_training_run(*args, **kwargs)

    def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: str = "owned"
    ) -> APIFuture[Any]:
        """The run that saved `tinker://<run>/<kind>/<name>`."""
        return self.get_training_run(parse_tinker_path(tinker_path)[0])

    async def get_training_run_by_tinker_path_async(self, *args: Any, **kwargs: Any) -> Any:
        """As `get_training_run_by_tinker_path`."""
        return await self.get_training_run_by_tinker_path(*args, **kwargs)

    def list_training_runs(
        self,
        limit: int = 20,
        offset: int = 0,
        access_scope: str = "owned",
        project_id: str | None = None,
    ) -> APIFuture[Any]:
        """Trainers that exist, newest first: `TrainingRunsResponse`.

        Args:
            limit: Runs at most.
            offset: Runs to leave out.
            access_scope: Without effect.
            project_id: Without effect.
        """

        async def work() -> Any:
            trainers = sorted(await self._trainers(), key=_created, reverse=True)
            runs = [await self._as_run(one) for one in trainers[offset : offset + limit]]
            return _make(
                "TrainingRunsResponse",
                training_runs=runs,
                cursor=_make("Cursor", offset=offset, limit=limit, total_count=len(trainers)),
            )

        return self._start("list_training_runs", work())

    async def list_training_runs_async(self, *args: Any, **kwargs: Any) -> Any:
        """As `list_training_runs`."""
        return await self.list_training_runs(*args, **kwargs)

    def list_checkpoints(self, training_run_id: str) -> APIFuture[Any]:
        """What a trainer saved, of a deleted one too: `CheckpointsListResponse`."""

        async def work() -> Any:
            return _make(
                "CheckpointsListResponse", checkpoints=await self._checkpoints(training_run_id)
            )

        return self._start("list_checkpoints", work())

    async def list_checkpoints_async(self, training_run_id: str) -> Any:
        """As `list_checkpoints`."""
        return await self.list_checkpoints(training_run_id)

    def list_user_checkpoints(self, limit: int = 100, offset: int = 0) -> APIFuture[Any]:
        """What every trainer that exists saved, newest first: `CheckpointsListResponse`.

        Args:
            limit: Checkpoints at most.
            offset: Checkpoints to leave out.
        """

        async def work() -> Any:
            found = [
                one
                for trainer in await self._trainers()
                for one in await self._checkpoints(_id(trainer))
            ]
            found.sort(key=lambda one: one.time, reverse=True)
            return _make(
                "CheckpointsListResponse",
                checkpoints=found[offset : offset + limit],
                cursor=_make("Cursor", offset=offset, limit=limit, total_count=len(found)),
            )

        return self._start("list_user_checkpoints", work())

    async def list_user_checkpoints_async(self, *args: Any, **kwargs: Any) -> Any:
        """As `list_user_checkpoints`."""
        return await self.list_user_checkpoints(*args, **kwargs)

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> APIFuture[Any]:
        """Base model and rank of a checkpoint: `WeightsInfoResponse`.

        Raises:
            NotFound: (from the future) no such checkpoint.
        """
        run, checkpoint_id = parse_tinker_path(tinker_path)

        async def work() -> Any:
            saved = await self._saved(run, checkpoint_id)
            return _make(
                "WeightsInfoResponse",
                base_model=saved.base_model,
                is_lora=saved.lora_rank > 0,
                lora_rank=saved.lora_rank or None,
            )

        return self._start("get_weights_info_by_tinker_path", work())

    async def get_weights_info_by_tinker_path_async(self, tinker_path: str) -> Any:
        """As `get_weights_info_by_tinker_path`."""
        return await self.get_weights_info_by_tinker_path(tinker_path)

    def delete_checkpoint(self, training_run_id: str, checkpoint_id: str) -> APIFuture[None]:
        """Remove a checkpoint or a snapshot.

        Args:
            training_run_id: The trainer's id.
            checkpoint_id: `weights/<name>` or `sampler_weights/<id>`.

        Raises:
            NotFound: (from the future) no such checkpoint.
            FailedPrecondition: (from the future) it is in use.
        """

        async def work() -> None:
            saved = await self._saved(training_run_id, checkpoint_id)
            kind = "Snapshot" if saved.name.startswith("snapshots/") else "Checkpoint"
            await self._transport.call(
                f"CheckpointService/Delete{kind}",
                getattr(checkpoint_service_pb2, f"Delete{kind}Request")(name=saved.name),
                getattr(checkpoint_service_pb2, f"Delete{kind}Response"),
            )

        return self._start("delete_checkpoint", work())

    async def delete_checkpoint_async(self, training_run_id: str, checkpoint_id: str) -> None:
        """As `delete_checkpoint`."""
        await self.delete_checkpoint(training_run_id, checkpoint_id)

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """As `delete_checkpoint`, by `tinker://<run>/<kind>/<name>`."""
        return self.delete_checkpoint(*parse_tinker_path(tinker_path))

    async def delete_checkpoint_from_tinker_path_async(self, tinker_path: str) -> None:
        """As `delete_checkpoint_from_tinker_path`."""
        await self.delete_checkpoint_from_tinker_path(tinker_path)

    def get_telemetry(self) -> None:
        """There is none."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.removesuffix("_async") not in _WITHOUT_MEANING:
            raise AttributeError(f"RestClient has no attribute {name!r}")

        def refuse(*_: Any, **__: Any) -> Any:
            raise Unsupported(f"{name} has no meaning for a daemon of your own; leave it out")

        return refuse

    # What is asked of the daemon

    def _start(self, label: str, work: Coroutine[Any, Any, Any]) -> APIFuture[Any]:
        future: APIFuture[Any] = APIFuture(label)
        follow(work, future)
        return future

    async def _run(self, training_run_id: str) -> Any:
        for trainer in await self._trainers():
            if _id(trainer) == training_run_id:
                return await self._as_run(trainer)
        raise NotFound(f"training run {training_run_id!r}: there is no such trainer")

    async def _as_run(self, trainer: trainer_pb2.Trainer) -> Any:
        saved = await self._checkpoints(_id(trainer))
        states = [one for one in saved if one.checkpoint_type == "training"]
        snapshots = [one for one in saved if one.checkpoint_type == "sampler"]
        return _make(
            "TrainingRun",
            training_run_id=_id(trainer),
            base_model=trainer.base_model,
            model_owner="local",
            is_lora=trainer.lora_rank > 0,
            lora_rank=trainer.lora_rank or None,
            corrupted=trainer.state == trainer_pb2.Trainer.STATE_FAILED,
            last_request_time=max([_created(trainer), *(one.time for one in saved)]),
            last_checkpoint=states[-1] if states else None,
            last_sampler_checkpoint=snapshots[-1] if snapshots else None,
            user_metadata=await self._notes(trainer),
        )

    async def _notes(self, trainer: trainer_pb2.Trainer) -> dict[str, str] | None:
        """The notes of a trainer's session, where it has exactly one."""
        if not trainer.session:
            return None
        answer = await self._transport.call(
            "TrainingService/GetSession",
            training_service_pb2.GetSessionRequest(name=trainer.session),
            training_service_pb2.GetSessionResponse,
        )
        return dict(answer.session.user_metadata)

    async def _checkpoints(self, run: str) -> list[Any]:
        """What a trainer saved, oldest first."""
        found = [
            _checkpoint(run, f"{kind}/{one.name.rpartition('/')[2]}", one)
            for kind, one in await self._all_saved(run)
        ]
        return sorted(found, key=lambda one: one.time)

    async def _saved(self, run: str, checkpoint_id: str) -> Any:
        kind, _, name = checkpoint_id.partition("/")
        if kind not in ("weights", "sampler_weights") or not name:
            raise InvalidArgument(
                f"checkpoint_id: {checkpoint_id!r} is none; give weights/<name> or "
                "sampler_weights/<id>",
                field="checkpoint_id",
            )
        for kind_, one in await self._all_saved(run):
            if (kind_, one.name.rpartition("/")[2]) == (kind, name):
                return one
        raise NotFound(f"checkpoint {checkpoint_id!r}: training run {run!r} has none of that name")

    async def _all_saved(self, run: str) -> list[tuple[str, Any]]:
        parent = f"trainers/{run}"
        states = await _all(
            self._transport, checkpoint_service_pb2, "Checkpoint", "Checkpoints", parent=parent
        )
        snapshots = await _all(
            self._transport, checkpoint_service_pb2, "Checkpoint", "Snapshots", parent=parent
        )
        return [
            *(("weights", one) for one in states),
            *(("sampler_weights", one) for one in snapshots),
        ]

    async def _trainers(self) -> list[trainer_pb2.Trainer]:
        found: list[trainer_pb2.Trainer] = await _all(
            self._transport, trainer_service_pb2, "Trainer", "Trainers"
        )
        return found


async def server_capabilities(transport: Transport) -> Any:
    """The base models the daemon has loaded: tinker's `GetServerCapabilitiesResponse`."""
    trainers = await _all(transport, trainer_service_pb2, "Trainer", "Trainers")
    deployments = await _all(transport, deployment_service_pb2, "Deployment", "Deployments")
    models = {}
    for one in (*trainers, *deployments):
        models[one.base_model] = one.max_context_length or one.model.max_context_length or None
    return _make(
        "GetServerCapabilitiesResponse",
        supported_models=[
            _make(
                "SupportedModel",
                model_name=name,
                max_context_length=length,
                trainable=True,
                sampleable=True,
            )
            for name, length in sorted(models.items())
        ],
    )


async def _all(transport: Transport, module: Any, service: str, what: str, **query: Any) -> Any:
    """Every page of a list call."""
    found: list[Any] = []
    token = ""
    while True:
        answer = await transport.call(
            f"{service}Service/List{what}",
            getattr(module, f"List{what}Request")(page_token=token, **query),
            getattr(module, f"List{what}Response"),
        )
        found += getattr(answer, what.lower())
        token = answer.next_page_token
        if not token:
            return found


def _make(kind: str, **facts: Any) -> Any:
    """One of tinker's types, from those facts its version has a field for."""
    found = tinker_type(kind)
    accepted = accepted_fields(found)
    return found(**{name: value for name, value in facts.items() if name in accepted})


def _checkpoint(run: str, checkpoint_id: str, saved: Any) -> Any:
    training = checkpoint_id.startswith("weights/")
    return _make(
        "Checkpoint",
        checkpoint_id=checkpoint_id,
        checkpoint_type="training" if training else "sampler",
        time=_created(saved),
        tinker_path=f"tinker://{run}/{checkpoint_id}",
        size_bytes=saved.size_bytes,
        user_metadata=dict(saved.user_metadata),
        expires_at=_time(saved.expire_time) if saved.HasField("expire_time") else None,
    )


def _id(trainer: trainer_pb2.Trainer) -> str:
    return trainer.name.rpartition("/")[2]


def _created(one: Any) -> datetime.datetime:
    return _time(one.create_time)


def _time(timestamp: Any) -> datetime.datetime:
    found: datetime.datetime = timestamp.ToDatetime(tzinfo=datetime.UTC)
    return found
