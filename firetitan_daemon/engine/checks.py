"""What every engine refuses alike.

Knows: the engine seam. Must not know: any engine.
"""

from __future__ import annotations

from firetitan_daemon.core.errors import FiretitanError, Reason
from firetitan_daemon.engine.api import SessionSpec


def check_base_only(spec: SessionSpec, retain_graph: bool) -> None:
    """Refuse to leave out full-parameter training, or to keep the base model's graph.

    Raises:
        FiretitanError: INVALID_ARGUMENT.
    """
    if spec.trains_all:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            "base_only: this session trains every parameter, so there is no adapter to leave out; "
            "create_reference_client() runs the base model in a trainer of its own",
            field="base_only",
        )
    if retain_graph:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            "retain_graph: nothing of the base model is trained; leave it out with base_only",
            field="retain_graph",
        )


def check_adapted(spec: SessionSpec) -> None:
    """Refuse an adapter in a session that trains none.

    Raises:
        FiretitanError: INVALID_ARGUMENT.
    """
    if spec.lora is None:
        raise FiretitanError(
            Reason.INVALID_ARGUMENT,
            "load_adapter: this session trains every parameter (lora_rank=0) and has no adapter; "
            "create a trainer with the adapter's lora_rank",
            field="lora_rank",
        )
