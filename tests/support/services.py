"""What the managers of a daemon stand on, without a daemon: ledger in memory, files in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firetitan_daemon.app import SystemClock
from firetitan_daemon.control.operations import OperationRegistry
from firetitan_daemon.control.services import Services
from firetitan_daemon.core.ports import Limits
from firetitan_daemon.launch.in_process import InProcessLauncher
from firetitan_daemon.rpc.codec import ProtobufCodec
from firetitan_daemon.store.folders import FileFolders
from firetitan_daemon.store.memory import MemoryStore
from firetitan_daemon.store.spool import FileSpool


@dataclass
class TurnedClock:
    """A clock that is turned by hand."""

    wall: float = 1000.0
    running: float = 50.0
    boot: str = "first"

    def now(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.running

    def boot_id(self) -> str:
        return self.boot


def services_in(root: Path, *, limits: Limits | None = None, **ports: Any) -> Services:
    """Services on a folder.

    Args:
        root: For files.
        limits: Those of a daemon.
        ports: Others than usual, by field of `Services`.
    """
    limits = limits or Limits()
    ports.setdefault("store", MemoryStore())
    ports.setdefault("spool", FileSpool(root / "spool"))
    ports.setdefault("clock", SystemClock())
    usual: dict[str, Any] = {
        "folders": FileFolders(root / "folders"),
        "launcher": InProcessLauncher(root),
        "codec": ProtobufCodec(),
        "limits": limits,
        "operations": OperationRegistry(ports["store"], ports["spool"], limits, ports["clock"]),
    }
    return Services(**(usual | ports))
