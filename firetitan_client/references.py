"""Names a user passes: checkpoints, snapshots, their aliases.

Knows: which texts may be names and how references are written. Must not know: whether what they
name exists; the daemon says.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from firetitan.v1 import checkpoint_pb2, checkpoint_service_pb2
from google.protobuf.duration_pb2 import Duration

from firetitan_client.errors import InvalidArgument, Unsupported

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RULE = "use 1 to 128 letters, digits, '.', '_' and '-', a letter or digit first"
_SHOWN = 200
_MAX_TTL_S = 100 * 365 * 86400
_KINDS = ("base", "delta", "merged_base")
_Request = checkpoint_service_pb2.SaveSnapshotRequest
_PRECISIONS = {
    "source": _Request.EXPORT_PRECISION_SOURCE,
    "bf16": _Request.EXPORT_PRECISION_BF16,
}
_CROSS_JOB = "cross_job://"
_TINKER = re.compile(r"tinker://([^/]+)/(weights|sampler_weights)/([^/]+)")


def check_name(name: Any, field: str = "name") -> str:
    """A name for something new.

    Raises:
        InvalidArgument: It breaks the rule for names.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidArgument(
            f"{field}: {name!r} is not a valid name; {_RULE}", reason="NAME_INVALID", field=field
        )
    return name


def time_to_live(ttl_seconds: float | None) -> Duration | None:
    """A time to live, as the daemon takes it.

    Raises:
        InvalidArgument: Not a number above 0 (and up to a hundred years).
    """
    if ttl_seconds is None:
        return None
    number = isinstance(ttl_seconds, int | float) and not isinstance(ttl_seconds, bool)
    if not number or not 0 < ttl_seconds <= _MAX_TTL_S:
        raise InvalidArgument(
            f"ttl_seconds: is {ttl_seconds!r}; give seconds above 0, or None to keep it until it "
            "is deleted",
            field="ttl_seconds",
        )
    duration = Duration()
    duration.FromNanoseconds(round(ttl_seconds * 1e9))
    return duration


def refuse_token(weights_access_token: str | None) -> None:
    """Refuse an access token rather than ignore it.

    Raises:
        Unsupported: One was given.
    """
    if weights_access_token is not None:
        raise Unsupported("weights_access_token: there are no access tokens on a local daemon")


def snapshot_kind(checkpoint_type: str | None) -> checkpoint_pb2.Snapshot.Kind.ValueType:
    """The kind a `checkpoint_type` asks for.

    Raises:
        InvalidArgument: Not a checkpoint type.
    """
    kind = checkpoint_type.lower() if isinstance(checkpoint_type, str) else checkpoint_type
    if kind is not None and kind not in _KINDS:
        raise InvalidArgument(
            f"checkpoint_type must be one of {_KINDS}, not {checkpoint_type!r}",
            field="checkpoint_type",
        )
    if kind == "merged_base":
        return checkpoint_pb2.Snapshot.KIND_MERGED_BASE
    if kind == "base":
        return checkpoint_pb2.Snapshot.KIND_BASE
    if kind == "delta":
        return checkpoint_pb2.Snapshot.KIND_DELTA
    return checkpoint_pb2.Snapshot.KIND_UNSPECIFIED


def check_adapted(lora_rank: int) -> None:
    """Refuse to merge where there is no adapter.

    Raises:
        InvalidArgument: Full-parameter training.
    """
    if lora_rank == 0:
        raise InvalidArgument(
            "checkpoint_type='merged_base' is for LoRA: full-parameter training has no adapter to "
            "merge; use 'base'",
            field="checkpoint_type",
        )


def export_precision(
    precision: str | None, kind: checkpoint_pb2.Snapshot.Kind.ValueType
) -> _Request.ExportPrecision.ValueType:
    """In what a merged base is to be written.

    Raises:
        InvalidArgument: Not a precision, or nothing that is merged.
    """
    if precision is None:
        return _Request.EXPORT_PRECISION_UNSPECIFIED
    if kind != checkpoint_pb2.Snapshot.KIND_MERGED_BASE:
        raise InvalidArgument(
            "export_precision requires checkpoint_type='merged_base'", field="export_precision"
        )
    if precision not in _PRECISIONS:
        raise InvalidArgument(
            f"export_precision must be one of {tuple(_PRECISIONS)}, not {precision!r}",
            field="export_precision",
        )
    return _PRECISIONS[precision]


def checkpoint_reference(path: Any, name: Any = None) -> str:
    """What load_state was given, as the daemon takes it.

    Args:
        path: A name, a full name, a reference, or a response with `.path`.
        name: The same by another name.

    Raises:
        InvalidArgument: Nothing, both, or a snapshot for sampling.
    """
    if path is not None and name is not None:
        raise InvalidArgument("pass either path or name, not both", field="name")
    given = path if path is not None else name
    if given is None:
        raise TypeError("load_state() needs the name or path of a checkpoint")
    kind = type(given).__name__
    text = getattr(given, "path", given)
    if not isinstance(text, str):
        raise InvalidArgument(f"path: is a {kind}; give a checkpoint's name or path", field="path")
    text = text.strip()
    alias = _TINKER.fullmatch(text)
    if (
        kind in ("SaveWeightsForSamplerResponse", "SaveSamplerResult")
        or text.startswith("snapshots/")
        or (alias is not None and alias[2] == "sampler_weights")
    ):
        raise InvalidArgument(
            f"path: {text!r} is a snapshot for sampling, it has no optimizer; load a checkpoint "
            "made by save_state",
            field="path",
        )
    if alias is not None:
        text = f"{_CROSS_JOB}{alias[1]}/{alias[3]}"
    _check_checkpoint_path(text)
    return text


def _check_checkpoint_path(text: str) -> None:
    """Refuse what cannot be a checkpoint's reference, in the words that are documented."""
    if not text:
        raise InvalidArgument("checkpoint path cannot be empty", field="path")
    if any(ord(character) < 32 or character in "\\\x7f" for character in text):
        raise _no_path("checkpoint path contains invalid characters", text)
    job, slash, name = text.removeprefix(_CROSS_JOB).partition("/")
    if text.startswith(_CROSS_JOB):
        if not (job and slash and name) or "/" in name:
            raise _no_path(
                "Invalid cross-job checkpoint ref format. "
                "Expected 'cross_job://<source_job_id>/<checkpoint_name>'",
                text,
            )
    elif "://" in text or text.startswith(("/", "~")):
        raise _no_path(
            "checkpoint path must be a logical name or opaque cross_job:// reference", text
        )
    for segment in text.removeprefix(_CROSS_JOB).split("/"):
        if segment in ("", ".", ".."):
            raise _no_path("checkpoint path contains empty or traversal segments", text)
        if not _NAME.fullmatch(segment):
            raise _no_path(f"checkpoint path segment {_shown(segment)} is not valid: {_RULE}", text)


def _no_path(why: str, text: str) -> InvalidArgument:
    return InvalidArgument(f"{why} (got {_shown(text)})", reason="NAME_INVALID", field="path")


def _shown(text: str) -> str:
    """A user's text in an error, however long it is."""
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def adapter_reference(adapter_path: Any) -> str:
    """What load_adapter was given, as the daemon takes it: a folder of this process, absolute.

    Raises:
        InvalidArgument: Not a text or path, or blank.
    """
    text = str(adapter_path) if isinstance(adapter_path, os.PathLike) else adapter_path
    if not isinstance(text, str) or not text.strip():
        raise InvalidArgument("adapter_path must be a non-empty string", field="adapter_path")
    text = text.strip()
    if "://" in text or "\0" in text:
        return text
    # os.path: what can be no path at all, a name too long or no user's home, is none either.
    folder = os.path.expanduser(text)  # noqa: PTH111
    return str(Path(folder).absolute()) if os.path.exists(folder) else text  # noqa: PTH110


def cross_job(checkpoint_name: str, source_job_id: str | None) -> str:
    """A reference to a checkpoint, of another trainer where one is given."""
    check_name(checkpoint_name, "checkpoint_name")
    if source_job_id is None:
        return checkpoint_name
    return f"{_CROSS_JOB}{check_name(source_job_id, 'source_job_id')}/{checkpoint_name}"


def parse_tinker_path(tinker_path: Any) -> tuple[str, str]:
    """Run and checkpoint id, `weights/x` or `sampler_weights/x`, of a `tinker://` path.

    Raises:
        InvalidArgument: Not such a path.
    """
    found = _TINKER.fullmatch(tinker_path) if isinstance(tinker_path, str) else None
    if found is None:
        raise InvalidArgument(
            f"tinker_path: {tinker_path!r} is none; give tinker://<run>/weights/<name> or "
            "tinker://<run>/sampler_weights/<id>",
            field="tinker_path",
        )
    return found[1], f"{found[2]}/{found[3]}"


def snapshot_reference(model_path: Any) -> str:
    """What a sampling client was given, as the daemon takes it.

    Raises:
        InvalidArgument: Not a name.
    """
    text = getattr(model_path, "path", model_path)
    if not isinstance(text, str) or not text.strip():
        raise InvalidArgument(
            f"model_path: {model_path!r} is no snapshot; give the `.path` of "
            "save_weights_for_sampler",
            field="model_path",
        )
    return text.strip()
