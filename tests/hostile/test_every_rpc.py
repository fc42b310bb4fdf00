"""Hostile requests to every RPC (R13): refused by reason and field, with nothing changed (R14).

The RPCs come from the descriptors: one that is new fails `test_every_rpc_has_a_good_request` until
it has one, and is then treated like all others.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from support.hostile import (
    TEN_MB,
    Refusal,
    bad_utf8,
    changed_bytes,
    changed_fields,
    fields,
    hostile_values,
    methods,
    put,
    spelled,
)
from support.hostile_world import DEADLINE_S, GOOD, MAKERS, NAMES, Site, World, name_of, tamed
from support.sizes import seed, size

from firetitan_daemon.rpc.binding import is_command

pytestmark = pytest.mark.timeout(size(300, 3600))

METHODS = methods()
COMMANDS = [method for method in METHODS if is_command(method)]
DATA = [
    method
    for method in METHODS
    if is_command(method) or method.containing_service.name == "SamplingService"
]
"""RPCs that reach a model."""
DRAIN = "SystemService/Drain"
"""Takes no argument and ends the daemon: every message is a good one."""
MALFORMED = (
    b"\xff\xff\xff",  # no field's tag
    b"\x0a\xff\xff\xff\xff\x0f",  # a field of 4 GiB in six bytes
    b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # an overlong varint
    b"\x00",  # field 0
)
READERS = ("Forward", "SaveState", "SaveSnapshot")
"""Commands that change no weights, no gradient and no counter even where they succeed."""
each_rpc = pytest.mark.parametrize("method", METHODS, ids=name_of)
hostile = settings(
    max_examples=size(20, 1500),
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
seeded = hypothesis_seed(seed(13))


class Sender:
    """Sends requests to one RPC of one model; a refused one must have changed nothing."""

    def __init__(self, world: World, site: Site, method: MethodDescriptor) -> None:
        self.world, self.site, self.method = world, site, method
        self._command = is_command(method)
        self._digest = site.digest() if self._command else ""

    def good(self) -> Message:
        """A good request; a command's header is that of the next one of its lane."""
        if self._command:
            # Whatever became of the last one's number: this one begins anew.
            self.site.new_lane()
        request = GOOD[name_of(self.method)](self.site)
        return self.site.lane.header(request) if self._command else request

    def send(self, request: bytes | Message) -> Refusal | None:
        """Send it; returns why it was refused."""
        raw = request if isinstance(request, bytes) else request.SerializeToString()
        raw = tamed(self.method, raw)
        refused = self.world.outcome(self.method, raw)
        if self._command:
            if self.method.name not in READERS:
                found = self.site.digest()
                assert refused is None or found == self._digest, refused
                self._digest = found
        elif self.method.name in MAKERS:
            # What exists may have been given another time to be idle.
            good = GOOD[name_of(self.method)](self.site).SerializeToString()
            assert self.world.outcome(self.method, good) is None
        return refused

    def check(self, request: Message, path: tuple[FieldDescriptor, ...], value: Any) -> None:
        """Send a request with one hostile value; a refusal of it names a field."""
        refused = self.send(put(request, path, value))
        if refused is not None and refused.code == "INVALID_ARGUMENT":
            where = f"{spelled(path)}={str(value)[:40]!r}: {refused}"
            assert refused.field, where


@pytest.fixture(autouse=True)
def unharmed(world: World) -> Iterator[None]:
    """The same processes before and after, the same weights, and good calls work."""
    before = world.processes()
    yield
    assert world.processes() == before
    world.clear()


@pytest.fixture(scope="module", autouse=True)
def going_on(world: World) -> Iterator[None]:
    """After all of it good calls do what they did before any of it."""
    yield
    for site in world.sites:
        site.new_lane()
        site.stubs.done(site.lane.load_state("kept"))
        assert site.digest() == site.kept_digest
        site.lane.step()
        assert site.stubs.sample(site.deployment).sequences


def test_every_rpc_has_a_good_request(world: World) -> None:
    """What the daemon says that it serves is what the descriptors say and what is tested here."""
    assert sorted(GOOD) == sorted(map(name_of, METHODS))
    stub = reflection_pb2_grpc.ServerReflectionStub(world.stubs.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = stub.ServerReflectionInfo(iter([request]))
    served = {one.name for one in answer.list_services_response.service}
    ours = {method.containing_service.full_name for method in METHODS}
    assert served - ours == {
        "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"
    }  # fmt: skip
    assert ours <= served


@each_rpc
def test_malformed_bytes(
    world: World, method: MethodDescriptor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "stream_s", DEADLINE_S)
    for raw in MALFORMED:
        refused = world.outcome(method, raw)
        assert refused is not None and refused.reason == "INVALID_ARGUMENT"
        assert "the request's bytes are not a" in refused.text


@each_rpc
def test_one_hostile_value_at_a_time(
    world: World, method: MethodDescriptor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every field of every RPC, each of them with every value of its type that nobody means."""
    sender = Sender(world, world.toy, method)
    for path in fields(method.input_type):
        if path[-1].name in NAMES or (path[0].name == "header" and method is not COMMANDS[0]):
            continue
        for value in hostile_values(path[-1]):
            sender.check(sender.good(), path, value)
        if path[-1].type == FieldDescriptor.TYPE_STRING:
            with monkeypatch.context() as patient:
                patient.setattr(world, "stream_s", DEADLINE_S)
                assert sender.send(bad_utf8(sender.good(), path)) is not None


def test_every_text_has_a_limit(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of megabytes anywhere in any RPC is refused, not kept."""
    long, kept = size("x" * 200_000, TEN_MB), []
    monkeypatch.setattr(world, "stream_s", DEADLINE_S)
    for method in METHODS:
        sender = Sender(world, world.toy, method)
        for path in fields(method.input_type):
            if path[-1].type != FieldDescriptor.TYPE_STRING or (
                path[0].name == "header" and method is not COMMANDS[0]
            ):
                continue
            refused = sender.send(put(sender.good(), path, long))
            if refused is None:
                kept.append(f"{method.name}: {spelled(path)}")
    assert not kept, kept


def test_deep_nesting(world: World) -> None:
    """A message inside itself a thousand times is no message."""
    for name in ("Forward", "ForwardBackward"):
        (method,) = [one for one in METHODS if one.name == name]
        sender = Sender(world, world.toy, method)
        deep = b""
        for _ in range(1000):
            deep = _field(6, _field(1, deep))
        config = _field(4, _field(1, _field(1, b"a") + _field(2, deep)))
        refused = sender.send(sender.good().SerializeToString() + config)
        assert refused is not None and refused.reason == "INVALID_ARGUMENT"


def _field(number: int, content: bytes) -> bytes:
    length, size_bytes = bytearray(), len(content)
    while size_bytes > 127:
        length.append(size_bytes & 127 | 128)
        size_bytes >>= 7
    return bytes([number << 3 | 2, *length, size_bytes]) + content


def requests(draw: st.DrawFn, sender: Sender) -> bytes:
    """A hostile request: nothing but bytes, damaged bytes, or good bytes with hostile values."""
    good = sender.good()
    raw = draw(
        st.binary(max_size=200)
        | changed_bytes(good.SerializeToString())
        | changed_fields(good, NAMES)
        | changed_fields(good, ("header", *NAMES))
    )
    return tamed(sender.method, raw, good)


@each_rpc
def test_hostile_requests(world: World, method: MethodDescriptor) -> None:
    if name_of(method) == DRAIN:
        pytest.skip("every message that can be read drains the daemon")
    _hostile_requests(Sender(world, world.toy, method))


@pytest.mark.parametrize("method", DATA, ids=name_of)
def test_hostile_requests_to_a_real_model(world: World, method: MethodDescriptor) -> None:
    _hostile_requests(Sender(world, world.llama, method))


def _hostile_requests(sender: Sender) -> None:
    begun, sent, refused = time.monotonic(), 0, 0

    @seeded
    @hostile
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        nonlocal sent, refused
        outcome = sender.send(requests(data.draw, sender))
        sent, refused = sent + 1, refused + (outcome is not None)

    run()
    print(f"{sender.method.name}: {sent} sent, {refused} refused, {time.monotonic() - begun:.1f} s")
