"""What a service's training clients and samplers share: daemon, settings, what was created.

Knows: transport, provisioner, lanes, waiting until something is ready. Must not know: the clients.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from firetitan_client import address as addresses
from firetitan_client import arguments, forking, transport
from firetitan_client.closing import Closing
from firetitan_client.credentials import Access
from firetitan_client.futures import SelfFuture, in_event_loop
from firetitan_client.lane import Lane
from firetitan_client.leases import Lease
from firetitan_client.managed import FiretitanProvisioningConfig
from firetitan_client.provisioner import Provisioner
from firetitan_client.stubs import Stubs
from firetitan_client.transport import in_own_thread

if TYPE_CHECKING:
    from firetitan_client.training import FiretitanTrainingClient

logger = logging.getLogger("firetitan")

SILENCE_S = 10.0
"""How long a blocking call waits before it says what for."""


class ServiceCore:
    """One daemon, one trainer, one deployment."""

    def _setup(
        self,
        endpoint: addresses.Endpoint,
        config: FiretitanProvisioningConfig,
        user_metadata: Mapping[str, str] | None,
        autostart: bool | None,
        access: Access,
        *,
        managed: bool,
    ) -> None:
        self._config = config
        self._managed = managed
        self._user_metadata = arguments.notes(user_metadata)
        self._transport = transport.connect(endpoint.address, autostart, access)
        self._lease = Lease(self._transport)
        self._provisioner = Provisioner(self._transport, config, self._lease)
        self._begin()
        self._reference: Provisioner | None = None
        """Makes the separate reference trainer, where there is one."""
        self._reference_clients: dict[FiretitanTrainingClient | None, FiretitanTrainingClient] = {}
        """By their policy where the service has several, else one by None."""
        self._inference: dict[str, str] = {}
        """Deployments made beside its own, by name, and how they are cleaned up on close."""
        self._training: list[FiretitanTrainingClient] = []
        self._lanes: list[Lane] = []
        self._closed = False
        self._closing = Closing("close")
        self._pid = os.getpid()
        self.stubs = Stubs(self._transport)
        """The raw services, for what is not wrapped."""
        forking.on_fork(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._opening = asyncio.Lock()
        self._being_made: set[concurrent.futures.Future[Any]] = set()
        """Done once what a call makes is there."""

    def _after_fork(self) -> None:
        """In a child: no call of the parent's is in the way."""
        self._begin()
        for one in (self._provisioner, self._reference):
            if one is not None:
                one._after_fork()

    @staticmethod
    def _agree(name: str, given: Any, configured: Any) -> None:
        if given is not None and configured is not None and given != configured:
            raise ValueError(
                f"{name}: {given!r} was given, this service has {configured!r}; leave it out, or "
                "create a new FiretitanServiceClient"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("FiretitanServiceClient is closed")

    def _await_ready(
        self,
        client: SelfFuture[Any],
        what: str,
        failed: Callable[[], object] = lambda: None,
        *,
        wait: bool = True,
    ) -> None:
        """Block until a client is ready, unless that would block an event loop."""
        given_up = False

        def give_up() -> None:
            nonlocal given_up
            if not given_up:
                given_up = True
                failed()

        def check(ready: Any) -> None:
            if ready.cancelled() or ready.exception() is not None:
                give_up()

        client._give_up = give_up

        self._being_made.add(client._ready)
        client._ready.add_done_callback(self._being_made.discard)
        if not wait or in_event_loop():
            client._ready.add_done_callback(check)
            return
        try:
            try:
                client.result(SILENCE_S)
            except TimeoutError:
                if client._ready.done():
                    raise
                logger.warning("%s at %s: still waiting", what, self._transport.address)
                client.result()
        except BaseException:  # Ctrl-C too: the work goes on, and the call can be repeated
            give_up()
            raise

    def _wait_until_made(self) -> None:
        """Wait for what calls are making, unless this thread makes it."""
        if not in_own_thread():
            left = concurrent.futures.wait(list(self._being_made), SILENCE_S).not_done
            if left:
                logger.warning("%s: still waiting for what is being made", self._transport.address)
                concurrent.futures.wait(left)
