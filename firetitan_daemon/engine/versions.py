"""Which versions of the weights are loaded, which is active, and who still runs on one.

Knows: names, counts of running requests. Must not know: tensors, files, how a version is used.

Owner: the engine; every method may be called from any thread. A version leaves the table when it is
neither active nor prepared nor kept nor in use. Of versions that hold all parameters two live at
most.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from firetitan_daemon.core.errors import FiretitanError, Reason

MAX_FULL_VERSIONS = 2


_SHOWN = 200
"""Characters of a name that an error repeats."""


@dataclass(eq=False)
class Version:
    """One snapshot in memory, or the base model's own weights (name empty)."""

    name: str
    result_digest: str
    full: bool
    """Holds every parameter; otherwise an adapter over the base, or the base itself."""
    content: Any = field(default=None, repr=False)
    """What the engine puts into the model."""
    running: int = 0
    """Requests that have begun on it."""
    kept: bool = True
    """Requests may still name it."""


class VersionTable:
    """The loaded versions."""

    def __init__(self, base: Version) -> None:
        self._changed = threading.Condition()
        self._versions = {base.name: base}
        self._active = base
        self._prepared: Version | None = None
        self._closed = False

    @property
    def active(self) -> Version:
        """What requests that name none take."""
        with self._changed:
            return self._active

    @property
    def names(self) -> tuple[str, ...]:
        """Names a request can still name, oldest first."""
        with self._changed:
            return tuple(name for name, version in self._versions.items() if version.kept)

    def find(self, name: str) -> Version | None:
        """The version of that name in memory, also one that only runs out."""
        with self._changed:
            return self._versions.get(name)

    def check(self, name: str | None) -> None:
        """Refuse a name that no new request can run under.

        Raises:
            FiretitanError: SNAPSHOT_NOT_ACTIVE naming what is loaded.
        """
        with self._changed:
            self._get(name)

    def begin(self, name: str | None) -> Version:
        """Count a request in; None takes the active version. Raises as `check`."""
        with self._changed:
            version = self._get(name)
            version.running += 1
            return version

    def end(self, version: Version) -> None:
        """Count a request out; drops the version where nobody needs it any more."""
        with self._changed:
            version.running -= 1
            self._drop_unneeded()
            self._changed.notify_all()

    def move(self, source: Version, target: Version) -> None:
        """Count a running request from one version over to another that is loaded."""
        with self._changed:
            target.running += 1
        self.end(source)

    def make_room(self) -> None:
        """Wait until one more full version may be built beside the active one.

        Others are no longer handed out; those still in use are waited for.

        Raises:
            FiretitanError: CLOSED where the engine closes meanwhile.
        """
        with self._changed:
            self._prepared = None
            others = [v for v in self._versions.values() if v.full and v is not self._active]
            for version in others[: max(0, len(others) + 2 - MAX_FULL_VERSIONS)]:
                version.kept = False
            self._drop_unneeded()
            self._changed.wait_for(self._has_room)
            if self._closed:
                raise FiretitanError(Reason.CLOSED, "the sampling engine is closed")

    def prepare(self, version: Version) -> None:
        """Hold a version that no request can name yet until the next call of this or `activate`."""
        with self._changed:
            assert self._versions.get(version.name, version) is version, "names are given once"
            if version.name not in self._versions:
                version.kept = False
                self._versions[version.name] = version
            self._prepared = version
            self._drop_unneeded()
            self._changed.notify_all()

    def activate(self, version: Version, keep: Sequence[str]) -> None:
        """Make `version` the active one; of the others only `keep` can be named from now on."""
        with self._changed:
            assert self._versions.get(version.name, version) is version, "names are given once"
            self._versions[version.name] = version
            version.kept = True
            self._active = version
            self._prepared = None
            for name, other in self._versions.items():
                if other is not version:
                    other.kept = other.kept and name in keep
            self._drop_unneeded()
            self._changed.notify_all()

    def close(self) -> None:
        """Wake whoever waits for room."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _get(self, name: str | None) -> Version:
        version = self._active if name is None else self._versions.get(name)
        if version is None or not version.kept:
            loaded = ", ".join(repr(each) for each, v in self._versions.items() if v.kept)
            shown = str(name)[:_SHOWN]
            raise FiretitanError(
                Reason.SNAPSHOT_NOT_ACTIVE,
                f"snapshot {shown!r} is not loaded (any more); loaded: {loaded}; name one of "
                "these, none for the active one, or hotload it again",
                field="snapshot",
                snapshot=shown,
                active=self._active.name,
            )
        return version

    def _has_room(self) -> bool:
        full = sum(version.full for version in self._versions.values())
        return self._closed or full < MAX_FULL_VERSIONS

    def _drop_unneeded(self) -> None:
        self._versions = {
            name: version
            for name, version in self._versions.items()
            if version in (self._active, self._prepared) or version.running or version.kept
        }
