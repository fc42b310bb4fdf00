"""What the managers share: the daemon they ask, waiting for answers, names of the documented API.

Knows: how a blocking call is made, how trainers and checkpoints are named in the managed service.
Must not know: what a manager manages.

The managers block, also inside a running event loop: call them before the loop, or from
`asyncio.to_thread`.
"""

from __future__ import annotations

import asyncio
import datetime
import os
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, Self, TypeVar

from firetitan.v1 import trainer_pb2, trainer_service_pb2

from firetitan_client import address as addresses
from firetitan_client import transport
from firetitan_client.credentials import access_of
from firetitan_client.errors import InvalidArgument
from firetitan_client.futures import APIFuture
from firetitan_client.sample_requests import follow

T = TypeVar("T")

ACCOUNT = "local"
"""The account that everything here belongs to in the documented names."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0


class ControlClient:
    """A daemon, asked with blocking calls.

    Args:
        api_key: The daemon's token, over TCP; ignored on a Unix socket.
        base_url: None or a cloud URL (the local daemon serves, nothing is dialled), or an address.
        additional_headers: Ignored.
        verify_ssl: Ignored.
        address: Of the daemon, `unix:/path` or `host:port`; None finds it.
        autostart: Start a daemon where none runs; None asks FIRETITAN_AUTOSTART.
        credentials: Folder of token and certificates, over TCP; None: FIRETITAN_CREDENTIALS, else
            FIRETITAN_HOME's.
    """

    def __init__(
        self,
        api_key: str | None = None,
        base_url: str | None = None,
        additional_headers: Mapping[str, str] | None = None,
        verify_ssl: bool | None = None,
        *,
        address: str | None = None,
        autostart: bool | None = None,
        credentials: str | os.PathLike[str] | None = None,
    ) -> None:
        endpoint = addresses.resolve(base_url, address)
        self._transport = transport.connect(
            endpoint.address, autostart, access_of(api_key, credentials)
        )

    @classmethod
    def _on(cls, daemon: transport.Transport) -> Self:
        """One that asks a daemon which is connected already."""
        client = cls.__new__(cls)
        client._transport = daemon
        return client

    @property
    def base_url(self) -> str:
        """The daemon's address, for another process's `base_url=`."""
        return addresses.Endpoint(self._transport.address).base_url

    @property
    def account_id(self) -> str:
        """`local`."""
        return ACCOUNT

    def close(self) -> None:
        """Nothing is held: what was created stays."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._transport.address}>"

    def _run(self, label: str, work: Coroutine[Any, Any, T]) -> T:
        """Block until a coroutine on the background loop ends."""
        future: APIFuture[T] = APIFuture(label)
        follow(work, future)
        return future.result()

    async def _find_trainer(
        self, trainer_id: str, patience_s: float | None = None
    ) -> trainer_pb2.Trainer:
        answer = await self._transport.call(
            "TrainerService/GetTrainer",
            trainer_service_pb2.GetTrainerRequest(name=f"trainers/{trainer_id}"),
            trainer_service_pb2.GetTrainerResponse,
            patience_s=patience_s,
        )
        found: trainer_pb2.Trainer = answer.trainer
        return found


def job_id_of(job: str, field: str = "job_id") -> str:
    """A trainer's id, from its id or any of its names.

    Args:
        job: `x`, `trainers/x` or `accounts/<a>/rlorTrainerJobs/x`.
        field: What to call it in an error.

    Raises:
        InvalidArgument: Not such a text.
    """
    return _last(job, field, ("trainers", "rlorTrainerJobs"), "a trainer's id")


def deployment_id_of(deployment: str, field: str = "deployment_id") -> str:
    """A deployment's id, from its id or any of its names.

    Args:
        deployment: `x`, `deployments/x`, `accounts/<a>/deployments/x`, or one of these behind
            `<model>#`.
        field: What to call it in an error.

    Raises:
        InvalidArgument: Not such a text.
    """
    text = deployment.rpartition("#")[2] if isinstance(deployment, str) else deployment
    return _last(text, field, ("deployments",), "a deployment's id")


def _last(text: Any, field: str, collections: tuple[str, ...], what: str) -> str:
    above, _, last = text.rpartition("/") if isinstance(text, str) else ("", "", "")
    if not last or (above and above.rpartition("/")[2] not in collections):
        raise InvalidArgument(f"{field}: {text!r} is not {what}", field=field)
    return str(last)


def job_name_of(trainer_id: str) -> str:
    """`accounts/local/rlorTrainerJobs/<id>`, a trainer's documented name."""
    return f"accounts/{ACCOUNT}/rlorTrainerJobs/{trainer_id}"


def checkpoint_name_of(name: str, field: str = "name") -> tuple[str, str]:
    """Trainer and id in `accounts/<a>/rlorTrainerJobs/<job>/checkpoints/<id>`.

    Args:
        name: As in a row of `list_checkpoints`.
        field: What to call it in an error.

    Raises:
        InvalidArgument: Not such a text.
    """
    parts = name.split("/") if isinstance(name, str) else []
    if parts[::2] != ["accounts", "rlorTrainerJobs", "checkpoints"] or not all(parts[1::2]):
        raise InvalidArgument(
            f"{field}: {name!r} is no checkpoint; give the `name` of a list_checkpoints row, "
            "accounts/<a>/rlorTrainerJobs/<job>/checkpoints/<id>",
            field=field,
        )
    return parts[3], parts[5]


def rfc3339(timestamp: Any) -> str:
    """A protobuf Timestamp in UTC, to the microsecond; texts sort as times do."""
    moment: datetime.datetime = timestamp.ToDatetime(tzinfo=datetime.UTC)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


async def pauses(poll_interval_s: float, timeout_s: float) -> AsyncIterator[float]:
    """Seconds that are left, each time it is worth looking again; ends when there are none.

    The first looks come fast: most things here take less than a polling interval.
    """
    clock = asyncio.get_running_loop().time
    deadline, pause_s = clock() + timeout_s, _FIRST_PAUSE_S
    yield timeout_s
    while (left_s := deadline - clock()) > 0:
        await asyncio.sleep(min(pause_s, max(poll_interval_s, 0.01), left_s))
        pause_s = min(_LONGEST_PAUSE_S, pause_s * 1.5)
        yield max(0.0, deadline - clock())
