"""What brings a session back after its worker died: which commands to replay, when to save.

Knows: operations' records, budgets. Must not know: files, workers, time.

A *recovery point* is a session's state between two commands, with no gradients pending. A session
comes back from its newest point (or from its first weights) by running again, in order, the
commands after it that moved weights or gradients. Their payloads are kept until a point holds their
effect; when that would take too much disk or time, a point is due.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

from firetitan_daemon.core.records import Operation, OperationState, ReplayCheck

LOADS = frozenset({"LoadState", "LoadAdapter"})
BACKWARDS = frozenset({"ForwardBackward", "Backward"})
BOUNDARIES = frozenset({"OptimStep"}) | LOADS
"""Methods after which no gradients are pending: where a point can be made."""
REPLAYED = BACKWARDS | BOUNDARIES
"""Methods that move weights or gradients."""
NOT_REPLAYED = frozenset({"Forward", "SaveState", "SaveSnapshot"})
"""Methods that move neither. A Forward is run again only for the graph it kept. Every method is
here or in `REPLAYED`: one that is in neither would be passed over by a replay without a word."""

RELATIVE_TOLERANCE = 1e-3
"""How far a replayed loss or gradient norm may be off where bits may differ, on a GPU."""


@dataclass(frozen=True)
class RecoveryLimits:
    """What being able to go on after a worker's death may cost."""

    enabled: bool = True
    """Keep what a replay needs; off: a trainer's death loses what was not checkpointed."""
    interval_s: float = 5.0
    """Fewest seconds of a worker's work between two recovery points."""
    cost_share: float = 0.02
    """Largest share of the worker's time that recovery points may take."""
    replay_s: float = 120.0
    """Where a replay would take longer than this, points may come at `max_cost_share`."""
    spool_bytes: int = 256 * 1024 * 1024
    """Where more payloads than this would be replayed, points may come at `max_cost_share`."""
    max_cost_share: float = 0.1
    """Largest share for a replay that is over its budget."""
    max_spool_bytes: int = 1024 * 1024 * 1024
    """Payloads a session keeps for a replay; above, replaying is given up until the next point."""


@dataclass(frozen=True)
class Plan:
    """How to get from some state to where the session was."""

    replay: Sequence[Operation] = ()
    """In order."""
    missing: Sequence[Operation] = ()
    """Those of them whose payload is gone: where there are any, this is no way."""
    graphs: Set[str] = frozenset()
    """Kept forwards that a Backward of the replay uses: the worker must keep them again."""


def plan_replay(done: Iterable[Operation], after: int) -> Plan:
    """What to run again on top of a state.

    Args:
        done: The session's operations that ended, by commit_seq.
        after: commit_seq of the last command whose effect the state holds.
    """
    applied = [one for one in done if one.commit_seq > after and one.state is OperationState.DONE]
    last_move = max((one.commit_seq for one in applied if one.method in BOUNDARIES), default=0)
    used = {one.graph for one in applied if one.method == "Backward" and one.graph}
    replay = [
        one for one in applied if one.method in REPLAYED or _rebuilds_graph(one, used, last_move)
    ]
    return Plan(replay, [one for one in replay if one.payload is None], used)


def _rebuilds_graph(one: Operation, used: set[str], last_move: int) -> bool:
    """A kept pass is needed where a Backward used it, or where one may still come."""
    if one.method != "Forward" or not one.graph:
        return False
    return one.graph in used or (one.commit_seq > last_move and one.payload is not None)


def pending_backwards(done: Iterable[Operation]) -> int:
    """Backward passes whose gradients no step has taken yet.

    Args:
        done: Operations of a session that ended, by commit_seq.
    """
    count = 0
    for one in done:
        if one.state is OperationState.DONE and one.method in BOUNDARIES:
            count = 0
        elif one.state is OperationState.DONE and one.method in BACKWARDS:
            count += 1
    return count


def same_result(recorded: ReplayCheck | None, found: ReplayCheck | None, *, exact: bool) -> bool:
    """Whether a replayed command came to what it came to before; what was not recorded agrees.

    Args:
        recorded: When it ran first.
        found: When it ran again.
        exact: Bit for bit, else within `RELATIVE_TOLERANCE`.
    """
    if recorded is None:
        return True
    if found is None:
        return False
    if exact:
        return recorded.digest == found.digest
    allowed = RELATIVE_TOLERANCE * max(1.0, abs(recorded.measure))
    return abs(recorded.measure - found.measure) <= allowed


_GUESSED_BYTES_S = 500e6
"""What a first point is taken to copy, hash and write a second."""


@dataclass(frozen=True)
class _Totals:
    seconds: float = 0.0
    size_bytes: int = 0


class PointPolicy:
    """When a session's next recovery point is due.

    Points come as often as `cost_share` allows, by what the last one cost (the first by its size);
    more often only where a replay would go over its budget of bytes or seconds.

    Args:
        limits: The budgets.
    """

    def __init__(self, limits: RecoveryLimits) -> None:
        self._limits = limits
        self._now = _Totals()
        self._tried = _Totals()
        """When a point was last begun."""
        self._held = _Totals()
        """Up to where the newest point holds everything."""
        self._cost_s: float | None = None
        """Of the last point; None before the first."""
        self._guess_s = 0.0
        self._wanted = False
        self.share = 0.0
        """Of the worker's time, what the last point took."""

    def ran(self, seconds: float, size_bytes: int) -> None:
        """Count a command that a replay would have to run again.

        Args:
            seconds: What it took.
            size_bytes: Of its payload.
        """
        now = self._now
        self._now = _Totals(now.seconds + seconds, now.size_bytes + size_bytes)

    def expect(self, state_bytes: int) -> None:
        """Say how much a point holds, for a guess at what the first one costs."""
        self._guess_s = state_bytes / _GUESSED_BYTES_S

    def want(self) -> None:
        """Ask for a point at the next boundary: what is needed to replay may not last."""
        self._wanted = True

    def due(self) -> bool:
        """Whether to make a point now, at a boundary."""
        limits, now = self._limits, self._now
        if not limits.enabled:
            return False
        if self._wanted:
            return True
        over = (
            now.size_bytes - self._held.size_bytes > limits.spool_bytes
            or now.seconds - self._held.seconds > limits.replay_s
        )
        since_s = now.seconds - self._tried.seconds
        if since_s < limits.interval_s and not over:
            return False
        cost_s = self._guess_s if self._cost_s is None else self._cost_s
        return cost_s <= (limits.max_cost_share if over else limits.cost_share) * since_s

    def begun(self) -> None:
        """A point is being made of the state as it is now."""
        self._tried, self._wanted = self._now, False

    def made(self, cost_s: float) -> None:
        """The point that was begun holds everything up to then.

        Args:
            cost_s: Of the worker's time, what it took.
        """
        since = self._tried.seconds - self._held.seconds
        self.share = cost_s / since if since > 0 else 0.0
        self._held, self._cost_s = self._tried, cost_s
