"""Files that would run code if somebody let them, or that never end; what runs leaves a canary."""

from __future__ import annotations

import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any


class _Bomb:
    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._canary),)


def pickled(canary: Path) -> bytes:
    """A pickle that makes a folder when it is read."""
    return pickle.dumps(_Bomb(canary))


def code(canary: Path) -> str:
    """A module that makes a folder when it is imported, and has every class that is asked for."""
    return (
        f"import os\nos.makedirs({str(canary)!r}, exist_ok=True)\n"
        "def __getattr__(name):\n    return type(name, (), {})\n"
    )


def arm(canary: Path) -> None:
    """Show that the bombs are live, on a canary of their own."""
    proof = canary.with_name("proof")
    pickle.loads(pickled(proof))
    assert proof.is_dir()
    proof.rmdir()
    exec(code(proof), {"__name__": "proof"})
    assert proof.is_dir()


def replace(path: Path, content: bytes | str) -> None:
    """Give a file another content."""
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def pipe(path: Path) -> None:
    """A pipe in the place of a file: who opens it waits."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path: Path) -> None:
    """A device that never ends in the place of a file; needs root."""
    path.unlink(missing_ok=True)
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))


def sparse(path: Path, size_bytes: int, header: dict[str, Any] | None = None) -> None:
    """A file of any size that takes no room; with a header it is right as safetensors."""
    raw = json.dumps(header or {}).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        if header is not None:
            file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(size_bytes)


def edit(path: Path, **settings: Any) -> None:
    """Change settings of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
