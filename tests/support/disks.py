"""Small disks of a test's own: ext4 in a file, mounted at a folder. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_TOOLS = ("mkfs.ext4", "mount", "umount")
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or any(shutil.which(tool) is None for tool in _TOOLS),
    reason=f"mounting an ext4 needs root and {', '.join(_TOOLS)}",
)


class Disk:
    """A file system at a folder.

    Args:
        folder: Where; made if it is missing.
        image: The file that holds it.
        size_kb: Its size, the file system's own tables included.
    """

    def __init__(self, folder: Path, image: Path, size_kb: int) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with image.open("wb") as file:
            file.truncate(size_kb * 1024)
        make = ["mkfs.ext4", "-q", "-b", "1024", "-m", "0", "-N", "512", "-O", "^has_journal"]
        subprocess.run([*make, str(image)], check=True)
        mounted = subprocess.run(
            ["mount", "-o", "loop", str(image), str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        if mounted.returncode:
            pytest.skip(f"no loop device can be mounted here: {mounted.stderr.strip()}")
        folder.chmod(0o700)
        (folder / "lost+found").rmdir()

    @property
    def free_bytes(self) -> int:
        """What can be written yet."""
        return shutil.disk_usage(self.folder).free

    def fill(self, left_bytes: int = 0) -> None:
        """Leave no more than this."""
        filler = self.folder / "filler"
        with filler.open("ab", buffering=0) as file:
            while self.free_bytes > left_bytes:
                try:
                    file.write(bytes(min(65536, max(1024, self.free_bytes - left_bytes))))
                except OSError:
                    break

    def free(self) -> None:
        """Take back what `fill` took."""
        (self.folder / "filler").unlink(missing_ok=True)

    def read_only(self, on: bool) -> None:
        """Refuse every write, or take them again."""
        option = f"remount,{'ro' if on else 'rw'}"
        subprocess.run(["mount", "-o", option, str(self.folder)], check=True)

    def unmount(self) -> None:
        """Take it away, whoever still uses it."""
        subprocess.run(["umount", "-l", str(self.folder)], check=True)
