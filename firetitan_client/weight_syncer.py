"""WeightSyncer: save the policy's weights and serve them, in one call.

Knows: a training client, a deployment manager. Must not know: which snapshot builds on which; that
chain is the daemon's, the fields here only mirror what was seen of it.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from firetitan_client.constants import DEFAULT_DELTA_COMPRESSION
from firetitan_client.control_client import deployment_id_of
from firetitan_client.deployment_sampler import DeploymentSampler
from firetitan_client.errors import FailedPrecondition, FiretitanError
from firetitan_client.futures import completed
from firetitan_client.sample_requests import target_on
from firetitan_client.sampling import FiretitanSamplingClient

if TYPE_CHECKING:
    from firetitan_client.deployment_manager import DeploymentManager
    from firetitan_client.training import FiretitanTrainingClient

logger = logging.getLogger("firetitan")

_COMPRESSIONS = ("arc_v1", "xor_one_to_one_zlib", "arc_v2", "xor_one_to_one_zstd")
_WARMUP_PAUSE_S = 10.0


@dataclass
class WeightSyncer:
    """Saves snapshots of one training client and brings them to one deployment."""

    policy_client: FiretitanTrainingClient
    """Whose weights."""
    deploy_mgr: DeploymentManager | None = None
    """None: only saving works."""
    deployment_id: str | None = None
    base_model: str = ""
    """Compared with the deployment's; empty: not compared."""
    hotload_timeout: float = 600
    """Seconds."""
    first_checkpoint_type: str = "base"
    """"base": the daemon decides, which is a base where there is none yet. "delta" is passed on."""
    compression_format: str = DEFAULT_DELTA_COMPRESSION
    """Checked, without effect: the daemon has a format of its own."""
    reset_prompt_cache: bool = True
    """Forget every computed prompt at a hotload; what other weights computed is never used."""
    lora_rank: int = 0
    """For information: the daemon knows the session's."""
    warmup_after_hotload: bool = True
    warmup_max_retries: int = 10
    base_saved: bool = field(default=False, init=False)
    """Whether this syncer has saved; the next of a full-parameter session may be a delta."""
    base_identity: str | None = field(default=None, init=False)
    """The snapshot the deployment was last seen to serve."""
    last_timing: dict[str, float] = field(default_factory=dict, init=False)
    """Seconds of the last call: save_time_s, hotload_time_s, warmup_time_s, total_time_s."""
    _wants_base: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.compression_format not in _COMPRESSIONS:
            raise ValueError(
                f"compression_format: is {self.compression_format!r}; give one of {_COMPRESSIONS}"
            )
        if self.first_checkpoint_type not in ("base", "delta"):
            raise ValueError(
                f"first_checkpoint_type: is {self.first_checkpoint_type!r}; give 'base' or 'delta'"
            )
        if (self.deploy_mgr is None) != (self.deployment_id is None):
            raise ValueError("deploy_mgr and deployment_id: give both, or neither to save only")

    def save_and_hotload(self, name: str, checkpoint_type: str | None = None) -> str | None:
        """Save the weights and serve them.

        Args:
            name: Of the snapshot.
            checkpoint_type: "base" or "delta"; None: the daemon decides.

        Returns:
            The snapshot's identity.

        Raises:
            RuntimeError: It could not be served; says why. It is saved, and what was served before
                is served on.
        """
        started = time.monotonic()
        self._deployment()
        try:
            identity = self.save_only(name, checkpoint_type)
            assert identity is not None
            if not self.hotload(identity, checkpoint_type):
                manager, _ = self._deployment()
                raise FailedPrecondition(
                    f"Hotload failed for sampler snapshot {identity!r}: "
                    f"{manager.last_hotload_error_message}",
                    reason="SNAPSHOT_NOT_ACTIVE",
                )
        finally:
            self.last_timing["total_time_s"] = time.monotonic() - started
        return identity

    def save_only(self, name: str, checkpoint_type: str | None = None) -> str | None:
        """Save the weights.

        Args:
            name: Of the snapshot.
            checkpoint_type: "base" or "delta"; None: the daemon decides.

        Returns:
            The snapshot's identity, for `hotload`.
        """
        kind = checkpoint_type
        if kind is None and self._wants_base:
            kind = "base"
        elif kind is None and not self.base_saved and self.first_checkpoint_type != "base":
            kind = self.first_checkpoint_type
        started = time.monotonic()
        try:
            saved = self.policy_client.save_weights_for_sampler_ext(name, checkpoint_type=kind)
        finally:
            self.last_timing["save_time_s"] = time.monotonic() - started
        self.base_saved = True
        self._wants_base = False
        return saved.snapshot_name

    def hotload(self, snapshot_name: str, checkpoint_type: str | None = None) -> bool:
        """Serve a saved snapshot.

        Args:
            snapshot_name: Its identity.
            checkpoint_type: Ignored: the daemon knows what it saved.

        Returns:
            Whether it is served; `deploy_mgr.last_hotload_error_message` says why not.
        """
        manager, deployment_id = self._deployment()
        started = time.monotonic()
        try:
            loaded = manager.hotload_and_wait(
                deployment_id,
                self.base_model,
                snapshot_name,
                reset_prompt_cache=self.reset_prompt_cache,
                timeout_seconds=self.hotload_timeout,
            )
        finally:
            self.last_timing["hotload_time_s"] = time.monotonic() - started
        if loaded:
            self.base_identity = snapshot_name
            self._warm_up(manager, deployment_id)
        return loaded

    def reset_delta_chain(self) -> None:
        """Make the next save a base, for whoever will not trust what is loaded."""
        self.base_saved, self.base_identity, self._wants_base = False, None, True

    def wait_for_hotload_ready(self, timeout_s: float = 600, poll_interval_s: float = 5) -> None:
        """Wait until the deployment takes snapshots.

        Raises:
            TimeoutError: Not in time.
        """
        manager, deployment_id = self._deployment()
        manager.wait_for_ready(deployment_id, timeout_s, poll_interval_s)

    def check_deployment_state(self) -> str | None:
        """What the deployment serves now; None: the base model, or nothing.

        Whoever brought it there: the daemon finds the way from it to the next snapshot.
        """
        manager, deployment_id = self._deployment()
        replicas = manager.hotload_check_status(deployment_id, self.base_model)["replicas"]
        current = replicas[0]["current_snapshot_identity"] if replicas else ""
        self.base_identity = current or None
        return self.base_identity

    def get_deployment_sampler(self, tokenizer: Any = None) -> DeploymentSampler:
        """FireTitan's own sampler of the deployment."""
        manager, deployment_id = self._deployment()
        target = target_on(manager._transport, deployment_id, tokenizer)
        return DeploymentSampler(tokenizer=tokenizer, ready=completed(target))

    def get_sampling_client(self, tokenizer: Any = None) -> FiretitanSamplingClient:
        """A tinker-shaped client of the deployment."""
        manager, deployment_id = self._deployment()
        target = target_on(manager._transport, deployment_id, tokenizer)
        return FiretitanSamplingClient(
            completed(target), tokenizer=tokenizer, label=target.deployment
        )

    def _deployment(self) -> tuple[DeploymentManager, str]:
        if self.deploy_mgr is None or self.deployment_id is None:
            raise RuntimeError("this WeightSyncer only saves; give it deploy_mgr and deployment_id")
        return self.deploy_mgr, deployment_id_of(self.deployment_id)

    def _warm_up(self, manager: DeploymentManager, deployment_id: str) -> None:
        if not self.warmup_after_hotload:
            return
        started = time.monotonic()
        try:
            manager.warmup(deployment_id, self.warmup_max_retries, _WARMUP_PAUSE_S)
        except FiretitanError as error:
            logger.warning("warmup of %s after a hotload: %s", deployment_id, error)
        self.last_timing["warmup_time_s"] = time.monotonic() - started
