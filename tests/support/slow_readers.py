"""Readers of streams that do not read: HTTP/2 by hand, as gRPC's own clients read ahead.

A reader opens a stream on a socket of its own, sends its request and sees the answer begin. What
comes then stays in the socket; beyond the window that HTTP/2 gives each stream, the daemon waits.
"""

from __future__ import annotations

import socket
import struct
import threading

from google.protobuf import message
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, ResponseReceived


class SlowReader:
    """One stream that is open and is not read.

    Args:
        address: Of the daemon, `unix:...`.
        method: `Service/Method`.
        request: Its first and only request.
    """

    def __init__(self, address: str, method: str, request: message.Message) -> None:
        self._connection = H2Connection(H2Configuration(client_side=True))
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address.removeprefix("unix:"))
        self._connection.initiate_connection()
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", f"/firetitan.v1.{method}"),
            (":authority", "localhost"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ]
        self._connection.send_headers(1, headers)
        payload = request.SerializeToString()
        self._connection.send_data(1, struct.pack(">BI", 0, len(payload)) + payload)
        self._send()
        self._socket.settimeout(30)
        while not any(
            isinstance(event, ResponseReceived)
            for event in self._connection.receive_data(self._socket.recv(64))
        ):
            pass

    def _send(self) -> None:
        self._socket.sendall(self._connection.data_to_send())

    def drip(self, stopping: threading.Event) -> int:
        """Read a byte a second until told to stop; returns how many bytes of the stream came."""
        received = 0
        self._socket.settimeout(0.1)
        while not stopping.wait(1.0):
            try:
                events = self._connection.receive_data(self._socket.recv(1))
            except TimeoutError:
                continue
            for event in events:
                if isinstance(event, DataReceived):
                    received += len(event.data)
                    self._connection.acknowledge_received_data(event.flow_controlled_length, 1)
            self._send()
        return received

    def close(self) -> None:
        """Go away without a word."""
        self._socket.close()
