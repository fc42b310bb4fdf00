"""Tells the service manager that started the daemon how it stands: the protocol of sd_notify(3).

Knows: NOTIFY_SOCKET, datagrams. Must not know: what the states mean to the daemon. Without the
variable, as in a terminal, nothing is told; workers do not get it.
"""

from __future__ import annotations

import logging
import os
import socket

logger = logging.getLogger("firetitan.service_manager")
READY, STOPPING = "READY=1", "STOPPING=1"


def tell(state: str) -> None:
    """Send `READY` or `STOPPING`; who does not listen is logged and never waited for."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # abstract, without a file
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto(state.encode(), address)
    except OSError as error:
        logger.warning("the service manager was not told %s: %s", state, error)
