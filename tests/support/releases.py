"""Other releases of this project, as folders for PYTHONPATH: the one before, and one to come.

A daemon of another release runs with the dependencies installed here:
`DaemonProcess(home, environment(folder))`.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
FORMER_TAG = "v0.1.0-rc1"
FORMER_COMMIT = "51f693024322d2eb08a9f69bb398979a424456b4"
"""What the tag names. The newest commit with an older ledger schema and worker protocol."""
_PACKAGES = ("firetitan_client", "firetitan_daemon", "proto/firetitan")


def environment(folder: Path) -> dict[str, str]:
    """What has a process take its modules from a release's folder before all others."""
    return {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}


def former_release(folder: Path) -> Path:
    """Build the former release's wheel as it would be released, and unpack it.

    Args:
        folder: Empty; sources, wheel and what is in it go there.

    Returns:
        The folder with its modules. The test is skipped where the history does not reach so far.
    """
    commit = _known(FORMER_TAG) or _known(FORMER_COMMIT)
    if not commit:
        pytest.skip(f"this history has no {FORMER_TAG} ({FORMER_COMMIT[:12]}): a shallow clone?")
    archive = subprocess.run(
        ["git", "archive", commit], cwd=REPO, check=True, capture_output=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as sources:
        sources.extractall(folder / "sources", filter="data")
    options = ("--quiet", "--disable-pip-version-check", "--no-build-isolation", "--no-deps")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "--no-index", str(folder / "sources")],
        cwd=folder,
        check=True,
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(folder / "former")
    return folder / "former"


def release_to_come(folder: Path) -> Path:
    """A copy of the present code whose workers speak a protocol that nobody here knows."""
    for package in _PACKAGES:
        shutil.copytree(REPO / package, folder / Path(package).name)
    handshake = folder / "firetitan_daemon" / "handshake.py"
    changed, count = re.subn(
        r"^PROTOCOL_VERSION = (\d+)$",
        lambda found: f"PROTOCOL_VERSION = {int(found[1]) + 1}",
        handshake.read_text(),
        flags=re.MULTILINE,
    )
    assert count == 1
    handshake.write_text(changed)
    return folder


def _known(name: str) -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--quiet", "--verify", f"{name}^{{commit}}"],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    return found.stdout.strip() if found.returncode == 0 else ""
