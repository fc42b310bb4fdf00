"""Small disks of a test's own: ext4 in a file, mounted at a folder; what is sealed. Needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_TOOLS = ("mkfs.ext4", "mount", "umount", "chattr")
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or any(shutil.which(tool) is None for tool in _TOOLS),
    reason=f"mounting an ext4 needs root and {', '.join(_TOOLS)}",
)


@contextlib.contextmanager
def sealed(path: Path) -> Iterator[None]:
    """Refuse every write to one file, or every name new in one folder, also to who has it open.

    Unlike a disk that is mounted read-only it can be done, and undone, while files are in use.
    """
    done = subprocess.run(["chattr", "+i", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the file system of {path} seals nothing: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["chattr", "-i", str(path)], check=True)


class Disk:
    """A file system at a folder.

    Args:
        folder: Where; made if it is missing.
        image: The file that holds it.
        size_kb: Its size, the file system's own tables included.
    """

    def __init__(self, folder: Path, image: Path, size_kb: int) -> None:
        self.folder = folder
        self._image = image
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with image.open("wb") as file:
            file.truncate(size_kb * 1024)
        make = ["mkfs.ext4", "-q", "-b", "1024", "-m", "0", "-N", "512", "-O", "^has_journal"]
        subprocess.run([*make, str(image)], check=True)
        self._mount()
        folder.chmod(0o700)
        (folder / "lost+found").rmdir()

    def _mount(self) -> None:
        mounted = subprocess.run(
            ["mount", "-o", "loop,errors=remount-ro", str(self._image), str(self.folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        if mounted.returncode:
            pytest.skip(f"no loop device can be mounted here: {mounted.stderr.strip()}")

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
        # It is busy while a file is open for writing.
        deadline = time.monotonic() + 1
        while subprocess.run(["mount", "-o", option, str(self.folder)]).returncode:
            assert time.monotonic() < deadline, f"{self.folder} cannot be mounted {option}"
            time.sleep(0.01)

    def fail(self) -> None:
        """Make the kernel find an error in it: from now on it is read-only, with open files too."""
        find = ["findmnt", "-n", "-o", "SOURCE", str(self.folder)]
        device = subprocess.run(find, check=True, capture_output=True, text=True).stdout.strip()
        trigger = Path("/sys/fs/ext4", Path(device).name, "trigger_fs_error")
        if not trigger.exists():
            pytest.skip(f"this kernel has no {trigger}")
        trigger.write_text("an error of a test")

    def repair(self) -> None:
        """Check and mount it again; who used it has been ended."""
        # A process that ends has no command line any more while its files are still being closed.
        deadline = time.monotonic() + 30
        while subprocess.run(["umount", str(self.folder)], capture_output=True).returncode:
            assert time.monotonic() < deadline, f"{self.folder} is still in use"
            time.sleep(0.02)
        checked = subprocess.run(["e2fsck", "-f", "-y", str(self._image)], capture_output=True)
        assert checked.returncode <= 1, checked.stdout
        self._mount()

    def unmount(self) -> None:
        """Take it away, whoever still uses it."""
        subprocess.run(["umount", "-l", str(self.folder)], check=True)
