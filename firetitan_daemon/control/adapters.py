"""Which folder a LoadAdapter reads: a promoted model's, or a copy of a user's.

Knows: models' records, folders, what is in use. Must not know: what is in an adapter.

A user's folder may change or go while the command may still be run again, so it is copied first;
the copy goes once no replay can need it.
"""

from __future__ import annotations

from pathlib import Path

from firetitan_daemon.control.services import Services
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.model_records import Model
from firetitan_daemon.core.ports import ADAPTERS
from firetitan_daemon.core.records import Session
from firetitan_daemon.core.worker_ports import LoadSource

_FORMAT = "peft_adapter"


async def hold_adapter(
    services: Services, session: Session, reference: str, operation_id: str
) -> LoadSource:
    """The folder that an operation is to read, held until it needs it no more.

    Args:
        services: The ports.
        session: Where the adapter goes.
        reference: A model's name, a path or an address.
        operation_id: Who holds it.

    Raises:
        FiretitanError: INVALID_ARGUMENT, MODEL_NOT_FOUND, UNSUPPORTED, STATE_DISK_FULL.
    """
    if session.lora.rank == 0:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"load_adapter: {session.name} trains every parameter (lora_rank=0) and has no "
            "adapter; create a trainer with the adapter's lora_rank",
            field="lora_rank",
        )
    holds = services.operations.holds
    found = services.models.find(reference)
    if not isinstance(found, Model):
        source = await services.folders.import_adapter(found.location)
        holds.take(str(source.folder), operation_id)
        return source
    if found.kind != _FORMAT:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"adapter_path: {found.full_name} is a whole model, no adapter; create a trainer with "
            "it as base_model",
            field="adapter_path",
        )
    # A deletion takes the name at once and the folder once nobody holds it; nothing waits here.
    holds.take(found.folder, operation_id)
    return LoadSource(Path(found.folder), found.digest)


def is_copy(source: LoadSource) -> bool:
    """Whether a folder was copied for one load, and goes with it."""
    return source.folder.parent.name == ADAPTERS
