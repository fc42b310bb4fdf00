"""Documented settings that a daemon on one machine has no use for.

Knows: their names and defaults. Must not know: the settings that do something.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True)
class AcceptedSettings:
    """Settings of the managed service that are kept and shown, and change nothing here.

    They are fields so that a loop written for the managed service finds them in the
    configuration as it passed them.
    """

    accelerator_type: str | None = None
    """Deprecated upstream too: a DeprecationWarning."""
    accelerator_count: int | None = None
    """As `accelerator_type`."""
    node_count: int | None = None
    """As `accelerator_type`."""
    region: str | None = None
    gradient_accumulation_steps: int | None = 1
    """Gradients accumulate until `optim_step`, over as many calls as are made."""
    custom_image_tag: str | None = None
    extra_args: Any = None
    extra_values: Any = None
    deployment_extra_args: Any = None
    deployment_extra_values: Any = None
    trainer_pending_timeout_s: float = 172800.0
    reattach_settle_timeout_s: float = 600.0
    reattach_poll_interval_s: float = 5.0
    display_name: str | None = None
    purpose: str | None = None
    preemptible: bool = False
    managed_by: str | None = None
    skip_validations: bool = False
    disable_speculative_decoding: bool = False
    use_reservation: bool = True
    reservation_target: str | None = None
    wait_for_trainer_before_deployment: bool = False
    """Trainer and deployment are always made at the same time."""
    weight_sync_transport: str | None = None
    """Weights move through files of the daemon."""
