"""FireworksClient: the managed service's control plane, in what it means for a local daemon.

Knows: rows of checkpoints, facts about models and shapes. Must not know: how trainers and
deployments are run (`trainer_jobs`, `deployment_manager`).
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from firetitan.v1 import (
    checkpoint_pb2,
    checkpoint_service_pb2,
    model_pb2,
    model_service_pb2,
    shape_service_pb2,
    trainer_service_pb2,
)

from firetitan_client.control_client import (
    ControlClient,
    checkpoint_name_of,
    job_id_of,
    job_name_of,
    rfc3339,
)
from firetitan_client.errors import InvalidArgument, NotFound, Unsupported
from firetitan_client.sdk_errors import validate_output_model_id
from firetitan_client.training_profile import (
    TrainingShapeProfile,
    context_length,
    is_moe,
    profile_of,
    read_config,
)

_TOY = "firetitan/toy"


class FireworksClient(ControlClient):
    """Checkpoints, models and shapes of the local daemon, in the managed service's terms."""

    def list_checkpoints(self, job_id: str, *, page_size: int = 200) -> list[dict[str, Any]]:
        """Everything a trainer has saved, oldest first; also of one that was deleted.

        Args:
            job_id: Id or name of the trainer.
            page_size: Rows asked for at a time; all are returned.

        Returns:
            Rows with `name` (`accounts/local/rlorTrainerJobs/<job>/checkpoints/<id>`),
            `createTime`, `updateTime` (RFC 3339), `checkpointType` and `promotable`; and of ours
            `baseModel`, `baseModelRevision`, `baseModelFingerprint`, `tokenizer`, `loraRank`,
            `step`, `seq` (place in the session's order), `session`, `sizeBytes`, `userMetadata`;
            `expireTime` where it has one. Checkpoints to resume from and snapshots for sampling are
            told apart by their type.

        Raises:
            NotFound: No such trainer, and nothing it would have saved.
        """
        return self._run("list_checkpoints", self._rows(job_id_of(job_id), page_size))

    async def _rows(self, trainer_id: str, page_size: int) -> list[dict[str, Any]]:
        rows = [
            *[
                _checkpoint_row(trainer_id, one)
                for one in await self._all("ListCheckpoints", "checkpoints", trainer_id, page_size)
            ],
            *[
                _snapshot_row(trainer_id, one)
                for one in await self._all("ListSnapshots", "snapshots", trainer_id, page_size)
            ],
        ]
        if not rows:
            await self._find_trainer(trainer_id)
        return sorted(rows, key=lambda row: (str(row["createTime"]), row["seq"]))

    async def _all(self, method: str, field: str, trainer_id: str, page_size: int) -> list[Any]:
        found: list[Any] = []
        token = ""
        while True:
            answer = await self._transport.call(
                f"CheckpointService/{method}",
                getattr(checkpoint_service_pb2, f"{method}Request")(
                    parent=f"trainers/{trainer_id}", page_size=page_size, page_token=token
                ),
                getattr(checkpoint_service_pb2, f"{method}Response"),
            )
            found += getattr(answer, field)
            token = answer.next_page_token
            if not token:
                return found

    def delete_checkpoint(self, name: str) -> None:
        """Remove what was saved, a checkpoint or a snapshot; one that is gone already is fine.

        Args:
            name: Of a `list_checkpoints` row.

        Raises:
            ValueError: Not such a name.
            FailedPrecondition: It is served, pinned or being loaded, or a delta stands on it.
        """
        trainer_id, saved_id = checkpoint_name_of(name)
        self._run("delete_checkpoint", self._delete_saved(trainer_id, saved_id))

    async def _delete_saved(self, trainer_id: str, saved_id: str) -> None:
        for one in await self._all("ListCheckpoints", "checkpoints", trainer_id, 0):
            if one.name.rpartition("/")[2] == saved_id:
                await self._transport.call(
                    "CheckpointService/DeleteCheckpoint",
                    checkpoint_service_pb2.DeleteCheckpointRequest(name=one.name),
                    checkpoint_service_pb2.DeleteCheckpointResponse,
                )
        for one in await self._all("ListSnapshots", "snapshots", trainer_id, 0):
            if one.name == f"snapshots/{saved_id}":
                await self._transport.call(
                    "CheckpointService/DeleteSnapshot",
                    checkpoint_service_pb2.DeleteSnapshotRequest(name=one.name),
                    checkpoint_service_pb2.DeleteSnapshotResponse,
                )

    def promote_checkpoint(
        self,
        job_id: str | None = None,
        checkpoint_id: str | None = None,
        output_model_id: str | None = None,
        base_model: str | None = None,
        *,
        name: str | None = None,
        hot_load_deployment_id: str | None = None,
    ) -> dict[str, Any]:
        """Make a model of what `save_weights_for_sampler` saved.

        From then on `accounts/local/models/<output_model_id>` is a base model of trainers and
        deployments or, promoted from a LoRA snapshot, an adapter for `load_adapter`. Its folder
        (`location`) is a plain Hugging Face or PEFT folder.

        Args:
            job_id: Deprecated: trainer that saved it.
            checkpoint_id: Deprecated: last segment of its name.
            output_model_id: 1 to 63 of a-z, 0-9 and hyphen, or `accounts/<a>/models/` and that.
            base_model: Must be what it was trained on; None: not compared.
            name: `name` of a `list_checkpoints` row.
            hot_load_deployment_id: Ignored.

        Returns:
            The model: `name`, `state` "READY", `kind` ("HF_BASE_MODEL" or "HF_PEFT_ADDON"),
            `baseModel`, `createTime`; and of ours `location`, `loraRank`, `digest`, `sizeBytes`.
            The same promotion again gives the same model.

        Raises:
            ValueError: The arguments name no checkpoint or no valid model id; the checkpoint is a
                delta or one to resume from; another base model; the id is another model's.
            NotFound: No such checkpoint.
        """
        if name is not None and checkpoint_id is not None:
            raise ValueError("pass either name= or checkpoint_id, not both")
        if name is None and (job_id is None or checkpoint_id is None):
            raise ValueError(
                "name: give the `name` of a list_checkpoints row, "
                "accounts/<a>/rlorTrainerJobs/<job>/checkpoints/<id>"
            )
        if name is None:
            warnings.warn(
                "job_id and checkpoint_id are deprecated; pass name=",
                DeprecationWarning,
                stacklevel=2,
            )
            name = f"{job_name_of(job_id_of(job_id or ''))}/checkpoints/{checkpoint_id}"
        problems = validate_output_model_id(output_model_id)
        if problems:
            raise ValueError("\n".join(problems))
        checkpoint_name_of(name)
        request = model_service_pb2.PromoteCheckpointRequest(
            checkpoint=name, model_id=output_model_id or "", base_model=base_model or ""
        )
        return _model_row(self._run("promote_checkpoint", self._promote(request)))

    async def _promote(
        self, request: model_service_pb2.PromoteCheckpointRequest
    ) -> model_pb2.Model:
        answer = await self._transport.call(
            "ModelService/PromoteCheckpoint",
            request,
            model_service_pb2.PromoteCheckpointResponse,
            timeout_s=None,  # every byte is verified first
        )
        model: model_pb2.Model = answer.model
        return model

    def export_checkpoint(self, name: str, folder: str | os.PathLike[str]) -> str:
        """Write what was saved as a plain Hugging Face or PEFT folder, whatever its kind.

        A delta becomes the whole model, a checkpoint to resume from what
        `save_weights_for_sampler` would have saved beside it.

        Args:
            name: Of a `list_checkpoints` row.
            folder: Does not exist yet, or is empty.

        Returns:
            The folder's absolute path.

        Raises:
            ValueError: Not such a name, a folder with content, a base model that has changed.
            NotFound: No such checkpoint.
        """
        checkpoint_name_of(name)
        request = model_service_pb2.ExportCheckpointRequest(
            checkpoint=name, folder=str(Path(folder).expanduser().absolute())
        )
        work = self._transport.call(
            "ModelService/ExportCheckpoint",
            request,
            model_service_pb2.ExportCheckpointResponse,
            timeout_s=None,
        )
        return str(self._run("export_checkpoint", work).folder)

    def list_models(self) -> list[dict[str, Any]]:
        """Promoted models, as `promote_checkpoint` returns them."""
        return [_model_row(one) for one in self._run("list_models", self._models()) if one.snapshot]

    async def _models(self) -> list[model_pb2.Model]:
        request, found = model_service_pb2.ListModelsRequest(), []
        while True:
            answer = await self._transport.call(
                "ModelService/ListModels", request, model_service_pb2.ListModelsResponse
            )
            found += answer.models
            request.page_token = answer.next_page_token
            if not request.page_token:
                return found

    def delete_model(self, name: str) -> None:
        """Remove a promoted model; one that is gone already is fine.

        Args:
            name: `accounts/<a>/models/<id>` or the id.

        Raises:
            FailedPrecondition: A trainer, a deployment or an adapter needs it.
        """
        work = self._transport.call(
            "ModelService/DeleteModel",
            model_service_pb2.DeleteModelRequest(name=name),
            model_service_pb2.DeleteModelResponse,
        )
        self._run("delete_model", work)

    def model_is_moe(self, model: str) -> bool:
        """Whether a model is a mixture of experts, as its config.json says.

        Args:
            model: Name of a model, folder, Hugging Face id that is on this machine, or the base
                model of a trainer.

        Raises:
            NotFound: There is no such model on this machine yet.
        """
        if not isinstance(model, str) or not model.strip():
            raise InvalidArgument(f"model: is {model!r}; give a model's name", field="model")
        if model == _TOY:
            return False
        return is_moe(self._run("model_is_moe", self._config(model)))

    async def _config(self, model: str) -> dict[str, Any]:
        config = read_config(model) or await self._named_config(model)
        token = ""
        while config is None:
            answer = await self._transport.call(
                "TrainerService/ListTrainers",
                trainer_service_pb2.ListTrainersRequest(page_token=token),
                trainer_service_pb2.ListTrainersResponse,
            )
            paths = [one.model.path for one in answer.trainers if one.base_model == model]
            config = next(filter(None, map(read_config, filter(None, paths))), None)
            token = answer.next_page_token
            if not token:
                break
        if config is None:
            raise NotFound(
                f"model: {model!r} is not on this machine: no folder, not in the Hugging Face "
                "cache, and no trainer has loaded it; create a trainer with it first",
                reason="MODEL_NOT_FOUND",
                field="model",
            )
        return config

    async def _named_config(self, name: str) -> dict[str, Any] | None:
        """The config.json of what a model's name stands for; of an adapter, its base model's."""
        answer = await self._transport.call(
            "ModelService/GetModel",
            model_service_pb2.GetModelRequest(name=name),
            model_service_pb2.GetModelResponse,
        )
        model = answer.model
        if model.kind == model_pb2.Model.KIND_ADAPTER:
            return read_config(model.base_model) or await self._named_config(model.base_model)
        return read_config(model.location)

    def resolve_training_profile(
        self, training_shape_id: str, *, base_model: str | None = None, **_: Any
    ) -> TrainingShapeProfile:
        """A training shape of the daemon, pinned to its version.

        Args:
            training_shape_id: `accounts/<a>/trainingShapes/<id>`, with or without
                `/versions/<n>`, or the id. For what is not configured this machine stands in,
                unless the name says account "local".
            base_model: Model whose own limit becomes `max_supported_context_length` where the
                shape has none; None: that is 0, for the limit of whatever is trained.

        Raises:
            ValueError: No such shape, or another version.
            NotFound: `base_model` is not on this machine yet.
        """
        if not isinstance(training_shape_id, str) or not training_shape_id.strip():
            raise ValueError("training_shape_id: is empty; give a name, e.g. 'local'")
        work = self._transport.call(
            "ShapeService/GetShape",
            shape_service_pb2.GetShapeRequest(name=training_shape_id.strip()),
            shape_service_pb2.GetShapeResponse,
        )
        shape = self._run("resolve_training_profile", work).shape
        length = 0
        if base_model is not None and base_model != _TOY:
            length = context_length(self._run("resolve_training_profile", self._config(base_model)))
        return profile_of(shape, length)

    def promote_session_checkpoint(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Not supported: there are no serverless sessions."""
        raise Unsupported("serverless training sessions are not supported; use a trainer")

    def delete_training_session(self, *_: Any, **__: Any) -> None:
        """Not supported: there are no serverless sessions."""
        raise Unsupported(
            "serverless training sessions are not supported; unload_model() ends an adapter's "
            "session, TrainerJobManager.delete(job_id) a trainer"
        )

    def list_training_session_checkpoints(self, *_: Any, **__: Any) -> list[dict[str, Any]]:
        """Not supported: there are no serverless sessions."""
        raise Unsupported(
            "serverless training sessions are not supported; use list_checkpoints(job_id)"
        )


def _row(trainer_id: str, saved: Any, kind: str, promotable: bool) -> dict[str, Any]:
    time = rfc3339(saved.create_time)
    row = {
        "name": f"{job_name_of(trainer_id)}/checkpoints/{saved.name.rpartition('/')[2]}",
        "createTime": time,
        "updateTime": time,
        "checkpointType": f"CHECKPOINT_TYPE_{kind}",
        "promotable": promotable,
        "baseModel": saved.base_model,
        "baseModelRevision": saved.base_revision,
        "baseModelFingerprint": saved.base_fingerprint,
        "tokenizer": saved.tokenizer,
        "loraRank": saved.lora_rank,
        "step": saved.step,
        "seq": saved.commit_seq,
        "session": saved.session,
        "sizeBytes": saved.size_bytes,
        "userMetadata": dict(saved.user_metadata),
    }
    if saved.HasField("expire_time"):
        row["expireTime"] = rfc3339(saved.expire_time)
    return row


def _model_row(model: model_pb2.Model) -> dict[str, Any]:
    adapter = model.kind == model_pb2.Model.KIND_ADAPTER
    return {
        "name": model.name,
        "state": "READY",
        "kind": "HF_PEFT_ADDON" if adapter else "HF_BASE_MODEL",
        "baseModel": model.base_model,
        "createTime": rfc3339(model.create_time),
        "location": model.location,
        "loraRank": model.lora_rank,
        "digest": model.digest,
        "sizeBytes": model.size_bytes,
    }


def _checkpoint_row(trainer_id: str, saved: checkpoint_pb2.Checkpoint) -> dict[str, Any]:
    return _row(trainer_id, saved, "TRAINING_LORA" if saved.lora_rank else "TRAINING", False)


def _snapshot_row(trainer_id: str, saved: checkpoint_pb2.Snapshot) -> dict[str, Any]:
    merged = saved.kind == checkpoint_pb2.Snapshot.KIND_MERGED_BASE
    if saved.lora_rank and not merged:
        return _row(trainer_id, saved, "INFERENCE_LORA", True)
    if saved.kind == checkpoint_pb2.Snapshot.KIND_DELTA:
        return _row(trainer_id, saved, "INFERENCE_ARC_V2", False)
    return _row(trainer_id, saved, "INFERENCE_BASE", True)
