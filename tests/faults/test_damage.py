"""R10: damage to a file of what was saved is refused by its name; what was served is served on."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from blake3 import blake3
from firetitan.v1 import checkpoint_pb2, operation_pb2
from google.rpc import error_details_pb2
from support.daemon import DaemonProcess
from support.sizes import NIGHTLY, figure, seed, size
from support.stubs import TOY, LaneClient, Stubs

pytestmark = pytest.mark.timeout(size(150, 7200))
FLIPS = size(2, 100)
"""Bits flipped in a file, one at a time."""
BASE = checkpoint_pb2.Snapshot.KIND_BASE
EMPTY = blake3(b"").hexdigest()
DATA_LOSS = 15


class Damage:
    """Something done to a file, and taken back."""

    def __init__(self, name: str, files: list[Path], do: Callable[[], None]) -> None:
        self.name = name
        self.files = files
        self._do = do

    @contextmanager
    def done(self) -> Iterator[None]:
        before = {file: file.read_bytes() for file in self.files}
        self._do()
        try:
            yield
        finally:
            for file, content in before.items():
                file.write_bytes(content)


def damages(folders: list[Path], draw: random.Random) -> Iterator[Damage]:
    """Of every file in folders: bits flipped, cut, emptied, gone, and exchanged with the next."""
    for folder in folders:
        for file in sorted(folder.iterdir()):
            length = file.stat().st_size
            for _ in range(FLIPS):
                at, bit = draw.randrange(length), draw.randrange(8)
                yield Damage(f"bit {bit} of byte {at}", [file], _flip(file, at, bit))
            for keep in (0, draw.randrange(1, length)):
                yield Damage(f"cut at {keep}", [file], _cut(file, keep))
            yield Damage("gone", [file], file.unlink)
    for one, two in itertools.pairwise(folders[1:]):
        for name in sorted({file.name for file in one.iterdir()}):
            yield Damage("exchanged", [one / name, two / name], _exchange(one / name, two / name))
    for folder in folders:
        first, second = sorted(folder.iterdir())[:2]
        yield Damage("exchanged", [first, second], _exchange(first, second))


def _flip(file: Path, at: int, bit: int) -> Callable[[], None]:
    def flip() -> None:
        content = bytearray(file.read_bytes())
        content[at] ^= 1 << bit
        file.write_bytes(content)

    return flip


def _cut(file: Path, keep: int) -> Callable[[], None]:
    return lambda: os.truncate(file, keep)


def _exchange(one: Path, two: Path) -> Callable[[], None]:
    def exchange() -> None:
        content = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(content)

    return exchange


def check_told(ended: operation_pb2.Operation, damage: Damage) -> None:
    """The operation failed with DATA_LOSS, naming a damaged file and both hashes."""
    assert ended.error.code == DATA_LOSS, f"{damage.name} of {damage.files}: {ended}"
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in ended.error.details)
    assert info.reason == "CHECKSUM_MISMATCH"
    told = {f"{file.parent.name}/{file.name}": file for file in damage.files}
    file = told[info.metadata["file"]]
    expected, found = info.metadata["expected"], info.metadata["found"]
    assert len(expected) == 64, info
    actual = blake3(file.read_bytes()).hexdigest() if file.exists() else "no file"
    assert found == actual != expected, info
    for text in (info.metadata["file"], expected, found):
        assert text in ended.error.message
    assert "Traceback" not in ended.error.message


class Served:
    """Samples a deployment without a pause: every answer must be that of one snapshot."""

    def __init__(self, address: str) -> None:
        self.answers: set[tuple[str, bytes]] = set()
        self.count = 0
        self._address = address
        self._stop = threading.Event()
        self._failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Served:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        assert not self._failed

    def _run(self) -> None:
        stubs = Stubs(self._address)
        try:
            while not self._stop.is_set():
                answer = stubs.sample()
                tokens = b"".join(one.SerializeToString() for one in answer.sequences)
                self.answers.add((answer.snapshot, tokens))
                self.count += 1
        except BaseException as error:
            self._failed.append(error)
        finally:
            stubs.channel.close()


class Chain:
    """A session with a base and three deltas on it, and a deployment that serves an older base."""

    def __init__(self, daemon: DaemonProcess, base_model: str) -> None:
        self.store = daemon.home / "store"
        self.stubs = Stubs(daemon.address)
        self.stubs.create_trainer(base_model=base_model)
        self.stubs.create_deployment(base_model=base_model)
        self.lane = LaneClient(self.stubs, self.stubs.session())
        self.old = self._save("old", BASE)
        self.other = self._save("other", BASE)
        self.names = [self._save("base", BASE)] + [self._save(f"d{n}") for n in (1, 2, 3)]
        assert not self.stubs.hotload("deployments/d", self.old).HasField("error")

    def _save(self, name: str, kind: int = 0) -> str:
        self.lane.step()
        saved = self.stubs.done(self.lane.save_snapshot(name, kind)).snapshot
        delta = checkpoint_pb2.Snapshot.KIND_DELTA
        assert saved.kind == (kind or delta), saved
        return str(saved.name)

    def folder(self, name: str) -> Path:
        (found,) = (self.store / "snapshots").glob(f"{name.rpartition('/')[2]}-*")
        return found

    def hotload(self) -> operation_pb2.Operation:
        return self.stubs.hotload("deployments/d", self.names[-1])


@pytest.fixture(params=size([TOY], [TOY, "tiny"]))
def chain(daemon: DaemonProcess, request: pytest.FixtureRequest) -> Iterator[Chain]:
    toy = request.param == TOY
    chain = Chain(daemon, TOY if toy else str(request.getfixturevalue("tiny_llama")))
    yield chain
    chain.stubs.channel.close()


def test_a_damaged_chain_is_refused_by_file_and_the_old_version_is_served(
    daemon: DaemonProcess, chain: Chain
) -> None:
    folders = [chain.folder(name) for name in chain.names]
    count = 0
    with Served(daemon.address) as served:
        for damage in damages(folders, random.Random(seed())):
            with damage.done():
                check_told(chain.hotload(), damage)
            count += 1
        # Another base that is whole, in the place of the one the deltas stand on.
        aside = folders[0].with_name("aside")
        folders[0].rename(aside)
        shutil.copytree(chain.folder(chain.other), folders[0])
        manifest = folders[0] / "manifest.json"
        check_told(chain.hotload(), Damage("replaced", [manifest], manifest.touch))
        shutil.rmtree(folders[0])
        aside.rename(folders[0])
    assert served.count > 10
    (answer,) = served.answers
    assert answer[0] == chain.old
    figure("R10", damages=count + 1, answers=served.count, nightly=NIGHTLY)
    assert not chain.hotload().HasField("error"), "undamaged again"
    assert chain.stubs.sample().snapshot == chain.names[-1]


def test_a_damaged_checkpoint_is_refused_by_file_and_changes_nothing(chain: Chain) -> None:
    stubs, lane = chain.stubs, chain.lane
    # Gradients too: every file of a checkpoint has something in it.
    stubs.done(lane.forward_backward())
    stubs.done(lane.save_state("saved"))
    lane.step()
    (folder,) = (chain.store / "checkpoints").glob("saved-*")
    before = stubs.done(lane.save_state("probe")).checkpoint.digest
    for damage in damages([folder], random.Random(seed())):
        with damage.done():
            operation = lane.load_state("saved")
            check_told(stubs.wait(operation.name), damage)
            lane.seen_failure = operation.seq
    assert stubs.done(lane.save_state("probe")).checkpoint.digest == before
    stubs.done(lane.load_state("saved"))
    assert stubs.done(lane.save_state("probe")).checkpoint.digest != before
