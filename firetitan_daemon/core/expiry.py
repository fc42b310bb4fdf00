"""When what was saved for a limited time may go; how old what ended is.

Knows: records, clocks. Must not know: who removes it, or what else keeps it.

Within one boot of the machine the time that passed is read off a clock that never jumps, across
daemons too. Behind a reboot only the wall clock is left.
"""

from __future__ import annotations

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.ports import Clock
from firetitan_daemon.core.records import Checkpoint, Expiry, Moment, Operation, Snapshot

MAX_TTL_S = 100 * 365 * 86400.0


def begin(ttl_s: float | None, clock: Clock) -> Expiry | None:
    """The expiry of something saved now; None: never.

    Args:
        ttl_s: Seconds it is to live.
        clock: The daemon's.
    """
    return None if ttl_s is None else Expiry(ttl_s, clock.boot_id(), clock.monotonic())


def check_ttl(ttl_s: float | None) -> None:
    """Refuse a time to live that is none.

    Raises:
        FiretitanError: INVALID_ARGUMENT.
    """
    if ttl_s is not None and not 0 < ttl_s <= MAX_TTL_S:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"ttl: {ttl_s:g} s; give a time above 0 and up to {MAX_TTL_S:.0f} s, or none to keep "
            "it until it is deleted",
            field="ttl",
        )


def expire_time(saved: Checkpoint | Snapshot) -> float | None:
    """When it expires, in Unix seconds, for display; None: never."""
    return None if saved.expiry is None else saved.create_time + saved.expiry.ttl_s


def is_due(saved: Checkpoint | Snapshot, clock: Clock) -> bool:
    """Whether its time is over."""
    expiry = saved.expiry
    if expiry is None:
        return False
    if expiry.boot_id == clock.boot_id():
        return clock.monotonic() - expiry.monotonic_s >= expiry.ttl_s
    return clock.now() - saved.create_time >= expiry.ttl_s


def ago(seconds: float, clock: Clock) -> Moment:
    """The moment so long before now."""
    return Moment(clock.now() - seconds, clock.boot_id(), clock.monotonic() - seconds)


def ended_before(operation: Operation, moment: Moment) -> bool:
    """Whether an operation ended before a moment."""
    if not operation.done:
        return False
    finished = operation.finished
    if finished is not None and finished.boot_id == moment.boot_id:
        return finished.monotonic_s < moment.monotonic_s
    return operation.finish_time < moment.wall_s
