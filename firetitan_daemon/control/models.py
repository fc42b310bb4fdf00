"""The registry of models: checkpoints promoted to models that are loaded by name.

Knows: model records, snapshots, what uses a model. Must not know: RPCs, what is in a folder. A
promoted model's folder holds the snapshot's files, unchanged: a Hugging Face or a PEFT folder.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from firetitan_daemon.control.checkpoints import hold_snapshot
from firetitan_daemon.control.deployments import DeploymentManager
from firetitan_daemon.control.holds import discard
from firetitan_daemon.control.services import Services, logger
from firetitan_daemon.control.trainers import TrainerManager
from firetitan_daemon.core import chain, names
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.model_names import ModelId, NamedModel, check_location, parse_model_id
from firetitan_daemon.core.model_records import Model
from firetitan_daemon.core.ports import Change, Ledger
from firetitan_daemon.core.records import Snapshot


@dataclass(frozen=True)
class Promotion:
    """What is to become a model."""

    checkpoint: str
    """A snapshot, or the documented name of what was saved."""
    model_id: str
    base_model: str = ""
    """Must be what it was trained on; empty: not compared."""


class ModelRegistry:
    """Promotes, finds and deletes models; the names are `services.models`."""

    def __init__(
        self, services: Services, trainers: TrainerManager, deployments: DeploymentManager
    ) -> None:
        self._services = services
        self._trainers = trainers
        self._deployments = deployments
        self._lock = asyncio.Lock()

    def restore(self, ledger: Ledger) -> None:
        """Take over the models of a former daemon."""
        self._services.models.restore(ledger.models)

    @property
    def configured(self) -> Mapping[str, NamedModel]:
        """The names of the configuration."""
        return self._services.models.configured

    def all(self) -> Sequence[Model]:
        """Promoted models, by name."""
        promoted = self._services.models.promoted
        return [promoted[one] for one in sorted(promoted, key=names.natural_key)]

    def find(self, name: str) -> Model | NamedModel:
        """What a name stands for; a bare id is a promoted model's.

        Raises:
            FiretitanError: MODEL_NOT_FOUND, INVALID_ARGUMENT.
        """
        check_location(name, "name")
        return self._services.models.promoted.get(name) or self._services.models.find(name)

    async def promote(self, promotion: Promotion) -> Model:
        """Make a model of a snapshot; the same again is that model.

        Raises:
            FiretitanError: NAME_INVALID, SNAPSHOT_NOT_FOUND; INVALID_ARGUMENT for a delta, a
                checkpoint to resume from, another base model; ALREADY_EXISTS where the id is
                another's; CHECKSUM_MISMATCH, STATE_DISK_FULL.
        """
        model_id = parse_model_id(promotion.model_id)
        # A caller that goes away leaves no folder without a row.
        return await asyncio.shield(asyncio.create_task(self._promote(promotion, model_id)))

    async def _promote(self, promotion: Promotion, model_id: ModelId) -> Model:
        services = self._services
        holder = f"promote {model_id.id}"
        async with self._lock:
            try:
                snapshot = await self._snapshot(promotion.checkpoint, holder)
                self._check(snapshot, promotion.base_model)
                former = services.models.promoted.get(model_id.id)
                if former is not None:
                    if former.digest == snapshot.digest:
                        return former
                    raise FiretitanError(
                        Reason.ALREADY_EXISTS,
                        f"model_id: {former.full_name} exists, made from {former.snapshot}; choose "
                        "another id, or delete that model first",
                        field="model_id",
                    )
                folder = await services.folders.copy(
                    Path(snapshot.folder), snapshot.digest, "models", model_id.id
                )
                model = _model(model_id, snapshot, folder, services.clock.now())
                try:
                    await services.store.write(Change(models=[model], durable=True))
                except FiretitanError:
                    await discard(services.folders, folder)
                    raise
            finally:
                services.operations.holds.release(holder)
            services.models.promoted[model.id] = model
        logger.info("promoted snapshot=%s model=%s", snapshot.id, model.full_name)
        return model

    async def _snapshot(self, reference: str, holder: str) -> Snapshot:
        saved = names.parse_saved(reference)
        try:
            snapshot = await hold_snapshot(self._services, saved.id, holder)
        except FiretitanError as error:
            if error.reason is not Reason.SNAPSHOT_NOT_FOUND or saved.trainer is None:
                raise
            rows = await self._services.store.checkpoints(saved.trainer)
            if any(names.last_segment(row.name) == saved.id for row in rows):
                raise FiretitanError(
                    Reason.INVALID_ARGUMENT,
                    f"checkpoint: {reference} holds weights and optimizer to resume from and "
                    "cannot be promoted; save_weights_for_sampler makes what can be",
                    field="checkpoint",
                ) from None
            raise
        if saved.trainer not in (None, snapshot.session.split("/")[1]):
            raise FiretitanError(
                Reason.SNAPSHOT_NOT_FOUND,
                f"checkpoint: {reference} was not found; {snapshot.name} is of {snapshot.session}",
                field="checkpoint",
            )
        return snapshot

    def _check(self, snapshot: Snapshot, base_model: str) -> None:
        if snapshot.kind == chain.DELTA:
            raise FiretitanError(
                Reason.INVALID_ARGUMENT,
                f"checkpoint: {snapshot.name} is a delta and cannot be promoted: it holds only the "
                "changes against the snapshot before it; save again with checkpoint_type='base' "
                "and promote that",
                field="checkpoint",
                snapshot=snapshot.name,
            )
        models = self._services.models
        same = not base_model or base_model == snapshot.base_model
        if not same and models.reference(base_model) != models.reference(snapshot.base_model):
            raise FiretitanError(
                Reason.INVALID_ARGUMENT,
                f"base_model: {base_model!r}, but {snapshot.name} was trained on "
                f"{snapshot.base_model!r}; give that, or leave it out",
                field="base_model",
            )

    async def delete(self, name: str) -> None:
        """Remove a promoted model. One that is gone already is fine.

        Raises:
            FiretitanError: NAME_INVALID; MODEL_IN_USE naming the trainer, deployment or adapter
                that needs it.
        """
        model_id = parse_model_id(name.removeprefix("models/"), "name")
        await asyncio.shield(asyncio.create_task(self._delete(model_id)))

    async def _delete(self, model_id: ModelId) -> None:
        services = self._services
        async with self._lock:
            model = services.models.promoted.get(model_id.id)
            if model is None or model_id.account not in ("local", model.account):
                return
            user = self._user(model)
            if user is not None:
                raise FiretitanError(
                    Reason.MODEL_IN_USE,
                    f"{model.full_name} stays: {user} uses it; delete that first",
                    model=model.full_name,
                    used_by=user,
                )
            # At once, so that nobody begins to use it.
            del services.models.promoted[model.id]
            try:
                await services.store.write(Change(deleted_models=[model.id], durable=True))
            except FiretitanError:
                services.models.promoted[model.id] = model
                raise
            await services.operations.holds.retire(Path(model.folder), services.folders)

    def _user(self, model: Model) -> str | None:
        """A trainer, a deployment or an adapter with this base model."""
        users = {one.name: one.base_model for one in self._trainers.all()}
        users |= {one.name: one.base_model for one in self._deployments.all()}
        users |= {one.full_name: one.base_model for one in self.all() if one != model}
        for user, base_model in users.items():
            try:
                if self._services.models.find(base_model) == model:
                    return user
            except FiretitanError:
                logger.debug("%s has base model %s, which is gone", user, base_model)
        return None


def _model(model_id: ModelId, snapshot: Snapshot, folder: Path, now: float) -> Model:
    return Model(
        id=model_id.id,
        account=model_id.account,
        kind=snapshot.format,
        snapshot=snapshot.name,
        base_model=snapshot.base_model,
        lora_rank=snapshot.lora_rank,
        folder=str(folder),
        digest=snapshot.digest,
        result_digest=snapshot.result_digest,
        size_bytes=snapshot.size_bytes,
        create_time=now,
        base=snapshot.base,
    )
