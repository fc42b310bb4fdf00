"""How long a call goes on trying a daemon, or a worker, that is away.

Knows: which failures may be tried again, and when. Must not know: channels, loops, what is asked.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from typing import TYPE_CHECKING, Any

import grpc

from firetitan_client import address as addresses
from firetitan_client import forking
from firetitan_client.errors import Unauthenticated, from_rpc_error

if TYPE_CHECKING:
    from firetitan_client.transport import Transport

logger = logging.getLogger("firetitan")

PATIENCE_S = float(os.environ.get("FIRETITAN_PATIENCE_S", "300"))
"""How long a daemon that was there may stay away before calls fail."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 0.25
_CONNECTED_S = 15.0
"""A try that lasted longer had somebody at its other end: connecting takes less, in vain too."""
_LONG_ANSWERS = 3
"""How often a daemon may say, after so long, that its worker is gone: the work may be to blame."""
_SILENCE_S = 2.0
"""How long a daemon may be away before the user is told; a restart takes less."""
_MISTRUST = "CERTIFICATE_VERIFY_FAILED"
"""What TLS says in gRPC's words where it does not trust the other side."""


class Untrusted(grpc.RpcError):
    """A call that was not made: nobody, or another user, listens on the socket.

    Args:
        code: As gRPC would have it.
        details: What was found.
    """

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        """UNAVAILABLE or UNAUTHENTICATED."""
        return self._code

    def details(self) -> str:
        """For people."""
        return self._details

    def trailing_metadata(self) -> tuple[()]:
        """Nothing: no daemon said this."""
        return ()


class Patience:
    """Decides after each failed try whether to try again, and waits the right time.

    What it measures is how long nobody has been there, not how long the work has taken: it begins
    anew with whatever was heard of the daemon.

    Args:
        transport: To the daemon.
        patience_s: How long it may be away; None: PATIENCE_S.
        final: Reasons that another try will not change, though they say UNAVAILABLE.
    """

    def __init__(
        self,
        transport: Transport,
        patience_s: float | None = None,
        final: frozenset[str] = frozenset(),
    ) -> None:
        self.final = final
        self.transport = transport
        self.patience_s = PATIENCE_S if patience_s is None else patience_s
        self.renew()

    def renew(self) -> None:
        """Begin anew: there was an answer, or time went by without any sign of trouble."""
        self.long_answers = 0
        self._begin()

    def _begin(self) -> None:
        self.began = self.tried = time.monotonic()
        self.deadline = self.began + self.patience_s
        self.pause_s = _FIRST_PAUSE_S

    async def after(self, rpc_error: Any) -> None:
        """Return when it is time for the next try.

        Raises:
            FiretitanError: No further try.
        """
        if not forking.was_broken_off(rpc_error):
            await self._after(rpc_error)
        self.tried = time.monotonic()

    async def _after(self, rpc_error: Any) -> None:
        code, error = rpc_error.code(), from_rpc_error(rpc_error)
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and error.retry_after_s is not None:
            await asyncio.sleep(error.retry_after_s * random.uniform(1.0, 1.2))
            self.renew()
            return
        # CANCELLED is what a daemon that ends leaves of a call it was in the middle of.
        tries = (
            grpc.StatusCode.UNAVAILABLE,
            grpc.StatusCode.DEADLINE_EXCEEDED,
            grpc.StatusCode.CANCELLED,
        )
        if code not in tries or error.reason in self.final:
            raise error from None
        late = code is grpc.StatusCode.DEADLINE_EXCEEDED
        if not late and time.monotonic() - self.tried > _CONNECTED_S:
            ended = error.reason == "WORKER_UNAVAILABLE"
            self.long_answers += ended
            if not ended or self.long_answers <= _LONG_ANSWERS:
                self._begin()
        unreachable = error.reason == "UNAVAILABLE"
        if unreachable:
            self.transport.distrust()
            if _MISTRUST in error.message:  # another try changes no certificate
                raise Unauthenticated(
                    f"{self.transport.address}: the daemon's certificate is not what the "
                    f"credentials' ca.crt vouches for, or not for this name: {error.message}"
                ) from error
        # On a socket somebody listens to, a daemon hangs or starts: it is waited for.
        absent = isinstance(rpc_error, Untrusted) or addresses.tcp_target(self.transport.address)
        if unreachable and absent and not self.transport.served:
            await self.transport.start_missing_daemon(error)
            return
        if not unreachable:
            self.transport.served = True
        if time.monotonic() > self.deadline:
            if unreachable:
                raise addresses.not_running(self.transport.address, error.message) from None
            raise error from None
        if self.pause_s == _FIRST_PAUSE_S:
            logger.info("%s: trying again: %s", self.transport.address, error)
        now = time.monotonic()
        if unreachable and now - self.began > _SILENCE_S and not self.transport.told_away:
            self.transport.told_away = True
            logger.warning(
                "the daemon at %s went away; waiting up to %.0f s for it, start it with: %s",
                self.transport.address,
                self.deadline - now,
                addresses.START_COMMAND,
            )
        await asyncio.sleep(max(self.pause_s, error.retry_after_s or 0.0))
        self.pause_s = min(_LONGEST_PAUSE_S, self.pause_s * 1.5)
