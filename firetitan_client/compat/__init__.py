"""Code written for the managed service runs here, with one line added before its imports.

    from firetitan_client import compat; compat.install()

    from fireworks.training.sdk import FiretitanServiceClient   # this machine's
    import tinker

Knows: what is installed, what was put in place. Must not know: how a client works.
Importing this package changes nothing and imports no tinker.
"""

from __future__ import annotations

import logging

from firetitan_client.compat import modules, tinker_types
from firetitan_client.compat.tinker_service import (
    install_tinker_service_client,
    patched_tinker_service_client,
    restore_tinker_service_client,
)
from firetitan_client.types import has_tinker

logger = logging.getLogger("firetitan")

__all__ = [
    "install",
    "install_tinker_service_client",
    "patched_tinker_service_client",
    "restore_tinker_service_client",
    "uninstall",
]


def install(*, force: bool = False) -> bool:
    """Let `fireworks.training.sdk` mean firetitan, and complete tinker's types.

    A cloud's `base_url` then means the local daemon; nothing is ever dialled. A second call changes
    nothing.

    Args:
        force: Stand in for `fireworks.training` even where a real `fireworks` is installed.
            Modules that were imported before keep what they have.

    Returns:
        Whether `fireworks.training.sdk` is firetitan's. False: a real `fireworks` is installed and
        stays what it is; the log says so.
    """
    if has_tinker():
        tinker_types.apply()
    if modules.put_in_place(force=force):
        return True
    logger.warning(
        "compat.install(): a real fireworks package is installed and stays; with it training runs "
        "in the cloud. Pass force=True to let firetitan stand in, or import firetitan_client"
    )
    return False


def uninstall() -> None:
    """Take everything back that `install` did."""
    modules.take_away()
    if has_tinker():
        tinker_types.revert()
