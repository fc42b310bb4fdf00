"""What is shown to a daemon over TCP, and what it is checked against.

Knows: where token and certificates come from. Must not know: what is called.

A folder has all of it under fixed names, as the daemon made it: `token`, `ca.crt`, and `client.crt`
with `client.key` where the daemon asks for a certificate. It is the argument `credentials`, else
FIRETITAN_CREDENTIALS, else `credentials` in FIRETITAN_HOME. The token may come from elsewhere: the
argument `api_key`, FIRETITAN_API_KEY, FIREWORKS_API_KEY, the first of these that is one of a
firetitan daemon. What is none is a key for another service and is sent nowhere.
"""

from __future__ import annotations

import logging
import os
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from firetitan_client.address import home

logger = logging.getLogger("firetitan")

_TOKEN_PREFIX = "ft_"
_TOKEN = re.compile(rf"{_TOKEN_PREFIX}[\w-]+", re.ASCII)
_VARIABLES = ("FIRETITAN_API_KEY", "FIREWORKS_API_KEY")


@dataclass(frozen=True)
class Access:
    """What a caller gave; the rest is found when the first call is made."""

    api_key: str | None = field(default=None, repr=False)
    folder: str | None = None
    """None: found."""

    def open(self, target: str, options: list[tuple[str, int]]) -> grpc.Channel:
        """An encrypted channel to `host:port`; there is no other kind.

        Raises:
            ValueError: Something is missing or damaged; the text says what and where it was looked
                for, and nothing of what is in it.
        """
        folder = credentials_folder(self.folder)
        certificate, key = _read(folder / "client.crt"), _read(folder / "client.key")
        authority = _needed(folder / "ca.crt", target)
        _check(folder, own=bool(certificate and key))
        tls = grpc.ssl_channel_credentials(
            authority,
            private_key=key if certificate else None,
            certificate_chain=certificate if key else None,
        )
        token = grpc.access_token_call_credentials(self._token(folder, target))
        both = grpc.composite_channel_credentials(tls, token)
        return grpc.secure_channel(target, both, options=options)

    def _token(self, folder: Path, target: str) -> str:
        given = {"api_key": self.api_key, **{name: os.environ.get(name) for name in _VARIABLES}}
        for name, value in given.items():
            if value and value.strip().startswith(_TOKEN_PREFIX):
                return _checked(value.strip(), name)
            if value:
                logger.info("%s is no token of a firetitan daemon and is not sent", name)
        path = folder / "token"
        return _checked(_needed(path, target).decode("ascii", "replace").strip(), str(path))


def access_of(
    api_key: str | None = None, credentials: str | os.PathLike[str] | None = None
) -> Access:
    """What a caller's arguments say."""
    return Access(api_key, None if credentials is None else os.fspath(credentials))


def credentials_folder(given: str | os.PathLike[str] | None = None) -> Path:
    """Where token and certificates are."""
    found = given or os.environ.get("FIRETITAN_CREDENTIALS")
    return Path(found).expanduser().absolute() if found else home() / "credentials"


def _checked(token: str, origin: str) -> str:
    """A token, where it can be one: gRPC would say of another that nobody answers."""
    if _TOKEN.fullmatch(token) is None:
        raise ValueError(
            f"credentials: what {origin} says is no token ({_TOKEN_PREFIX} and letters, digits, - "
            "and _); copy it from the file token in the daemon's credentials"
        )
    return token


def _check(folder: Path, *, own: bool) -> None:
    """See that the certificates can be used, as Python's own TLS reads them."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    name = "ca.crt"
    try:
        context.load_verify_locations(folder / name)
        name = "client.crt with client.key"
        if own:
            # A password that is given is not asked for at the terminal.
            context.load_cert_chain(folder / "client.crt", folder / "client.key", password="")
    except OSError as error:  # ssl.SSLError is one
        raise ValueError(
            f"credentials: {folder / name} cannot be used ({error.strerror or error}); copy the "
            "folder credentials of the daemon's home anew"
        ) from error


def _needed(path: Path, target: str) -> bytes:
    content = _read(path)
    if content is None:
        raise ValueError(
            f"credentials: a call to {target} needs {path}, which does not exist; copy the folder "
            "credentials of the daemon's home to there, or name it in FIRETITAN_CREDENTIALS"
        )
    return content


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"credentials: {path} cannot be read: {error.strerror}") from error
