"""R27: what a web page can make a browser send reaches nothing of the daemon."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import closing

import pytest
from support.sizes import figure
from support.stubs import Stubs
from support.tcp import TcpDaemon

pytestmark = pytest.mark.timeout(120)

CALL = "/firetitan.v1.SystemService/Drain"
"""What would be noticed: the daemon would end."""
REFUSALS = (b"grpc-status\x0216", b"grpc-message Error parsing ':method' metadata")
"""UNAUTHENTICATED, and what another method than POST is told."""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TcpDaemon]:
    daemon = TcpDaemon(tmp_path_factory.mktemp("web") / "home")
    daemon.start()
    yield daemon
    assert daemon.process is not None and daemon.process.poll() is None
    daemon.stop()


def requests(daemon: TcpDaemon) -> dict[str, bytes]:
    """HTTP/1.1 as pages, forms and rebound names send it."""
    host, token = daemon.target, daemon.token

    def request(line: str, *headers: str, body: str = "") -> bytes:
        length = [f"Content-Length: {len(body)}"] if body else []
        return "\r\n".join([f"{line} HTTP/1.1", *headers, *length, "", body]).encode()

    own, evil, text = f"Host: {host}", "Host: evil.example", "Content-Type: text/plain"
    return {
        "a page": request("GET /", own),
        "a picture": request(f"GET {CALL}", own, "Origin: https://evil.example"),
        "a rebound name": request("GET /", evil),
        "a form": request(f"POST {CALL}", own, text, body="x=1"),
        "a form of a rebound name": request(
            f"POST {CALL}",
            evil,
            "Origin: http://evil.example",
            "Content-Type: text/plain",
            body="x",
        ),
        "gRPC's type": request(
            f"POST {CALL}", own, "Content-Type: application/grpc", body="\0" * 5
        ),
        "the token in the address": request(f"GET {CALL}?authorization=Bearer%20{token}", own),
        "the token": request(f"POST {CALL}", own, f"Authorization: Bearer {token}", body="x"),
        "a question before": request(
            f"OPTIONS {CALL}",
            own,
            "Origin: https://evil.example",
            "Access-Control-Request-Headers: authorization",
        ),
        "a change of protocol": request(
            "GET /", own, "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"
        ),
        "a change to HTTP/2": request(
            "GET /", own, "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: "
        ),
    }


def answer(connection: socket.socket, sent: bytes) -> bytes:
    """All that comes back until the other side closes."""
    received = b""
    with closing(connection):
        connection.settimeout(20)
        try:
            connection.sendall(sent)
            while data := connection.recv(65536):
                received += data
        except (ConnectionError, ssl.SSLError):
            return received
    return received


def test_plain_http_gets_a_closed_connection(daemon: TcpDaemon) -> None:
    tried = requests(daemon)
    for name, sent in tried.items():
        assert answer(daemon.connect(), sent) == b"", name
    figure("R27", requests=len(tried))


def test_encrypted_http_gets_a_closed_connection(daemon: TcpDaemon) -> None:
    for protocols in ((), ("http/1.1",)):
        for name, sent in requests(daemon).items():
            assert answer(daemon.connect_tls(*protocols), sent) == b"", name


def test_plain_http2_gets_a_closed_connection(daemon: TcpDaemon) -> None:
    assert b"h2" not in answer(daemon.connect(), PREFACE + frame(4, 0, 0, b""))
    assert answer(daemon.connect(), PREFACE) == b""


# HTTP/2 of a browser that trusts the daemon's certificate, by hand: a client of our own would not
# send what a page can.

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADERS, DATA, RST_STREAM, SETTINGS, GOAWAY = 1, 0, 3, 4, 7


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    head = len(payload).to_bytes(3, "big") + bytes([kind, flags])
    return head + stream.to_bytes(4, "big") + payload


def header(name: str, value: str) -> bytes:
    """HPACK: a literal that enters no table."""
    parts = b"".join(bytes([len(one)]) + one.encode() for one in (name, value))
    return b"\0" + parts


def frames(connection: ssl.SSLSocket) -> Iterator[tuple[int, int, bytes]]:
    received = b""
    while True:
        while len(received) >= 9 and len(received) >= 9 + int.from_bytes(received[:3], "big"):
            end = 9 + int.from_bytes(received[:3], "big")
            yield received[3], int.from_bytes(received[5:9], "big"), received[9:end]
            received = received[end:]
        data = connection.recv(65536)
        if not data:
            return
        received += data


def http2(daemon: TcpDaemon, *headers: tuple[str, str]) -> tuple[int, bytes]:
    """Kind and content of the first frame that answers a request."""
    block = b"".join(header(*one) for one in headers)
    connection = daemon.connect_tls("h2")
    connection.settimeout(20)
    with closing(connection):
        connection.sendall(PREFACE + frame(SETTINGS, 0, 0, b""))
        connection.sendall(frame(HEADERS, 4, 1, block) + frame(DATA, 1, 1, b"\0" * 5))
        for kind, stream, content in frames(connection):
            if stream == 1 or kind == GOAWAY:
                return kind, content
    return GOAWAY, b""


def page(daemon: TcpDaemon, method: str = "POST", **more: str) -> list[tuple[str, str]]:
    plain = {
        ":method": method,
        ":scheme": "https",
        ":path": CALL,
        ":authority": daemon.target,
        "content-type": "text/plain",
        "origin": "https://evil.example",
    }
    plain |= {name.replace("_", "-"): value for name, value in more.items()}
    return list(plain.items())


def test_http2_of_a_page_reaches_no_handler(daemon: TcpDaemon) -> None:
    tried = [
        page(daemon),
        page(daemon, content_type="application/grpc", te="trailers"),
        page(daemon, content_type="application/grpc-web"),
        [(name, "evil.example" if name == ":authority" else value) for name, value in page(daemon)],
        page(daemon, cookie=f"authorization=Bearer {daemon.token}"),
        [
            (name, f"{CALL}?authorization={daemon.token}" if name == ":path" else value)
            for name, value in page(daemon)
        ],
        page(daemon, method="GET"),
        page(daemon, method="PUT"),
        # What a browser asks before it sends a header of its own.
        page(daemon, method="OPTIONS", access_control_request_headers="authorization"),
    ]
    for headers in tried:
        kind, content = http2(daemon, *headers)
        if kind == HEADERS:
            assert b"access-control-allow" not in content, headers
            assert any(one in content for one in REFUSALS), (headers, content)
        else:
            assert kind in (RST_STREAM, GOAWAY), (headers, kind)
    # With the token, which no page has, the same bytes are a call.
    harmless = {":path": CALL.replace("Drain", "GetSystemInfo"), "te": "trailers"}
    harmless |= {"content-type": "application/grpc", "authorization": f"Bearer {daemon.token}"}
    kind, content = http2(daemon, *(dict(page(daemon)) | harmless).items())
    assert kind == HEADERS and not any(one in content for one in REFUSALS)
    stubs = Stubs(daemon.address)
    stubs.create_trainer()
    stubs.channel.close()
