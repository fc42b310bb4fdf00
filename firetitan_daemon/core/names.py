"""Names of resources: what may be one, how it is put together and taken apart.

Knows: patterns and texts. Must not know: whether a named thing exists, or where it is stored; a
name is never a path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.core.records import Checkpoint

MAX_ID_LENGTH = 128
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RULE = (
    "use 1 to 128 characters, the first a letter or a digit, the others letters, digits, "
    "'.', '_' or '-'"
)
_DIGITS = re.compile(r"([0-9]+)")
_TINKER_SNAPSHOT = re.compile(r"tinker://[^/]+/sampler_weights/(?P<id>[^/]+)")
_CROSS_JOB = "cross_job://"


def check_id(value: str, field: str) -> str:
    """Refuse what may not be the last segment of a name.

    Args:
        value: The id.
        field: Path of the request field it came in, for the error.

    Returns:
        The id.

    Raises:
        FiretitanError: NAME_INVALID naming the field, the value and the rule.
    """
    if not _ID.fullmatch(value):
        raise _invalid(field, value, _RULE)
    return value


def trainer_name(trainer: str) -> str:
    """`trainers/{trainer}`."""
    return f"trainers/{trainer}"


def session_name(trainer: str, session: str) -> str:
    """`trainers/{trainer}/sessions/{session}`, from two ids."""
    return f"trainers/{trainer}/sessions/{session}"


def checkpoint_name(session: str, checkpoint: str) -> str:
    """`{session}/checkpoints/{checkpoint}`, from a session's full name and an id."""
    return f"{session}/checkpoints/{checkpoint}"


def snapshot_name(snapshot: str) -> str:
    """`snapshots/{snapshot}`."""
    return f"snapshots/{snapshot}"


def deployment_name(deployment: str) -> str:
    """`deployments/{deployment}`."""
    return f"deployments/{deployment}"


def operation_name(operation: str) -> str:
    """`operations/{operation}`."""
    return f"operations/{operation}"


@dataclass(frozen=True)
class SessionParts:
    """A session's name, taken apart."""

    trainer: str
    session: str

    @property
    def name(self) -> str:
        """The full name."""
        return session_name(self.trainer, self.session)


@dataclass(frozen=True)
class CheckpointParts:
    """A checkpoint's name, taken apart."""

    trainer: str
    session: str
    checkpoint: str

    @property
    def name(self) -> str:
        """The full name."""
        return checkpoint_name(session_name(self.trainer, self.session), self.checkpoint)


def parse_trainer(name: str, field: str = "name", *, bare: bool = True) -> str:
    """Id of `trainers/{trainer}` or, where `bare`, of `{trainer}`.

    Raises:
        FiretitanError: NAME_INVALID.
    """
    return _parse_one(name, "trainers", "trainer", field, bare)


def parse_deployment(name: str, field: str = "name", *, bare: bool = True) -> str:
    """Id of `deployments/{deployment}` or, where `bare`, of `{deployment}`.

    Raises:
        FiretitanError: NAME_INVALID.
    """
    return _parse_one(name, "deployments", "deployment", field, bare)


def parse_operation(name: str, field: str = "name", *, bare: bool = True) -> str:
    """Id of `operations/{operation}` or, where `bare`, of `{operation}`.

    Raises:
        FiretitanError: NAME_INVALID.
    """
    return _parse_one(name, "operations", "operation", field, bare)


def parse_session(name: str, field: str = "name") -> SessionParts:
    """Parts of `trainers/{trainer}/sessions/{session}`.

    Raises:
        FiretitanError: NAME_INVALID.
    """
    trainer, session = _parse(name, ("trainers", "sessions"), field)
    return SessionParts(trainer, session)


def parse_checkpoint(name: str, field: str = "name") -> CheckpointParts:
    """Parts of `trainers/{trainer}/sessions/{session}/checkpoints/{checkpoint}`.

    Raises:
        FiretitanError: NAME_INVALID.
    """
    return CheckpointParts(*_parse(name, ("trainers", "sessions", "checkpoints"), field))


def parse_parent(name: str, field: str = "parent") -> tuple[str, str | None]:
    """What a list is asked of: a trainer or one of its sessions.

    Returns:
        The trainer's id, and the session's full name where a session was named.

    Raises:
        FiretitanError: NAME_INVALID.
    """
    if "/sessions/" in name:
        parts = parse_session(name, field)
        return parts.trainer, parts.name
    return parse_trainer(name, field, bare=False), None


def parse_snapshot(reference: str, field: str = "snapshot") -> str:
    """Id of `snapshots/{snapshot}`, `{snapshot}` or `tinker://{anything}/sampler_weights/{...}`.

    Raises:
        FiretitanError: NAME_INVALID.
    """
    if "://" in reference:
        match = _TINKER_SNAPSHOT.fullmatch(reference)
        if match is None:
            raise _invalid(
                field,
                reference,
                "a snapshot is named by snapshots/{snapshot}, by its last segment or by "
                "tinker://{trainer}/sampler_weights/{snapshot}",
            )
        return check_id(match["id"], field)
    return _parse_one(reference, "snapshots", "snapshot", field, True)


@dataclass(frozen=True)
class SavedReference:
    """Something saved, as rows name it or by a snapshot's name."""

    id: str
    trainer: str | None = None
    """None: whichever saved it."""


def parse_saved(reference: str, field: str = "checkpoint") -> SavedReference:
    """Take apart `accounts/{a}/rlorTrainerJobs/{trainer}/checkpoints/{id}`, or a snapshot's name.

    Raises:
        FiretitanError: NAME_INVALID.
    """
    parts = reference.split("/")
    if len(parts) == 6 and parts[::2] == ["accounts", "rlorTrainerJobs", "checkpoints"]:
        return SavedReference(check_id(parts[5], field), check_id(parts[3], field))
    return SavedReference(parse_snapshot(reference, field))


def choose_snapshot_id(wanted: str, suffix: str, taken: Callable[[str], bool]) -> str:
    """A snapshot id never used before: `{wanted}-{suffix}`, else `{wanted}.2-{suffix}` and so on.

    Args:
        wanted: What the user called it.
        suffix: The session's eight hexadecimal digits.
        taken: Whether an id is in use.

    Raises:
        FiretitanError: NAME_INVALID, also where nothing fits the longest id.
    """
    check_id(wanted, "snapshot_id")
    chosen = f"{wanted}-{suffix}"
    number = 1
    while taken(chosen):
        number += 1
        chosen = f"{wanted}.{number}-{suffix}"
    if len(chosen) > MAX_ID_LENGTH:
        room = MAX_ID_LENGTH - (len(chosen) - len(wanted))
        raise _invalid(
            "snapshot_id",
            wanted,
            f"{chosen[len(wanted) :]!r} is appended: use at most {room} characters",
        )
    return chosen


@dataclass(frozen=True)
class CheckpointReference:
    """What a load names, before it is looked up."""

    text: str
    """As the user wrote it."""
    checkpoint: str
    trainer: str | None = None
    """None: the trainer of the session that loads."""
    session: str | None = None
    """A session's full name; None: any of the trainer's sessions, the loading one first."""


def parse_checkpoint_reference(reference: str, field: str = "checkpoint") -> CheckpointReference:
    """Take apart what `load_state` accepts.

    Args:
        reference: `{checkpoint}`, a full name, or `cross_job://{trainer}/{checkpoint}`.
        field: Path of the request field it came in.

    Raises:
        FiretitanError: NAME_INVALID with the reason in words.
    """
    text = reference.strip()
    if not text:
        raise _refused(field, reference, "checkpoint path cannot be empty")
    if any(ord(character) < 32 or character in "\\\x7f" for character in text):
        raise _refused(field, reference, "checkpoint path contains invalid characters")
    if text.startswith(_CROSS_JOB):
        return _cross_job(text, field)
    if "://" in text or text.startswith(("/", "~")):
        raise _refused(
            field,
            reference,
            "checkpoint path must be a logical name or opaque cross_job:// reference",
        )
    segments = text.split("/")
    if any(segment in ("", ".", "..") for segment in segments):
        raise _refused(field, reference, "checkpoint path contains empty or traversal segments")
    for segment in segments:
        _check_segment(segment, field, reference)
    if len(segments) == 1:
        return CheckpointReference(text, text)
    if segments[0] == "snapshots":
        raise no_checkpoint(reference, field)
    parts = parse_checkpoint(text, field)
    session = session_name(parts.trainer, parts.session)
    return CheckpointReference(text, parts.checkpoint, parts.trainer, session)


def pick_checkpoint(
    reference: CheckpointReference, session: str, candidates: Iterable[Checkpoint]
) -> Checkpoint:
    """The checkpoint a reference means.

    Args:
        reference: What was asked for.
        session: Full name of the session that loads; its own checkpoints come first.
        candidates: Checkpoints of the reference's trainer, or of the session's where it names none.

    Raises:
        FiretitanError: CHECKPOINT_NOT_FOUND naming what there is.
    """
    rows = [row for row in candidates if reference.session in (None, row.session)]
    found = [row for row in rows if last_segment(row.name) == reference.checkpoint]
    if found:
        return max(found, key=lambda row: (row.session == session, row.create_time, row.name))
    known = sorted({last_segment(row.name) for row in rows}, key=natural_key)
    there = ", ".join(known[-8:]) if known else "no checkpoint at all"
    where = reference.session or f"trainers/{reference.trainer or parse_session(session).trainer}"
    raise FiretitanError(
        Reason.CHECKPOINT_NOT_FOUND,
        f"checkpoint {reference.text!r} was not found: {where} has {there}; nothing was loaded",
        field="checkpoint",
        checkpoint=reference.text,
    )


def no_checkpoint(snapshot: str, field: str = "checkpoint") -> FiretitanError:
    """The error where a load names a snapshot."""
    return _refused(
        field,
        snapshot,
        "is a snapshot for serving and holds no optimizer; name a checkpoint made by save_state",
    )


def last_segment(name: str) -> str:
    """What follows the last slash."""
    return name.rpartition("/")[2]


def natural_key(text: str) -> tuple[tuple[str | int, ...], str]:
    """Sort key that puts `step-2` before `step-10`."""
    parts: list[str | int] = []
    for index, part in enumerate(_DIGITS.split(text)):
        parts.append(int(part) if index % 2 else part)
    return tuple(parts), text


def _parse_one(name: str, collection: str, kind: str, field: str, bare: bool) -> str:
    if bare and "/" not in name:
        return check_id(name, field)
    prefix, _, last = name.partition("/")
    if prefix != collection or not _ID.fullmatch(last):
        raise _invalid(field, name, f"expected {collection}/{{{kind}}}; for ids, {_RULE}")
    return last


def _parse(name: str, collections: tuple[str, ...], field: str) -> tuple[str, ...]:
    segments = name.split("/")
    fits = len(segments) == 2 * len(collections) and tuple(segments[::2]) == collections
    if not fits or not all(_ID.fullmatch(segment) for segment in segments[1::2]):
        shape = "/".join(f"{one}/{{{one[:-1]}}}" for one in collections)
        raise _invalid(field, name, f"expected {shape}; for ids, {_RULE}")
    return tuple(segments[1::2])


def _cross_job(text: str, field: str) -> CheckpointReference:
    trainer, slash, checkpoint = text.removeprefix(_CROSS_JOB).partition("/")
    if not (trainer and slash and checkpoint) or "/" in checkpoint:
        raise _refused(
            field,
            text,
            "Invalid cross-job checkpoint ref format. "
            "Expected 'cross_job://<source_job_id>/<checkpoint_name>'",
        )
    if trainer in (".", "..") or checkpoint in (".", ".."):
        raise _refused(field, text, "checkpoint path contains empty or traversal segments")
    _check_segment(trainer, field, text)
    _check_segment(checkpoint, field, text)
    return CheckpointReference(text, checkpoint, trainer)


def _check_segment(segment: str, field: str, text: str) -> None:
    if not _ID.fullmatch(segment):
        raise _refused(
            field, text, f"checkpoint path segment {_shown(segment)} is not valid: {_RULE}"
        )


def _refused(field: str, value: str, why: str) -> FiretitanError:
    return FiretitanError(Reason.NAME_INVALID, f"{field}: {why} (got {_shown(value)})", field=field)


def _invalid(field: str, value: str, rule: str) -> FiretitanError:
    return FiretitanError(
        Reason.NAME_INVALID, f"{field}: {_shown(value)} is not a valid name; {rule}", field=field
    )


def _shown(value: str) -> str:
    return repr(value if len(value) <= 200 else f"{value[:200]}... ({len(value)} characters)")
