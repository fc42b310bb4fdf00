"""Hostile requests for any RPC, made from its descriptor, and what an answer to one may look like.

Knows: descriptors, protobuf's wire format. Must not know: any single RPC.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import firetitan.v1
from google.protobuf import message
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from hypothesis import strategies as st

TEN_MB = "x" * 10_000_000
CODES = frozenset(
    {
        "INVALID_ARGUMENT",
        "RESOURCE_EXHAUSTED",
        "NOT_FOUND",
        "FAILED_PRECONDITION",
        # Two that want the same thing, and what this project does not do: reasons of their own.
        "ALREADY_EXISTS",
        "ABORTED",
        "UNIMPLEMENTED",
    }
)
"""Codes with which hostile requests may be refused."""
INTERNALS = ("Traceback", 'File "', 'File \\"', "site-packages", "firetitan_daemon", "0x7f")
MAX_STATUS_CHARACTERS = 8000

_TEXTS: tuple[str, ...] = (
    "", "..", "../x", "/etc/passwd", "a\0b", "a b", "é", "🦊" * 1000, "%2e%2e", "{0.__class__}",
    "a\nb\x1b[31m", "gs://bucket/x", "x" * 129, "9" * 5000, "trainers/../sessions/x",
)  # fmt: skip
_BYTES = (b"", b"\0", b"\xff" * 7, b"\xff" * 64, bytes(1_000_000))
_INTS = {
    FieldDescriptor.CPPTYPE_INT32: (0, -1, 1, 2**31 - 1, -(2**31)),
    FieldDescriptor.CPPTYPE_INT64: (0, -1, 1, 2**31, 2**63 - 1, -(2**63)),
    FieldDescriptor.CPPTYPE_UINT32: (0, 1, 2**31, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 1, 2**31, 2**63, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (0, 1, 99, -1, 2**31 - 1),
    FieldDescriptor.CPPTYPE_BOOL: (False, True),
}
_FLOATS = (0.0, -1.0, math.nan, math.inf, -math.inf, 1e39, -1e308, 5e-324)
_MAX_DEPTH = 5

Path = tuple[FieldDescriptor, ...]


def methods() -> list[MethodDescriptor]:
    """Every RPC of the public protocol, from the descriptors of all of its files."""
    found = []
    for module in pkgutil.iter_modules(firetitan.v1.__path__):
        if module.name.endswith("_service_pb2"):
            file = importlib.import_module(f"firetitan.v1.{module.name}").DESCRIPTOR
            for service in file.services_by_name.values():
                found += service.methods
    return found


def path_of(method: MethodDescriptor) -> str:
    """The path that gRPC calls an RPC by."""
    return f"/{method.containing_service.full_name}/{method.name}"


def fields(kind: Descriptor, before: Path = ()) -> Iterator[Path]:
    """The way to every field of a message that is no message itself."""
    for field in kind.fields:
        if field.message_type is None:
            yield (*before, field)
        elif len(before) < _MAX_DEPTH and field not in before:
            yield from fields(field.message_type, (*before, field))


def spelled(path: Path) -> str:
    """A field's path as a text."""
    return ".".join(field.name for field in path)


def hostile_values(field: FieldDescriptor) -> Sequence[Any]:
    """What is at the edge of a type or beyond what anybody means."""
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return _BYTES if field.type == FieldDescriptor.TYPE_BYTES else _TEXTS
    if field.cpp_type in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
        return _FLOATS
    return _INTS[field.cpp_type]


def put(request: message.Message, path: Path, value: Any) -> message.Message:
    """A copy with one field replaced; lists and tables get the value as their first entry."""
    changed = type(request)()
    changed.CopyFrom(request)
    at: Any = changed
    for index, field in enumerate(path):
        last = index == len(path) - 1
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            return _put_entry(changed, at, field, path[index + 1 :], value)
        if field.is_repeated:
            items = getattr(at, field.name)
            if last:
                items[:] = [value, *items[1:]]
                return changed
            at = items[0] if items else items.add()
        elif last:
            setattr(at, field.name, value)
        else:
            at = getattr(at, field.name)
            at.SetInParent()
    return changed


def _put_entry(
    changed: message.Message, at: Any, field: FieldDescriptor, rest: Path, value: Any
) -> message.Message:
    """Replace the key or something in the value of a table's first entry."""
    table = getattr(at, field.name)
    kind = field.message_type.fields_by_name["value"]
    key = next(iter(table), "key")
    if rest[0].name == "key":
        if kind.message_type is None:
            table[value] = table.pop(key, "")
        else:
            kept = GetMessageClass(kind.message_type)()
            kept.CopyFrom(table[key])
            del table[key]
            table[value].CopyFrom(kept)
    elif kind.message_type is None:
        table[key] = value
    else:
        table[key].CopyFrom(put(table[key], rest[1:], value))
    return changed


def bad_utf8(request: message.Message, path: Path) -> bytes:
    """A request's bytes with a text that is no UTF-8."""
    marker = "QZQZQZQZ"
    raw = put(request, path, marker).SerializeToString()
    return raw.replace(marker.encode(), b"\xff\xfe\x80\xc0\xff\xfe\x80\xc0")


def scalars(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    """Values of a field: its hostile ones, and any that fit the type."""
    edge = st.sampled_from(hostile_values(field))
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
            return edge | st.binary(max_size=40)
        case FieldDescriptor.CPPTYPE_STRING:
            return edge | st.text(max_size=40)
        case FieldDescriptor.CPPTYPE_DOUBLE:
            return edge | st.floats()
        case FieldDescriptor.CPPTYPE_FLOAT:
            return edge | st.floats(width=32)
        case FieldDescriptor.CPPTYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.CPPTYPE_INT32 | FieldDescriptor.CPPTYPE_ENUM:
            return edge | st.integers(-(2**31), 2**31 - 1)
        case FieldDescriptor.CPPTYPE_UINT32:
            return edge | st.integers(0, 2**32 - 1)
        case FieldDescriptor.CPPTYPE_UINT64:
            return edge | st.integers(0, 2**64 - 1)
        case _:
            return edge | st.integers(-(2**63), 2**63 - 1)


@st.composite
def changed_fields(draw: st.DrawFn, request: message.Message, keep: Sequence[str] = ()) -> bytes:
    """A good request with some fields replaced.

    Args:
        draw: Hypothesis'.
        request: The good one.
        keep: First names of fields that stay as they are.
    """
    places = [path for path in fields(request.DESCRIPTOR) if path[0].name not in keep]
    for path in draw(st.lists(st.sampled_from(places), min_size=1, max_size=4)) if places else ():
        request = put(request, path, draw(scalars(path[-1])))
    return request.SerializeToString()


@st.composite
def changed_bytes(draw: st.DrawFn, raw: bytes) -> bytes:
    """A request's bytes with some of them changed, cut out or put in."""
    changed = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        # A part of the length: good requests are not all equally long.
        place = draw(st.integers(0, 9999)) * len(changed) // 10000
        match draw(st.integers(0, 3)):
            case 0:
                changed[place : place + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                del changed[place : place + draw(st.integers(1, 4))]
            case 2:
                changed[place:place] = draw(st.binary(min_size=1, max_size=8))
            case _:
                del changed[place:]
    return bytes(changed)


@dataclass(frozen=True)
class Refusal:
    """A failure as a client sees it."""

    code: str
    reason: str
    field: str
    text: str


def refusal(
    status: status_pb2.Status,
    secrets: Sequence[str] = (),
    codes: Collection[str] = CODES,
    sent: bytes = b"",
) -> Refusal:
    """Read a failure that a hostile request came to, and fail where it should not look like that.

    Args:
        status: What came back.
        secrets: Texts that must not be in it, e.g. the daemon's own folder.
        codes: Of which its code must be one.
        sent: The request: what it says may be repeated, secret or not.
    """
    from google.rpc import code_pb2

    info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(info) or detail.Unpack(request)
    shown = str(status)
    for internal in (*INTERNALS, *secrets):
        assert internal not in shown or internal.encode() in sent, shown[:2000]
    assert len(shown) < MAX_STATUS_CHARACTERS, shown[:500]
    field = request.field_violations[0].field if request.field_violations else ""
    code = code_pb2.Code.Name(status.code)
    assert code in codes and info.reason not in ("", "INTERNAL"), shown[:2000]
    return Refusal(code, info.reason, field, status.message)
