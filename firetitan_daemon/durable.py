"""The one way a file becomes durable: write beside, hash, fsync, rename, fsync the folder.

Knows: files, BLAKE3. Must not know: what the files mean. Every layer that publishes files uses this
module; nothing else in the project may write a file that must survive.

A published folder holds `manifest.json`, written last, with the size and BLAKE3 of every other
file; its own hash is the folder's digest. A folder without a manifest is an unfinished one.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import uuid
from pathlib import Path
from typing import Any

from blake3 import blake3

from firetitan_daemon.core.errors import FiretitanError, Reason

MANIFEST = "manifest.json"
_READ_BEYOND = 1 << 30
"""How much more than it should be a file may be and still be hashed, to say what is there."""
MAX_MANIFEST_BYTES = 1 << 28
"""Far more than a line for each tensor of any model takes."""
TEMPORARY_PREFIX = ".tmp-"


def hash_file(path: Path) -> str:
    """BLAKE3 of a file, hex."""
    return blake3().update_mmap(path).hexdigest()


def fsync_path(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_file(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file.

    Args:
        path: The file.
        max_bytes: How large it may be.

    Raises:
        OSError: There is none, it is larger, or what is there is a link, a pipe or a device, which
            is not waited for.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        if found.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"it has {found.st_size} bytes", str(path))
        return file.read()


def read_manifest(folder: Path) -> bytes:
    """A published folder's manifest, unread.

    Raises:
        OSError: As `read_file`.
    """
    return read_file(folder / MANIFEST, MAX_MANIFEST_BYTES)


def publish_file(path: Path, data: bytes, *, fsync: bool = True, mode: int | None = None) -> None:
    """Write `data` so that `path` is either as before or complete.

    Args:
        path: Final name; its folder exists.
        data: Whole content.
        fsync: False where surviving a process death is enough and power loss is not promised.
        mode: Of the file; None: what the umask leaves.

    Raises:
        OSError: Nothing was published, the temporary file is gone; or, where the last flush failed,
            `data` is there and may not survive a loss of power.
    """
    temporary = path.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    try:
        with temporary.open("xb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(data)
            if fsync:
                file.flush()
                os.fsync(file.fileno())
        temporary.rename(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if fsync:
        fsync_path(path.parent)


def publish_written(written: Path, final: Path) -> None:
    """Give a file that another library wrote beside it its final name, as `publish_file` does."""
    fsync_path(written)
    written.rename(final)
    fsync_path(final.parent)


def seal_folder(folder: Path, about: dict[str, Any]) -> tuple[str, int]:
    """Hash and fsync every file of a staging folder and write its manifest last.

    Args:
        folder: Holds the payload files, no subfolders, no manifest yet.
        about: JSON facts stored in the manifest beside the file table.

    Returns:
        The digest (BLAKE3 of the manifest, hex) and the payload's size in bytes.
    """
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.iterdir()):
        fsync_path(path)
        files[path.name] = {"size_bytes": path.stat().st_size, "blake3": hash_file(path)}
    manifest = json.dumps({**about, "files": files}, indent=1, sort_keys=True).encode()
    publish_file(folder / MANIFEST, manifest)
    size_bytes: int = sum(entry["size_bytes"] for entry in files.values())
    return blake3(manifest).hexdigest(), size_bytes


def publish_folder(staging: Path, final: Path) -> None:
    """Give a staging folder, sealed or flushed, its final name, atomically."""
    make_folder(final.parent)
    staging.rename(final)
    fsync_path(final.parent)
    if staging.parent != final.parent:
        fsync_path(staging.parent)


def flush_folder(folder: Path) -> None:
    """Flush every file of a staging folder that is not sealed here: it has its manifest already."""
    for path in folder.iterdir():
        fsync_path(path)
    fsync_path(folder)


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Make a folder and those above it where they are missing; a loss of power leaves them there.

    Args:
        folder: One that is there is left as it is.
        mode: Of the folder; in those above it nobody else can write.
    """
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    for one in reversed(missing):
        one.mkdir(mode=mode if one == folder else 0o755, exist_ok=True)
        # A folder of someone else's may let us make one in it and not read it.
        with contextlib.suppress(PermissionError):
            fsync_path(one.parent)


def sweep_temporaries(folder: Path) -> int:
    """Remove what a `publish_file` into a folder that died in between left; returns how many.

    Nothing may be publishing there meanwhile.
    """
    left = list(folder.glob(f"{TEMPORARY_PREFIX}*"))
    for path in left:
        remove(path)
    return len(left)


def check_manifest(folder: Path, digest: str | None) -> bytes:
    """The bytes of a published folder's manifest, compared with what they must hash to.

    Raises:
        FiretitanError: CHECKSUM_MISMATCH.
    """
    path = folder / MANIFEST
    try:
        raw = read_manifest(folder)
    except OSError as error:
        what = "no file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise _mismatch(path, digest or "a readable manifest", what) from error
    found = blake3(raw).hexdigest()
    if digest is not None and found != digest:
        raise _mismatch(path, digest, found)
    return raw


def verify_folder(folder: Path, digest: str | None = None) -> dict[str, Any]:
    """Check every file of a published folder against its manifest.

    Args:
        folder: A folder made by `seal_folder`.
        digest: What the manifest itself must hash to.

    Returns:
        The manifest.

    Raises:
        FiretitanError: CHECKSUM_MISMATCH naming the file, the expected and the found hash.
    """
    path, raw = folder / MANIFEST, check_manifest(folder, digest)
    manifest, files = _read(path, raw)
    for name, entry in files.items():
        file = folder / name
        found = _hash_found(file, entry["size_bytes"])
        if found != entry["blake3"]:
            wanted = entry["size_bytes"]
            size = file.stat().st_size if file.is_file() else wanted
            sizes = f"{size} bytes, not {wanted}" if size != wanted else ""
            raise _mismatch(file, entry["blake3"], found, sizes)
    return manifest


def remove(path: Path) -> None:
    """Remove a file or a folder; one that is not there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _hash_found(path: Path, wanted_bytes: int) -> str:
    """What is at a path, as a hash where there is a file that can be read."""
    if not path.is_file():
        return "no file"
    if path.stat().st_size > wanted_bytes + _READ_BEYOND:
        return "a file that is not read to its end"  # a sparse one has any size for nothing
    try:
        return hash_file(path)
    except OSError as error:
        return error.strerror or str(error)


def _read(path: Path, raw: bytes) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A manifest and its file table, refused where it is none or names a file elsewhere."""
    try:
        manifest = json.loads(raw)
        files = {str(name): dict(entry) for name, entry in manifest["files"].items()}
        sound = all(
            Path(name).name == name and isinstance(entry["size_bytes"], int) and entry["blake3"]
            for name, entry in files.items()
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _mismatch(path, "a manifest", f"{type(error).__name__} reading it") from error
    if not sound:
        raise _mismatch(path, "plain file names with size and hash", "others")
    return manifest, files


def _mismatch(path: Path, expected: str, found: str, sizes: str = "") -> FiretitanError:
    return FiretitanError(
        Reason.CHECKSUM_MISMATCH,
        f"{path.parent.name}/{path.name} is damaged: expected {expected}, found {found}"
        f"{f' ({sizes})' if sizes else ''}; nothing was loaded from it",
        file=f"{path.parent.name}/{path.name}",
        expected=expected,
        found=found,
    )
