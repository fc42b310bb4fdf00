"""The order of one session's commands: lanes by seq, merged into one commit_seq.

Knows: seqs, commit_seqs, request ids, time as a number that is passed in. Must not know: files,
tables, workers; it decides, its caller acts.

Deciding and taking are two steps, so that nothing changes in memory before it is on the disk:

    existing = operation at (client_id, seq), looked up where `taken` says so
    decision = sequencer.decide(command, existing)      raises, or Replay, or Admit
    ... write the payload, the operations and `decision.lane` ...
    sequencer.admit(decision, now)

The caller holds one lock a session from `decide` to `admit`, in a task that no client can cancel.

A lane's commands are admitted in any order of arrival. One whose predecessors are all there gets
the session's next commit_seq at once, and so do those that waited behind it; the others are held.
A held command never keeps another lane from going on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.records import Lane, Operation, Session
from firetitan_daemon.core.texts import check_text

MAX_SEQ = 2**62
"""Highest seq, far beyond any lane's life and within a signed 64-bit integer."""


@dataclass(frozen=True)
class Incoming:
    """A command that asks to be admitted."""

    operation_id: str
    """The id it gets if it is new."""
    client_id: str
    seq: int
    request_id: str
    payload_digest: str
    epoch: int


@dataclass(frozen=True)
class Commit:
    """A place in the session's order, given to one operation."""

    client_id: str
    seq: int
    operation_id: str
    commit_seq: int


@dataclass(frozen=True)
class Replay:
    """The command was accepted before; its operation is the answer."""

    operation_id: str


@dataclass(frozen=True)
class Admit:
    """The command is new: write it, then call `admit`."""

    command: Incoming
    commits: tuple[Commit, ...]
    """Operations that get their commit_seq now, in order: this one first, then those it released.
    Empty where it is held."""
    lane: Lane
    """The lane's row to write in the same transaction."""
    last_commit_seq: int
    """The session's highest commit_seq afterwards, to write in the same transaction."""
    version: int = field(repr=False, default=0)
    """Which state it was decided on."""

    @property
    def held(self) -> bool:
        """Whether it waits for an earlier seq of its lane."""
        return not self.commits

    @property
    def commit_seq(self) -> int:
        """The command's own place; 0 while it is held."""
        return self.commits[0].commit_seq if self.commits else 0


@dataclass(frozen=True)
class Expired:
    """A lane whose missing command did not come in time."""

    lane: Lane
    """Its row, broken, to write."""
    missing_seq: int
    operation_ids: tuple[str, ...]
    """The held operations, by seq; they fail with `error`."""

    @property
    def error(self) -> FiretitanError:
        """Why they fail."""
        return _broken(self.lane)


@dataclass
class _LaneState:
    row: Lane
    held: dict[int, str | None] = field(default_factory=dict)
    """Operation ids by seq; None for one that was cancelled while it was held."""
    waiting_since: float = 0.0


class SessionSequencer:
    """Admission and order of one session's commands. One owner; no locks, no I/O."""

    def __init__(self, session: str, *, epoch: int = 1, last_commit_seq: int = 0) -> None:
        self.session = session
        self.epoch = epoch
        self.last_commit_seq = last_commit_seq
        self._lanes: dict[str, _LaneState] = {}
        self._version = 0

    @classmethod
    def restore(
        cls,
        session: Session,
        lanes: Iterable[Lane],
        operations: Iterable[Operation],
        now: float,
    ) -> SessionSequencer:
        """The sequencer as it was when the daemon ended.

        Args:
            session: Its row.
            lanes: All its lanes.
            operations: Its operations that are not done and, so that a lane does not wait for
                them, done ones at or above a lane's `next_seq`; others do no harm.
            now: Monotonic seconds; waiting for missing commands begins anew.
        """
        sequencer = cls(session.name, epoch=session.epoch, last_commit_seq=session.commit_seq)
        for lane in lanes:
            sequencer._lanes[lane.client_id] = _LaneState(lane, waiting_since=now)
        for operation in operations:
            if not operation.client_id:
                continue
            sequencer.last_commit_seq = max(sequencer.last_commit_seq, operation.commit_seq)
            state = sequencer._state(operation.client_id)
            sequencer._lanes[operation.client_id] = state
            if operation.commit_seq == 0 and operation.seq >= state.row.next_seq:
                state.held[operation.seq] = None if operation.done else operation.id
                state.waiting_since = now
        return sequencer

    def taken(self, client_id: str, seq: int) -> bool:
        """Whether a command may have been admitted at this place: look it up for `decide`."""
        state = self._lanes.get(client_id)
        if state is None:
            return False
        # A broken lane has forgotten what it held.
        return state.row.broken or 0 < seq < state.row.next_seq or seq in state.held

    def awaits(self, client_id: str, seq: int) -> bool:
        """Whether held commands of a lane wait for this one."""
        state = self._lanes.get(client_id)
        return state is not None and _waits(state) and seq == state.row.next_seq

    def decide(self, command: Incoming, existing: Operation | None = None) -> Replay | Admit:
        """What to do with a command; changes nothing.

        Args:
            command: What arrived.
            existing: The operation at its place, where `taken`; or one with its request id.

        Raises:
            FiretitanError: INVALID_ARGUMENT; REQUEST_ID_REUSED or SEQ_REUSED where `existing` is
                another command; SESSION_RESTARTED for another epoch; LANE_BROKEN.
        """
        _check(command)
        if existing is not None:
            return _replay(command, existing)
        if command.epoch != self.epoch:
            raise FiretitanError(
                Reason.SESSION_RESTARTED,
                f"{self.session} is in epoch {self.epoch}, the command was made for epoch "
                f"{command.epoch}: the session lost work since; attach again",
                field="header.epoch",
                session=self.session,
                epoch=str(self.epoch),
            )
        state = self._state(command.client_id)
        if state.row.broken:
            raise _broken(state.row)
        if self.taken(command.client_id, command.seq):
            raise FiretitanError(
                Reason.SEQ_REUSED,
                f"header.seq: {command.seq} of lane {command.client_id!r} was used before; the "
                f"lane's next is {self._first_free(state)}",
                field="header.seq",
                next_seq=str(self._first_free(state)),
            )
        commits: list[Commit] = []
        next_seq = state.row.next_seq
        if command.seq == next_seq:
            commits, next_seq = self._run(state, command)
        return Admit(
            command=command,
            commits=tuple(commits),
            lane=replace(state.row, next_seq=next_seq),
            last_commit_seq=self.last_commit_seq + len(commits),
            version=self._version,
        )

    def admit(self, decision: Admit, now: float) -> None:
        """Take a decision that has been written.

        Args:
            decision: The latest answer of `decide`.
            now: Monotonic seconds.
        """
        assert decision.version == self._version, "decided on another state"
        self._version += 1
        command = decision.command
        state = self._lanes.setdefault(command.client_id, self._state(command.client_id))
        waited = bool(state.held)
        if decision.held:
            state.held[command.seq] = command.operation_id
        for seq in [seq for seq in state.held if seq < decision.lane.next_seq]:
            del state.held[seq]
        if decision.commits or not waited:
            state.waiting_since = now
        state.row = replace(state.row, next_seq=decision.lane.next_seq)
        self.last_commit_seq = decision.last_commit_seq

    def attach(self, client_id: str) -> Lane:
        """The lane of a client that attaches; `next_seq` is what its next command must carry.

        Raises:
            FiretitanError: INVALID_ARGUMENT; LANE_BROKEN: attach with a new client id.
        """
        check_text(client_id, "client_id", least=1)
        row = self._state(client_id).row
        if row.broken:
            raise _broken(row)
        return row

    def lane(self, client_id: str) -> Lane:
        """A client's lane as it is, broken or not yet used too."""
        return self._state(client_id).row

    def lanes(self) -> Sequence[Lane]:
        """All lanes that had a command."""
        return [state.row for state in self._lanes.values()]

    def cancel(self, client_id: str, seq: int) -> None:
        """Let a lane pass over a held command that was cancelled; it gets no commit_seq."""
        state = self._lanes.get(client_id)
        if state is not None and seq in state.held:
            self._version += 1
            state.held[seq] = None

    def record_failure(self, client_id: str, seq: int) -> Lane:
        """Note a command that failed by itself; returns the lane's row to write."""
        failed = max(seq, self._state(client_id).row.failed_seq)
        return self._update(client_id, failed_seq=failed)

    def record_acknowledged(self, client_id: str, through_seq: int) -> Lane:
        """Note that results up to a seq were taken; returns the lane's row."""
        acked = max(through_seq, self._state(client_id).row.acked_through)
        return self._update(client_id, acked_through=acked)

    def fails_with_preceding(self, client_id: str, seq: int, seen_failure: int) -> bool:
        """Whether a command stands behind a failure of its lane that its sender had not seen."""
        return seen_failure < self._state(client_id).row.failed_seq < seq

    def next_expiry(self, gap_timeout_s: float) -> float | None:
        """Monotonic second at which `expired` next has something; None: nothing is held."""
        waiting = [state.waiting_since for state in self._lanes.values() if _waits(state)]
        return min(waiting) + gap_timeout_s if waiting else None

    def expired(self, now: float, gap_timeout_s: float) -> list[Expired]:
        """Lanes whose missing command is overdue; write each, then call `break_lane`.

        Args:
            now: Monotonic seconds.
            gap_timeout_s: How long held commands wait without their lane moving.
        """
        return [
            Expired(
                lane=replace(state.row, broken=True),
                missing_seq=state.row.next_seq,
                operation_ids=tuple(
                    operation for _, operation in sorted(state.held.items()) if operation
                ),
            )
            for state in self._lanes.values()
            if _waits(state) and now - state.waiting_since >= gap_timeout_s
        ]

    def wait_anew(self, now: float) -> None:
        """Give missing commands their whole time again.

        Args:
            now: Monotonic seconds.
        """
        for state in self._lanes.values():
            state.waiting_since = now

    def break_lane(self, client_id: str) -> None:
        """Close a lane for good; its held commands are forgotten."""
        self._update(client_id, broken=True)

    def restarted(self) -> tuple[int, list[Lane]]:
        """The epoch and the lanes' rows behind `restart`: write them, then call it."""
        return self.epoch + 1, [
            replace(state.row, next_seq=max(state.row.next_seq, max(state.held, default=0) + 1))
            for state in self._lanes.values()
        ]

    def restart(self) -> None:
        """Begin a new epoch after a loss: nothing is held any more, lanes go on behind it."""
        self._version += 1
        self.epoch, lanes = self.restarted()
        for state, row in zip(self._lanes.values(), lanes, strict=True):
            state.row = row
            state.held.clear()

    def _run(self, state: _LaneState, command: Incoming) -> tuple[list[Commit], int]:
        commits: list[Commit] = []
        seq = command.seq
        operation: str | None = command.operation_id
        while True:
            if operation is not None:
                place = self.last_commit_seq + len(commits) + 1
                commits.append(Commit(command.client_id, seq, operation, place))
            seq += 1
            if seq not in state.held:
                return commits, seq
            operation = state.held[seq]

    def _update(self, client_id: str, **changes: int | bool) -> Lane:
        self._version += 1
        state = self._lanes.setdefault(client_id, self._state(client_id))
        state.row = replace(state.row, **changes)  # type: ignore[arg-type]
        if state.row.broken:
            state.held.clear()
        return state.row

    def _state(self, client_id: str) -> _LaneState:
        return self._lanes.get(client_id) or _LaneState(Lane(self.session, client_id))

    @staticmethod
    def _first_free(state: _LaneState) -> int:
        seq = state.row.next_seq
        while seq in state.held:
            seq += 1
        return seq


def _waits(state: _LaneState) -> bool:
    return bool(state.held) and not state.row.broken


def _check(command: Incoming) -> None:
    check_text(command.client_id, "header.client_id", least=1)
    check_text(command.request_id, "header.request_id", least=1)
    if not 0 < command.seq <= MAX_SEQ:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            f"header.seq: {command.seq} is not a place in a lane; count 1, 2, 3 ...",
            field="header.seq",
        )


def _replay(command: Incoming, existing: Operation) -> Replay:
    if existing.request_id != command.request_id:
        raise FiretitanError(
            Reason.SEQ_REUSED,
            f"header.seq: {command.seq} of lane {command.client_id!r} belongs to request "
            f"{existing.request_id!r} ({existing.name}), not to {command.request_id!r}; give each "
            "command of a lane its own seq",
            field="header.seq",
            operation=existing.name,
        )
    if existing.payload_digest != command.payload_digest:
        raise FiretitanError(
            Reason.REQUEST_ID_REUSED,
            f"header.request_id: {command.request_id!r} was used for another command "
            f"({existing.name}, {existing.method}, seq {existing.seq}); give each call its own",
            field="header.request_id",
            operation=existing.name,
        )
    return Replay(existing.id)


def _broken(lane: Lane) -> FiretitanError:
    return FiretitanError(
        Reason.LANE_BROKEN,
        f"lane {lane.client_id!r} of {lane.session} is closed: seq {lane.next_seq} never came "
        "while later ones waited; attach again with a new client_id",
        field="header.client_id",
        session=lane.session,
        client_id=lane.client_id,
        missing_seq=str(lane.next_seq),
    )
