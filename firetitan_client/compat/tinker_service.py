"""`tinker.ServiceClient` as firetitan's: for code that makes its service client itself.

Knows: the arguments of tinker's service client from 0.23 to 0.38. Must not know: how the service
works.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any


def install_tinker_service_client(**managed_config_kwargs: Any) -> Any:
    """Let `tinker.ServiceClient(...)` make managed services of firetitan.

    Args:
        managed_config_kwargs: Fields of `FiretitanProvisioningConfig` every one of them has.

    Returns:
        What `tinker.ServiceClient` was, for `restore_tinker_service_client`.

    Raises:
        TypeError: An unknown setting with a value.
        ValueError: A setting out of range.
    """
    import tinker

    from firetitan_client import address as addresses
    from firetitan_client.credentials import access_of
    from firetitan_client.managed import build_config
    from firetitan_client.service import FiretitanServiceClient

    build_config(None, dict(managed_config_kwargs))

    class ServiceClient(FiretitanServiceClient):
        """A managed service, made with tinker's arguments.

        Args:
            user_metadata: Your own notes, kept with the session.
            project_id: Ignored.
            display_name: Ignored.
            base_url: None or a cloud URL: the local daemon.
            api_key: The daemon's token, over TCP; ignored on a Unix socket.
            default_headers: Ignored.
            default_headers_overrides: Ignored.
        """

        def __init__(
            self,
            user_metadata: Mapping[str, str] | None = None,
            project_id: str | None = None,
            *,
            display_name: str | None = None,
            base_url: str | None = None,
            api_key: str | None = None,
            default_headers: Mapping[str, str] | None = None,
            default_headers_overrides: Mapping[str, str] | None = None,
        ) -> None:
            endpoint = addresses.resolve(base_url)
            config = build_config(None, dict(managed_config_kwargs))
            config.trainer_job_id = config.trainer_job_id or endpoint.trainer_id
            access = access_of(api_key)
            self._setup(endpoint, config, user_metadata, None, access, managed=True)

    original = tinker.ServiceClient
    tinker.ServiceClient = ServiceClient
    return original


def restore_tinker_service_client(original: Any) -> None:
    """Put back what `install_tinker_service_client` returned."""
    import tinker

    tinker.ServiceClient = original


@contextlib.contextmanager
def patched_tinker_service_client(**managed_config_kwargs: Any) -> Iterator[None]:
    """`install_tinker_service_client` for the length of a `with` block."""
    original = install_tinker_service_client(**managed_config_kwargs)
    try:
        yield
    finally:
        restore_tinker_service_client(original)
