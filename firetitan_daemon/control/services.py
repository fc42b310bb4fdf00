"""What every manager works with; put together once, by the composition root.

Knows: the ports. Must not know: which implementations stand behind them.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from firetitan_daemon.control.activity import Activity
from firetitan_daemon.control.codec import Codec
from firetitan_daemon.control.operations import OperationRegistry
from firetitan_daemon.control.pins import Pins
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.model_names import ModelNames
from firetitan_daemon.core.ports import Clock, Folders, Limits, Spool, Store
from firetitan_daemon.core.records import ErrorRecord
from firetitan_daemon.core.recovery import RecoveryLimits
from firetitan_daemon.core.shapes import Shapes
from firetitan_daemon.core.worker_ports import WorkerLauncher

logger = logging.getLogger("firetitan.control")
DISK_RETRY_S = 1.0
DISK_TROUBLE = (Reason.STATE_DISK_FULL, Reason.STATE_NOT_WRITABLE)
"""What passes once someone sees to the disk."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Services:
    """The ports, and the registry of operations on them."""

    store: Store
    spool: Spool
    folders: Folders
    launcher: WorkerLauncher
    clock: Clock
    codec: Codec
    limits: Limits
    operations: OperationRegistry
    recovery: RecoveryLimits = field(default_factory=RecoveryLimits)
    inactivity_s: float = 0.0
    """How long a new trainer or deployment may be unused before it is stopped; 0: for ever."""
    num_threads: int = 0
    """Threads a worker computes with; 0: as many as there are cores."""
    models: ModelNames = field(default_factory=ModelNames)
    shapes: Shapes = field(default_factory=Shapes)
    adopt_timeout_s: float = 5.0
    """How long one attempt to reach a worker of a former daemon may take."""

    @cached_property
    def activity(self) -> Activity:
        """What runs on trainers and deployments, and when they were last used."""
        return Activity(self.clock)

    @cached_property
    def pins(self) -> Pins:
        """Who keeps which snapshot loaded."""
        return Pins(self.store)


async def when_there_is_space(what: str, write: Callable[[], Awaitable[_T]]) -> _T:
    """Repeat a write that the disk refuses: for what has happened and must be told.

    Args:
        what: For the log.
        write: Changes nothing where it fails.
    """
    while True:
        try:
            return await write()
        except FiretitanError as error:
            if error.reason not in DISK_TROUBLE:
                raise
            logger.error("cannot write down %s, trying again: %s", what, error)
            await asyncio.sleep(DISK_RETRY_S)


def error_record(error: FiretitanError) -> ErrorRecord:
    """A failure as it is kept."""
    metadata = dict(error.metadata)
    if error.field is not None:
        metadata["field"] = error.field
    return ErrorRecord(str(error.reason), error.message, metadata)


def internal_error(what: str, error: BaseException) -> FiretitanError:
    """An unforeseen failure: an id for people, the traceback for the log."""
    identity = uuid.uuid4().hex[:12]
    logger.error("internal error id=%s what=%s", identity, what, exc_info=error)
    return FiretitanError(
        Reason.INTERNAL,
        f"{what}: internal error {identity}; the daemon's log says more under this id",
        id=identity,
    )
