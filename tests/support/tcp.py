"""A daemon over TCP: where it serves, raw calls with and without what it asks for."""

from __future__ import annotations

import json
import socket
import ssl
from pathlib import Path
from typing import Any

import grpc

from support.daemon import DaemonProcess
from support.stubs import Stubs


class TcpDaemon(DaemonProcess):
    """A daemon that also serves over TCP.

    Args:
        home: Becomes FIRETITAN_HOME.
        host: To bind.
        environment: Added to the daemon's environment.
    """

    def __init__(
        self, home: Path, host: str = "127.0.0.1", environment: dict[str, str] | None = None
    ) -> None:
        address = f"{host}:{free_port()}"
        super().__init__(home, {"FIRETITAN_TCP_ADDRESS": address, **(environment or {})})

    @property
    def target(self) -> str:
        """`host:port` for clients on this machine."""
        told = json.loads((self.home / "daemon.json").read_text())["tcp_address"]
        return f"127.0.0.1:{told.rpartition(':')[2]}"

    @property
    def credentials(self) -> Path:
        """What clients need."""
        return self.home / "credentials"

    @property
    def token(self) -> str:
        """What every call shows."""
        return (self.credentials / "token").read_text().strip()

    def tls(self, *, certificate: bool = False) -> grpc.ChannelCredentials:
        """Encryption, with a client's certificate or without, and no token."""
        read = {name: (self.credentials / name).read_bytes() for name in ("ca.crt", "client.crt")}
        return grpc.ssl_channel_credentials(
            read["ca.crt"],
            (self.credentials / "client.key").read_bytes() if certificate else None,
            read["client.crt"] if certificate else None,
        )

    def stubs(self) -> Stubs:
        """All services over TCP, with the token."""
        token = grpc.access_token_call_credentials(self.token)
        both = grpc.composite_channel_credentials(self.tls(certificate=True), token)
        return Stubs(self.target, both)

    def connect(self) -> socket.socket:
        """A plain connection to the port."""
        host, _, port = self.target.rpartition(":")
        return socket.create_connection((host, int(port)), timeout=10)

    def connect_tls(self, *protocols: str) -> ssl.SSLSocket:
        """An encrypted one of a program that trusts the daemon's certificate."""
        context = ssl.create_default_context(cafile=str(self.credentials / "ca.crt"))
        if protocols:
            context.set_alpn_protocols(list(protocols))
        return context.wrap_socket(self.connect(), server_hostname="localhost")


def free_port() -> int:
    """A port of this machine that nobody has just now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def raw_call(
    channel: grpc.Channel,
    method: str,
    metadata: Any = (),
    request: bytes = b"",
) -> list[Any]:
    """Call any RPC with any bytes, whatever its kind."""
    call = channel.stream_stream(method)(iter([request]), metadata=metadata, timeout=20)
    return list(call)
