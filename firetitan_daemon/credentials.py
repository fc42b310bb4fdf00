"""What callers over TCP show and are shown: a token and certificates, made at first need.

Knows: the files. Must not know: gRPC, X.509, who calls.

    ca.key               signs the certificates; stays in the home
    credentials/         all that a client needs: copy it to where one runs
        token            `ft_` and 256 random bits
        ca.crt           what the daemon's certificate is checked against
        client.crt/.key  shown where the daemon asks for it

The daemon's own certificate is made anew at each start, for the names and addresses the machine has
then, and is in no file. The token alone is changed by deleting its file, everything by deleting
`credentials/`; then the daemon is started again.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import secrets
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from firetitan_daemon import durable
from firetitan_daemon.places import PlaceError, Places, check_private_file, make_private

TOKEN_PREFIX = "ft_"
"""Tells our tokens from the keys of other services: clients send no others."""
_TOKEN = re.compile(rf"{TOKEN_PREFIX}[A-Za-z0-9_-]{{43,}}")
_MODE = 0o600


@dataclass(frozen=True)
class ServerCredentials:
    """What the daemon needs to serve over TCP; PEM."""

    token: str = field(repr=False)
    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)


def server_credentials(places: Places, names: Iterable[str] = ()) -> ServerCredentials:
    """Read what there is, make what is missing. The caller holds the home's lock.

    Args:
        places: The home.
        names: What clients call this machine, beside what it knows itself.

    Raises:
        PlaceError: The files are another daemon's, or not their owner's alone; cryptography is not
            installed.
        OSError: They cannot be read or written.
    """
    try:
        from firetitan_daemon import certificates
    except ImportError as error:
        raise PlaceError(
            f"tcp.address needs the package cryptography ({error}); install firetitan with its "
            "daemon extra, in its folder: pip install '.[daemon]'"
        ) from error
    folder, token = places.credentials, places.credentials / "token"
    if not folder.exists():
        _make(places)
    make_private(folder)
    if not places.ca_key.exists():
        raise PlaceError(
            f"{folder} is of another daemon (there is no {places.ca_key}); move it away, and this "
            "daemon makes its own"
        )
    if not token.exists():
        _write(token, f"{TOKEN_PREFIX}{secrets.token_urlsafe(32)}\n".encode())
    authority = certificates.Pair((folder / "ca.crt").read_bytes(), _read(places.ca_key))
    shown = certificates.for_server(authority, {*own_names(), *names})
    return ServerCredentials(_token_of(token), authority.certificate, shown.certificate, shown.key)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what is bound to a host."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def own_names() -> Iterator[str]:
    """What this machine is called, and its addresses, so far as it knows."""
    yield "localhost"
    name = socket.gethostname()
    if re.fullmatch(r"[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*", name):
        yield name
    for addresses in psutil.net_if_addrs().values():
        for one in addresses:
            if one.family in (socket.AF_INET, socket.AF_INET6):
                yield one.address.partition("%")[0]


def _make(places: Places) -> None:
    """Make everything; the folder gets its name last, so it is there as a whole or not."""
    from firetitan_daemon import certificates

    staging = places.credentials.with_name(f"{durable.TEMPORARY_PREFIX}credentials")
    durable.remove(staging)
    make_private(staging)
    authority = certificates.new_authority(f"firetitan at {socket.gethostname()}"[:64])
    client = certificates.for_client(authority)
    _write(places.ca_key, authority.key)
    _write(staging / "ca.crt", authority.certificate)
    _write(staging / "client.crt", client.certificate)
    _write(staging / "client.key", client.key)
    durable.publish_folder(staging, places.credentials)


def _write(path: Path, content: bytes) -> None:
    durable.publish_file(path, content, mode=_MODE)


def _read(path: Path) -> bytes:
    check_private_file(path)
    return path.read_bytes()


def _token_of(path: Path) -> str:
    token = _read(path).decode("ascii", "replace").strip()
    if _TOKEN.fullmatch(token) is None:
        raise PlaceError(
            f"{path} holds no token ({TOKEN_PREFIX} and 43 letters); delete it, and a new one is "
            "made"
        )
    return token
