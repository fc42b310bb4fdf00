"""Takes PEFT adapters from where users keep them: folders, and addresses that fsspec knows.

Knows: PEFT's two files, file descriptors, fsspec. Must not know: what is in the files.

Folders are not ours, so nothing about them is trusted: only the two files are opened, relative to
the folder's descriptor, and they must be regular files, no links, of a bounded size. Nothing is
unpickled.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from firetitan_daemon import durable
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.disk_errors import is_full

MAX_BYTES = {"adapter_config.json": 1 << 20, "adapter_model.safetensors": 32 << 30}
"""The files of an adapter, and how large they may be."""
_PICKLE = "adapter_model.bin"
_CHUNK = 1 << 20
_NO_STORES = frozenset(
    {
        "asynclocal", "async_wrapper", "asyncwrapper", "blockcache", "cached", "data", "dir", "dvc",
        "filecache", "generic", "git", "libarchive", "local", "reference", "simplecache", "tar",
        "zip",
    }
)  # fmt: skip
"""fsspec's drivers that read this machine's files, past the checks of a folder, or wrap others."""
_PROTOCOL = re.compile(r"([a-z][a-z0-9+.-]*)://.*", re.DOTALL)
_FIELD = "adapter_path"
_LEAST_SECRET = 4
"""Characters: what is shorter guards nothing, and would be found in any text."""

Open = Callable[[str], BinaryIO]
"""A file of the adapter by its name; FileNotFoundError where there is none."""


def fetch_adapter(location: str, staging: Path, roots: Sequence[Path] = (Path("/"),)) -> str:
    """Copy an adapter's files into an empty folder and seal it.

    Args:
        location: An absolute path, a `file://` address, or another that fsspec has a driver for.
        staging: The folder.
        roots: Below one of which a local folder must be, links resolved.

    Returns:
        The digest of its manifest.

    Raises:
        FiretitanError: MODEL_NOT_FOUND, INVALID_ARGUMENT or UNSUPPORTED: what to give instead.
        OSError: The disk of `staging`.
    """
    if "\0" in location or "::" in location:
        raise _refused(location, "is no address; give a folder or one plain address")
    match = _PROTOCOL.fullmatch(location)
    if match is None or match[1] == "file":
        _fetch_local(location, staging, roots)
    else:
        _fetch_remote(location, match[1], staging)
    digest, _ = durable.seal_folder(staging, {"kind": "adapter", "source": _public(location)})
    return digest


def readable_name(location: str) -> str:
    """The last part of a location, as part of a folder's name."""
    last = location.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._-]+", "_", last)[:64].lstrip("._-") or "adapter"


def _fetch_local(location: str, staging: Path, roots: Sequence[Path]) -> None:
    folder = _local_path(location)
    try:
        root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise FiretitanError(
            Reason.MODEL_NOT_FOUND,
            f"{_FIELD}: {_public(location)[:400]!r} does not exist on the daemon's machine",
            field=_FIELD,
        ) from None
    except OSError as error:
        raise _refused(location, f"is no folder that can be read: {error.strerror}") from error
    try:
        _check_inside(location, root, roots)
        _copy(location, lambda name: _open_regular(location, root, name), staging)
    finally:
        os.close(root)


def _check_inside(location: str, root: int, roots: Sequence[Path]) -> None:
    # What was opened, not what the name may stand for by now.
    opened = Path(f"/proc/self/fd/{root}").readlink()
    if not any(opened.is_relative_to(one.resolve()) for one in roots):
        allowed = ", ".join(str(one) for one in roots)
        raise _refused(
            location, f"is not below {allowed}, where this daemon reads (server.adapter_roots)"
        )


def _local_path(location: str) -> str:
    if not location.startswith("file:"):
        if not location.startswith("/"):
            raise _refused(
                location,
                "is neither a promoted model nor an absolute path; give a folder on the daemon's "
                "machine, an address such as file:///..., or accounts/<account>/models/<id>",
            )
        return location
    parts = urlsplit(location)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise _refused(location, "names another machine; write file:///absolute/path")
    path = unquote(parts.path)
    if "\0" in path or not path.startswith("/"):
        raise _refused(location, "is no absolute path; write file:///absolute/path")
    return path


def _open_regular(location: str, root: int, name: str) -> BinaryIO:
    # Not blocking: a pipe in the place of a file would be waited for.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(name, flags, dir_fd=root)
    except FileNotFoundError:
        try:
            os.stat(_PICKLE, dir_fd=root, follow_symlinks=False)
        except OSError:
            raise FileNotFoundError(name) from None
        raise _refused(
            location,
            f"has {_PICKLE}, which is a pickle and can run code; save it as safetensors "
            "(PeftModel.save_pretrained does)",
        ) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _refused(
                location, f"holds {name} as a symbolic link; give a folder with the file itself"
            ) from None
        raise _refused(location, f"has a {name} that cannot be read: {error.strerror}") from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise _refused(location, f"has a {name} that is no regular file")
    if found.st_size > MAX_BYTES[name]:
        # Before a byte is copied: a sparse file has any size for nothing.
        os.close(descriptor)
        raise _too_large(location, name)
    return os.fdopen(descriptor, "rb")


def _fetch_remote(location: str, protocol: str, staging: Path) -> None:
    import fsspec  # a dependency of what loads models; its drivers are not

    if protocol in _NO_STORES:
        raise _refused(
            location, "is no address of a store; write /absolute/path or file:///absolute/path"
        )
    try:
        files, path = fsspec.core.url_to_fs(location)
    except (ImportError, ValueError, TypeError) as error:
        raise FiretitanError(
            Reason.UNSUPPORTED,
            f"{_FIELD}: {_public(location)[:400]!r} needs a driver for {protocol}:// beside the "
            f"daemon, and there is none: {_without_secrets(str(error), location)}. Install it "
            "there, or copy the adapter to a local folder",
            field=_FIELD,
        ) from error
    except OSError as error:
        raise _refused(
            location, f"cannot be reached: {_without_secrets(str(error), location)}"
        ) from error
    try:
        _copy(location, lambda name: _open_remote(files, f"{path.rstrip('/')}/{name}"), staging)
    except FiretitanError:
        raise
    except Exception as error:  # every driver has errors of its own, and they are the address's
        if isinstance(error, OSError) and is_full(error):
            raise
        raise _refused(
            location, f"cannot be fetched: {_without_secrets(str(error), location)}"
        ) from error


def _open_remote(files: Any, path: str) -> BinaryIO:
    opened: BinaryIO = files.open(path, "rb")
    return opened


def _copy(location: str, open_file: Open, staging: Path) -> None:
    for name, limit in MAX_BYTES.items():
        try:
            source = open_file(name)
        except FileNotFoundError:
            raise _refused(
                location, f"holds no {name}; a PEFT adapter has {' and '.join(MAX_BYTES)}"
            ) from None
        with source, (staging / name).open("xb") as target:
            copied = 0
            while chunk := source.read(_CHUNK):
                copied += len(chunk)
                if copied > limit:
                    raise _too_large(location, name)
                target.write(chunk)


def _too_large(location: str, name: str) -> FiretitanError:
    return _refused(location, f"has a {name} of more than {MAX_BYTES[name]} bytes")


def _refused(location: str, what: str) -> FiretitanError:
    return FiretitanError(
        Reason.INVALID_ARGUMENT, f"{_FIELD}: {_public(location)[:400]!r} {what}", field=_FIELD
    )


def _public(location: str) -> str:
    """A location without what only its user may know: name, password and query of an address."""
    return _without_secrets(location, location)


def _without_secrets(text: str, location: str) -> str:
    """A text that may quote a location, without what lets the location's bearer in."""
    _, found, rest = location.partition("://")
    if not found:
        return text
    user = rest.partition("/")[0].rpartition("@")[0]
    query = rest.partition("?")[2]
    for secret in (user, user.partition(":")[2], query):
        if len(secret) >= _LEAST_SECRET:
            text = text.replace(secret, "***").replace(unquote(secret), "***")
    return text
