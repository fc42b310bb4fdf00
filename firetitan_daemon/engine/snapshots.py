"""Which snapshot the next delta stands on: the trainer's end of a chain.

Knows: raw tensors, the last snapshot saved. Must not know: torch, what a base folder looks like,
deployments. The daemon's ledger decides base or delta; this only refuses what cannot be made.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import SavedSnapshot, SnapshotFormat, SnapshotKind
from firetitan_daemon.engine.delta import encode_delta
from firetitan_daemon.engine.raw import RawTensors

WriteBase = Callable[[Path, str, RawTensors], SavedSnapshot]
"""(empty folder, snapshot name, tensors) -> a sealed base."""


class ChainWriter:
    """Writes bases and deltas of one session and keeps the last one's tensors.

    Args:
        write_base: Writes a base folder.
    """

    def __init__(self, write_base: WriteBase) -> None:
        self._write_base = write_base
        self._previous: tuple[str, SavedSnapshot, RawTensors] | None = None

    @property
    def previous(self) -> str | None:
        """Name of the snapshot that a delta can stand on; None: only a base can be saved."""
        return None if self._previous is None else self._previous[0]

    def save(
        self, staging: Path, name: str, kind: SnapshotKind, parent: str | None, now: RawTensors
    ) -> SavedSnapshot:
        """Write a snapshot and keep it as what the next delta stands on.

        Args:
            staging: Empty folder.
            name: The snapshot's name.
            kind: Base or delta.
            parent: For a delta, the snapshot it must stand on.
            now: Tensors as they are to be served; kept, so the memory must be no one else's.

        Raises:
            FiretitanError: CHAIN_BROKEN where `parent` is not the last snapshot saved here.
        """
        if kind is SnapshotKind.BASE:
            saved = self._write_base(staging, name, now)
        else:
            if self._previous is None or self._previous[0] != parent:
                raise FiretitanError(
                    Reason.CHAIN_BROKEN,
                    f'snapshot "{name}": a delta on "{parent}" was asked for, the last snapshot '
                    f'saved here is "{self.previous}"; save a base',
                    snapshot=name,
                    parent=str(parent),
                    last=str(self.previous),
                )
            last, parent_saved, before = self._previous
            saved = encode_delta(
                staging, name=name, parent=last, parent_saved=parent_saved, before=before, now=now
            )
        self._previous = (name, saved, now)
        return saved

    def forget(self) -> None:
        """Drop the last snapshot: weights were loaded, or it was never published."""
        self._previous = None


def about_base(form: SnapshotFormat, name: str, base_model: str, digest: str) -> dict[str, Any]:
    """Manifest facts of a snapshot that stands alone."""
    return {
        "kind": SnapshotKind.BASE.value,
        "format": form.value,
        "name": name,
        "base_model": base_model,
        "result_digest": digest,
    }
