"""Checkpoints and snapshots: where a save goes, what a load reads, what becomes of the files.

Knows: rows, folders, the chain's rules. Must not know: what the files hold. A save is settled only
once its folder is published and its row written; until then nothing can see it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from firetitan_daemon.control.adapters import hold_adapter, is_copy
from firetitan_daemon.control.codec import SaveStateArguments
from firetitan_daemon.control.services import Services
from firetitan_daemon.core import chain, names
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.expiry import begin, check_ttl
from firetitan_daemon.core.ports import Ledger, Store
from firetitan_daemon.core.records import Checkpoint, LoadedFrom, Operation, Session, Snapshot
from firetitan_daemon.core.texts import check_metadata
from firetitan_daemon.core.worker_ports import LoadSource, Outcome, SavedFiles, SaveTarget

SAVES = ("SaveState", "SaveSnapshot")


@dataclass(frozen=True)
class Prepared:
    """What a command needs besides its payload."""

    save: SaveTarget | None = None
    load: LoadSource | None = None
    loads: Checkpoint | None = None
    """What `load` reads, of LoadState."""
    adapter: str = ""
    """What `load` reads as it was asked for, of LoadAdapter."""
    state: SaveStateArguments | None = None
    """Of SaveState."""
    ttl_s: float | None = None
    """Seconds that what is saved is to live; None: until it is deleted."""
    notes: tuple[str, ...] = ()
    """What the user should know of a snapshot."""
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    """The user's own notes on what is saved."""

    @property
    def loaded(self) -> LoadedFrom | None:
        """What a load reads."""
        if self.load is None:
            return None
        return LoadedFrom(str(self.load.folder), self.load.digest)

    @property
    def obsolete(self) -> tuple[str, ...]:
        """Folders that go with the command, however it ends."""
        return (str(self.load.folder),) if self.load is not None and is_copy(self.load) else ()


@dataclass(frozen=True)
class Finished:
    """What a command's success changes besides its own row."""

    session: Session
    result: bytes
    checkpoints: Sequence[Checkpoint] = ()
    snapshots: Sequence[Snapshot] = ()
    obsolete: Sequence[str] = field(default=())
    """Folders to remove once the change is written."""


class CheckpointManager:
    """Names, places and rows of what sessions save."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self.expiring: dict[str, Checkpoint | Snapshot] = {}
        """What was saved for a limited time, by name."""

    async def restore(self, ledger: Ledger) -> None:
        """Take over what a former daemon's operations use and what expires."""
        for operation in (*ledger.open_operations, *ledger.kept_operations):
            if operation.loaded is not None:
                self._services.operations.holds.take(operation.loaded.folder, operation.id)
        store = self._services.store
        self.settled(await store.checkpoints(None), await store.snapshots(None))

    def settled(self, checkpoints: Sequence[Checkpoint], snapshots: Sequence[Snapshot]) -> None:
        """Rows that are written now."""
        rows: list[Checkpoint | Snapshot] = [*checkpoints, *snapshots]
        for saved in rows:
            self.expiring.pop(saved.name, None)
            if saved.expiry is not None:
                self.expiring[saved.name] = saved

    def forget(self, saved: Checkpoint | Snapshot) -> None:
        """A row that is gone now."""
        if self.expiring.get(saved.name) == saved:
            del self.expiring[saved.name]

    async def prepare(self, session: Session, operation: Operation, payload: bytes) -> Prepared:
        """Resolve what a save or a load names.

        Args:
            session: As it stands when the command's turn has come.
            operation: The command; `staging` is reused where an earlier daemon made one.
            payload: The request's bytes.

        Raises:
            FiretitanError: NAME_INVALID, ALREADY_EXISTS, CHECKPOINT_NOT_FOUND, CHAIN_BROKEN,
                INVALID_ARGUMENT, STATE_DISK_FULL.
        """
        if operation.method == "SaveState":
            return await self._prepare_state(session, operation, payload)
        if operation.method == "SaveSnapshot":
            return await self._prepare_snapshot(session, operation, payload)
        if operation.method == "LoadState":
            return await self._prepare_load(session, operation, payload)
        if operation.method == "LoadAdapter":
            return await self._prepare_adapter(session, operation, payload)
        return Prepared()

    async def finish(
        self, session: Session, operation: Operation, prepared: Prepared, outcome: Outcome
    ) -> Finished:
        """Publish what a command left and say what its success changes; again is fine.

        Raises:
            FiretitanError: STATE_DISK_FULL, CHAIN_BROKEN: nothing was published for good.
        """
        session = replace(session, step=outcome.session.step)
        if prepared.loads is not None:
            result = self._services.codec.load_result(prepared.loads, outcome.session.step)
            return Finished(chain.reset(session), result)
        if prepared.adapter:
            result = self._services.codec.adapter_result(prepared.adapter, outcome.session.step)
            return Finished(chain.reset(session), result, obsolete=prepared.obsolete)
        if prepared.save is None or outcome.saved is None:
            assert outcome.result is not None
            return Finished(session, outcome.result)
        if prepared.state is not None:
            return await self._finish_state(session, operation, prepared, outcome.saved)
        return await self._finish_snapshot(session, operation, prepared, outcome.saved)

    async def resolve(self, session: Session, reference: names.CheckpointReference) -> Checkpoint:
        """The checkpoint a session means.

        Raises:
            FiretitanError: CHECKPOINT_NOT_FOUND naming what there is; NAME_INVALID for a snapshot.
        """
        trainer = reference.trainer or session.trainer_id
        rows = await self._services.store.checkpoints(trainer)
        try:
            return names.pick_checkpoint(reference, session.name, rows)
        except FiretitanError:
            if await self._services.store.snapshot(reference.text) is not None:
                raise names.no_checkpoint(reference.text) from None
            raise

    async def get(self, name: str) -> Checkpoint:
        """One checkpoint by full name.

        Raises:
            FiretitanError: NAME_INVALID, CHECKPOINT_NOT_FOUND.
        """
        names.parse_checkpoint(name)
        checkpoint = await self._services.store.checkpoint(name)
        if checkpoint is None:
            raise FiretitanError(Reason.CHECKPOINT_NOT_FOUND, f"name: {name} does not exist")
        return checkpoint

    async def list_checkpoints(self, parent: str) -> list[Checkpoint]:
        """Checkpoints of a trainer or a session, by name, numbers in them by value."""
        trainer, session = names.parse_parent(parent)
        rows = await self._services.store.checkpoints(trainer)
        return sorted(
            (row for row in rows if session in (None, row.session)),
            key=lambda row: (names.natural_key(names.last_segment(row.name)), row.name),
        )

    async def get_snapshot(self, reference: str) -> Snapshot:
        """One snapshot.

        Raises:
            FiretitanError: NAME_INVALID, SNAPSHOT_NOT_FOUND.
        """
        return await find_snapshot(self._services.store, reference)

    async def list_snapshots(self, parent: str) -> list[Snapshot]:
        """Snapshots, all or of a trainer or a session, oldest first."""
        trainer, session = names.parse_parent(parent) if parent else (None, None)
        rows = await self._services.store.snapshots(trainer)
        return [row for row in rows if session in (None, row.session)]

    async def _prepare_load(
        self, session: Session, operation: Operation, payload: bytes
    ) -> Prepared:
        reference = names.parse_checkpoint_reference(
            self._services.codec.load_state(payload).checkpoint
        )
        holds = self._services.operations.holds
        while True:
            checkpoint = await self.resolve(session, reference)
            if operation.loaded is not None:
                # It was begun before: with these files, whatever has the name by now.
                source = LoadSource(Path(operation.loaded.folder), operation.loaded.digest)
                return Prepared(load=source, loads=checkpoint)
            holds.take(checkpoint.folder, operation.id)
            if await self._services.store.checkpoint(checkpoint.name) == checkpoint:
                break
            holds.release(operation.id)  # replaced or removed in between
        source = LoadSource(Path(checkpoint.folder), checkpoint.digest)
        return Prepared(load=source, loads=checkpoint)

    async def _prepare_adapter(
        self, session: Session, operation: Operation, payload: bytes
    ) -> Prepared:
        reference = self._services.codec.load_adapter(payload).adapter
        if operation.loaded is not None:
            # It was begun before: with these files, whatever the user's hold by now.
            source = LoadSource(Path(operation.loaded.folder), operation.loaded.digest)
        else:
            source = await hold_adapter(self._services, session, reference, operation.id)
        return Prepared(load=source, adapter=reference)

    async def _prepare_state(
        self, session: Session, operation: Operation, payload: bytes
    ) -> Prepared:
        arguments = self._services.codec.save_state(payload)
        check_ttl(arguments.ttl_s)
        check_metadata(arguments.user_metadata)
        checkpoint_id = names.check_id(arguments.checkpoint_id, "checkpoint_id")
        name = names.checkpoint_name(session.name, checkpoint_id)
        if arguments.keep_existing and await self._services.store.checkpoint(name) is not None:
            raise FiretitanError(
                Reason.ALREADY_EXISTS,
                f"checkpoint_id: {name} exists and keep_existing is set; choose another name",
                field="checkpoint_id",
            )
        return Prepared(
            save=SaveTarget(self._staging(operation), checkpoint_id),
            state=arguments,
            user_metadata=arguments.user_metadata,
            ttl_s=arguments.ttl_s,
        )

    async def _prepare_snapshot(
        self, session: Session, operation: Operation, payload: bytes
    ) -> Prepared:
        arguments = self._services.codec.save_snapshot(payload)
        check_ttl(arguments.ttl_s)
        check_metadata(arguments.user_metadata)
        known = {row.id: row for row in await self._services.store.snapshots(session.trainer_id)}
        # The suffix keeps sessions apart, so an id can only be taken by one of this trainer's.
        taken = set(await self._services.store.snapshot_ids(session.trainer_id))
        snapshot_id = names.choose_snapshot_id(
            arguments.snapshot_id, session.suffix, taken.__contains__
        )
        following = chain.next_kind(session, arguments.kind, known.get)
        if arguments.with_precision and following.kind != chain.MERGED_BASE:
            raise FiretitanError(
                Reason.INVALID_ARGUMENT,
                "export_precision requires kind 'merged_base'; leave it out, or save a merged base",
                field="export_precision",
            )
        wanted = f"{arguments.snapshot_id}-{session.suffix}"
        notes = [following.note] if following.note else []
        if snapshot_id != wanted:
            notes.append(f"{wanted} exists and never changes: saved as {snapshot_id}")
        # Workers know snapshots by their full names, as requests and answers carry them.
        target = SaveTarget(
            self._staging(operation),
            names.snapshot_name(snapshot_id),
            following.kind,
            names.snapshot_name(following.parent) if following.parent else "",
        )
        return Prepared(
            save=target,
            notes=tuple(notes),
            user_metadata=arguments.user_metadata,
            ttl_s=arguments.ttl_s,
        )

    async def _finish_state(
        self, session: Session, operation: Operation, prepared: Prepared, saved: SavedFiles
    ) -> Finished:
        assert prepared.save is not None and prepared.state is not None
        name = names.checkpoint_name(session.name, prepared.save.name)
        folder = await self._services.folders.publish(
            prepared.save.staging, "checkpoints", prepared.save.name
        )
        former = await self._services.store.checkpoint(name)
        checkpoint = Checkpoint(
            name=name,
            session=session.name,
            base_model=session.base_model,
            lora_rank=session.lora.rank,
            lora=session.lora,
            step=session.step,
            commit_seq=operation.commit_seq,
            folder=str(folder),
            digest=saved.digest,
            size_bytes=saved.size_bytes,
            create_time=self._services.clock.now(),
            user_metadata=prepared.user_metadata,
            base=session.base,
            expiry=begin(prepared.ttl_s, self._services.clock),
        )
        return Finished(
            session,
            self._services.codec.checkpoint_result(checkpoint),
            checkpoints=[checkpoint],
            obsolete=[former.folder] if former is not None else [],
        )

    async def _finish_snapshot(
        self, session: Session, operation: Operation, prepared: Prepared, saved: SavedFiles
    ) -> Finished:
        assert prepared.save is not None
        snapshot_id = names.last_segment(prepared.save.name)
        folder = await self._services.folders.publish(
            prepared.save.staging, "snapshots", snapshot_id
        )
        snapshot = Snapshot(
            id=snapshot_id,
            session=session.name,
            base_model=session.base_model,
            lora_rank=session.lora.rank,
            kind=saved.kind or prepared.save.kind,
            format=saved.format,
            parent=names.last_segment(prepared.save.parent) or None,
            step=session.step,
            commit_seq=operation.commit_seq,
            folder=str(folder),
            digest=saved.digest,
            result_digest=saved.result_digest,
            size_bytes=saved.size_bytes,
            create_time=self._services.clock.now(),
            notes=prepared.notes,
            user_metadata=prepared.user_metadata,
            base=session.base,
            expiry=begin(prepared.ttl_s, self._services.clock),
        )
        return Finished(
            chain.commit(session, snapshot),
            self._services.codec.snapshot_result(snapshot),
            snapshots=[snapshot],
        )

    def _staging(self, operation: Operation) -> Path:
        if operation.staging:
            return Path(operation.staging)
        return self._services.folders.staging()


async def hold_snapshot(services: Services, reference: str, operation_id: str) -> Snapshot:
    """The snapshot a reference names, its files held until an operation ends.

    Raises:
        FiretitanError: NAME_INVALID, SNAPSHOT_NOT_FOUND.
    """
    snapshot = await find_snapshot(services.store, reference)
    services.operations.holds.take(snapshot.folder, operation_id)
    try:
        return await find_snapshot(services.store, reference)
    except FiretitanError:
        services.operations.holds.release(operation_id)  # removed in between
        raise


async def find_snapshot(store: Store, reference: str) -> Snapshot:
    """The snapshot a reference names.

    Raises:
        FiretitanError: NAME_INVALID, SNAPSHOT_NOT_FOUND.
    """
    snapshot_id = names.parse_snapshot(reference)
    snapshot = await store.snapshot(snapshot_id)
    if snapshot is None:
        raise FiretitanError(
            Reason.SNAPSHOT_NOT_FOUND,
            f"snapshot: {reference!r} was not found; list the snapshots to see which there are",
            field="snapshot",
            snapshot=names.snapshot_name(snapshot_id),
        )
    return snapshot
