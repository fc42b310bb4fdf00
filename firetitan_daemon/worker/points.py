"""Recovery points in a worker: copied between two commands, written beside the next ones.

Knows: the engine's copy of its state, the worker protocol. Must not know: when points are made,
what becomes of their folders.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from firetitan.worker.v1 import worker_pb2

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.failpoints import failpoint
from firetitan_daemon.engine.api import SavedFiles, TrainEngine, WriteState
from firetitan_daemon.worker.commands import APPLIED
from firetitan_daemon.worker.servicer import EngineHost

if TYPE_CHECKING:
    from firetitan_daemon.worker.trainer import HeldSession


@dataclass(frozen=True)
class PointInWriting:
    """A recovery point that was begun."""

    staging: str
    copied: worker_pb2.SaveRecoveryPointResponse
    written: asyncio.Future[worker_pb2.WaitRecoveryPointResponse]


def check_boundary(session: HeldSession, request: worker_pb2.SaveRecoveryPointRequest) -> None:
    """Refuse a point anywhere but right behind the command it is to hold.

    Raises:
        FiretitanError: STEP_MISMATCH where another command ran last or gradients are pending.
    """
    applied = session.journal.applied
    if applied != request.commit_seq or session.state.pending_backwards:
        raise FiretitanError(
            Reason.STEP_MISMATCH,
            f"commit_seq {request.commit_seq}: the session is behind {applied} with "
            f"{session.state.pending_backwards} backward passes pending",
        )


async def begin(
    host: EngineHost[TrainEngine],
    session: HeldSession,
    request: worker_pb2.SaveRecoveryPointRequest,
) -> PointInWriting:
    """Copy the session's state and write the copy in a thread of its own.

    Where memory does not suffice for a copy, the state is written before this returns.

    Args:
        host: The engine; no command runs on it.
        session: Its session.
        request: Where to.
    """
    staging = Path(request.staging)
    facts: dict[str, str | int] = {"session": request.session, APPLIED: request.commit_seq}
    begun = time.perf_counter()
    written: asyncio.Future[worker_pb2.WaitRecoveryPointResponse]
    engine = session.engine

    def write_now() -> worker_pb2.WaitRecoveryPointResponse:
        return _written(engine.capture_state(copy=False)(staging, facts), 0.0)

    def write_copy(write: WriteState) -> worker_pb2.WaitRecoveryPointResponse:
        failpoint("worker.point_copied")
        before = time.thread_time()
        saved = write(staging, facts)
        failpoint("worker.point_written")
        return _written(saved, time.thread_time() - before)

    try:
        write = await host.run(lambda: engine.capture_state(copy=True))
    except FiretitanError as error:
        if error.reason is not Reason.DEVICE_OUT_OF_MEMORY:
            raise
        written = asyncio.ensure_future(host.run(write_now))
        await asyncio.wait([written])
    else:
        written = asyncio.ensure_future(asyncio.to_thread(write_copy, write))
    # One that nobody waits for any more may fail unseen: its folder is gone.
    written.add_done_callback(lambda done: done.cancelled() or done.exception())
    copied = worker_pb2.SaveRecoveryPointResponse(
        step=session.state.step, blocked_s=time.perf_counter() - begun
    )
    return PointInWriting(request.staging, copied, written)


def _written(saved: SavedFiles, compute_s: float) -> worker_pb2.WaitRecoveryPointResponse:
    return worker_pb2.WaitRecoveryPointResponse(
        saved=worker_pb2.SavedFiles(digest=saved.digest, size_bytes=saved.size_bytes),
        compute_s=compute_s,
    )
