"""What a disk may hold after a loss of power: recorded while it happens, enumerated afterwards.

A recording looks at a folder before every call that changes files or makes them durable (Python's
audit events, `os.fsync`, and SQLite's own writes, see `sqlite_files`) and notes what has changed
since: entries of folders and contents of files, apart from each other. Content is safe once its
file was fsynced, an entry once its folder was. What is not safe may be there or not, each by
itself: an entry is missing or still has its old name, a file holds half of what was written.

`Recording.crashes` goes through every prefix of what happened and every subset of what was not safe
by then (a sample of them where there are too many) and lays each out as a folder.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import stat
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink",
            "os.truncate"}  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_recordings: list[Recording] = []
_here = threading.local()


@dataclass(frozen=True)
class Entry:
    """A folder has a name for a file or a folder; None: no longer."""

    parent: int
    name: str
    node: int | None


@dataclass(frozen=True)
class Move:
    """A rename: both entries change as one."""

    source: tuple[int, str]
    target: tuple[int, str]
    node: int


@dataclass(frozen=True)
class Data:
    """Bytes reach a file; without an offset they are its whole new content."""

    node: int
    data: bytes
    offset: int | None = None


@dataclass(frozen=True)
class Size:
    """A file is cut."""

    node: int
    size: int


@dataclass(frozen=True)
class Sync:
    """A file's content, or a folder's entries, are safe from here on."""

    node: int


@dataclass(frozen=True)
class Note:
    """Something was promised to someone."""

    text: str


Event = Entry | Move | Data | Size | Sync | Note
Layout = dict[str, bytes | None]
"""Content by path below the root; None for a folder."""


@dataclass(frozen=True)
class Crash:
    """One possible state."""

    root: Path
    promised: tuple[str, ...]
    """Notes before the loss."""
    how: str
    """For the message of a failed test."""


@dataclass
class Recording:
    """What reaches a folder.

    Args:
        root: The folder; what is in it already counts as safe.
        ignored: Names of files that mean nothing.
    """

    root: Path
    ignored: Sequence[str] = ()
    events: list[Event] = field(default_factory=list)
    _lock: Any = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self._nodes: dict[tuple[int, int], int] = {}
        self._count = itertools.count()
        self._managed: set[int] = set()
        self._files: set[int] = set()
        self._entries: dict[tuple[int, str], int] = {}
        self._contents: dict[int, bytes] = {}
        self._root = self._node(self.root.stat())
        self._entries, self._contents = self._look()
        self._first = dict(self._entries), dict(self._contents)

    # -- recording -----------------------------------------------------------------------------

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record until the end of the block."""
        real = os.fsync
        _hook_once()

        def fsync(descriptor: Any) -> None:
            real(descriptor)
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            self.synced(os.fstat(number))

        os.fsync = fsync
        _recordings.append(self)
        try:
            yield
            self.look()
        finally:
            _recordings.remove(self)
            os.fsync = real

    def note(self, text: str) -> None:
        """Something is promised from here on."""
        with self._lock:
            self.look()
            self.events.append(Note(text))

    def look(self) -> None:
        """Note what has changed since the last look."""
        with self._lock:
            _here.looking = True
            try:
                entries, contents = self._look()
            finally:
                _here.looking = False
            gone = {key: node for key, node in self._entries.items() if entries.get(key) != node}
            new = {key: node for key, node in entries.items() if self._entries.get(key) != node}
            for key, node in new.items():
                source = next((old for old, moved in gone.items() if moved == node), None)
                if source is None:
                    self.events.append(Entry(*key, node))
                else:
                    self.events.append(Move(source, key, node))
                    del gone[source]
            self.events += [Entry(*key, None) for key in gone if key not in new]
            for node, data in contents.items():
                if node not in self._managed and self._contents.get(node, b"") != data:
                    self.events.append(Data(node, data))
            self._entries, self._contents = entries, contents
            there = {self._root, *entries.values()}
            # An inode's number may be given to another file once it is free.
            self._nodes = {key: node for key, node in self._nodes.items() if node in there}

    def synced(self, found: os.stat_result) -> None:
        """A file or a folder was fsynced."""
        with self._lock:
            self.look()
            node = self._nodes.get((found.st_dev, found.st_ino))
            if node is not None:
                self.events.append(Sync(node))

    def wrote(self, found: os.stat_result, data: bytes | None, place: int) -> None:
        """Bytes are about to be written at an offset, or with None the file to be cut there.

        From then on only such calls tell of the file's content.
        """
        with self._lock:
            self.look()
            node = self._nodes.get((found.st_dev, found.st_ino))
            if node is not None:
                self._managed.add(node)
                self.events.append(Size(node, place) if data is None else Data(node, data, place))

    def _look(self) -> tuple[dict[tuple[int, str], int], dict[int, bytes]]:
        entries: dict[tuple[int, str], int] = {}
        contents: dict[int, bytes] = {}
        folders = [self.root]
        while folders:
            folder = folders.pop()
            try:
                parent = self._node(folder.stat())
                found = sorted(os.scandir(folder), key=lambda one: one.name)
            except FileNotFoundError:
                continue
            for one in found:
                if one.name in self.ignored:
                    continue
                try:
                    about = one.stat(follow_symlinks=False)
                    kind = stat.S_IFMT(about.st_mode)
                    if kind not in (stat.S_IFDIR, stat.S_IFREG):
                        continue
                    node = self._node(about)
                    if kind == stat.S_IFREG:
                        self._files.add(node)
                    if kind == stat.S_IFDIR:
                        folders.append(Path(one.path))
                    elif node not in self._managed:
                        contents[node] = Path(one.path).read_bytes()
                    else:
                        contents[node] = b""
                except FileNotFoundError:
                    continue
                entries[parent, one.name] = node
        return entries, contents

    def _node(self, found: os.stat_result) -> int:
        key = (found.st_dev, found.st_ino)
        if key not in self._nodes:
            self._nodes[key] = next(self._count)
        return self._nodes[key]

    # -- enumerating ---------------------------------------------------------------------------

    def crashes(
        self, scratch: Path, *, most: int = 4096, sample: int | None = None, seed: int = 0
    ) -> Iterator[Crash]:
        """Every state a loss of power may leave, each once.

        Args:
            scratch: Where a state is laid out; the next one takes its place.
            most: Of the subsets behind one prefix; more are sampled.
            sample: Of all states; None: all.
            seed: What samples are drawn from.
        """
        draw = random.Random(seed)
        seen: set[bytes] = set()
        # Right behind an fsync nothing is possible that was not possible before it.
        places = [
            length
            for length in range(len(self.events) + 1)
            if length in (0, len(self.events)) or not isinstance(self.events[length - 1], Sync)
        ]
        if sample is not None and len(places) > sample:
            places = sorted({*draw.sample(places[:-1], sample - 1), places[-1]})
            most = 1
        elif sample is not None:
            most = max(1, sample // len(places))
        for length in places:
            done = self.events[:length]
            unsafe = _unsafe(done)
            promised = tuple(one.text for one in done if isinstance(one, Note))
            for lost in _subsets(unsafe, done, most, draw):
                layout = self._layout(done, lost)
                key = _key(layout, promised)
                if key in seen:
                    continue
                seen.add(key)
                shutil.rmtree(scratch, ignore_errors=True)
                _lay_out(scratch, layout)
                how = f"power lost after {length} of {len(self.events)}: {_told(done, lost)}"
                yield Crash(scratch, promised, how)

    def _layout(self, done: Sequence[Event], lost: dict[int, str]) -> Layout:
        entries, first = dict(self._first[0]), self._first[1]
        contents = {node: bytearray(data) for node, data in first.items()}
        for index, event in enumerate(done):
            how = lost.get(index)
            if isinstance(event, Data):
                data = event.data
                if how is not None:
                    data = data[: len(data) // 2] if how == "torn" else b""
                if event.offset is None:
                    if how != "lost":
                        contents[event.node] = bytearray(data)
                elif data:
                    content = contents.setdefault(event.node, bytearray())
                    end = event.offset + len(data)
                    content.extend(bytes(max(0, end - len(content))))
                    content[event.offset : end] = data
            elif how is not None:
                continue
            elif isinstance(event, Entry) and event.node is not None:
                entries[event.parent, event.name] = event.node
            elif isinstance(event, Entry):
                entries.pop((event.parent, event.name), None)
            elif isinstance(event, Move):
                entries.pop(event.source, None)
                entries[event.target] = event.node
            elif isinstance(event, Size):
                del contents.setdefault(event.node, bytearray())[event.size :]
        layout: Layout = {}
        children: dict[int, list[tuple[str, int]]] = {}
        for (parent, name), node in entries.items():
            children.setdefault(parent, []).append((name, node))
        rest = [("", self._root)]
        while rest:
            path, node = rest.pop()
            if node in self._files:
                layout[path] = bytes(contents.get(node, b""))
                continue
            layout[path] = None
            rest += [(f"{path}/{name}", child) for name, child in children.get(node, ())]
        return layout


def _unsafe(done: Sequence[Event]) -> list[int]:
    """What is not certain to be on the disk: indexes of events."""
    last: dict[int, int] = {}
    for index, event in enumerate(done):
        if isinstance(event, Sync):
            last[event.node] = index
    unsafe = []
    for index, event in enumerate(done):
        match event:
            case Entry(parent=parent):
                needed = {parent}
            case Move(source=source, target=target):
                needed = {source[0], target[0]}
            case Data(node=node) | Size(node=node):
                needed = {node}
            case _:
                continue
        if any(last.get(node, -1) < index for node in needed):
            unsafe.append(index)
    return unsafe


def _subsets(
    unsafe: list[int], done: Sequence[Event], most: int, draw: random.Random
) -> Iterator[dict[int, str]]:
    """What is lost, and how: nothing, everything, every subset or a sample of them."""
    if 2 ** len(unsafe) <= most:
        for lost in itertools.product((False, True), repeat=len(unsafe)):
            chosen = [index for index, gone in zip(unsafe, lost, strict=True) if gone]
            yield {
                i: "torn" if isinstance(done[i], Data) and done[i].offset is None else "lost"  # type: ignore[union-attr]
                for i in chosen
            }
        return
    if most > 2:
        yield {}
        yield dict.fromkeys(unsafe, "lost")
    for _ in range(most - 2 if most > 2 else most):
        share = draw.random()
        yield {i: draw.choice(("lost", "torn")) for i in unsafe if draw.random() < share}


def _key(layout: Layout, promised: tuple[str, ...]) -> bytes:
    key = blake3()
    for text in promised:
        key.update(f"{text}\n".encode())
    for path in sorted(layout):
        content = layout[path]
        key.update(f"{path} {'folder' if content is None else len(content)}\n".encode())
        key.update(content or b"")
    return bytes(key.digest())


def _lay_out(root: Path, layout: Layout) -> None:
    for path in sorted(layout):
        content, place = layout[path], root / path.lstrip("/")
        if content is None:
            place.mkdir(mode=0o700)
        else:
            place.write_bytes(content)


def _told(done: Sequence[Event], lost: dict[int, str]) -> str:
    parts = []
    for index, how in lost.items():
        event = done[index]
        what = f"{event.node}+{event.offset}" if isinstance(event, Data) else str(event)
        parts.append(f"{index} {how} {type(event).__name__} {what}")
    return "; ".join(parts) or "nothing else lost"


def active() -> list[Recording]:
    """Recordings under way, for what tells them of its writes itself."""
    return list(_recordings)


def _hook_once() -> None:
    """Audit hooks cannot be taken back: one for all recordings."""
    if getattr(_hook_once, "done", False):
        return
    _hook_once.done = True  # type: ignore[attr-defined]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not _recordings or getattr(_here, "looking", False):
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
        if writes or event in _CHANGES:
            for recording in list(_recordings):
                recording.look()

    sys.addaudithook(hook)
