"""Which commands of a session ran, and what came of them: exactly once, in order.

Knows: commit_seq, lanes, failures. Must not know: engines, protobuf, time, threads. Pure: the
caller runs what `admit` lets through, one command after the other, and reports with `finish`.

commit_seq of a session strictly increases; gaps are fine (cancelled commands leave them). A command
at or below the highest one admitted is never run again: its stored outcome is returned, or the run
in progress is waited for. A failed command takes its number like any other.

A lane is one client's own order. Behind a failed command of a lane, that lane's commands fail with
PRECEDING_FAILED until one says that its user has seen the failure (`seen_failure`), so that no step
runs without its gradient. Such a cascade does not move the mark: it names what failed first.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from firetitan_daemon.core.errors import FiretitanError, Reason

OutcomeT = TypeVar("OutcomeT")


class Verdict(Enum):
    """What to do with a command that arrived."""

    RUN = "run"
    JOIN = "join"
    STORED = "stored"


@dataclass(frozen=True)
class LaneFailure:
    """The first failure of a lane that its user may not have seen."""

    seq: int
    method: str
    reason: str


class Journal(Generic[OutcomeT]):
    """The record of one session."""

    def __init__(self) -> None:
        self._applied = 0
        self._admitted = 0
        self._running: dict[int, str] = {}
        self._stored: dict[int, tuple[str, OutcomeT]] = {}
        self._failures: dict[str, LaneFailure] = {}

    @property
    def applied(self) -> int:
        """Highest commit_seq that was run, failed ones included; 0 before the first."""
        return self._applied

    def check_untouched(self) -> None:
        """Refuse to `restore` a session that has run something.

        Raises:
            FiretitanError: ALREADY_EXISTS.
        """
        if self._admitted:
            raise FiretitanError(
                Reason.ALREADY_EXISTS,
                f"commit_seq {self._admitted} was taken already; only a session that has run "
                "nothing can be put elsewhere",
            )

    def restore(self, commit_seq: int) -> None:
        """Begin behind a commit_seq: the session was put where it was then."""
        self.check_untouched()
        self._applied = self._admitted = commit_seq

    def admit(self, commit_seq: int, request_id: str) -> Verdict:
        """Decide on a command. RUN takes its number: the caller must run and `finish` it.

        Raises:
            FiretitanError: INVALID_ARGUMENT for commit_seq 0; REQUEST_ID_REUSED where the number
                belongs to another request; OPERATION_NOT_FOUND where it is behind the session and
                no outcome is stored.
        """
        if commit_seq < 1:
            raise FiretitanError(
                Reason.INVALID_ARGUMENT, f"commit_seq {commit_seq}: must be 1 or more"
            )
        if commit_seq > self._admitted:
            self._admitted = commit_seq
            self._running[commit_seq] = request_id
            return Verdict.RUN
        if commit_seq in self._running:
            known, verdict = self._running[commit_seq], Verdict.JOIN
        elif commit_seq in self._stored:
            known, verdict = self._stored[commit_seq][0], Verdict.STORED
        else:
            raise FiretitanError(
                Reason.OPERATION_NOT_FOUND,
                f"commit_seq {commit_seq} is behind {self._admitted}, which was taken already, "
                "and no outcome of it is stored: it was settled, or never sent in order",
            )
        if known != request_id:
            raise FiretitanError(
                Reason.REQUEST_ID_REUSED,
                f"commit_seq {commit_seq} belongs to request {known}, not to {request_id}",
            )
        return verdict

    def preceding_failure(
        self, client_id: str, seq: int, seen_failure: int
    ) -> FiretitanError | None:
        """The error of a command that stands behind an unseen failure of its lane."""
        failure = self._failures.get(client_id)
        if failure is None or seen_failure >= failure.seq:
            return None
        return FiretitanError(
            Reason.PRECEDING_FAILED,
            f"not run: {failure.method} (seq {failure.seq}) of this client failed before it with "
            f"{failure.reason}; look at that error, then send this again",
            failed_seq=str(failure.seq),
            failed_method=failure.method,
            failed_reason=failure.reason,
            seq=str(seq),
        )

    def finish(self, commit_seq: int, outcome: OutcomeT) -> None:
        """Store the outcome of a command that `admit` let run."""
        request_id = self._running.pop(commit_seq)
        self._stored[commit_seq] = (request_id, outcome)
        self._applied = max(self._applied, commit_seq)

    def fail(self, client_id: str, seq: int, method: str, reason: Reason) -> None:
        """Mark a lane: the command at `seq` failed. A cascade leaves the mark where it is."""
        if reason is not Reason.PRECEDING_FAILED:
            self._failures[client_id] = LaneFailure(seq, method, reason.value)

    def stored(self, commit_seq: int) -> OutcomeT | None:
        """The outcome of a command; None where it never ran or was settled."""
        entry = self._stored.get(commit_seq)
        return None if entry is None else entry[1]

    def settle(self, through: int) -> None:
        """Drop the outcomes up to a commit_seq: the daemon has stored them."""
        for commit_seq in [number for number in self._stored if number <= through]:
            del self._stored[commit_seq]
