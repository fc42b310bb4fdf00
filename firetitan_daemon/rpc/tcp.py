"""TCP: what a call there must show, and which paths it may name.

Knows: TLS and metadata of gRPC, which request fields are paths. Must not know: where token and
certificates come from, what a request does.

Everything is refused that is not allowed: an RPC without the token before anything of it is read,
whichever it is; a path unless it is below a configured folder.
"""

from __future__ import annotations

import hmac
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor

from firetitan_daemon import status
from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.rpc.binding import Check

LOCATIONS: Mapping[str, str] = {
    "CreateDeployment": "base_model",
    "CreateTrainer": "base_model",
    "ExportCheckpoint": "folder",
    "GetModel": "name",
    "LoadAdapter": "adapter",
}
"""The RPCs that read or write where a field says."""
OPTIONS = (
    # Machines go to sleep and routers forget: both sides look after each other.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*(@[\w./-]+)?", re.ASCII)
"""A model's name or a Hugging Face id. A relative path can look like one and stands for nothing:
neither daemon nor workers have folders beside them."""
_PAUSE_S = 10.0

log = logging.getLogger("firetitan.tcp")


@dataclass(frozen=True)
class TcpAccess:
    """Who may call over TCP, and what of this machine's files they may name."""

    address: str
    """`host:port`; port 0: any."""
    token: str = field(repr=False)
    certificate: bytes
    """The server's, PEM."""
    key: bytes = field(repr=False)
    client_ca: bytes | None
    """Signs the certificates that callers must have; None: they need none."""
    roots: tuple[Path, ...] = ()
    """Folders below which paths may be named."""

    def listen(self, server: grpc.aio.Server) -> str:
        """Bind; returns `host:port` with the port that it became.

        Raises:
            OSError: It cannot be bound.
        """
        credentials = grpc.ssl_server_credentials(
            [(self.key, self.certificate)],
            root_certificates=self.client_ca,
            require_client_auth=self.client_ca is not None,
        )
        try:
            port = server.add_secure_port(self.address, credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self.address} (tcp.address): {error}") from error
        return f"{self.address.rpartition(':')[0]}:{port}"

    def check_of(self, method: MethodDescriptor) -> Check | None:
        """What a request of an RPC must pass; None: it names no path."""
        name = LOCATIONS.get(method.name)
        if name is None:
            return None

        def check(request: Any) -> None:
            check_location(name, getattr(request, name), self.roots)

        return check


class TokenCheck(grpc.aio.ServerInterceptor):
    """Lets in what shows the token.

    Args:
        token: The only one there is.
    """

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()
        self._missing = _refusal("this call shows no token")
        self._wrong = _refusal("this call's token is not this daemon's")

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The RPC's own handler, or one that refuses."""
        shown = [
            value if isinstance(value, bytes) else value.encode()
            for key, value in handler_call_details.invocation_metadata
            if key == "authorization"
        ]
        if len(shown) == 1 and hmac.compare_digest(shown[0], self._expected):
            return await continuation(handler_call_details)
        return self._wrong if shown else self._missing


def check_location(name: str, value: str, roots: tuple[Path, ...]) -> None:
    """See that a field is a name, or a path below one of the roots, links resolved.

    Args:
        name: The field's.
        value: What it says.
        roots: Absolute folders.

    Raises:
        FiretitanError: INVALID_ARGUMENT.
    """
    if not value or (name != "folder" and _NAME.fullmatch(value)):
        return
    # By its text first: nothing elsewhere is even looked at.
    if _is_below(value, roots, os.path.normpath) and _is_below(value, roots, os.path.realpath):
        return
    raise FiretitanError(
        Reason.INVALID_ARGUMENT,
        f"{name}: {value[:400]!r} may not be named over TCP: paths there are below the folders of "
        "tcp.roots in the daemon's config.toml, and nothing else; put it there, give a model's "
        "name, or call over the Unix socket",
        field=name,
    )


def _is_below(value: str, roots: tuple[Path, ...], form: Callable[[str], str]) -> bool:
    if not value.startswith("/") or "\0" in value:
        return False
    found = Path(form(value))
    return any(found.is_relative_to(form(str(root))) for root in roots)


def _refusal(what: str) -> grpc.RpcMethodHandler[Any, Any]:
    error = FiretitanError(
        Reason.UNAUTHENTICATED,
        f"{what}; over TCP every call has the metadata `authorization: Bearer <token>`, the token "
        "is in credentials/token of the daemon's home (Python: api_key=, FIRETITAN_API_KEY)",
    )
    last = [-_PAUSE_S]

    async def refuse(_: AsyncIterator[bytes], context: Any) -> None:
        if time.monotonic() > last[0] + _PAUSE_S:  # a flood of calls is none of lines
            last[0] = time.monotonic()
            log.warning("refused peer=%s cause=%r", context.peer(), what)
        await status.abort(context, error)

    # A stream's handler: it is called before any of the request has been read.
    return grpc.stream_stream_rpc_method_handler(refuse)
